"""What every engine does: hold lanes of one program, advance them together, evaluate them, hand out their states.

The law of lanes (tested for every family and engine): a lane's trajectory depends on its config and seed alone. Not on
its slot, on how many neighbours it has, on when they come and go, or on the engine, beyond the rounding of the
arithmetic.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.draws import counter
from trainables.family import Arrays, Family, Hypers, State, hyper_tensors

Curves = dict[str, np.ndarray]


@dataclass
class Lane:
    """A run while it trains. `step` counts update steps done; `rows` are the current epoch's order, [S, ...] each."""

    key: str
    hyper: Any
    seed: int
    step: int = 0


class Engine(ABC):
    """Lanes of one program on one device.

    Args:
        family, program: what a lane computes.
        arrays: the program's data, already on `device`.
        device: where states live.
    """

    name: str

    def __init__(self, family: Family, program: Any, arrays: Arrays, device: torch.device | str = "cpu"):
        self.family = family
        self.program = program
        self.arrays = arrays
        self.device = torch.device(device)
        self.schedule = family.schedule(program)
        self.lanes: dict[str, Lane] = {}
        # on a GPU, what the next epoch and its test read is worked out while the device trains
        self._ahead = ThreadPoolExecutor(1, "orders") if self.device.type == "cuda" else None
        self._orders: dict[tuple[str, str, int], Future] = {}  # (lane, "order" or "test_order", epoch)

    # --- what an engine implements ---

    @abstractmethod
    def _place(self, lane: Lane, state: State, hyper: Hypers) -> None:
        """Take a lane in."""

    @abstractmethod
    def _drop(self, keys: Sequence[str]) -> None:
        """Let lanes go and free what they held."""

    @abstractmethod
    def _set_orders(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give lanes the order of the epoch they are in, {lane: {name: [S, ...]}}."""

    @abstractmethod
    def _advance(self, steps: int) -> tuple[list[str], Tensor]:
        """Do `steps` updates of every lane. Returns metrics' names and values [steps, metrics, lanes], lanes in the
        order of `self.lanes`."""

    @abstractmethod
    def _evaluate(self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Sums of `family.evaluate` over the test batches, {metric: [len(keys)]}."""

    @abstractmethod
    def state(self, key: str) -> State:
        """A copy of a lane's state."""

    @abstractmethod
    def hypers(self, key: str) -> Hypers:
        """A lane's hypers as 0-d tensors."""

    # --- what callers use ---

    def insert(self, key: str, hyper: Any, seed: int, state: State | None = None) -> None:
        """Start a lane, or continue one from a `state` that was taken at any step (copied, moved to the device)."""
        if key in self.lanes:
            raise ValueError(f"lane {key} is already here")
        tensors = hyper_tensors(self.program, hyper, self.device)
        if state is None:
            state = self.family.init(self.program, tensors, counter(seed, self.device))
        else:
            state = tree_map(lambda t: t.detach().to(self.device, copy=True), state)
        lane = Lane(key, hyper, seed, step=int(state["step"]))
        self._place(lane, state, tensors)
        self.lanes[key] = lane
        if lane.step < self.schedule.steps:
            self._refresh_orders([lane])

    def remove(self, keys: Sequence[str]) -> None:
        """Free lanes. Neighbours do not notice."""
        self._drop(keys)
        for key in keys:
            del self.lanes[key]
        gone = set(keys)
        for wanted in [wanted for wanted in self._orders if wanted[0] in gone]:
            del self._orders[wanted]

    def until_epoch_end(self) -> int:
        """Steps that every lane can still do before the first of them ends its epoch."""
        steps = self.schedule.steps_per_epoch
        return min(steps - lane.step % steps for lane in self.lanes.values())

    def advance(self, steps: int) -> Curves:
        """Train every lane for `steps` updates, at most `until_epoch_end()`.

        Returns {metric: float64 array [steps, lanes]}, lanes in the order of `self.lanes`.
        """
        if steps > self.until_epoch_end():
            raise ValueError(f"{steps} steps would cross the end of an epoch")
        with autocast(self.program, self.device):
            names, values = self._advance(steps)
        curves = values.detach().to("cpu", torch.float64).numpy()
        ended = []
        for lane in self.lanes.values():
            lane.step += steps
            if lane.step % self.schedule.steps_per_epoch == 0 and lane.step < self.schedule.steps:
                ended.append(lane)
        self._refresh_orders(ended)
        return {name: curves[:, i] for i, name in enumerate(names)}

    def evaluate(self, keys: Sequence[str]) -> dict[str, dict[str, float]]:
        """Evaluate lanes that have just ended an epoch, on that epoch's test batches. {key: {metric: mean}}.

        `test_order` may give one epoch more than another (the test set itself at the last one, say): lanes whose rows
        have equal names and shapes are evaluated together.
        """
        alike: dict[tuple, list[tuple[str, Mapping[str, Tensor]]]] = {}
        for key in keys:
            lane = self.lanes[key]
            epoch = lane.step // self.schedule.steps_per_epoch - 1
            rows = self._order("test_order", lane, epoch)
            shapes = tuple((name, tuple(row.shape)) for name, row in sorted(rows.items()))
            alike.setdefault(shapes, []).append((key, rows))
        means: dict[str, dict[str, float]] = {}
        for group in alike.values():
            together = [key for key, _ in group]
            with torch.no_grad(), autocast(self.program, self.device):
                sums = self._evaluate(together, [rows for _, rows in group])
            totals = {name: values.detach().to("cpu", torch.float64).numpy() for name, values in sums.items()}
            counts = totals.pop("count")
            for i, key in enumerate(together):
                means[key] = {name: float(values[i] / counts[i]) for name, values in totals.items()}
        return {key: means[key] for key in keys}

    def inspect(self, keys: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """The family's covariates of each lane's present state, {key: {name: array}}."""
        with torch.no_grad():
            return {
                key: {
                    name: value.detach().cpu().numpy()
                    for name, value in self.family.inspect(self.program, self.state(key), self.hypers(key)).items()
                }
                for key in keys
            }

    def _refresh_orders(self, lanes: Sequence[Lane]) -> None:
        """Hand lanes at the start of an epoch its order, and have what comes after it worked out ahead."""
        epochs = {lane.key: lane.step // self.schedule.steps_per_epoch for lane in lanes}
        if lanes:
            self._set_orders({lane.key: self._order("order", lane, epochs[lane.key]) for lane in lanes})
        if self._ahead is not None:
            for lane in lanes:
                epoch = epochs[lane.key]
                self._order_ahead("test_order", lane, epoch)
                if epoch + 1 < self.schedule.epochs:
                    self._order_ahead("order", lane, epoch + 1)

    def _order(self, kind: str, lane: Lane, epoch: int) -> Mapping[str, Tensor]:
        """The family's `order` or `test_order` of a lane, which may have been worked out already."""
        future = self._orders.pop((lane.key, kind, epoch), None)
        if future is not None:
            return future.result()
        return getattr(self.family, kind)(self.program, self.arrays, lane.seed, epoch)

    def _order_ahead(self, kind: str, lane: Lane, epoch: int) -> None:
        assert self._ahead is not None
        make = getattr(self.family, kind)
        self._orders[lane.key, kind, epoch] = self._ahead.submit(make, self.program, self.arrays, lane.seed, epoch)

    def _step_one(self, state: State, hyper: Hypers, row: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
        """One update of one lane: gather its batch, then the family's step."""
        return self.family.step(self.program, state, hyper, self.family.batch(self.program, self.arrays, row))

    def _evaluate_one(self, state: State, hyper: Hypers, row: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.family.evaluate(self.program, state, hyper, self.family.batch(self.program, self.arrays, row))


def autocast(program: Any, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products over float32 master weights where the program asks for them."""
    if program.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def stack_metrics(values: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Metrics of any dtypes as one tensor of the widest floating dtype among them."""
    kind = torch.float32
    for value in values:
        if value.dtype.is_floating_point:
            kind = torch.promote_types(kind, value.dtype)
    return torch.stack([value.to(kind) for value in values], dim=dim)


def put(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """The family's arrays on the device, once. Integer images stay integers; `batch` converts what it gathers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anything write to it
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


def tree_map(f: Any, *trees: Any) -> Any:
    """Apply f to the tensors of equally shaped nested dicts."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: tree_map(f, *(tree[key] for tree in trees)) for key in first}
    return f(*trees)
