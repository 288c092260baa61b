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
def delay_forward(x: Tensor, kernels: Tensor) -> Tensor:
    """Every channel with its own kernel; "same" over frequency (zeros), causal over time.

    Args:
        x: [G, B, T, N, C] (groups, batch, time, positions, channels).
        kernels: [G, k, K, C], k along frequency, K along time, of the dtype that sums are kept in.

    Returns:
        y of x's shape and dtype, contiguous.
    """
    return forward_convolution(x, kernels)


def forward_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """`delay_forward` by PyTorch's convolution, on any device."""
    padded, weights = _padded(x.to(kernels.dtype), kernels), _weights(kernels)
    y = F.conv2d(padded, weights, groups=len(weights))
    return _unfold_channels(y, len(x)).to(x.dtype)


@torch.library.custom_op("lanewise::delay_backward", mutates_args=())
def delay_backward(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x (in its dtype) and to kernels (in theirs) from the one with respect to y."""
    return backward_convolution(grad, x, kernels)


def backward_convolution(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
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
    return dx, narrow.reshape(groups, channels, taps, size).permute(0, 3, 2, 1).contiguous()


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
def _(x: Tensor, kernels: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@delay_backward.register_fake
def _(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape)


@delay_forward.register_kernel("cuda")
def _(x: Tensor, kernels: Tensor) -> Tensor:
    kernel = gpu_kernel("delay_kernel")
    return forward_convolution(x, kernels) if kernel is None else kernel.forward(x, kernels)


@delay_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    kernel = gpu_kernel("delay_kernel")
    return backward_convolution(grad, x, kernels) if kernel is None else kernel.backward(grad, x, kernels)


takes_lanes(delay_forward)
takes_lanes(delay_backward)


class _Delay(torch.autograd.Function):
    """The operators above as one differentiable function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernels: Tensor) -> Tensor:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return delay_forward(x.detach(), kernels.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, kernels = ctx.saved_tensors
        return delay_backward(grad.detach(), x.detach(), kernels.detach())


@in_graph
def _delay(x: Tensor, kernels: Tensor) -> Tensor:
    return _Delay.apply(x, kernels)


def walked_delay(x: Tensor, kernels: Tensor) -> Tensor:
    """`delays.frequency_delay` by the operators of this module: x [B, T, N, C], kernels [C, k, K] -> [B, T, N, C]."""
    return _delay(x.unsqueeze(0), kernels.permute(1, 2, 0).unsqueeze(0)).squeeze(0)
