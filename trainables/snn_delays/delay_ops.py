"""The depthwise convolution over frequency and time as two operators of its own, over all lanes at once.

`lanewise::delay_forward` and `lanewise::delay_backward` are opaque to torch.compile and take lanes as one more axis,
where a convolution under torch.func.vmap becomes one of lanes x channels groups, with copies before and after it. On a
GPU they are Triton kernels (`.delay_kernel`); elsewhere the convolution they stand for. `delays.frequency_delay`
chooses between them and the plain convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.operators import in_graph, takes_lanes
from trainables.snn_delays.neurons import gpu_kernel

LONGEST = 150
"""Taps k * K of a kernel that a thread can hold in its registers."""


@torch.library.custom_op("lanewise::delay_forward", mutates_args=())
def delay_forward(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Every channel with its own kernel; "same" over frequency (zeros), causal over time.

    Args:
        x: [G, B, T, N, C] (groups, batch, time, positions, channels).
        kernels: [G, k, K, C], k along frequency, K along time, of the dtype that sums are kept in.
        bias: what is added to every sample, of that dtype: [G, K, N, C], of the first K - 1 steps and of all after
            them; or [G, 0, N, C] for nothing.

    Returns:
        y of x's shape and dtype, contiguous.
    """
    return forward_convolution(x, kernels, bias)


def forward_convolution(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """`delay_forward` by PyTorch's convolution, on any device."""
    padded, weights = _padded(x.to(kernels.dtype), kernels), _weights(kernels)
    y = _unfold_channels(F.conv2d(padded, weights, groups=len(weights)), len(x))
    if bias.numel():
        row = torch.arange(x.shape[2], device=x.device).clamp(max=bias.shape[1] - 1)
        y = y + bias[:, row].unsqueeze(1)
    return y.to(x.dtype)


@torch.library.custom_op("lanewise::delay_backward", mutates_args=())
def delay_backward(grad: Tensor, x: Tensor, kernels: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x (in its dtype), to kernels and, `biased`, to bias (else [G, 0, N, C]; in kernels'
    dtype) from the one with respect to y."""
    return backward_convolution(grad, x, kernels, biased)


def backward_convolution(grad: Tensor, x: Tensor, kernels: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`delay_backward` by PyTorch's convolution, on any device."""
    padded, weights = _padded(x.to(kernels.dtype), kernels), _weights(kernels)
    wide, narrow, _ = torch.ops.aten.convolution_backward(
        _fold_channels(grad.to(kernels.dtype)),
        padded,
        weights,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        len(weights),
        [True, True, False],
    )
    groups, size, taps, channels = kernels.shape
    left = size // 2
    dx = _unfold_channels(wide[:, :, taps - 1 :, left : left + x.shape[3]], groups).to(x.dtype)
    to_kernels = narrow.reshape(groups, channels, taps, size).permute(0, 3, 2, 1).contiguous()
    return dx, to_kernels, bias_gradient(grad, kernels) if biased else no_bias(x, kernels)


def bias_gradient(grad: Tensor, kernels: Tensor) -> Tensor:
    """Gradient with respect to bias, [G, K, N, C]: sums over samples, the last row's over the steps that share it."""
    rows, by_step = kernels.shape[2], grad.sum(1, dtype=kernels.dtype)
    own, shared = by_step[:, : rows - 1], by_step[:, rows - 1 :].sum(1, keepdim=True)
    beyond = own.new_zeros((len(own), rows - 1 - own.shape[1], *own.shape[2:]))
    return torch.cat([own, beyond, shared], 1)


def no_bias(x: Tensor, kernels: Tensor) -> Tensor:
    """What stands for a bias, or its gradient, where there is none: [G, 0, N, C]."""
    return kernels.new_empty((len(x), 0, *x.shape[3:]))


def _fold_channels(x: Tensor) -> Tensor:
    """[G, B, T, N, C] -> [B, G * C, T, N]."""
    return x.permute(1, 0, 4, 2, 3).flatten(1, 2)


def _unfold_channels(x: Tensor, groups: int) -> Tensor:
    """[B, G * C, T, N] -> [G, B, T, N, C], contiguous."""
    return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).contiguous()


def _padded(x: Tensor, kernels: Tensor) -> Tensor:
    size, taps = kernels.shape[1:3]
    return F.pad(_fold_channels(x), (size // 2, size - 1 - size // 2, taps - 1, 0))


def _weights(kernels: Tensor) -> Tensor:
    """[G, k, K, C] -> [G * C, 1, K, k]."""
    return kernels.permute(0, 3, 2, 1).flatten(0, 1).unsqueeze(1)


@delay_forward.register_fake
def _(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@delay_backward.register_fake
def _(grad: Tensor, x: Tensor, kernels: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    to_bias = kernels.new_empty((len(x), kernels.shape[2] if biased else 0, *x.shape[3:]))
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape), to_bias


@delay_forward.register_kernel("cuda")
def _(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    kernel = gpu_kernel("delay_kernel")
    return (forward_convolution if kernel is None else kernel.forward)(x, kernels, bias)


@delay_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, kernels: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    kernel = gpu_kernel("delay_kernel")
    return (backward_convolution if kernel is None else kernel.backward)(grad, x, kernels, biased)


takes_lanes(delay_forward)
takes_lanes(delay_backward)


class _Delay(torch.autograd.Function):
    """The operators above as one differentiable function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return delay_forward(x.detach(), kernels.detach(), bias.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, kernels, bias = inputs
        ctx.biased = bias.numel() > 0
        ctx.save_for_backward(x, kernels)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, kernels = ctx.saved_tensors
        return delay_backward(grad.detach(), x.detach(), kernels.detach(), ctx.biased)


@in_graph
def _delay(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    return _Delay.apply(x, kernels, bias)


def walked_delay(x: Tensor, kernels: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`delays.frequency_delay` by the operators of this module.

    A scale multiplies the kernels instead, and what a shift adds is a bias: all that the taps weigh which read no
    zeros, neither before the first step nor beside the outermost positions.
    """
    taps = kernels.permute(1, 2, 0)  # [k, K, C]
    if affine is None:
        bias = taps.new_empty((0, *x.shape[2:]))
    else:
        scale, shift = affine
        bias = shift * _weight_read(taps, x.shape[2])
        taps = taps * scale
    return _delay(*(tensor.unsqueeze(0) for tensor in (x, taps, bias))).squeeze(0)


def _weight_read(taps: Tensor, positions: int) -> Tensor:
    """Sum of the taps [k, K, C] that stand on values at step min(t, K - 1) and position n, [K, N, C]."""
    size, lags = taps.shape[:2]
    lag, n = torch.arange(lags, device=taps.device), torch.arange(positions, device=taps.device)
    row = torch.arange(size, device=taps.device)[:, None]
    begun = lag[:, None] >= lag  # [K, K]: at step t the values of lags 0 .. t
    stands = (n + row >= size // 2) & (n + row < size // 2 + positions)  # [k, N]
    reached = torch.where(begun[:, :, None], taps.flip(1)[:, None], 0.0).sum(2)  # [k, K, C]
    return torch.where(stands[:, None, :, None], reached[:, :, None], 0.0).sum(0)
