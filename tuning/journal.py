"""The sweep's journal: every proposal, report, decision and end, one JSON line each, on disk before it counts.

A proposal is on disk before anybody trains it. What Tune's loop says of one result (report, decision, end) is handed
to the operating system at once, so that killing the driver loses none of it, and reaches the disk together, before the
loop goes on: a machine that loses power can cost the end of the journal, never its middle, and --resume hears that
end again.

The journal is what a sweep IS: the runs table, MLflow, resume and replay are all made from it. Events:

    begin     {versions, git, code, resumed}         a driver takes the sweep up; with what was asked for after the
                                                     search: confirm, confirm_seeds, race, race_seeds, margin
    proposed  {index, phase, trial, config_key, label, algorithm, point, values, program, hyper, epochs,
               runs: {seed: run_key}}                index -1 and parent {seed: [run_key, epoch]}: PBT made it;
                                                     index -1 and phase race or confirm: further seeds of a config
    resumed   {trial, config_key, replaces}          the same config under a new trial id, after a restart
    report    {trial, config_key, epoch, progress, values, spread, per_seed, engine, lanes, device, done}
    decision  {trial, config_key, epoch, decision}   what the scheduler made of it: CONTINUE, STOP, PAUSE, EXPLOIT;
                                                     with EXPLOIT, `copy` is the config that goes on instead
    race      {look, seeds, started, most, margin, beaten, alive, crashed, verdict, next}
                                                     who dropped out after `seeds`; the next look is at `next`
    confirm   {k, seeds, chosen, ties}               the best configs, to be run on these fresh seeds
    end       {trial, config_key, stop_reason, epoch, error}
    retry     {trial, config_key, stop_reason}       a config that failed runs again (--retry): it has no end any more
    notice    {text}                                 what the user was told meanwhile: out of memory, and so on
    finish    {reason, detail}                       the sweep is over: done, time budget, interrupted, too many crashes

Events are in the order in which they happened. `time` follows the wall clock but never goes back: not when somebody
sets the clock, and not from one session to the next.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trainables.family import BadValue
from tuning.ground import StorageFailed

Event = dict[str, Any]
TOGETHER = ("report", "decision", "end")


class Journal:
    """Appends events. One writer at a time, the driver."""

    def __init__(
        self,
        path: Path,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._lock = threading.Lock()
        self._unsettled = False
        self._path = path
        _cut_torn_line(path)
        self._file = open(path, "ab")  # noqa: SIM115  # held for the sweep's life
        self._clock, self._started = clock, clock()
        last = _last_time(path)
        self._wall = wall() if last is None else max(wall(), last + timedelta(milliseconds=1))

    @property
    def now(self) -> datetime:
        """The time for the next event: the wall clock's when this session began, and what has passed since."""
        return self._wall + timedelta(seconds=self._clock() - self._started)

    def write(self, event: str, **fields: Any) -> Event:
        """Append one event and wait until it is on disk, or, for TOGETHER, until `settle`. Returns it."""
        entry = {"event": event, "time": self.now.isoformat(timespec="milliseconds"), **fields}
        data = (json.dumps(entry, default=_plain) + "\n").encode()
        with self._writing():
            self._append(entry, data)
        return entry

    def settle(self) -> None:
        """Wait until everything written is on disk."""
        with self._writing():
            if self._unsettled:
                self._sync()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except OSError as error:
            raise StorageFailed(f"{self._place} could not be written ({error.strerror or error})") from error

    @property
    def _place(self) -> str:
        return str(self._path)

    def _append(self, entry: Event, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        if os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino:
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
        self._unsettled = True
        if entry.get("event") not in TOGETHER:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsettled = False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk left in the buffer was never said to be written
            if self._unsettled:
                self._sync()
        with contextlib.suppress(OSError):
            self._file.close()


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """(event, offset after it) of every whole line from byte `offset`; an unfinished last line is left for later.

    Raises `BadValue` where a line is no event.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _event(path, line, offset), offset


def _event(path: Path, line: bytes, end: int) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise BadValue(
            f"{path} is damaged: what ends at byte {end} is no event ({line[:40]!r}); bring back a copy of it, or "
            "begin a new sweep"
        )
    return event


def cut_off(path: Path) -> bool:
    """Whether the driver that wrote this journal ended without a word, or was interrupted."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(last)
    except ValueError:
        return True
    return event["event"] != "finish" or event["reason"] == "interrupted"


def _last_time(path: Path) -> datetime | None:
    """The time of the last event."""
    last = None
    for event, _ in read(path):
        last = event
    return datetime.fromisoformat(last["time"]) if last else None


def _cut_torn_line(path: Path) -> None:
    """Drop the half line that a kill in the middle of a write left behind."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        size = len(whole[0]) + len(whole[1])
        if size != path.stat().st_size:
            os.truncate(path, size)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong in the journal")
