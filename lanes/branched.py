"""The branched engine: K separately compiled lanes, each a CUDA graph on a stream of its own, replayed side by side.

Best for convolutions, which stacking turns into slow grouped ones. All lanes share one compiled step (their shapes are
equal), so the program is compiled once; a slot is a set of buffers and the graphs captured over them, and a lane that
comes or goes is a copy into or out of a slot. GPU only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lanes.compiling import compile_lanes
from lanes.engine import Engine, Placing, send, shapes_of, stack_metrics
from lanes.graphs import GraphedSteps, GraphedSums
from lanes.states import copy_into, copy_of, leaves, tree_map
from trainables.family import Hypers, State

STREAMS = 16
TURN = 64
"""Steps launched of one lane before the next one's."""


class _Slot:
    """One lane's buffers, which never move, and the graphs over them."""

    def __init__(self, state: State, hyper: Hypers, device: torch.device, stream: torch.cuda.Stream):
        self.state = tree_map(_buffer, state)
        self.hyper = copy_of(dict(hyper))
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.rows: dict[str, Tensor] = {}
        self.stream = stream
        self.graphed: GraphedSteps | None = None
        self.graphed_sums: dict[tuple, GraphedSums] = {}  # by the shapes of what an evaluation reads


def _buffer(tensor: Tensor) -> Tensor:
    """A copy for a slot. Weights of convolutions get their channels last, as tensor cores read them: a convolution's
    result follows its weight, and what comes after follows that; else every convolution turns its tensors round."""
    return tensor.clone(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


class BranchedEngine(Engine):
    name = "branched"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.device.type != "cuda":
            raise ValueError("the branched engine runs on a GPU")
        self.in_graphs = True
        self._streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        self._slots: list[_Slot] = []
        self._free: list[_Slot] = []
        self._slot_of: dict[str, _Slot] = {}
        self._names: list[str] = []
        # a lane's step alone is hundreds of kernels of microseconds
        self._in_place = compile_lanes(self._step_in_place, self.device, small_kernels=True)
        self._compiled_evaluate = compile_lanes(self._evaluate_one, self.device)

    def _place(self, arrived: Sequence[Placing]) -> None:
        for lane, state, hyper in arrived:
            if self._free:
                slot = self._free.pop()
                copy_into(slot.state, state)
                copy_into(slot.hyper, dict(hyper))
            else:
                slot = _Slot(state, hyper, self.device, self._streams[len(self._slots) % STREAMS])
                self._slots.append(slot)
            self._slot_of[lane.key] = slot

    def _drop(self, keys: Sequence[str]) -> None:
        self._free += [self._slot_of.pop(key) for key in keys]

    def _set_orders(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        for key, lane_rows in rows.items():
            slot = self._slot_of[key]
            if not slot.rows:
                slot.rows = {name: row.to(self.device, copy=True) for name, row in lane_rows.items()}
            for name, row in lane_rows.items():
                slot.rows[name].copy_(send(row, self.device))
            slot.position.fill_(self.lanes[key].step % self.schedule.steps_per_epoch)

    def _step_in_place(self, state: State, hyper: Any, rows: Any, position: Tensor) -> Tensor:
        place = position.clamp(max=self.schedule.steps_per_epoch - 1).reshape(1)
        row = {name: values.index_select(0, place).squeeze(0) for name, values in rows.items()}
        updated, metrics = self._step_one(state, hyper, row)
        tree_map(lambda old, new: old.copy_(new), state, updated)
        position.add_(1)
        self._names = list(metrics)
        return stack_metrics(list(metrics.values()))

    def _advance(self, steps: int) -> tuple[list[str], Tensor]:
        main = torch.cuda.current_stream()
        slots = [self._slot_of[key] for key in self.lanes]
        for slot in slots:
            if slot.graphed is None:
                self._capture(slot)
        for slot in slots:
            slot.stream.wait_stream(main)
        parts: list[list[Tensor]] = [[] for _ in slots]
        # in turns: a stream takes some thousand launches and then lets the host wait, while the others run dry
        for begun in range(0, steps, TURN):
            for slot, part in zip(slots, parts, strict=True):
                with torch.cuda.stream(slot.stream):
                    assert slot.graphed is not None
                    part.append(slot.graphed.run(min(TURN, steps - begun)))
        for slot, part in zip(slots, parts, strict=True):
            main.wait_stream(slot.stream)
            for curve in part:
                curve.record_stream(main)
        return self._names, torch.stack([torch.cat(part) for part in parts], dim=2)

    def _capture(self, slot: _Slot) -> None:
        changed = [slot.position, *leaves(slot.state)]
        step = lambda: self._in_place(slot.state, slot.hyper, slot.rows, slot.position)
        slot.graphed = GraphedSteps(step, changed, self.schedule.steps_per_epoch, slot.stream)

    def _evaluate(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[int]]:
        main, totals = torch.cuda.current_stream(), []
        for key, lane_rows in zip(keys, rows, strict=True):
            slot = self._slot_of[key]
            placed = {name: send(row, self.device) for name, row in lane_rows.items()}
            shapes = shapes_of(placed)
            if shapes not in slot.graphed_sums:
                slot.graphed_sums[shapes] = self._capture_sums(slot, placed)
            slot.stream.wait_stream(main)
            for row in placed.values():
                row.record_stream(slot.stream)  # its memory must not be handed out again before that stream has read it
            with torch.cuda.stream(slot.stream):
                totals.append(slot.graphed_sums[shapes].run(placed))
        for key, total in zip(keys, totals, strict=True):
            main.wait_stream(self._slot_of[key].stream)
            for value in total.values():
                value.record_stream(main)
        return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}, list(range(len(keys)))

    def _capture_sums(self, slot: _Slot, rows: Mapping[str, Tensor]) -> GraphedSums:
        evaluate = lambda row: self._compiled_evaluate(slot.state, slot.hyper, row)
        return GraphedSums(evaluate, rows, 0, slot.stream)

    def state(self, key: str) -> State:
        return copy_of(self._slot_of[key].state)

    def hypers(self, key: str) -> Hypers:
        return copy_of(self._slot_of[key].hyper)
