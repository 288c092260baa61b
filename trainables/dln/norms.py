"""RMSNorm and LayerNorm without bias, over one position or, as some originals did by mistake, over the whole window."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32: statistics, softmax and losses are never taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, eps: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019)."""
    x = wide(x)
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


def layer_norm(x: Tensor, eps: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """(x - mean) / sqrt(variance + eps) (Ba et al. 2016), no weights."""
    x = wide(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
