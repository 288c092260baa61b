"""What operators with GPU kernels share: how they take lanes, and what is said where Triton is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import CustomOpDef

from trainables.family import BadValue


def takes_lanes(operator: CustomOpDef) -> None:
    """Register how an operator runs under torch.func.vmap: once, the lane axis joined to the first one of every tensor
    that goes in, [L, N, ...] -> [L * N, ...], and parted from it in every one that comes out."""

    @operator.register_vmap
    def _(info, dims, *args):
        lanes = info.batch_size
        joined = [
            _joined(arg, dim, lanes) if isinstance(arg, Tensor) else arg for arg, dim in zip(args, dims, strict=True)
        ]
        found = operator(*joined)
        if isinstance(found, Tensor):
            return found.unflatten(0, (lanes, -1)), 0
        return tuple(one.unflatten(0, (lanes, -1)) for one in found), (0,) * len(found)


@torch.library.custom_op("lanewise::kept", mutates_args=())
def kept(tensor: Tensor) -> Tensor:
    """The same, [N, ...], written to memory: torch.compile works out anew, for each, what many elements share."""
    return tensor.clone()


@kept.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


takes_lanes(kept)


def _joined(tensor: Tensor, dim: int | None, lanes: int) -> Tensor:
    stacked = tensor.unsqueeze(0).expand(lanes, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return stacked.flatten(0, 1)


@contextmanager
def triton_for(what: str, instead: str) -> Iterator[None]:
    """Around the import of kernels. Raises `BadValue`: WHAT triton, which is missing; install it, or do INSTEAD."""
    try:
        yield
    except ImportError as error:
        raise BadValue(f"{what} triton, which is not installed here ({error}): install it, or {instead}") from error
