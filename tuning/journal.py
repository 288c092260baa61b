"""The sweep's journal: every proposal, report, decision and end, one JSON line each, on disk before it counts.

The journal is what a sweep IS: the runs table, MLflow, resume and replay are all made from it. Events:

    begin      {session, versions}                    and what was asked for after the search: confirm, race ...
    proposed   {index, phase, trial, config_key, label, algorithm, point, values, program, hyper, epochs,
                runs: {seed: run_key}}                index -1 and parent {seed: [run_key, epoch]}: PBT made it;
                                                      index -1 and phase race or confirm: further seeds of a config
    resumed    {trial, config_key, replaces}          the same config under a new trial id, after a restart
    report     {trial, config_key, epoch, progress, values, spread, per_seed, engine, lanes, device, done}
    decision   {trial, config_key, epoch, decision}   what the scheduler made of it: CONTINUE, STOP, PAUSE, EXPLOIT
    race       {look, seeds, started, most, margin, beaten, alive, crashed, verdict, next}
                                                      who dropped out after `seeds`; the next look is at `next`
    confirm    {k, seeds, chosen, ties}               the best configs, to be run on these fresh seeds
    end        {trial, config_key, stop_reason, epoch, error}
    finish     {reason}                               the sweep is over: done, time budget, interrupted
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Journal:
    """Appends events. One writer at a time, the driver."""

    def __init__(self, path: Path):
        self._lock = threading.Lock()
        _cut_torn_line(path)
        self._file = open(path, "ab")  # noqa: SIM115  # held for the sweep's life

    def write(self, event: str, **fields: Any) -> Event:
        """Append one event and wait until it is on disk. Returns it."""
        entry = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        data = (json.dumps(entry, default=_plain) + "\n").encode()
        with self._lock:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        return entry

    def close(self) -> None:
        self._file.close()


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """(event, offset after it) of every whole line from byte `offset`; an unfinished last line is left for later."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


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
