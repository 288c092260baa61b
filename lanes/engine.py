"""What every engine does: hold lanes of one program, advance them together, evaluate them, hand out their states.

The law of lanes (tested for every family and engine): a lane's trajectory depends on its config and seed alone. Not on
its slot, on how many neighbours it has, on when they come and go, or on the engine, beyond the rounding of the
arithmetic.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lanes.graphs import GraphedInit
from lanes.orders import Orders
from lanes.states import copy_of, tree_map
from trainables.draws import counter
from trainables.family import Arrays, Family, Hypers, State, hyper_tensors

Curves = dict[str, np.ndarray]
log = logging.getLogger(__name__)


class Fetch:
    """Tensors on their way to the host; the device may go on with other work meanwhile.

    Args:
        tensors: {name: tensor on the device}. What is done on the device after this is not seen.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._done: torch.cuda.Event | None = None
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in self._tensors.items()
            }
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> dict[str, np.ndarray]:
        """The values, once they are here."""
        if self._done is not None:
            self._done.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in self._tensors.items()}


@dataclass(frozen=True)
class Chunk:
    """Steps that the device has been told to do: `wait` gives {metric: float64 [steps, lanes]}, lanes as in `keys`."""

    keys: tuple[str, ...]
    steps: int
    names: tuple[str, ...]
    columns: tuple[int, ...]
    values: Fetch

    def wait(self) -> Curves:
        values = self.values.wait()["curves"].astype(np.float64)[:, :, list(self.columns)]
        return {name: values[:, i] for i, name in enumerate(self.names)}


@dataclass(frozen=True)
class Evaluation:
    """Evaluations under way: `wait` gives {key: {metric: mean}}. A group is of one set: what its metrics' names begin
    with, the lanes, their columns, and the sums."""

    keys: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...], tuple[int, ...], Fetch], ...]

    def wait(self) -> dict[str, dict[str, float]]:
        means: dict[str, dict[str, float]] = {key: {} for key in self.keys}
        for prefix, keys, columns, sums in self.groups:
            totals = {name: values.astype(np.float64)[list(columns)] for name, values in sums.wait().items()}
            counts = totals.pop("count")
            for i, key in enumerate(keys):
                means[key] |= {prefix + name: float(values[i] / counts[i]) for name, values in totals.items()}
        return means


@dataclass(frozen=True)
class Inspection:
    """Covariates under way: `wait` gives {key: {name: array}}."""

    fetches: Mapping[str, Fetch]

    def wait(self) -> dict[str, dict[str, np.ndarray]]:
        return {key: fetch.wait() for key, fetch in self.fetches.items()}


@dataclass(frozen=True)
class Arrival:
    """A lane that is to be inserted: to start, or to continue from `state`, which was taken at `step`."""

    key: str
    hyper: Any
    seed: int
    state: State | None = None
    step: int = 0


@dataclass
class Lane:
    """A run while it trains. `step` counts update steps done."""

    key: str
    hyper: Any
    seed: int
    step: int = 0


Placing = tuple[Lane, State, Hypers]
"""A lane that gets a slot, with its state and its hypers on the device."""


class Engine(ABC):
    """Lanes of one program on one device.

    Args:
        family, program: what a lane computes.
        arrays: the program's data, already on `device`.
        device: where states live.
        host_arrays: the same data on the host, where what an epoch reads is worked out; on the device without them.
    """

    name: str

    def __init__(
        self,
        family: Family,
        program: Any,
        arrays: Arrays,
        device: torch.device | str = "cpu",
        host_arrays: Arrays | None = None,
    ):
        family.import_all()
        self.family = family
        self.program = program
        self.arrays = arrays
        self.host_arrays = arrays if host_arrays is None else host_arrays
        self.device = torch.device(device)
        self.schedule = family.schedule(program)
        self.lanes: dict[str, Lane] = {}
        # on a GPU worked out while the device trains, and on the host: on the device it would queue behind the
        # training that it is meant to be ready for
        self._orders = Orders(family, program, self.host_arrays, ahead=self.device.type == "cuda")
        self._side = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._prepared: dict[str, tuple[State | None, Hypers]] = {}  # lane to come -> made on the side stream
        self.in_graphs = False  # work is captured in CUDA graphs
        self._graphed_init: GraphedInit | None = None
        self.runs_ahead = self.device.type == "cuda"  # `launch` comes back before the work is done
        self.setup_seconds = 0.0  # compiling and capturing so far

    # --- what an engine implements ---

    @abstractmethod
    def _place(self, arrived: Sequence[Placing]) -> None:
        """Take lanes in: each with a state of its own and its hypers, on the device."""

    @abstractmethod
    def _drop(self, keys: Sequence[str]) -> None:
        """Let lanes go and free what they held."""

    @abstractmethod
    def _set_orders(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give lanes the order of the epoch they are in, {lane: {name: [S, ...]}}."""

    @abstractmethod
    def _advance(self, steps: int) -> tuple[list[str], Tensor]:
        """Do `steps` updates of every lane. Returns metrics' names and values [steps, metrics, columns], see
        `_columns`."""

    @abstractmethod
    def _evaluate(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Sums of `family.evaluate` over the test batches, {metric: [columns]}, and the column of each key."""

    def _columns(self) -> list[int]:
        """The column of each lane of `self.lanes` in what `_advance` returns."""
        return list(range(len(self.lanes)))

    @abstractmethod
    def state(self, key: str) -> State:
        """A copy of a lane's state."""

    def states(self, keys: Sequence[str]) -> dict[str, State]:
        """Copies of several lanes' states."""
        return {key: self.state(key) for key in keys}

    @abstractmethod
    def hypers(self, key: str) -> Hypers:
        """A lane's hypers as 0-d tensors."""

    # --- what callers use ---

    def insert(self, key: str, hyper: Any, seed: int, state: State | None = None) -> None:
        """Start a lane, or continue one from a `state` that was taken at any step (copied, moved to the device)."""
        self.insert_all([Arrival(key, hyper, seed, state, 0 if state is None else int(state["step"]))])

    def insert_all(self, arrivals: Sequence[Arrival]) -> None:
        """Start or continue several lanes."""
        arrived: dict[str, Placing] = {}
        for arrival in arrivals:
            if arrival.key in self.lanes or arrival.key in arrived:
                raise ValueError(f"lane {arrival.key} is already here")
            lane = Lane(arrival.key, arrival.hyper, arrival.seed, arrival.step)
            arrived[arrival.key] = lane, *self._taken_in(arrival)
        if not arrived:
            return
        self._place(list(arrived.values()))
        self.lanes |= {key: lane for key, (lane, _, _) in arrived.items()}
        self._refresh_orders([self.lanes[key] for key in arrived if self.lanes[key].step < self.schedule.steps])

    def prepare(self, arrival: Arrival) -> None:
        """Work out now, beside the training under way, what inserting a lane will need. For engines that run ahead."""
        if arrival.key in self._prepared or self._side is None:
            return
        self._prepared[arrival.key] = self._made(arrival)
        if arrival.step < self.schedule.steps:
            self._orders.expect("order", arrival.seed, arrival.step // self.schedule.steps_per_epoch)

    def _taken_in(self, arrival: Arrival) -> tuple[State, Hypers]:
        """An arrival's state, a copy that is the lane's own, and its hypers, on the device."""
        prepared = arrival.key in self._prepared
        state, tensors = self._prepared.pop(arrival.key) if prepared else self._made(arrival)
        if self._side is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self._side)
            tree_map(lambda tensor: tensor.record_stream(main), {"state": state or {}, "hyper": dict(tensors)})
        return (copy_of(arrival.state, self.device) if state is None else state), tensors

    def _made(self, arrival: Arrival) -> tuple[State | None, Hypers]:
        """An arrival's first state, unless it brings one, and its hypers. On a GPU all such work has one stream beside
        the training: it neither waits for the chunk under way nor overtakes itself."""
        with torch.cuda.stream(self._side) if self._side else contextlib.nullcontext():
            tensors = hyper_tensors(self.program, arrival.hyper, self.device)
            return (self._first_state(tensors, arrival.seed) if arrival.state is None else None), tensors

    def _first_state(self, hypers: Hypers, seed: int) -> State:
        """What the family starts a lane with."""
        init = lambda hypers, seed: self.family.init(self.program, hypers, seed)
        number = send(counter(seed), self.device)
        if self._graphed_init is None and self.in_graphs:
            try:
                self._graphed_init = GraphedInit(init, hypers, number)
            except RuntimeError as error:  # a matrix factorisation, say, cannot be captured
                log.info("first states of %s are made call by call: %s", self.family.name, str(error).splitlines()[0])
                self.in_graphs = False
        return self._graphed_init.run(hypers, number) if self._graphed_init else init(hypers, number)

    def remove(self, keys: Sequence[str]) -> None:
        """Free lanes. Neighbours do not notice."""
        self._drop(keys)
        for key in keys:
            del self.lanes[key]
        self.forget(keys)

    def forget(self, keys: Sequence[str]) -> None:
        """Let go of what was prepared for lanes that do not come, or have left."""
        gone = set(keys)
        for key in gone & self._prepared.keys():
            del self._prepared[key]

    @property
    def spare(self) -> int:
        """Slots that cost the device as much as a lane and hold none."""
        return 0

    def compact(self) -> None:  # noqa: B027  engines without spare slots have nothing to do
        """Give up spare slots."""

    def until_epoch_end(self) -> int:
        """Steps that every lane can still do before the first of them ends its epoch."""
        steps = self.schedule.steps_per_epoch
        return min(steps - lane.step % steps for lane in self.lanes.values())

    def launch(self, steps: int) -> Chunk:
        """Tell the device to train every lane for `steps` updates, at most `until_epoch_end()`. On a GPU this comes
        back long before they are done, and more may be launched behind them."""
        if steps > self.until_epoch_end():
            raise ValueError(f"{steps} steps would cross the end of an epoch")
        with autocast(self.program, self.device):
            names, values = self._advance(steps)
        chunk = Chunk(tuple(self.lanes), steps, tuple(names), tuple(self._columns()), Fetch({"curves": values}))
        ended = []
        for lane in self.lanes.values():
            lane.step += steps
            if lane.step % self.schedule.steps_per_epoch == 0 and lane.step < self.schedule.steps:
                ended.append(lane)
        self._refresh_orders(ended)
        return chunk

    def advance(self, steps: int) -> Curves:
        """`launch`, and wait: {metric: float64 array [steps, lanes]}, lanes in the order of `self.lanes`."""
        return self.launch(steps).wait()

    def launch_evaluation(self, keys: Sequence[str]) -> Evaluation:
        """Evaluate lanes that have just ended an epoch, on that epoch's test batches.

        `test_order` may give one epoch more sets than another (the test set itself at the last one, say): lanes whose
        rows of a set have equal names and shapes are evaluated together.
        """
        alike: dict[tuple, list[tuple[str, Mapping[str, Tensor]]]] = {}
        for key in keys:
            lane = self.lanes[key]
            epoch = lane.step // self.schedule.steps_per_epoch - 1
            for prefix, rows in sets_of(self._orders.get("test_order", lane.seed, epoch)).items():
                alike.setdefault((prefix, shapes_of(rows)), []).append((key, rows))
        groups = []
        for (prefix, _), group in alike.items():
            together = tuple(key for key, _ in group)
            with torch.no_grad(), autocast(self.program, self.device):
                sums, columns = self._evaluate(together, [rows for _, rows in group])
            groups.append((prefix, together, tuple(columns), Fetch(sums)))
        return Evaluation(tuple(keys), tuple(groups))

    def evaluate(self, keys: Sequence[str]) -> dict[str, dict[str, float]]:
        """`launch_evaluation`, and wait: {key: {metric: mean}}."""
        return self.launch_evaluation(keys).wait()

    def launch_inspection(self, keys: Sequence[str]) -> Inspection:
        """Read the family's covariates off each lane's present state."""
        with torch.no_grad():
            return Inspection(
                {key: Fetch(self.family.inspect(self.program, self.state(key), self.hypers(key))) for key in keys}
            )

    def inspect(self, keys: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """`launch_inspection`, and wait: {key: {name: array}}."""
        return self.launch_inspection(keys).wait()

    def _refresh_orders(self, lanes: Sequence[Lane]) -> None:
        """Hand lanes at the start of an epoch its order, and have what comes after it worked out ahead."""
        if not lanes:
            return
        epochs = {lane.key: lane.step // self.schedule.steps_per_epoch for lane in lanes}
        self._set_orders({lane.key: self._orders.get("order", lane.seed, epochs[lane.key]) for lane in lanes})
        for lane in lanes:
            epoch = epochs[lane.key]
            self._orders.expect("test_order", lane.seed, epoch)
            if epoch + 1 < self.schedule.epochs:
                self._orders.expect("order", lane.seed, epoch + 1)
        self._orders.trim(len(self.lanes))

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


def sets_of(rows: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """What `test_order` gave, as what the metrics of each set begin with -> its rows."""
    several = isinstance(next(iter(rows.values())), Mapping)
    return {f"{name}_": of_set for name, of_set in rows.items()} if several else {"": rows}


def shapes_of(rows: Mapping[str, Tensor]) -> tuple:
    """Names and shapes: what evaluations that can be done together, or by one graph, have in common."""
    return tuple((name, tuple(row.shape)) for name, row in sorted(rows.items()))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for the work before it: an ordinary copy to a GPU would."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def put(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """The family's arrays on the device, once. Integer images stay integers; `batch` converts what it gathers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anything write to it
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
