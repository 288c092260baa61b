"""A sweep on a cluster that grows and shrinks: more configs in flight as devices join, fewer devices at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from lanes.pool import find_slots
from tuning.demand import ask
from tuning.searchers import Proposer

LOOK_SECONDS = 5.0


class Elastic:
    """Called from the driver's loop; never waits.

    Args:
        pool: handle of the sweep's `lanes.pool.Pool`.
        proposer: its limit is raised.
        concurrency: number of devices -> configs in flight; None where the user gave a number.
        gpu: the devices are GPUs, for which the cluster may be asked.
    """

    def __init__(self, pool: Any, proposer: Proposer, concurrency: Callable[[int], int] | None, gpu: bool):
        self._pool, self._proposer, self._concurrency, self._gpu = pool, proposer, concurrency, gpu
        self._looked = time.monotonic()
        self._thinning: Any = None
        self._asked = 0

    def step(self) -> None:
        """Every LOOK_SECONDS: while configs are left to propose, grow; after that, let go."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if self._proposer.remaining:
            self._grow()
        else:
            self._thin_out()

    def _grow(self) -> None:
        if self._concurrency is None:
            return
        most = self._concurrency(len(find_slots()))
        if most > self._proposer.limit:
            self._proposer.limit = most
            self._pool.grow.remote(most)

    def _thin_out(self) -> None:
        if self._thinning is not None:
            done, _ = ray.wait([self._thinning], timeout=0)
            if not done:
                return
            in_use = ray.get(self._thinning)
            if self._gpu and in_use != self._asked:
                ask(in_use)
                self._asked = in_use
        self._thinning = self._pool.thin_out.remote()
