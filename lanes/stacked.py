"""The stacked engine: K lanes as one, states stacked along a lane axis and the family's step under torch.func.vmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from lanes.engine import Engine, Lane, tree_map
from trainables.family import Hypers, State


class StackedEngine(Engine):
    """Best where the work is matrix products and small tensors.

    Args:
        compiled: run the stacked step through torch.compile. Capacity then grows and shrinks in powers of two, so that
            lanes come and go without recompiling; uncompiled, the stack is exactly as large as its lanes.
    """

    name = "stacked"

    def __init__(self, *args, compiled: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.compiled = compiled
        self._slots: list[str | None] = []
        self._states: State = {}
        self._hypers: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        step = vmap(self._step_one)
        self._stacked_step = torch.compile(step, dynamic=False) if compiled else step
        self._stacked_evaluate = vmap(self._evaluate_one)

    @property
    def capacity(self) -> int:
        return len(self._slots)

    def _place(self, lane: Lane, state: State, hyper: Hypers) -> None:
        if not self._slots:
            self._slots = [lane.key]
            self._states = tree_map(lambda t: t.unsqueeze(0).clone(), state)
            self._hypers = tree_map(lambda t: t.unsqueeze(0).clone(), dict(hyper))
            self._rows = {}
            return
        if None not in self._slots:
            self._resize(list(range(len(self._slots))), self._size_for(len(self._slots) + 1))
        slot = self._slots.index(None)
        self._slots[slot] = lane.key
        tree_map(lambda stack, value: stack[slot].copy_(value), self._states, state)
        tree_map(lambda stack, value: stack[slot].copy_(value), self._hypers, dict(hyper))

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._slots[self._slots.index(key)] = None
        kept = [slot for slot, key in enumerate(self._slots) if key is not None]
        if self._size_for(len(kept)) < len(self._slots):
            self._resize(kept, self._size_for(len(kept)))

    def _size_for(self, lanes: int) -> int:
        if not self.compiled or lanes == 0:
            return lanes
        return 1 << (lanes - 1).bit_length()

    def _resize(self, kept: list[int], size: int) -> None:
        """Rebuild the stack with the `kept` slots first. Spare slots repeat a kept lane: finite, and never read."""
        if not kept:
            self._slots, self._states, self._hypers, self._rows = [], {}, {}, {}
            return
        index = torch.tensor(kept + [kept[0]] * (size - len(kept)), device=self.device)

        def pick(stack: Tensor) -> Tensor:
            return stack.index_select(0, index)

        self._states = tree_map(pick, self._states)
        self._hypers = tree_map(pick, self._hypers)
        self._rows = tree_map(pick, self._rows)
        self._slots = [self._slots[slot] for slot in kept] + [None] * (size - len(kept))

    def _set_order(self, key: str, rows: Mapping[str, Tensor]) -> None:
        if not self._rows:
            self._rows = {
                name: row.unsqueeze(0).repeat(len(self._slots), *[1] * row.dim()) for name, row in rows.items()
            }
        slot = self._slots.index(key)
        for name, row in rows.items():
            self._rows[name][slot].copy_(row)

    def _advance(self, steps: int) -> dict[str, Tensor]:
        per_epoch = self.schedule.steps_per_epoch
        slots = torch.arange(len(self._slots), device=self.device)
        first = torch.tensor(
            [0 if key is None else self.lanes[key].step % per_epoch for key in self._slots], device=self.device
        )
        history = []
        for i in range(steps):
            # spare slots may run past the epoch's end: they read its last row
            position = torch.clamp(first + i, max=per_epoch - 1)
            rows = {name: row[slots, position] for name, row in self._rows.items()}
            self._states, metrics = self._stacked_step(self._states, self._hypers, rows)
            history.append(metrics)
        return {
            name: torch.stack([metrics[name] for metrics in history])[:, self._index(list(self.lanes))]
            for name in history[0]
        }

    def _evaluate(self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        index = self._index(keys)
        states = tree_map(lambda stack: stack.index_select(0, index), self._states)
        hypers = tree_map(lambda stack: stack.index_select(0, index), self._hypers)
        stacked = {name: torch.stack([lane_rows[name] for lane_rows in rows]) for name in rows[0]}
        batches = next(iter(stacked.values())).shape[1]
        sums = [
            self._stacked_evaluate(states, hypers, {name: row[:, i] for name, row in stacked.items()})
            for i in range(batches)
        ]
        return {name: torch.stack([s[name] for s in sums]).sum(0) for name in sums[0]}

    def _index(self, keys: Sequence[str]) -> Tensor:
        return torch.tensor([self._slots.index(key) for key in keys], device=self.device)

    def state(self, key: str) -> State:
        slot = self._slots.index(key)
        return tree_map(lambda stack: stack[slot].clone(), self._states)

    def hypers(self, key: str) -> Hypers:
        slot = self._slots.index(key)
        return tree_map(lambda stack: stack[slot].clone(), self._hypers)
