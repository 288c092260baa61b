"""BatchNorm over a batch's own statistics, ReLU and max-pooling as one function with its gradient written down.

    z = pool(relu((x - mean) / sqrt(var + eps) * gamma + beta))

What autograd keeps and walks through again is several times what has to be read: here both ways are a few passes over x
and the gradient alone (`.norm_ops`). With g the gradient where a value was the first of its window's largest and above
0, else 0, x^ the normalised x, w 1 for examples that count and 0 for padding, and n the number of values that count
(Ioffe & Szegedy 2015, with weights):

    dbeta = sum g,  dgamma = sum g x^,  dx = gamma / sqrt(var + eps) * (g - w (dbeta + x^ dgamma) / n)
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainables.operators import in_graph
from trainables.vgg_decay import norm_ops

EPSILON = 1e-5

Statistics = tuple[Tensor, Tensor, Tensor]
"""Mean [C], biased variance [C], and how many values each is of, 0-d."""


def activated(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> Tensor:
    """pool(relu((x - centre) * scale + shift)) without gradient: x [N, H, W, C], the others [C]."""
    return _passes(x)[0](x, *(vector.unsqueeze(0) for vector in (centre, scale, shift)), pool)[0]


def normalised(x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor | None, pool: bool) -> tuple[Tensor, Statistics]:
    """Normalised by the batch's own statistics, rectified, and pooled where asked.

    Args:
        x: [N, H, W, C].
        gamma, beta: [C], in the dtype that statistics and arithmetic have.
        mask: bool [N]: the other examples are padding, whose gradients are 0, and take no part; None: all count.

    Returns:
        z [N, H, W, C], or half as high and wide, in x's dtype, and the statistics, which carry no gradient.
    """
    weight = gamma.new_zeros(0) if mask is None else mask.to(gamma.dtype)
    z, mean, var, count, _ = _normalised(x, gamma, beta, weight, pool)
    return z, (mean, var, count)


def _moments(x: Tensor, weight: Tensor) -> Statistics:
    """Over the examples of weight 1, in the weight's dtype."""
    x = x.to(weight.dtype)
    positions = x.shape[1] * x.shape[2]
    if not len(weight):
        var, mean = torch.var_mean(x, dim=(0, 1, 2), correction=0)
        return mean, var, mean.new_full((), float(x.shape[0] * positions))
    weight = weight[:, None, None, None]
    count = weight.sum() * positions
    mean = (x * weight).sum((0, 1, 2)) / count
    spread = (x - mean) * weight
    return mean, (spread * spread).sum((0, 1, 2)) / count, count


def _passes(x: Tensor):
    """Forward, sums and backward: the operators in bf16 on a GPU, elsewhere the formulas."""
    if x.dtype == torch.bfloat16 and x.device.type == "cuda":
        return norm_ops.norm_forward, norm_ops.norm_sums, norm_ops.norm_backward
    return norm_ops.forward_formula, norm_ops.sums_formula, norm_ops.backward_formula


class _Normalised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, pool: bool) -> tuple[Tensor, ...]:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        x, gamma, beta = x.detach(), gamma.detach(), beta.detach()
        mean, var, count = _moments(x, weight)
        vectors = (vector.unsqueeze(0) for vector in (mean, gamma / torch.sqrt(var + EPSILON), beta))
        z, chosen = _passes(x)[0](x, *vectors, pool)
        return z, mean, var, count, chosen

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, beta, weight, ctx.pool = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, gamma, beta, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, gamma, beta, weight, mean, var, count, chosen = (saved.detach() for saved in ctx.saved_tensors)
        _, sums, backward = _passes(x)
        inverse = 1 / torch.sqrt(var + EPSILON)
        what = (grad.detach(), x, chosen, *(vector.unsqueeze(0) for vector in (mean, gamma * inverse, beta)))
        to_beta, timed = sums(*what, ctx.pool).squeeze(0).unbind(0)
        to_gamma = timed * inverse
        shared = (to_beta / count).unsqueeze(0), (inverse * to_gamma / count).unsqueeze(0)
        dx = backward(*what, *shared, weight.unsqueeze(0), ctx.pool)
        return dx, to_gamma, to_beta, None, None


@in_graph
def _normalised(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, pool: bool) -> tuple[Tensor, ...]:
    return _Normalised.apply(x, gamma, beta, weight, pool)
