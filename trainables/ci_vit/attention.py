"""Multi-head attention without a mask: written out, and as one GPU kernel each way for few positions.

    p = softmax(q k^T / sqrt(D)),  out = p v            for each sample and head, [S, D] each

Both take the product that made q, k and v as it stands, [.., S, 3, H, D], and its bias apart, and give what the next
product reads, [.., S, H, D]. Written out, the scores go through memory; torch.compile fuses what lies between the
products. Fused, they never leave the chip: `lanewise::attention_forward` and `lanewise::attention_backward` are
operators over the samples of all lanes at once, on a GPU one Triton kernel each (`.attention_kernel`), elsewhere the
formulas (which the tests hold against autograd). `fits` says which shapes the kernels are for.

Rounding, bf16: q, k and v are rounded after the bias, as autocast does. Fused, scores and softmax are float32 and
only the probabilities (and the scores' gradient) are rounded before they meet v (and q, k); written out, the scores and
their gradient are rounded to bf16 in memory as well.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trainables.operators import in_graph, takes_lanes, triton_for

MOST_POSITIONS = 128
MOST_WIDTH = 64
"""A head's scores and its queries, keys and values must fit on the chip at once."""


def fits(positions: int, width: int) -> bool:
    """Whether the kernels do heads of `width` channels at so many positions."""
    return positions <= MOST_POSITIONS and width <= MOST_WIDTH


# --- written out ------------------------------------------------------------------------------------------------------


def written_out(qkv: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Matrix product, softmax, matrix product.

    Args:
        qkv: queries, keys and values, bias included, [B, S, 3, H, D].
        spare: further positions to pad with, masked: tensor cores want rows of a multiple of 8.

    Returns:
        out [B, S, H, D], and the distributions [B * H, S + spare, S + spare].
    """
    count, positions, _, heads, width = qkv.shape
    absent = torch.arange(positions + spare, device=qkv.device) >= positions
    padded = F.pad(qkv.permute(2, 0, 3, 1, 4), (0, 0, 0, spare))
    q, k, v = padded.reshape(3, count * heads, positions + spare, width).unbind(0)
    scores = q @ k.transpose(-1, -2) * width**-0.5
    attention = torch.softmax(scores.masked_fill(absent, -torch.inf), dim=-1)
    out = (attention @ v)[:, :positions].reshape(count, heads, positions, width).transpose(1, 2)
    return out, attention


# --- the two operators: [samples, positions, 3, heads, width], one bias [3, heads, width] a group of samples ----------


@torch.library.custom_op("lanewise::attention_forward", mutates_args=())
def attention_forward(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every head of every sample.

    Args:
        qkv: queries, keys and values before their bias, [N, S, 3, H, D].
        bias: added before all else and rounded to qkv's dtype, [G, 3, H, D]; the first N / G samples take the first.

    Returns:
        out [N, S, H, D] in qkv's dtype, and the log-sum-exp of every query's scores [N, H, S], at least float32.
    """
    return forward_formula(qkv, bias)


def forward_formula(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_forward` on any device."""
    q, k, v = _biased(qkv, bias)
    scores = _wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v
    return out.transpose(1, 2).contiguous(), lse


@attention_forward.register_fake
def _(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    samples, positions, _, heads, width = qkv.shape
    lse = qkv.new_empty((samples, heads, positions), dtype=_wide_dtype(qkv.dtype))
    return qkv.new_empty((samples, positions, heads, width)), lse


@torch.library.custom_op("lanewise::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, qkv: Tensor, bias: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to qkv [N, S, 3, H, D] and bias [G, 3, H, D] from that with respect to the result
    [N, S, H, D].

    With p = exp(scores - lse):  dv = p^T g,  dp = g v^T,  ds = p (dp - sum over keys of p dp),
    dq = ds k / sqrt(D),  dk = ds^T q / sqrt(D); and of bias the sums over a group's samples and positions.
    """
    return backward_formula(grad, qkv, bias, lse)


def backward_formula(grad: Tensor, qkv: Tensor, bias: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_backward` on any device."""
    q, k, v = _biased(qkv, bias)
    g = grad.transpose(1, 2)
    p = torch.exp(_wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 - lse.unsqueeze(-1))
    dp = _wide(g @ v.transpose(-1, -2))
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5).to(q.dtype)
    slopes = torch.stack([ds @ k, ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ g])
    slope = slopes.permute(1, 3, 0, 2, 4).contiguous()
    return slope, slope.unflatten(0, (len(bias), -1)).to(bias.dtype).sum((1, 2))


@attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _biased(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [N, H, S, D] each."""
    grouped = qkv.unflatten(0, (len(bias), -1)) + bias[:, None, None]
    q, k, v = grouped.flatten(0, 1).to(qkv.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@attention_forward.register_kernel("cuda")
def _(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return gpu_kernel().forward(qkv, bias)


@attention_backward.register_kernel("cuda")
def _(grad: Tensor, qkv: Tensor, bias: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return gpu_kernel().backward(grad, qkv, bias, lse)


def gpu_kernel() -> ModuleType:
    """The module of the GPU kernels. Raises `BadValue` where Triton is missing."""
    with triton_for("attention in bf16 on a GPU needs", "take precision=float32"):
        from trainables.ci_vit import attention_kernel
    return attention_kernel


takes_lanes(attention_forward)
takes_lanes(attention_backward)


@register_flop_formula(torch.ops.lanewise.attention_forward)
def _(qkv_shape, bias_shape, *_, **__) -> int:
    return 2 * _product(qkv_shape)


@register_flop_formula(torch.ops.lanewise.attention_backward)
def _(grad_shape, qkv_shape, *_, **__) -> int:
    """The four products of the written-out way: scores that are worked out again are not counted."""
    return 4 * _product(qkv_shape)


def _product(qkv_shape) -> int:
    """Operations of all heads' q k^T."""
    samples, positions, _, heads, width = qkv_shape
    return 2 * samples * heads * positions**2 * width


# --- their gradient ---------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """The operators above, one the other's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        return attention_forward(qkv.detach(), bias.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        qkv, bias, lse = ctx.saved_tensors
        return attention_backward(grad.detach(), qkv.detach(), bias.detach(), lse.detach())


@in_graph
def _attention(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _Attention.apply(qkv, bias)


def fused(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention by the operators.

    Args:
        qkv: queries, keys and values before their bias, [B, S, 3, H, D].
        bias: [3, H, D].

    Returns:
        [B, S, H, D] in qkv's dtype.
    """
    return _attention(qkv, bias.unsqueeze(0))[0]
