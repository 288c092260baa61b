"""BatchNorm over a batch's own statistics, ReLU and max-pooling as one function with its gradient written down.

    z = pool(relu((x - mean) / sqrt(var + eps) * gamma + beta))

What autograd keeps and walks through again is several times what has to be read: here both ways are a few passes over x
and the gradient alone. With g the gradient where a value was the first of its window's largest and above 0, else 0, x^
the normalised x, w 1 for examples that count and 0 for padding, and n the number of values that count (Ioffe & Szegedy
2015, with weights):

    dbeta = sum g,  dgamma = sum g x^,  dx = gamma / sqrt(var + eps) * (g - w (dbeta + x^ dgamma) / n)
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5

Statistics = tuple[Tensor, Tensor, Tensor]
"""Mean [C], biased variance [C], and how many values each is of, 0-d."""


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - centre) * scale + shift, x [N, H, W, C] and the others [C], in their dtype."""
    return (x.to(centre.dtype) - centre) * scale + shift


def pooled(x: Tensor) -> Tensor:
    """Max-pooling of 2x2, [N, H, W, C] -> [N, H / 2, W / 2, C]. Without gradient: `normalised` has it."""
    return _windows(x).amax((2, 4))


def normalised(x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor | None, pool: bool) -> tuple[Tensor, Statistics]:
    """Normalised by the batch's own statistics, rectified, and pooled where asked.

    Args:
        x: [N, H, W, C].
        gamma, beta: [C], in the dtype that statistics and arithmetic have.
        mask: bool [N]: the other examples are padding, whose gradients are 0, and take no part; None: all count.

    Returns:
        z [N, H, W, C], or half as high and wide, in x's dtype, and the statistics, which carry no gradient.
    """
    weight = None if mask is None else mask.to(gamma.dtype)
    z, mean, var, count, _ = _normalised(x, gamma, beta, weight, pool)
    return z, (mean, var, count)


def moments(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Statistics:
    """Mean and biased variance per channel over the examples of weight 1, in `dtype`."""
    x = x.to(dtype)
    positions = x.shape[1] * x.shape[2]
    if weight is None:
        var, mean = torch.var_mean(x, dim=(0, 1, 2), correction=0)
        return mean, var, mean.new_full((), float(x.shape[0] * positions))
    weight = weight[:, None, None, None]
    count = weight.sum() * positions
    mean = (x * weight).sum((0, 1, 2)) / count
    spread = (x - mean) * weight
    return mean, (spread * spread).sum((0, 1, 2)) / count, count


class _Normalised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, pool: bool) -> tuple[Tensor, ...]:
        mean, var, count = moments(x, weight, gamma.dtype)
        active = torch.relu(affine(x, mean, gamma / torch.sqrt(var + EPSILON), beta))
        if not pool:
            return active.to(x.dtype), mean, var, count, x.new_zeros(0, dtype=torch.int8)
        return pooled(active).to(x.dtype), mean, var, count, _first_largest(active)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, beta, weight, ctx.pool = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, gamma, beta, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, gamma, beta, weight, mean, var, count, chosen = ctx.saved_tensors
        inverse = 1 / torch.sqrt(var + EPSILON)
        scale = gamma * inverse
        centred = x.to(gamma.dtype) - mean
        grad = grad.to(gamma.dtype)
        slope = torch.where(centred * scale + beta > 0, _spread(grad, chosen) if ctx.pool else grad, 0)
        to_beta = slope.sum((0, 1, 2))
        to_gamma = (slope * centred).sum((0, 1, 2)) * inverse
        shared = (to_beta + centred * (inverse * to_gamma)) / count
        if weight is not None:
            shared = shared * weight[:, None, None, None]
        return (scale * (slope - shared)).to(x.dtype), to_gamma, to_beta, None, None


@torch.compiler.allow_in_graph
def _normalised(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, pool: bool) -> tuple[Tensor, ...]:
    # allow_in_graph: torch.compile (2.13) loses an autograd.Function's own backward under torch.func.grad
    return _Normalised.apply(x, gamma, beta, weight, pool)


def _windows(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H / 2, 2, W / 2, 2, C]."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


def _first_largest(x: Tensor) -> Tensor:
    """Which of a window's four is the first of the largest, row by row, int8 [N, H / 2, W / 2, C]."""
    a, b, c, d = (x[:, i::2, j::2] for i in range(2) for j in range(2))
    upper, lower = (b > a).to(torch.int8), (d > c).to(torch.int8) + 2
    return torch.where(torch.maximum(c, d) > torch.maximum(a, b), lower, upper)


def _spread(grad: Tensor, chosen: Tensor) -> Tensor:
    """Each window's gradient at the position that was chosen of it, [N, H / 2, W / 2, C] -> [N, H, W, C]."""
    place = torch.arange(4, dtype=torch.int8, device=grad.device).reshape(2, 1, 2, 1)
    grad, chosen = (tensor[:, :, None, :, None] for tensor in (grad, chosen))
    return torch.where(chosen == place, grad, 0).flatten(3, 4).flatten(1, 2)
