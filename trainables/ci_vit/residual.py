"""What stands between the products of a wide net's block, as operators: residual with LayerNorm, bias with ReLU.

    y = x + added + bias,  h = LN(y) * scale + shift        `lanewise::residual_forward`, `lanewise::residual_backward`
    active = relu(product + bias)                           `lanewise::rectify_forward`, `lanewise::rectify_backward`

Each works on the rows of all lanes at once and is one pass over memory, sums over rows (the gradients of scale, shift
and biases) included; torch.compile makes such a sum a pass of its own. On a GPU they are Triton kernels
(`.residual_kernel`), elsewhere the formulas (which the tests hold against autograd). Narrow nets have `.mlp` instead.

Rounding is that of autocast: x, y and every sum are float32, what a product gives or reads is bf16.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from trainables.ci_vit.mlp import EPS
from trainables.operators import in_graph, takes_lanes, triton_for

MOST_WIDTH = 1024
"""Channels of a row, which a kernel holds on the chip."""


def fits(width: int) -> bool:
    """Whether the kernels do rows of `width` channels."""
    return width <= MOST_WIDTH


# --- residual and LayerNorm: rows of all lanes joined, vectors [G, D] of each -----------------------------------------


def residual_forward_formula(
    x: Tensor, added: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product is added to the residual, and the sum normalised.

    Args:
        x: the residual, rows [N, D]; the first N / G take the first lane's vectors.
        added: a product before its bias, [N, D].
        bias, scale, shift: [G, D].

    Returns:
        y [N, D] in x's dtype, h [N, D] in that of `added`, and of y's rows the mean and 1 / standard deviation, [N].
    """
    y = x + added + _of_rows(bias, x)
    mean = y.mean(-1)
    centred = y - mean.unsqueeze(-1)
    rate = (centred.square().mean(-1) + EPS).rsqrt()
    h = centred * rate.unsqueeze(-1) * _of_rows(scale, x) + _of_rows(shift, x)
    return y, h.to(added.dtype), mean, rate


residual_forward = torch.library.custom_op("lanewise::residual_forward", residual_forward_formula, mutates_args=())
"""`residual_forward_formula`, on any device."""


@residual_forward.register_fake
def _(x, added, bias, scale, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), added.new_empty(added.shape), x.new_empty(len(x)), x.new_empty(len(x))


def residual_backward_formula(
    to_y: Tensor, to_h: Tensor, y: Tensor, mean: Tensor, rate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, added, bias, scale and shift from those with respect to y and h.

    With z = (y - mean) * rate and d = to_h * scale:
    dx = to_y + rate (d - mean(d) - z mean(d z)), dadded = dx rounded, and summed over a lane's rows
    dbias = sum dx,  dscale = sum to_h z,  dshift = sum to_h.
    """
    z = (y - mean.unsqueeze(-1)) * rate.unsqueeze(-1)
    slope = to_h.to(y.dtype)
    d = slope * _of_rows(scale, y)
    along = (d * z).mean(-1, keepdim=True)
    dx = to_y + (d - d.mean(-1, keepdim=True) - z * along) * rate.unsqueeze(-1)
    sums = (tensor.unflatten(0, (len(scale), -1)).sum(1) for tensor in (dx, slope * z, slope))
    return dx, _another(dx.to(to_h.dtype), dx), *sums


residual_backward = torch.library.custom_op("lanewise::residual_backward", residual_backward_formula, mutates_args=())
"""`residual_backward_formula`, on any device."""


@residual_backward.register_fake
def _(to_y, to_h, y, mean, rate, scale) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = (scale.new_empty(scale.shape) for _ in range(3))
    return y.new_empty(y.shape), to_h.new_empty(to_h.shape), *sums


def _of_rows(vectors: Tensor, rows: Tensor) -> Tensor:
    """[G, D] -> [N, D], each N / G times."""
    return vectors.repeat_interleave(len(rows) // len(vectors), 0)


def _another(result: Tensor, first: Tensor) -> Tensor:
    """An operator may not return one tensor twice."""
    return result.clone() if result is first else result


# --- bias and ReLU ----------------------------------------------------------------------------------------------------


def rectify_forward_formula(
    product: Tensor, bias: Tensor, fired: bool, activity: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden layer.

    Args:
        product: [N, H]; the first N / G rows take the first lane's bias.
        bias: [G, H].
        fired, activity: whether to find out the second and the third result.

    Returns:
        active [N, H] in product's dtype; the rows on which product + bias was >= 0, int32 [G, H]; and the mean of
        ReLU's results over the rows, in bias's dtype [G, H]. What was not asked for is [G, 0].
    """
    pre = (product + _of_rows(bias, product)).unflatten(0, (len(bias), -1))
    active = torch.relu(pre)
    counts, means = _unwatched(bias)
    if fired:
        counts = (pre >= 0).sum(1, dtype=torch.int32)
    if activity:
        means = active.mean(1)
    return active.flatten(0, 1).to(product.dtype), counts, means


rectify_forward = torch.library.custom_op("lanewise::rectify_forward", rectify_forward_formula, mutates_args=())
"""`rectify_forward_formula`, on any device."""


@rectify_forward.register_fake
def _(product, bias, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    counts, means = _unwatched(bias)
    if fired:
        counts = bias.new_empty(bias.shape, dtype=torch.int32)
    return product.new_empty(product.shape), counts, bias.new_empty(bias.shape) if activity else means


def rectify_backward_formula(grad: Tensor, active: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to product and bias: `grad` where not active <= 0, [N, H], and its sums [G, H]."""
    slope = torch.where(active <= 0, 0, grad)  # not a number stays so, as in autograd
    return slope, slope.to(bias.dtype).unflatten(0, (len(bias), -1)).sum(1)


rectify_backward = torch.library.custom_op("lanewise::rectify_backward", rectify_backward_formula, mutates_args=())
"""`rectify_backward_formula`, on any device."""


@rectify_backward.register_fake
def _(grad, active, bias) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), bias.new_empty(bias.shape)


def _unwatched(bias: Tensor) -> tuple[Tensor, Tensor]:
    """No counts and no means."""
    return bias.new_empty((len(bias), 0), dtype=torch.int32), bias.new_empty((len(bias), 0))


# --- on a GPU, and of lanes -------------------------------------------------------------------------------------------


@residual_forward.register_kernel("cuda")
def _(x, added, bias, scale, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gpu_kernel().residual_forward(x, added, bias, scale, shift, EPS)


@residual_backward.register_kernel("cuda")
def _(to_y, to_h, y, mean, rate, scale) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return gpu_kernel().residual_backward(to_y, to_h, y, mean, rate, scale)


@rectify_forward.register_kernel("cuda")
def _(product, bias, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    return gpu_kernel().rectify_forward(product, bias, fired, activity)


@rectify_backward.register_kernel("cuda")
def _(grad, active, bias) -> tuple[Tensor, Tensor]:
    return gpu_kernel().rectify_backward(grad, active, bias)


def gpu_kernel() -> ModuleType:
    """The module of the GPU kernels. Raises `BadValue` where Triton is missing."""
    with triton_for("the net in bf16 on a GPU needs", "take precision=float32"):
        from trainables.ci_vit import residual_kernel
    return residual_kernel


for operator in (residual_forward, residual_backward, rectify_forward, rectify_backward):
    takes_lanes(operator)


# --- their gradients --------------------------------------------------------------------------------------------------


class _Residual(torch.autograd.Function):
    """`residual_forward`, with `residual_backward` for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, added, bias, scale, shift):
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return residual_forward(*(tensor.detach() for tensor in (x, added, bias, scale, shift)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, _, mean, rate = output
        ctx.mark_non_differentiable(mean, rate)
        ctx.save_for_backward(y, mean, rate, inputs[3])

    @staticmethod
    def backward(ctx, to_y: Tensor, to_h: Tensor, *_):
        return residual_backward(to_y.detach(), to_h.detach(), *(tensor.detach() for tensor in ctx.saved_tensors))


class _Rectify(torch.autograd.Function):
    """`rectify_forward`, with `rectify_backward` for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product, bias, fired: bool, activity: bool):
        return rectify_forward(product.detach(), bias.detach(), fired, activity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        return *rectify_backward(grad.detach(), *(tensor.detach() for tensor in ctx.saved_tensors)), None, None


@in_graph
def _residual(x, added, bias, scale, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Residual.apply(x, added, bias, scale, shift)


@in_graph
def _rectify(product, bias, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    return _Rectify.apply(product, bias, fired, activity)


def added_and_normalised(x: Tensor, added: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x + added + bias in x's dtype, and its LayerNorm in that of `added`, by the operators.

    Args:
        x, added: [rows, D].
        bias, scale, shift: [D].
    """
    return _residual(x, added, *(vector.unsqueeze(0) for vector in (bias, scale, shift)))[:2]


def rectified(
    product: Tensor, bias: Tensor, fired: bool = False, activity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(product + bias) by the operators.

    Args:
        product: [rows, H]. bias: [H].
        fired, activity: whether to find out the second and the third result.

    Returns:
        [rows, H] in product's dtype; the rows on which each unit's pre-activation was >= 0, int32 [H]; and the mean of
        its results [H]. What was not asked for is [0]; neither has a gradient.
    """
    active, counts, means = _rectify(product, bias.unsqueeze(0), fired, activity)
    return active, counts[0], means[0]
