"""The serial engine: one lane after another, plain calls. The control that every other engine is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lanes.engine import Engine, Lane, Placing, send, stack_metrics
from lanes.states import copy_of, in_rows
from trainables.family import Hypers, State


class SerialEngine(Engine):
    name = "serial"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._states: dict[str, State] = {}
        self._hypers: dict[str, Hypers] = {}
        self._rows: dict[str, Mapping[str, Tensor]] = {}

    def _place(self, arrived: Sequence[Placing]) -> None:
        for lane, state, hyper in arrived:
            self._states[lane.key] = state
            self._hypers[lane.key] = hyper

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._states[key], self._hypers[key]
            self._rows.pop(key, None)

    def _set_orders(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        for key, lane_rows in rows.items():
            self._rows[key] = {name: send(row, self.device) for name, row in lane_rows.items()}

    def _advance(self, steps: int) -> tuple[list[str], Tensor]:
        curves = [self._advance_lane(lane, steps) for lane in self.lanes.values()]
        names = list(curves[0])
        return names, stack_metrics([torch.stack([curve[name] for curve in curves], dim=1) for name in names], dim=1)

    def _advance_lane(self, lane: Lane, steps: int) -> dict[str, Tensor]:
        state, hyper, rows = self._states[lane.key], self._hypers[lane.key], self._rows[lane.key]
        first = lane.step % self.schedule.steps_per_epoch
        history = []
        for position in range(first, first + steps):
            updated, metrics = self._step_one(state, hyper, {name: row[position] for name, row in rows.items()})
            state = in_rows(updated)
            history.append(metrics)
        self._states[lane.key] = state
        return {name: torch.stack([metrics[name] for metrics in history]) for name in history[0]}

    def _evaluate(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[int]]:
        totals = []
        for key, lane_rows in zip(keys, rows, strict=True):
            batches = len(next(iter(lane_rows.values())))
            sums = [
                self._evaluate_one(
                    self._states[key],
                    self._hypers[key],
                    {name: send(row[i], self.device) for name, row in lane_rows.items()},
                )
                for i in range(batches)
            ]
            totals.append({name: torch.stack([s[name] for s in sums]).sum(0) for name in sums[0]})
        return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}, list(range(len(keys)))

    def state(self, key: str) -> State:
        return copy_of(self._states[key])

    def hypers(self, key: str) -> Hypers:
        return self._hypers[key]
