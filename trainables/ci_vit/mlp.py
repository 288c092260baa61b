"""The MLP half of a block as operators: LayerNorm, product, ReLU, product and the residual.

    h = LN(x) * scale + shift,  pre = h w_in + b_in,  y = x + relu(pre) w_out + b_out

`lanewise::mlp_forward` and `lanewise::mlp_backward` work on the rows of all lanes at once, on a GPU by a few Triton
kernels (`.mlp_kernel`) that keep the hidden layer on the chip, elsewhere by the formulas (which the tests hold against
autograd). `fits` says which shapes the kernels are for.

Rounding, by the kernels: what is multiplied is bf16, as under autocast (xhat and scale * w_in, where autocast rounds
LN(x) and w_in); all else, sums, biases, the residual and every result, is float32, where autocast rounds each product.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trainables.operators import in_graph, takes_lanes, triton_for

EPS = 1e-6
MOST_WIDTH = 62
MOST_NEURONS = 256
CHUNK = 64
"""A lane's weights must fit on the chip, in tiles of 64 channels with two to spare; neurons are taken by the chunk."""


def fits(width: int, neurons: int) -> bool:
    """Whether the kernels do rows of `width` channels and so many neurons."""
    return 16 <= width <= MOST_WIDTH and neurons <= MOST_NEURONS and neurons % CHUNK == 0


# --- the two operators: rows of all lanes joined, one set of weights a lane -------------------------------------------


def forward_formula(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    fired: bool,
    activity: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP half of a block.

    Args:
        x: rows, [N, D]; the first N / G take the first lane's weights.
        scale, shift: LayerNorm's, [G, D].
        w_in, b_in: [G, D, neurons], [G, neurons].
        w_out, b_out: [G, neurons, D], [G, D].
        fired, activity: whether to find out the second and the third result.

    Returns:
        y [N, D] in x's dtype; the rows on which a neuron's pre-activation was >= 0, int32 [G, neurons]; and the mean
        over the rows of ReLU's results [G, neurons]. What was not asked for is [G, 0].
    """
    xhat, _ = _standardised(x, len(w_in))
    pre = (xhat * scale.unsqueeze(1) + shift.unsqueeze(1)) @ w_in + b_in.unsqueeze(1)
    active = torch.relu(pre)
    y = x + (active @ w_out + b_out.unsqueeze(1)).flatten(0, 1)
    none = w_in.shape[0], 0
    counts = (pre >= 0).sum(1, dtype=torch.int32) if fired else x.new_empty(none, dtype=torch.int32)
    return y, counts, active.mean(1) if activity else x.new_empty(none)


mlp_forward = torch.library.custom_op("lanewise::mlp_forward", forward_formula, mutates_args=())
"""`forward_formula`, on any device."""


@mlp_forward.register_fake
def _(x, scale, shift, w_in, b_in, w_out, b_out, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    lanes, _, neurons = w_in.shape
    counts = x.new_empty((lanes, neurons if fired else 0), dtype=torch.int32)
    return x.new_empty(x.shape), counts, x.new_empty((lanes, neurons if activity else 0))


def backward_formula(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, scale, shift, w_in, b_in, w_out, b_out from that with respect to y, [N, D].

    With xhat = (x - mean) / std of a row, pre worked out again, and sums over a lane's rows:
    dactive = grad w_out^T,  dpre = dactive where not pre <= 0,  dh = dpre w_in^T,  dxhat = dh scale,
    dx = grad + (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) / std,
    dw_out = active^T grad,  db_out = sum grad,  dw_in = h^T dpre,  db_in = sum dpre,
    dscale = sum dh xhat,  dshift = sum dh.
    """
    xhat, deviation = _standardised(x, len(w_in))
    slope = grad.unflatten(0, (len(w_in), -1))
    h = xhat * scale.unsqueeze(1) + shift.unsqueeze(1)
    pre = h @ w_in + b_in.unsqueeze(1)
    dpre = torch.where(pre <= 0, 0, slope @ w_out.transpose(-1, -2))  # not a number stays so, as in autograd
    dh = dpre @ w_in.transpose(-1, -2)
    dxhat = dh * scale.unsqueeze(1)
    along = (dxhat * xhat).mean(-1, keepdim=True)
    dx = slope + (dxhat - dxhat.mean(-1, keepdim=True) - xhat * along) / deviation
    return (
        dx.flatten(0, 1),
        (dh * xhat).sum(1),
        dh.sum(1),
        h.transpose(-1, -2) @ dpre,
        dpre.sum(1),
        torch.relu(pre).transpose(-1, -2) @ slope,
        slope.sum(1),
    )


mlp_backward = torch.library.custom_op("lanewise::mlp_backward", backward_formula, mutates_args=())
"""`backward_formula`, on any device."""


@mlp_backward.register_fake
def _(grad, x, scale, shift, w_in, b_in, w_out) -> tuple[Tensor, ...]:
    like = (x, scale, shift, w_in, b_in, w_out, shift)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _standardised(x: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, [G, M, D], and their deviation before, [G, M, 1]."""
    rows = x.unflatten(0, (lanes, -1))
    deviation = (rows.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return F.layer_norm(rows, rows.shape[-1:], eps=EPS), deviation


@mlp_forward.register_kernel("cuda")
def _(x, scale, shift, w_in, b_in, w_out, b_out, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    return gpu_kernel().forward(x, scale, shift, w_in, b_in, w_out, b_out, EPS, fired, activity)


@mlp_backward.register_kernel("cuda")
def _(grad, x, scale, shift, w_in, b_in, w_out) -> tuple[Tensor, ...]:
    return gpu_kernel().backward(grad, x, scale, shift, w_in, b_in, w_out, EPS)


def gpu_kernel() -> ModuleType:
    """The module of the GPU kernels. Raises `BadValue` where Triton is missing."""
    with triton_for("the net in bf16 on a GPU needs", "take precision=float32"):
        from trainables.ci_vit import mlp_kernel
    return mlp_kernel


takes_lanes(mlp_forward)
takes_lanes(mlp_backward)


@register_flop_formula(torch.ops.lanewise.mlp_forward)
def _(x_shape, scale_shape, shift_shape, w_in_shape, *_, **__) -> int:
    return 2 * _product(x_shape, w_in_shape)


@register_flop_formula(torch.ops.lanewise.mlp_backward)
def _(grad_shape, x_shape, scale_shape, shift_shape, w_in_shape, *_, **__) -> int:
    """The four products of the ordinary way: the pre-activations that are worked out again are not counted."""
    return 4 * _product(x_shape, w_in_shape)


def _product(x_shape, w_in_shape) -> int:
    """Operations of one product."""
    return 2 * x_shape[0] * w_in_shape[1] * w_in_shape[2]


# --- their gradient ---------------------------------------------------------------------------------------------------


class _Mlp(torch.autograd.Function):
    """The operators above, one the other's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shift, w_in, b_in, w_out, b_out, fired: bool, activity: bool):
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        weights = (tensor.detach() for tensor in (scale, shift, w_in, b_in, w_out, b_out))
        return mlp_forward(x.detach(), *weights, fired, activity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        return *mlp_backward(grad.detach(), *(tensor.detach() for tensor in ctx.saved_tensors)), None, None


@in_graph
def _mlp(x, scale, shift, w_in, b_in, w_out, b_out, fired, activity) -> tuple[Tensor, Tensor, Tensor]:
    return _Mlp.apply(x, scale, shift, w_in, b_in, w_out, b_out, fired, activity)


def fused(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    fired: bool = False,
    activity: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP half of a block by the operators.

    Args:
        x: [rows, D], float32.
        scale, shift: [D].
        w_in, b_in: [D, neurons], [neurons].
        w_out, b_out: [neurons, D], [D].
        fired, activity: whether to find out the second and the third result.

    Returns:
        y [rows, D]; rows on which each neuron's pre-activation was >= 0, int32 [neurons]; and the mean of ReLU's
        results [neurons]. What was not asked for is [0]; neither has a gradient.
    """
    weights = (tensor.unsqueeze(0) for tensor in (scale, shift, w_in, b_in, w_out, b_out))
    y, counts, means = _mlp(x, *weights, fired, activity)
    return y, counts[0], means[0]
