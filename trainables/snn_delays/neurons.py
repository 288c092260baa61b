"""Leaky integrate-and-fire neurons over a whole time axis, with the ATan surrogate gradient, and a readout membrane.

The neuron is spikingjelly's `LIFNode(decay_input=False, v_threshold=1, v_reset=0, detach_reset=True)`
(github.com/fangwei123456/spikingjelly, activation_based/neuron): with keep = 1 - 1/tau,

    h[t] = keep * v[t-1] + x[t]        membrane before the spike
    s[t] = 1 if h[t] >= 1 else 0       spike
    v[t] = h[t] * (1 - s[t])           hard reset to zero; no gradient through this s

and backward ds/dh = (alpha/2) / (1 + (pi/2 * alpha * (h - 1))^2), `surrogate.ATan(alpha)`.

Only this recurrence runs along time, so it is two operators of its own, `lanewise::lif_forward` and
`lanewise::lif_backward`, over all lanes at once: opaque to torch.compile (which would otherwise unroll every time
step). On a CPU they are loops over time; on a GPU each is one Triton kernel (`.lif_kernel`). The environment variable
LANEWISE_SNN_KERNELS=off takes the loops there too, and convolutions for `.delay_ops`; nothing else does.

Batch normalisation's scale and shift are applied on the way in: what is read and kept for the gradient is then the
product before it, in bf16 where the program computes in bf16.
"""

from __future__ import annotations

import math
import os
from types import ModuleType

import torch
from torch import Tensor

from trainables.family import BadValue
from trainables.operators import in_graph, takes_lanes, triton_for

# --- the two operators: [groups, rows, time, places], one decay and one alpha a group ---------------------------------


@torch.library.custom_op("lanewise::lif_forward", mutates_args=())
def lif_forward(x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes, and how far the membrane stands above its threshold.

    Args:
        x: [G, R, T, P]; the input current is scale * x + shift, of the channel p % C.
        scale, shift: [G, C], C a divisor of P; arithmetic is done in their dtype, whatever x's.
        keep: share of the membrane that survives one step, 1 - 1/tau, [G].

    Returns:
        spikes: zeros and ones, [G, R, T, P], contiguous, of x's dtype.
        over: h - 1, likewise. A spike stands where it is not negative: the difference keeps that, and what the gradient
            needs of a membrane near its threshold, when it is rounded to bf16.
    """
    return forward_loop(x, scale, shift, keep)


def forward_loop(x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """`lif_forward` step by step, on any device. A step's numbers stay in a processor's cache from one line to the
    next; whole tensors, of all steps, would go to memory and back for each."""
    wide = x.unflatten(-1, (-1, scale.shape[1]))
    scale, shift = scale[:, None, None], shift[:, None, None]
    factor, v = keep.reshape(-1, 1, 1), scale.new_zeros(())
    spikes, over = x.new_empty(x.shape), x.new_empty(x.shape)
    for t in range(x.shape[2]):
        h = torch.addcmul((scale * wide[:, :, t] + shift).flatten(-2), factor, v)
        v = torch.where(h >= 1, 0.0, h)
        over[:, :, t] = h - 1
        spikes[:, :, t] = over[:, :, t] >= 0
    return spikes, over


@lif_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("lanewise::lif_backward", mutates_args=())
def lif_backward(
    grad: Tensor, over: Tensor, x: Tensor, scale: Tensor, keep: Tensor, alpha: Tensor, learn_keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x [G, R, T, P], scale and shift [G, C] and, with `learn_keep`, keep [G] (else [G, 0])
    from that with respect to the spikes. `grad`, `over` and x [G, R, T, P] are of one dtype; arithmetic is in that of
    `keep`.

    The gradient of the input current is g[t] = grad[t] * ds/dh[t] + keep * (1 - s[t]) * g[t+1]; then dx = scale * g,
    dscale = sum g x, dshift = sum g, and dkeep = sum g[t] v[t-1].
    """
    return backward_loop(grad, over, x, scale, keep, alpha, learn_keep)


def backward_loop(
    grad: Tensor, over: Tensor, x: Tensor, scale: Tensor, keep: Tensor, alpha: Tensor, learn_keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lif_backward` step by step, on any device."""
    a, keep, to_x = alpha.reshape(-1, 1, 1), keep.reshape(-1, 1, 1), over.new_empty(over.shape)
    factor = scale.repeat(1, x.shape[3] // scale.shape[1]).unsqueeze(1)
    after = keep.new_zeros(())
    timed, plain, kept = (keep.new_zeros(over[:, :, 0].shape) for _ in range(3))
    for t in reversed(range(over.shape[2])):
        spiked, now = over[:, :, t] >= 0, over[:, :, t].to(keep.dtype)
        if learn_keep:
            kept += after * torch.where(spiked, 0.0, now + 1)
        direct = grad[:, :, t] * (a / 2) / (1 + (math.pi / 2 * a * now) ** 2)
        after = direct.addcmul_(torch.where(spiked, 0.0, keep), after)
        timed.addcmul_(after, x[:, :, t].to(keep.dtype))
        plain += after
        to_x[:, :, t] = after * factor
    by_channel = (sums.unflatten(-1, (-1, scale.shape[1])).sum((1, 2)) for sums in (timed, plain))
    return to_x, *by_channel, kept.sum((1, 2)) if learn_keep else unasked(keep)


@lif_backward.register_fake
def _(grad, over, x, scale, keep, alpha, learn_keep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_channels = (scale.new_empty(scale.shape) for _ in range(2))
    return over.new_empty(over.shape), *of_channels, torch.empty_like(keep) if learn_keep else unasked(keep)


def unasked(keep: Tensor) -> Tensor:
    """In the place of the gradient to `keep`."""
    return keep.new_empty((len(keep), 0))


@lif_forward.register_kernel("cuda")
def _(x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    kernel = gpu_kernel("lif_kernel")
    return forward_loop(x, scale, shift, keep) if kernel is None else kernel.forward(x, scale, shift, keep)


@lif_backward.register_kernel("cuda")
def _(grad, over, x, scale, keep, alpha, learn_keep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = gpu_kernel("lif_kernel")
    backward = backward_loop if kernel is None else kernel.backward
    return backward(grad, over, x, scale, keep, alpha, learn_keep)


def gpu_kernel(module: str) -> ModuleType | None:
    """This module of GPU kernels, or None where LANEWISE_SNN_KERNELS=off asks for plain PyTorch. Raises `BadValue`."""
    chosen = os.environ.get("LANEWISE_SNN_KERNELS", "on")
    if chosen == "off":
        return None
    if chosen != "on":
        raise BadValue(f"LANEWISE_SNN_KERNELS={chosen} should be on or off")
    with triton_for(
        "spiking neurons on a GPU need",
        "set LANEWISE_SNN_KERNELS=off to step through time in Python, which is many times slower",
    ):
        from trainables.snn_delays import delay_kernel, lif_kernel, mixing_kernel
    return {"lif_kernel": lif_kernel, "delay_kernel": delay_kernel, "mixing_kernel": mixing_kernel}[module]


takes_lanes(lif_forward)
takes_lanes(lif_backward)


# --- their gradient ---------------------------------------------------------------------------------------------------


class _Lif(torch.autograd.Function):
    """Spikes and `over` of the operators above, with their hand-written gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor, alpha: Tensor, learn_keep: bool
    ) -> tuple[Tensor, Tensor]:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return lif_forward(x.detach(), scale.detach(), shift.detach(), keep.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _, keep, alpha, ctx.learn_keep = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, scale, keep, alpha, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, scale, keep, alpha, over = (tensor.detach() for tensor in ctx.saved_tensors)
        to_x, to_scale, to_shift, to_keep = lif_backward(grad.detach(), over, x, scale, keep, alpha, ctx.learn_keep)
        return to_x, to_scale, to_shift, to_keep if ctx.learn_keep else None, None, None


@in_graph
def _lif(
    x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor, alpha: Tensor, learn_keep: bool
) -> tuple[Tensor, Tensor]:
    # traced through, the comparison would be differentiated in the place of the hand-written gradient, without a word
    return _Lif.apply(x, scale, shift, keep, alpha, learn_keep)


def lif(
    x: Tensor,
    keep: Tensor,
    alpha: Tensor,
    affine: tuple[Tensor, Tensor] | None = None,
    *,
    learn_keep: bool = False,
) -> Tensor:
    """Spikes of a layer of LIF neurons at rest before the first step.

    Args:
        x: [B, T, N, C] (batch, time, positions, channels).
        keep: 1 - 1/tau, 0-d; tau in time steps.
        alpha: steepness of the ATan surrogate, 0-d.
        affine: scale and shift, each [C]: the input current is scale * x + shift, worked out in their dtype. x itself
            without them.
        learn_keep: give `keep` a gradient (parametric LIF).

    Returns:
        Spikes, zeros and ones in x's dtype, [B, T, N, C].
    """
    if affine is None:
        one = torch.ones(x.shape[-1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        affine = one, torch.zeros_like(one)
    numbers = [*affine, keep.to(affine[0].dtype).reshape(1), alpha.to(affine[0].dtype).reshape(1)]
    spikes, _ = _lif(x.flatten(2).unsqueeze(0), *(n.reshape(1, -1) for n in numbers[:2]), *numbers[2:], learn_keep)
    return spikes.reshape(x.shape)


def membrane(x: Tensor, keep: Tensor) -> Tensor:
    """Membrane of neurons that never spike (the readout; spikingjelly's LIFNode with threshold 1e9), [B, C, T].

    v[t] = sum over t' <= t of keep^(t - t') x[t']: one product with a lower triangular matrix.
    """
    steps = torch.arange(x.shape[-1], device=x.device)
    age = steps.unsqueeze(0) - steps.unsqueeze(1)  # [t', t]
    decay = torch.where(age >= 0, keep ** age.clamp(min=0).to(keep.dtype), 0.0)
    return x @ decay.to(x.dtype)


def keep_of_tau(tau_ms: Tensor, dt_ms: float) -> Tensor:
    """1 - 1/tau with tau = tau_ms / dt_ms time steps."""
    return 1 - dt_ms / tau_ms


def keep_of_weight(weight: Tensor) -> Tensor:
    """Parametric LIF (Fang et al. 2021): 1/tau = sigmoid(weight)."""
    return 1 - torch.sigmoid(weight)


def weight_of_tau(tau_ms: Tensor, dt_ms: float) -> Tensor:
    """The parametric LIF's weight at which tau = tau_ms: -log(tau - 1), tau in steps and above 1."""
    return -torch.log(tau_ms / dt_ms - 1)
