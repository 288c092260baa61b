"""LayerNorm and the product after it as operators.

    out = (LN(x) * scale + shift) w + b

`lanewise::norm_project_forward` and `lanewise::norm_project_backward` work on the rows of all lanes at once, on a GPU
by Triton kernels (`.project_kernel`) that read x once, elsewhere by the formulas (the tests hold those to autograd).
x goes on from here to where the residual is added, so `fused` hands it through and backward adds that gradient too.
`fits` says which shapes the kernels are for.

Rounding, by the kernels: what is multiplied is bf16, as under autocast (xhat and scale * w, where autocast rounds LN(x)
and w), and so is the result, once, after the bias; all else is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trainables.ci_vit.operators import EPS, gpu_kernel, lanes_first, standardised, through_norm

MOST_WIDTH = 62
"""A lane's weights must fit on the chip, in tiles of 64 channels with two to spare."""


def fits(width: int) -> bool:
    """Whether the kernels do rows of `width` channels and three times as many columns."""
    return 16 <= width <= MOST_WIDTH


# --- the two operators: rows of all lanes joined, one set of weights a lane -------------------------------------------


@torch.library.custom_op("lanewise::norm_project_forward", mutates_args=())
def norm_project_forward(x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm and product.

    Args:
        x: rows, [N, D]; the first N / G take the first lane's weights.
        scale, shift: LayerNorm's, [G, D].
        w, b: [G, D, columns], [G, columns].
        dtype: of the result.

    Returns:
        [N, columns].
    """
    return forward_formula(x, scale, shift, w, b, dtype)


def forward_formula(x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`norm_project_forward` on any device."""
    xhat, _ = standardised(x, len(w))
    return ((xhat * scale.unsqueeze(1) + shift.unsqueeze(1)) @ w + b.unsqueeze(1)).flatten(0, 1).to(dtype)


@norm_project_forward.register_fake
def _(x, scale, shift, w, b, dtype) -> Tensor:
    return x.new_empty((len(x), w.shape[-1]), dtype=dtype)


@torch.library.custom_op("lanewise::norm_project_backward", mutates_args=())
def norm_project_backward(
    grad: Tensor, carried: Tensor, x: Tensor, scale: Tensor, shift: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, scale, shift, w, b.

    Args:
        grad: with respect to the result, [N, columns].
        carried: with respect to x by all that else depends on it, [N, D]; added to x's.

    With xhat = (x - mean) / std of a row and sums over a lane's rows:  dh = grad w^T,  dxhat = dh scale,
    dx = carried + (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) / std,
    dscale = sum dh xhat,  dshift = sum dh,  dw = h^T grad,  db = sum grad.
    """
    return backward_formula(grad, carried, x, scale, shift, w)


def backward_formula(
    grad: Tensor, carried: Tensor, x: Tensor, scale: Tensor, shift: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm_project_backward` on any device."""
    xhat, deviation = standardised(x, len(w))
    slope = grad.to(x.dtype).unflatten(0, (len(w), -1))
    h = xhat * scale.unsqueeze(1) + shift.unsqueeze(1)
    dh = slope @ w.transpose(-1, -2)
    dx = carried + through_norm(dh * scale.unsqueeze(1), xhat, deviation).flatten(0, 1)
    return dx, (dh * xhat).sum(1), dh.sum(1), h.transpose(-1, -2) @ slope, slope.sum(1)


@norm_project_backward.register_fake
def _(grad, carried, x, scale, shift, w) -> tuple[Tensor, ...]:
    bias = w.new_empty((w.shape[0], w.shape[-1]))
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (x, scale, shift, w, bias))


@norm_project_forward.register_kernel("cuda")
def _(x, scale, shift, w, b, dtype) -> Tensor:
    return gpu_kernel("project_kernel").forward(x, scale, shift, w, b, EPS, dtype)


@norm_project_backward.register_kernel("cuda")
def _(grad, carried, x, scale, shift, w) -> tuple[Tensor, ...]:
    return gpu_kernel("project_kernel").backward(grad, carried, x, scale, shift, w, EPS)


@norm_project_forward.register_vmap
def _(info, dims, *args):
    tensors, dtype = args[:5], args[5]
    joined = (lanes_first(arg, dim, info.batch_size) for arg, dim in zip(tensors, dims[:5], strict=True))
    return norm_project_forward(*joined, dtype).unflatten(0, (info.batch_size, -1)), 0


@norm_project_backward.register_vmap
def _(info, dims, *args):
    joined = (lanes_first(arg, dim, info.batch_size) for arg, dim in zip(args, dims, strict=True))
    return tuple(one.unflatten(0, (info.batch_size, -1)) for one in norm_project_backward(*joined)), (0,) * 5


@register_flop_formula(torch.ops.lanewise.norm_project_forward)
def _(x_shape, scale_shape, shift_shape, w_shape, *_, **__) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.lanewise.norm_project_backward)
def _(grad_shape, carried_shape, x_shape, scale_shape, shift_shape, w_shape, **__) -> int:
    return 4 * x_shape[0] * w_shape[1] * w_shape[2]


# --- their gradient ---------------------------------------------------------------------------------------------------


class _NormProject(torch.autograd.Function):
    """The operators above, one the other's gradient, and x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shift, w, b, dtype: torch.dtype):
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        out = norm_project_forward(*(tensor.detach() for tensor in (x, scale, shift, w, b)), dtype)
        return out, x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx, grad: Tensor, carried: Tensor):
        saved = (tensor.detach() for tensor in ctx.saved_tensors)
        return *norm_project_backward(grad.detach(), carried.detach(), *saved), None


@torch.compiler.allow_in_graph
def _norm_project(x, scale, shift, w, b, dtype) -> tuple[Tensor, Tensor]:
    # allow_in_graph: torch.compile (2.13) loses an autograd.Function's own backward under torch.func.grad
    return _NormProject.apply(x, scale, shift, w, b, dtype)


def fused(x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm and product by the operators.

    Args:
        x: [rows, D].
        scale, shift: [D].
        w, b: [D, columns], [columns].
        dtype: of the product.

    Returns:
        the product [rows, columns], and x, for whatever else depends on it.
    """
    return _norm_project(x, *(tensor.unsqueeze(0) for tensor in (scale, shift, w, b)), dtype)
