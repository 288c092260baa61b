"""Rows and checkpoints are written by a thread of their own, so that no device waits for a disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Protocol

from lanes.records import StorageLost
from lanes.underway import Underway

if TYPE_CHECKING:
    import numpy as np

    from lanes.states import Parcel
    from trainables.family import State

MOST_WAITING = 64
"""Checkpoints that may wait to be written: each holds a state in the host's memory."""
MOST_BEHIND = 0.5
"""Seconds that the disk may be behind with checkpoints when one is added that could be left out."""
FIRST_RATE = 200e6
"""Bytes a second that a disk takes, until it has been seen."""


class Recorder(Protocol):
    """Where curves go; `tuning.curves` writes Parquet."""

    def steps(self, run_key: str, first_step: int, curves: Mapping[str, np.ndarray]) -> None: ...

    def epoch(self, run_key: str, row: Mapping[str, Any], values: Mapping[str, float]) -> None: ...

    def covariates(self, run_key: str, epoch: int, values: Mapping[str, np.ndarray]) -> None: ...

    def flush(self, force: bool = False) -> None: ...


class Checkpoints(Protocol):
    """Where states go; `tuning.checkpoints` writes safetensors."""

    def save(self, run_key: str, step: int, state: State, extra: Mapping[str, Any]) -> None: ...

    def load(self, run_key: str, at_most: int | None = None) -> tuple[State, dict[str, Any]] | None: ...


class Writer:
    """Does what it is told in the order it was told, later.

    A checkpoint vouches for the rows before it, and a report for both: whoever needs something to be on disk waits for
    the `Future` of it, and everything given before is there too. An error of what nobody waits for is raised by
    `check`; an error of what has a future, by that.

    Args:
        recorder, checkpoints: where to; used by the thread alone from here on.
    """

    def __init__(self, recorder: Recorder, checkpoints: Checkpoints):
        self._recorder, self._checkpoints = recorder, checkpoints
        self._thread = ThreadPoolExecutor(1, "writer")
        self._room = Semaphore(MOST_WAITING)
        self._last: Future = Future()
        self._last.set_result(None)
        self._saves: dict[str, Future] = {}  # run key -> its newest checkpoint's writing
        self._unsaved = Underway()  # checkpoints
        self._rate = FIRST_RATE
        self._failed: list[BaseException] = []
        self._unwritten: BaseException | None = None  # why rows are not on disk that were to be flushed

    def steps(self, run_key: str, first_step: int, curves: Mapping[str, np.ndarray]) -> None:
        self._do(self._recorder.steps, run_key, first_step, curves)

    def epoch(self, run_key: str, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self._do(self._recorder.epoch, run_key, row, values)

    def covariates(self, run_key: str, epoch: int, values: Mapping[str, np.ndarray]) -> None:
        self._do(self._recorder.covariates, run_key, epoch, values)

    def write_some(self) -> None:
        """Have rows written, if it is time."""
        self._do(self._recorder.flush)

    def flush(self) -> Future:
        """Have all rows written that were recorded so far."""
        return self._submit(self._flush)

    def save(self, run_key: str, step: int, parcel: Parcel, extra: Mapping[str, Any]) -> Future:
        """Write all rows recorded so far, then a checkpoint. Neither state nor `extra` is to be changed afterwards."""
        self._room.acquire()
        self._submit(self._flush)
        self._saves[run_key] = self._submit(self._save, run_key, step, parcel, extra)
        self._unsaved.add(self._saves[run_key], parcel.bytes)
        return self._saves[run_key]

    def keeps_up(self, size: int, chosen: int = 0) -> bool:
        """Whether a checkpoint of `size` bytes would be written soon, after `chosen` bytes that are to come before it:
        the rows of every report queue behind checkpoints, and a disk may be slower than a GPU makes states."""
        waiting = chosen + self._unsaved.bytes
        return not waiting or (waiting + size) / self._rate <= MOST_BEHIND

    def load(self, run_key: str, at_most: int | None = None) -> tuple[State, dict[str, Any]] | None:
        """What the checkpoints hold once what was given before is written."""
        if run_key in self._saves:
            self._saves.pop(run_key).exception()
        return self._checkpoints.load(run_key, at_most)

    def settle(self) -> None:
        """Wait until everything given is written. Raises what could not be."""
        self._last.exception()
        self.check()
        self._last.result()

    def check(self) -> None:
        """Raise what has gone wrong since the last time, of what nobody waits for."""
        if self._failed:
            error = self._failed[0]
            self._failed.clear()
            raise error

    # --- in the thread ---

    def _flush(self) -> None:
        try:
            self._recorder.flush(force=True)
        except BaseException as error:
            self._unwritten = error
            raise
        self._unwritten = None

    def _save(self, run_key: str, step: int, parcel: Parcel, extra: Mapping[str, Any]) -> None:
        try:
            if self._unwritten is not None:
                raise StorageLost(f"no checkpoint without the rows before it: {self._unwritten}")
            begun = time.perf_counter()
            self._checkpoints.save(run_key, step, parcel.wait(), extra)
            seen = parcel.bytes / max(1e-6, time.perf_counter() - begun)
            self._rate += (seen - self._rate) / 8
        finally:
            self._room.release()

    def _submit(self, work: Callable[..., None], *args: Any) -> Future:
        self._last = self._thread.submit(work, *args)
        return self._last

    def _do(self, work: Callable[..., None], *args: Any) -> None:
        self._submit(self._noting, work, *args)

    def _noting(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._failed.append(error)
            raise
