"""A product over channels and the sums that BatchNorm takes of it, as operators over all lanes at once.

    y = x W^T,  first = sum (y - centre),  second = sum (y - centre)^2        over the rows that count

`lanewise::mix_forward` and `lanewise::mix_backward` read and write each activation once: torch.compile makes a pass of
its own of the sums, and of their gradient, besides the products. On a GPU they are Triton kernels (`.mixing_kernel`),
elsewhere the formulas (which the tests hold against autograd).

Rounding is that of autocast: y is rounded to x's dtype, and the sums, taken of the rounded values, are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trainables.operators import in_graph, takes_lanes
from trainables.snn_delays.neurons import gpu_kernel

MOST_CHANNELS = 128
"""On either side of the product: its gradient stays on the chip."""


def fits(outputs: int, inputs: int) -> bool:
    """Whether the kernels do a product of so many channels."""
    return max(inputs, outputs) <= MOST_CHANNELS


@torch.library.custom_op("lanewise::mix_forward", mutates_args=())
def mix_forward(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The product and its sums.

    Args:
        x: [G, B, T, N, C] (groups, batch, time, positions, channels).
        weight: [G, D, C], rounded to x's dtype where it is multiplied.
        centre: about which the sums are taken, [G, D], of weight's dtype.
        counted: 1 for the frames that enter the sums, else 0, [G, B, T], of weight's dtype.

    Returns:
        y [G, B, T, N, D] of x's dtype, and `first` and `second` [G, 2, D] of weight's.
    """
    return forward_formula(x, weight, centre, counted)


def forward_formula(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """`mix_forward` on any device."""
    y = torch.einsum("gbtnc,gdc->gbtnd", x, weight.to(x.dtype))
    return y, sums_formula(y, centre, counted)


def sums_formula(y: Tensor, centre: Tensor, counted: Tensor) -> Tensor:
    """`first` and `second` [G, 2, D]."""
    away = _away(y, centre) * counted[..., None, None]
    return torch.stack([away.sum((1, 2, 3)), away.square().sum((1, 2, 3))], 1)


@torch.library.custom_op("lanewise::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor, to_sums: Tensor, x: Tensor, y: Tensor, weight: Tensor, centre: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x (in its dtype) and to weight (in its own) from those with respect to y and the sums.

    With a row's slope = grad + counted * (to_first + 2 to_second (y - centre)), rounded to x's dtype:
    dx = slope W and dweight = sum slope^T x.
    """
    return backward_formula(grad, to_sums, x, y, weight, centre, counted)


def backward_formula(
    grad: Tensor, to_sums: Tensor, x: Tensor, y: Tensor, weight: Tensor, centre: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """`mix_backward` on any device."""
    to_first, to_second = (part[:, None, None, None] for part in to_sums.unbind(1))
    slope = grad + counted[..., None, None] * (to_first + 2 * to_second * _away(y, centre))
    slope = slope.to(x.dtype)
    dx = torch.einsum("gbtnd,gdc->gbtnc", slope, weight.to(x.dtype))
    return dx, torch.einsum("gbtnd,gbtnc->gdc", slope.to(weight.dtype), x.to(weight.dtype))


def _away(y: Tensor, centre: Tensor) -> Tensor:
    return y.to(centre.dtype) - centre[:, None, None, None]


@mix_forward.register_fake
def _(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[1])), weight.new_empty((len(weight), 2, weight.shape[1]))


@mix_backward.register_fake
def _(grad, to_sums, x, y, weight, centre, counted) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@mix_forward.register_kernel("cuda")
def _(*args) -> tuple[Tensor, Tensor]:
    kernel = gpu_kernel("mixing_kernel")
    return forward_formula(*args) if kernel is None else kernel.forward(*args)


@mix_backward.register_kernel("cuda")
def _(*args) -> tuple[Tensor, Tensor]:
    kernel = gpu_kernel("mixing_kernel")
    return backward_formula(*args) if kernel is None else kernel.backward(*args)


takes_lanes(mix_forward)
takes_lanes(mix_backward)


@register_flop_formula(torch.ops.lanewise.mix_forward)
def _(x_shape, weight_shape, *_, **__) -> int:
    return _operations(x_shape, weight_shape)


@register_flop_formula(torch.ops.lanewise.mix_backward)
def _(grad_shape, to_sums_shape, x_shape, y_shape, weight_shape, *_, **__) -> int:
    return 2 * _operations(x_shape, weight_shape)


def _operations(x_shape, weight_shape) -> int:
    """Of one product."""
    return 2 * math.prod(x_shape) * weight_shape[1]


class _Mix(torch.autograd.Function):
    """The operators above as one differentiable function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return mix_forward(*(tensor.detach() for tensor in (x, weight, centre, counted)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, centre, counted = inputs
        ctx.save_for_backward(x, output[0], weight, centre, counted)

    @staticmethod
    def backward(ctx, grad: Tensor, to_sums: Tensor):
        saved = (tensor.detach() for tensor in ctx.saved_tensors)
        return *mix_backward(grad.detach(), to_sums.detach(), *saved), None, None


@in_graph
def _mix(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    return _Mix.apply(x, weight, centre, counted)


def mixed(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product and its sums by the operators; neither `centre` nor `counted` has a gradient.

    Args:
        x: [B, T, N, C]. weight: [D, C]. centre: [D]. counted: [B, T], zeros and ones.

    Returns:
        y [B, T, N, D] in x's dtype, `first` and `second` [D] in weight's.
    """
    y, sums = _mix(*(tensor.unsqueeze(0) for tensor in (x, weight, centre, counted)))
    return y.squeeze(0), sums[0, 0], sums[0, 1]
