"""CUDA graphs: of a step that works in place, captured for one step and for several; and of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lanes.states import copy_into, copy_of
from trainables.family import Hypers, State

Out = TypeVar("Out")
LONGEST = 64
WORTH_LAUNCHING = 8.0
"""Milliseconds of work that hide a graph's launch many times over. A graph holds as many steps as take so long, at most
LONGEST: capturing more costs the host time for each of them, seconds a lane where a step is long."""


class GraphedSteps:
    """A chunk of steps as graph launches.

    Args:
        step: one step, in place on tensors that never move; returns its metrics [m, slots].
        changed: every tensor that a step changes. Warming up and capturing leave them as they were.
        chunk: steps usually asked for at once, an epoch: no graph is longer.
        stream: capture there. Graphs that are replayed side by side need streams of their own: cuBLAS keeps one
            workspace a stream, and graphs captured on one stream would share it.
    """

    def __init__(
        self,
        step: Callable[[], Tensor],
        changed: Sequence[Tensor],
        chunk: int,
        stream: torch.cuda.Stream | None = None,
    ):
        self._step = step
        self._stream = stream
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        before = [tensor.clone() for tensor in changed]
        warm_up(self._step)
        enough = math.ceil(WORTH_LAUNCHING / max(0.01, _milliseconds(self._step)))
        longest = min(chunk, LONGEST, enough)
        self._lengths = [longest, *(length for length in (16, 4, 1) if length < longest)]
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(old)
        torch.cuda.synchronize()

    def run(self, steps: int) -> Tensor:
        """Do `steps` steps. Returns their metrics, [steps, m, slots], not waited for."""
        metrics = []
        for length in self._lengths:
            while steps >= length:
                graph, out = self._graph(length)
                graph.replay()
                metrics.append(out.clone())
                steps -= length
        return torch.cat(metrics)

    def _graph(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if length not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # captured, not run: nothing changes; thread_local: the thread that works out orders may use the GPU too
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                out = torch.stack([self._step() for _ in range(length)])
            self._pool = self._pool or graph.pool()
            self._graphs[length] = graph, out
        return self._graphs[length]


class GraphedSums:
    """An evaluation as graph launches: sums over batches, one replay a batch.

    Args:
        evaluate: sums of one batch, {metric: tensor}, given one batch's rows; reads states that never move.
        rows: as they will be given to `run`, [..., batches, ...]: shapes and types are taken from here.
        dim: the dimension that counts batches.
        stream: see `GraphedSteps`.
    """

    def __init__(
        self,
        evaluate: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        rows: Mapping[str, Tensor],
        dim: int,
        stream: torch.cuda.Stream | None = None,
    ):
        self._rows = {name: row.clone() for name, row in rows.items()}
        self._batches = next(iter(rows.values())).shape[dim]
        self._position = torch.zeros(1, dtype=torch.int64, device=next(iter(rows.values())).device)

        def sums() -> dict[str, Tensor]:
            return evaluate({name: r.index_select(dim, self._position).squeeze(dim) for name, r in self._rows.items()})

        self._totals = {name: torch.zeros_like(value) for name, value in warm_up(sums).items()}
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            for name, value in sums().items():
                self._totals[name].add_(value)
            self._position.add_(1)

    def run(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all batches, not waited for."""
        for name, buffer in self._rows.items():
            buffer.copy_(rows[name])
        for tensor in (self._position, *self._totals.values()):
            tensor.zero_()
        for _ in range(self._batches):
            self._graph.replay()
        return {name: total.clone() for name, total in self._totals.items()}


class GraphedInit:
    """A lane's first state as one graph launch: drawing it takes hundreds to thousands of small kernels.

    Args:
        init: (hypers, seed) -> state, in plain calls; the captured kernels are the same, so the state is too, to the
            bit.
        hypers, seed: as they will be given to `run`.
    """

    def __init__(self, init: Callable[[Hypers, Tensor], State], hypers: Hypers, seed: Tensor):
        self._hypers, self._seed = copy_of(dict(hypers)), seed.clone()
        warm_up(lambda: init(self._hypers, self._seed))
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._state = init(self._hypers, self._seed)

    def run(self, hypers: Hypers, seed: Tensor) -> State:
        """A state of the caller's own, not waited for."""
        copy_into(self._hypers, dict(hypers))
        self._seed.copy_(seed)
        self._graph.replay()
        return copy_of(self._state)


def warm_up(work: Callable[[], Out]) -> Out:
    """Work on a stream of its own: compiles, tunes, and lets allocations settle before anything is captured."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            out = work()
    torch.cuda.current_stream().wait_stream(side)
    return out


def _milliseconds(work: Callable[[], object]) -> float:
    """Of one call by itself, launching included."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace of tens of megabytes a stream, for as long as the process lives."""
    return torch.cuda.Stream(device)
