"""What the operators with GPU kernels share: rows of all lanes joined, and the import of the kernels."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from trainables.family import BadValue

EPS = 1e-6
"""Of LayerNorm."""


def lanes_first(tensor: Tensor, dim: int | None, lanes: int) -> Tensor:
    """The lane axis joined to the first one, [L, N, ...] -> [L * N, ...]."""
    stacked = tensor.unsqueeze(0).expand(lanes, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return stacked.flatten(0, 1)


def standardised(x: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, [G, M, D], and their deviation before, [G, M, 1]."""
    rows = x.unflatten(0, (lanes, -1))
    deviation = (rows.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return F.layer_norm(rows, rows.shape[-1:], eps=EPS), deviation


def through_norm(slope: Tensor, xhat: Tensor, deviation: Tensor) -> Tensor:
    """The gradient with respect to rows from that with respect to xhat, both [G, M, D]: `standardised` gives the rest.

    (slope - mean(slope) - xhat mean(slope xhat)) / deviation
    """
    along = (slope * xhat).mean(-1, keepdim=True)
    return (slope - slope.mean(-1, keepdim=True) - xhat * along) / deviation


def gpu_kernel(name: str) -> ModuleType:
    """The module of that name with GPU kernels. Raises `BadValue` where Triton is missing."""
    try:
        return import_module(f"trainables.ci_vit.{name}")
    except ImportError as error:
        raise BadValue(
            f"the net in bf16 on a GPU needs triton, which is not installed here ({error}): install it, or take "
            "precision=float32"
        ) from error
