"""States as nested dicts of tensors: mapped over, copied in few launches, sent to the host in few copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainables.family import State


def tree_map(f: Any, *trees: Any) -> Any:
    """Apply f to the tensors of equally shaped nested dicts."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: tree_map(f, *(tree[key] for tree in trees)) for key in first}
    return f(*trees)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a nested dict, in its order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def copy_into(target: Any, source: Any) -> None:
    """Copy a nested dict's tensors over those of another: a few launches for all of a kind, not one each."""
    kinds: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}

    def sort(into: Tensor, of: Tensor) -> None:
        pair = kinds.setdefault((into.dtype, of.dtype, into.device, of.device), ([], []))
        pair[0].append(into)
        pair[1].append(of.detach())

    tree_map(sort, target, source)
    for into, of in kinds.values():
        torch._foreach_copy_(into, of)


def copy_of(tree: Any, device: torch.device | None = None) -> Any:
    """A nested dict of copies, on `device` if given."""
    fresh = tree_map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device or tensor.device), tree)
    copy_into(fresh, tree)
    return fresh


class Parcel:
    """A state on its way to the host; the device may go on with other work meanwhile.

    Args:
        state: changed by nobody any more, unless it is on a GPU: from there it is taken as it is now.
    """

    def __init__(self, state: State):
        self._state = state
        self._done: torch.cuda.Event | None = None
        self._flat: dict[torch.dtype, Tensor] = {}
        parts: dict[torch.dtype, list[Tensor]] = {}
        for tensor in leaves(state):
            if tensor.is_cuda:
                parts.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
        for dtype, some in parts.items():
            flat = torch.cat(some)
            self._flat[dtype] = torch.empty(flat.shape, dtype=dtype, pin_memory=True).copy_(flat, non_blocking=True)
        if parts:
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> State:
        """The state on the host, once it is there."""
        if self._done is None:
            return self._state
        self._done.synchronize()
        read = dict.fromkeys(self._flat, 0)

        def unpacked(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor
            begun = read[tensor.dtype]
            read[tensor.dtype] += tensor.numel()
            return self._flat[tensor.dtype][begun : read[tensor.dtype]].view(tensor.shape)

        return tree_map(unpacked, self._state)
