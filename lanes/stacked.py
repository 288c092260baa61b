"""The stacked engine: K lanes as one, states stacked along a lane axis and the family's step under torch.func.vmap.

On a GPU the stacked step is compiled, writes its results over its arguments, and is captured in CUDA graphs of one and
of several steps; a chunk of training is then a few graph launches. Lanes come and go by copying into and out of slots.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lanes.compiling import compile_lanes
from lanes.engine import Engine, Lane, Placing, send, shapes_of, stack_metrics
from lanes.graphs import GraphedSteps, GraphedSums
from lanes.states import copy_of, in_rows, leaves, tree_map
from trainables.family import Hypers, State

TAKEN_TOGETHER = 8
"""Lanes whose states leave in the same few launches; the memory of all is given back with the last of them."""


class StackedEngine(Engine):
    """Best where the work is matrix products and small tensors.

    Args:
        compiled: run the stacked step through torch.compile, on a GPU inside CUDA graphs. The stack then has a fixed
            number of slots, a power of two, so that lanes come and go without compiling again; spare slots repeat some
            lane's arithmetic and are never read. Uncompiled, the stack is exactly as large as its lanes.
        slots: the number of slots to start with when compiled; the stack doubles when it is full, and shrinks only in
            `compact`.
    """

    name = "stacked"

    def __init__(self, *args, compiled: bool = False, slots: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.compiled = compiled
        self._least = power_of_two(slots) if compiled else 0
        self._slots: list[str | None] = []
        self._states: State = {}
        self._hypers: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._position = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._names: list[str] = []
        self._graphed: GraphedSteps | None = None
        self._graphed_sums: dict[tuple, GraphedSums] = {}  # by the shapes of what an evaluation reads
        self._stacked_step = vmap(self._step_one)
        self._stacked_evaluate = vmap(self._evaluate_one)
        self.in_graphs = compiled and self.device.type == "cuda"
        if compiled:
            self._stacked_evaluate = compile_lanes(self._stacked_evaluate, self.device)
            self._in_place = compile_lanes(self._step_in_place, self.device)

    @property
    def capacity(self) -> int:
        return len(self._slots)

    # --- lanes in and out ---

    def _place(self, arrived: Sequence[Placing]) -> None:
        """A few launches for all of them: the device has one chunk to go on with meanwhile."""
        if not self._slots:
            (lane, state, hyper), *arrived = arrived
            self._begin(lane, state, hyper)
        missing = len(arrived) - self.spare
        if missing > 0:
            self._resize(list(range(len(self._slots))), self._size_for(len(self._slots) + missing))
        if not arrived:
            return
        free = [slot for slot, key in enumerate(self._slots) if key is None][: len(arrived)]
        index = send(torch.tensor(free), self.device)

        def put(stack: Tensor, *new: Tensor) -> None:
            stack.index_copy_(0, index, torch.stack(new))

        tree_map(put, self._states, *(state for _, state, _ in arrived))
        tree_map(put, self._hypers, *(dict(hyper) for _, _, hyper in arrived))
        places = torch.tensor([lane.step % self.schedule.steps_per_epoch for lane, _, _ in arrived])
        self._position.index_copy_(0, index, send(places, self.device))
        for slot, (lane, _, _) in zip(free, arrived, strict=True):
            self._slots[slot] = lane.key

    def _begin(self, lane: Lane, state: State, hyper: Hypers) -> None:
        """A stack of a first lane."""
        size = self._size_for(1)
        self._slots = [lane.key] + [None] * (size - 1)
        self._states = tree_map(lambda t: _repeat(t, size), state)
        self._hypers = tree_map(lambda t: _repeat(t, size), dict(hyper))
        # filled by a kernel: assigning a number copies it from the host, which then waits for the chunk under way
        self._position = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._position[0].fill_(lane.step % self.schedule.steps_per_epoch)
        self._rows, self._graphed, self._graphed_sums = {}, None, {}

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._slots[self._slots.index(key)] = None
        if not self.compiled:
            self.compact()

    @property
    def spare(self) -> int:
        return self._slots.count(None)

    def compact(self) -> None:
        """Give up spare slots. Compiled, that means to compile for another number: worth it when much is left to do."""
        kept = [slot for slot, key in enumerate(self._slots) if key is not None]
        size = power_of_two(len(kept)) if self.compiled and kept else len(kept)
        if size < len(self._slots):
            self._resize(kept, size)

    def _size_for(self, lanes: int) -> int:
        return max(self._least, power_of_two(lanes)) if self.compiled else lanes

    def _resize(self, kept: list[int], size: int) -> None:
        """Rebuild the stack with the `kept` slots first. Spare slots repeat a kept lane: finite, and never read."""
        self._graphed, self._graphed_sums = None, {}
        if not kept:
            self._slots, self._states, self._hypers, self._rows = [], {}, {}, {}
            return
        index = torch.tensor(kept + [kept[0]] * (size - len(kept)), device=self.device)

        def pick(stack: Tensor) -> Tensor:
            return stack.index_select(0, index)

        self._states = tree_map(pick, self._states)
        self._hypers = tree_map(pick, self._hypers)
        self._rows = tree_map(pick, self._rows)
        self._position = pick(self._position)
        self._slots = [self._slots[slot] for slot in kept] + [None] * (size - len(kept))

    def _set_orders(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        if not self._rows:
            some = next(iter(rows.values()))
            self._rows = {name: _repeat(row.to(self.device), len(self._slots)) for name, row in some.items()}
        place = {key: slot for slot, key in enumerate(self._slots)}
        slots = send(torch.tensor([place[key] for key in rows]), self.device)
        # lanes of one seed share an order, which goes to the device once
        orders = {id(order): order for order in rows.values()}
        number = {own: index for index, own in enumerate(orders)}
        whose = send(torch.tensor([number[id(order)] for order in rows.values()]), self.device)
        for name, buffer in self._rows.items():
            each = send(torch.stack([order[name] for order in orders.values()]), self.device)
            buffer.index_copy_(0, slots, each.index_select(0, whose))
        steps = [self.lanes[key].step if key in self.lanes else 0 for key in self._slots]
        places = torch.tensor([step % self.schedule.steps_per_epoch for step in steps])
        self._position.copy_(send(places, self.device))

    # --- training ---

    def _advance(self, steps: int) -> tuple[list[str], Tensor]:
        if self.compiled and self.device.type == "cuda":
            if self._graphed is None:
                started = time.perf_counter()
                everything = self._everything()
                self._graphed = GraphedSteps(self._compiled_step, everything, self.schedule.steps_per_epoch)
                self.setup_seconds += time.perf_counter() - started
            curves = self._graphed.run(steps)
        else:
            step = self._compiled_step if self.compiled else self._plain_step
            curves = torch.stack([step() for _ in range(steps)])
        return self._names, curves

    def _columns(self) -> list[int]:
        return [self._slots.index(key) for key in self.lanes]

    def _plain_step(self) -> Tensor:
        """One step of all lanes. Returns its metrics, [number of metrics, slots]."""
        rows = self._row(self._rows, self._position)
        updated, metrics = self._stacked_step(self._states, self._hypers, rows)
        self._states = in_rows(updated)
        self._position += 1
        self._names = list(metrics)
        return stack_metrics(list(metrics.values()))

    def _row(self, rows: Mapping[str, Tensor], position: Tensor) -> dict[str, Tensor]:
        """Each lane's slice of its epoch's order. Spare slots may run past the end: they read its last row."""
        slots = torch.arange(position.shape[0], device=position.device)
        position = position.clamp(max=self.schedule.steps_per_epoch - 1)
        return {name: row[slots, position] for name, row in rows.items()}

    def _compiled_step(self) -> Tensor:
        """The same, compiled and in place."""
        return self._in_place(self._states, self._hypers, self._rows, self._position)

    def _step_in_place(self, states: State, hypers: Any, rows: Any, position: Tensor) -> Tensor:
        updated, metrics = self._stacked_step(states, hypers, self._row(rows, position))
        tree_map(lambda old, new: old.copy_(new), states, updated)
        position.add_(1)
        self._names = list(metrics)
        return stack_metrics(list(metrics.values()))

    def _everything(self) -> list[Tensor]:
        """All that a step changes; capturing a graph must leave it as it was."""
        return [self._position, *leaves(self._states)]

    # --- reading ---

    def _evaluate(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Compiled, all slots are evaluated, so that shapes stay what they were."""
        if self.compiled:
            by_key = dict(zip(keys, rows, strict=True))
            rows = [by_key.get(key or "", rows[0]) for key in self._slots]
            states, hypers = self._states, self._hypers
            columns = [self._slots.index(key) for key in keys]
        else:
            index = self._index(keys)
            states = tree_map(lambda stack: stack.index_select(0, index), self._states)
            hypers = tree_map(lambda stack: stack.index_select(0, index), self._hypers)
            columns = list(range(len(keys)))
        stacked = {name: send(torch.stack([lane_rows[name] for lane_rows in rows]), self.device) for name in rows[0]}
        if self.compiled and self.device.type == "cuda":
            shapes = shapes_of(stacked)
            if shapes not in self._graphed_sums:
                evaluate = lambda row: self._stacked_evaluate(self._states, self._hypers, row)
                self._graphed_sums[shapes] = GraphedSums(evaluate, stacked, 1)
            return self._graphed_sums[shapes].run(stacked), columns
        batches = next(iter(stacked.values())).shape[1]
        sums = [
            self._stacked_evaluate(states, hypers, {name: row[:, i] for name, row in stacked.items()})
            for i in range(batches)
        ]
        return {name: torch.stack([s[name] for s in sums]).sum(0) for name in sums[0]}, columns

    def _index(self, keys: Sequence[str]) -> Tensor:
        return send(torch.tensor([self._slots.index(key) for key in keys]), self.device)

    def state(self, key: str) -> State:
        slot = self._slots.index(key)
        return copy_of(tree_map(lambda stack: stack[slot], self._states))

    def states(self, keys: Sequence[str]) -> dict[str, State]:
        """In a few launches for TAKEN_TOGETHER of them."""
        taken: dict[str, State] = {}
        for begun in range(0, len(keys), TAKEN_TOGETHER):
            some = keys[begun : begun + TAKEN_TOGETHER]
            index = self._index(some)
            rows = tree_map(lambda stack: stack.index_select(0, index).unbind(), self._states)  # noqa: B023
            for row, key in enumerate(some):
                taken[key] = tree_map(lambda parts: parts[row], rows)  # noqa: B023
        return taken

    def hypers(self, key: str) -> Hypers:
        slot = self._slots.index(key)
        return copy_of(tree_map(lambda stack: stack[slot], self._hypers))


def power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _repeat(tensor: Tensor, count: int) -> Tensor:
    return tensor.unsqueeze(0).repeat(count, *[1] * tensor.dim())
