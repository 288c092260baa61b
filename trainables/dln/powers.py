"""The powers of constant decays as operators: Re z^n at every step of a sequence, and their gradient.

`lanewise::powers_forward` and `lanewise::powers_backward` work on all lanes at once, on a GPU by Triton kernels
(`.powers_kernel`) that multiply from step to step, elsewhere by the formulas (which the tests hold against autograd).
Exponential, cosine and sine of every element, which torch.compile makes of the formulas, take a GPU five times as long
as writing the results.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.dln.recurrence import Pair, later_steps, power
from trainables.operators import in_graph, takes_lanes, triton_for


@torch.library.custom_op("lanewise::powers_forward", mutates_args=())
def powers_forward(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    """What the input of each step is multiplied by at the end, Re (size exp(i theta))^(steps - 1 - step).

    Args:
        log_size, theta: [G, D] (groups, channels).
        steps: of the sequence, L.
        width: of a row of the result, at least D; zeros beyond D.
        low: the result's dtype; arithmetic is in that of the arguments.

    Returns [G, L, width].
    """
    return forward_formula(log_size, theta, steps, width, low)


def forward_formula(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    """`powers_forward` on any device."""
    real, _ = _powers(log_size, theta, later_steps(steps, log_size))
    return F.pad(real, (0, width - real.shape[-1])).to(low)


@torch.library.custom_op("lanewise::powers_backward", mutates_args=())
def powers_backward(grad: Tensor, log_size: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to log_size and theta [G, D] from that with respect to the powers, [G, L, width].

    With n later steps, d Re z^n / d log_size = n Re z^n and d Re z^n / d theta = -n Im z^n.
    """
    return backward_formula(grad, log_size, theta)


def backward_formula(grad: Tensor, log_size: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """`powers_backward` on any device."""
    later = later_steps(grad.shape[1], log_size)
    real, imag = _powers(log_size, theta, later)
    weighted = grad[..., : log_size.shape[1]].to(log_size.dtype) * later
    return (weighted * real).sum(1), -(weighted * imag).sum(1)


def _powers(log_size: Tensor, theta: Tensor, later: Tensor) -> Pair:
    return power(log_size[:, None], theta[:, None], later)


@powers_forward.register_fake
def _(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    return log_size.new_empty((len(log_size), steps, width), dtype=low)


@powers_backward.register_fake
def _(grad: Tensor, log_size: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return log_size.new_empty(log_size.shape), theta.new_empty(theta.shape)


@powers_forward.register_kernel("cuda")
def _(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    return gpu_kernel().forward(log_size, theta, steps, width, low)


@powers_backward.register_kernel("cuda")
def _(grad: Tensor, log_size: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return gpu_kernel().backward(grad, log_size, theta)


def gpu_kernel() -> ModuleType:
    """The module of GPU kernels. Raises `BadValue` without Triton."""
    with triton_for("a recurrence of constant decays on a GPU needs", "train on a CPU"):
        from trainables.dln import powers_kernel
    return powers_kernel


takes_lanes(powers_forward)
takes_lanes(powers_backward)


class _Powers(torch.autograd.Function):
    """The operators above as one differentiable function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return powers_forward(log_size.detach(), theta.detach(), steps, width, low)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        log_size, theta = (tensor.detach() for tensor in ctx.saved_tensors)
        return *powers_backward(grad.detach(), log_size, theta), None, None, None


@in_graph
def _powers_of_lanes(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    return _Powers.apply(log_size, theta, steps, width, low)


def last_real_constant(log_size: Tensor, theta: Tensor, inputs: Tensor, low: torch.dtype) -> Tensor:
    """`recurrence.last_real_constant` of one lane by the operators, multiplied in the dtype `low`.

    Args:
        log_size, theta: [D]. inputs: [..., L].

    Returns [..., D].
    """
    channels = len(log_size)
    width = channels + -channels % 8  # tensor cores want rows of 8 values
    powers = _powers_of_lanes(log_size.unsqueeze(0), theta.unsqueeze(0), inputs.shape[-1], width, low).squeeze(0)
    return (inputs.to(low) @ powers)[..., :channels]
