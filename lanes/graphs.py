"""CUDA graphs of a step that works in place: captured for one step and for several, replayed as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 64
"""Steps of the longest graph: enough to hide launching, few enough to capture quickly."""


class GraphedSteps:
    """A chunk of steps as graph launches.

    Args:
        step: one step, in place on tensors that never move; returns its metrics [m, slots].
        changed: every tensor that a step changes. Warming up and capturing leave them as they were.
        chunk: steps usually asked for at once, an epoch: a graph of that length is made if it is not too long.
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
        self._lengths = sorted({min(chunk, LONGEST), 16, 4, 1}, reverse=True)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        before = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, tunes, and lets allocations settle before anything is captured
                self._step()
        torch.cuda.current_stream().wait_stream(side)
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
