"""The mean over positions as an operator, `lanewise::position_mean`: PyTorch's own reduction, as it is.

torch.compile writes a kernel of its own for a mean over a dimension that is neither the first nor the last; on a GPU it
took six times as long as reading the values does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainables.operators import in_graph, takes_lanes


@torch.library.custom_op("lanewise::position_mean", mutates_args=())
def position_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [G, N, C] -> its mean over N in `dtype`, [G, C]."""
    return x.mean(1, dtype=dtype)


@position_mean.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((len(x), x.shape[2]), dtype=dtype)


takes_lanes(position_mean)


class _Mean(torch.autograd.Function):
    """The operator as a differentiable function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return position_mean(x.detach(), dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.positions, ctx.dtype = inputs[0].shape[1], inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (grad / ctx.positions).to(ctx.dtype).unsqueeze(1).expand(-1, ctx.positions, -1), None


@in_graph
def _mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _Mean.apply(x, dtype)


def mean_over_positions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, T, N, C] -> [B, T, C] in `dtype`, on a GPU by the operator."""
    return mean_by_operator(x, dtype) if x.is_cuda else x.mean(2, dtype=dtype)


def mean_by_operator(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, on any device."""
    return _mean(x.flatten(0, 1), dtype).unflatten(0, x.shape[:2])
