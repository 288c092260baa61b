"""States as nested dicts of tensors: mapped over, copied in few launches, sent to the host in few copies."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lanes.underway import Underway
from trainables.family import State

MOST_ON_THE_WAY = 2 * 2**30
"""Bytes of copies on a device that are on their way to the host, at most: then whoever sends more waits."""


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


def bytes_of(tree: Any) -> int:
    """What a nested dict's tensors take."""
    return sum(tensor.nbytes for tensor in leaves(tree))


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


def in_rows(tree: Any) -> Any:
    """The same, every tensor in row-major order, as in copies and checkpoints. An optimiser leaves a weight as its
    gradient lies, and where numbers lie otherwise a product rounds otherwise (on some processors)."""
    return tree_map(lambda tensor: tensor.contiguous(), tree)


class Parcel:
    """A state on its way to the host; the device may go on with other work meanwhile.

    Args:
        state: changed by nobody any more, unless it is on a GPU: from there it is taken as it is now.
    """

    def __init__(self, state: State):
        self._state = state
        parts: dict[torch.dtype, list[Tensor]] = {}
        for tensor in leaves(state):
            if tensor.is_cuda:
                parts.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
        flat = {dtype: torch.cat(some) for dtype, some in parts.items()}
        self._flat = _carrier().take(flat) if flat else None

    @property
    def bytes(self) -> int:
        return bytes_of(self._state)

    def wait(self) -> State:
        """The state on the host, once it is there."""
        if self._flat is None:
            return self._state
        flat = self._flat.result()
        read = dict.fromkeys(flat, 0)

        def unpacked(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor
            begun = read[tensor.dtype]
            read[tensor.dtype] += tensor.numel()
            return flat[tensor.dtype][begun : read[tensor.dtype]].view(tensor.shape)

        return tree_map(unpacked, self._state)


Flat = dict[torch.dtype, Tensor]
"""A state as one row of numbers of each type."""


class _Carrier:
    """A thread that waits for copies, so that whoever trains need not."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "carrier")
        self._on_the_way = Underway()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self, flat: Flat) -> Future[Flat]:
        """Copies on the host, as the tensors are once the work before is done."""
        made = torch.cuda.Event()
        made.record()
        size = bytes_of(flat)
        while (before := self._on_the_way.bytes) and before + size > MOST_ON_THE_WAY:
            self._on_the_way.wait_for_oldest()
        copied = self._thread.submit(self._copy, flat, made)
        self._on_the_way.add(copied, size)
        return copied

    def _copy(self, flat: Flat, made: torch.cuda.Event) -> Flat:
        """Into ordinary memory: pinning some for each state holds the device up for milliseconds."""
        device = next(iter(flat.values())).device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(self._streams[device]):
            torch.cuda.current_stream().wait_event(made)
            return {dtype: tensor.cpu() for dtype, tensor in flat.items()}


@cache
def _carrier() -> _Carrier:
    """One for the process."""
    return _Carrier()
