"""Choosing an engine: measure a few steps of each at growing lane counts, keep the knee of trial-steps per second.

A choice slower than the serial engine is never picked: serial is one of the rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lanes.engine import Engine
from lanes.memory import is_out_of_memory
from lanes.serial import SerialEngine
from lanes.stacked import StackedEngine, power_of_two
from trainables.family import Arrays, Family, program_key
from trainables.files import code_beside, write_atomically
from trainables.operators import compiled_ahead

log = logging.getLogger(__name__)

MOST_AT_ONCE = 16  # steps of one launch while measuring on a GPU
KNEE = 1.15  # doubling the lanes must bring at least this much, or we stop
COMPILE_PAYS_AFTER = 600.0  # seconds of training ahead, below which compiling on a CPU (20-70 s a program) cannot pay
COMPILE_PAYS_AFTER_ON_GPU = 60.0  # of serial training ahead: a GPU gains tenfold and more from it
FURTHER_PAYS_AFTER = 3.0  # set-ups of a compiled row: with less ahead, more lanes are not tried
SECOND_PAYS_AFTER = 10.0  # the same for the engine that fits the program less


ENGINES = ("serial", "stacked", "stacked, compiled", "branched")


def make_engine(
    name: str,
    lanes: int,
    family: Family,
    program: Any,
    arrays: Arrays,
    device: torch.device | str,
    host_arrays: Arrays | None = None,
) -> Engine:
    """The engine called `name`, for about `lanes` lanes. `host_arrays`: see `lanes.engine.Engine`."""
    what = family, program, arrays, device, host_arrays
    if name == "serial":
        return SerialEngine(*what)
    if name == "branched":
        from lanes.branched import BranchedEngine

        return BranchedEngine(*what)
    compiled = name == "stacked, compiled"
    return StackedEngine(*what, compiled=compiled, slots=lanes if compiled else 1)


def resolve_engine(name: str, device: torch.device | str) -> str:
    """What `--engine NAME` means on a device: stacked is compiled where that takes CUDA graphs."""
    return "stacked, compiled" if name == "stacked" and torch.device(device).type == "cuda" else name


@dataclass(frozen=True)
class Row:
    """One measurement. `rate` counts trial-steps a second, all lanes together; `setup` is compiling, in seconds."""

    engine: str
    lanes: int
    rate: float
    setup: float


@dataclass(frozen=True)
class Choice:
    """What the probe decided, and the table it decided from."""

    engine: str
    lanes: int
    table: tuple[Row, ...]
    cached: bool = False

    def lines(self) -> list[str]:
        """The table as text, the chosen row marked."""
        head = f"{'engine':<18} {'lanes':>5} {'trial-steps/s':>14} {'set-up s':>9}"
        return [head] + [
            f"{r.engine:<18} {r.lanes:>5} {r.rate:>14.1f} {r.setup:>9.1f}"
            + ("  <- chosen" if r.engine == self.engine and r.lanes in (1, self.lanes) else "")
            for r in self.table
        ]


def measure(engine: Engine, hyper: Any, lanes: int, seconds: float) -> tuple[float, float]:
    """(trial-steps a second, set-up seconds) of `lanes` equal lanes; the engine is left empty."""
    keys = [f"probe{i}" for i in range(lanes)]
    started = time.perf_counter()
    if engine.name == "serial" and engine.device.type == "cuda":
        compile_kernels(engine, hyper)
    for i, key in enumerate(keys):
        engine.insert(key, hyper, i)
    # a GPU trains an epoch at a time in a sweep, and is far slower when asked for one step at a time
    chunk = min(engine.until_epoch_end(), MOST_AT_ONCE) if engine.runs_ahead else 1
    _train(engine, chunk)
    setup = time.perf_counter() - started
    started, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - started < seconds:
        steps += _train(engine, chunk)
    rate = steps * lanes / (time.perf_counter() - started)
    engine.remove(keys)
    return rate, setup


def compile_kernels(engine: Engine, hyper: Any) -> None:
    """Those that the program launches itself, side by side: every further engine launches them too.

    Args:
        engine: a serial one without lanes, on a GPU.
        hyper: of some lane.
    """
    engine.insert("kernels", hyper, 0)
    with compiled_ahead():
        # a second step reads what the first one left, which may be aligned otherwise than first states
        engine.advance(min(2, engine.until_epoch_end()))
    engine.remove(["kernels"])


def _train(engine: Engine, steps: int) -> int:
    """Train, starting over where a run would end."""
    if next(iter(engine.lanes.values())).step >= engine.schedule.steps:
        lanes = [(lane.key, lane.hyper, lane.seed) for lane in engine.lanes.values()]
        engine.remove([key for key, _, _ in lanes])
        for key, hyper, seed in lanes:
            engine.insert(key, hyper, seed)
    steps = min(steps, engine.until_epoch_end())
    engine.advance(steps)
    return steps


def probe(
    family: Family,
    program: Any,
    hyper: Any,
    arrays: Arrays,
    device: torch.device | str,
    host_arrays: Arrays | None = None,
    *,
    wanted: int,
    expected_steps: float = 0.0,
    seconds: float = 0.25,
    engines: tuple[str, ...] | None = None,
    cache: Path | None = None,
) -> Choice:
    """Measure and choose.

    Args:
        wanted: the most lanes that could ever be here at once; no more are measured.
        expected_steps: trial-steps this device will do for this program; decides what is worth measuring: every row of
            a compiled engine costs its compilation.
        seconds: measuring time of one row.
        engines: names out of ENGINES; default: serial, then what can repay being measured. On a GPU a short sweep tries
            `stacked` uncompiled, a longer one the compiled engines, the one that fits the family first.
        cache: folder of rows measured before, one file a (program, device, versions, code). A row that is known is not
            measured again, so a longer sweep measures only what it alone can repay.
    """
    known = _Known(cache, family, program, device)
    rows: list[Row] = []

    def rate(name: str, lanes: int) -> float:
        """Measure one row; out of memory counts as a rate of 0."""
        if row := known.get(name, lanes):
            rows.append(row)
            return row.rate
        started = time.perf_counter()
        try:
            engine = make_engine(name, lanes, family, program, arrays, device, host_arrays)
            measured, setup = measure(engine, hyper, lanes, seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            measured, setup = 0.0, time.perf_counter() - started
        rows.append(Row(name, lanes, measured, setup))
        known.add(rows[-1])
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        return measured

    def ahead() -> float:
        """Seconds of training to come at the best rate so far."""
        return expected_steps / max(1e-9, *(row.rate for row in rows))

    def climb(name: str, lanes: int, factor: int, patience: float = 0.0) -> None:
        """Grow the lane count until it stops paying, or memory ends, or what is ahead is less than `patience` times
        what the last row took to set up: a further row costs as much and brings a part of it. Where not even the first
        number fits, shrink it until it does."""
        best = rate(name, lanes)
        if not best:
            while lanes > 1 and not best:
                lanes = max(1, lanes // factor)
                best = rate(name, lanes)
            return
        while lanes * factor <= wanted and ahead() >= patience * rows[-1].setup:
            lanes *= factor
            now = rate(name, lanes)
            if now < best * KNEE:
                return
            best = now

    cuda = torch.device(device).type == "cuda"
    if engines is None and cuda:
        rate("serial", 1)
        if ahead() > COMPILE_PAYS_AFTER_ON_GPU:
            # branches are compiled once and captured for each lane; a stack is compiled for each number of lanes
            first = {"branched": 8, "stacked, compiled": 32}
            for name in first if family.convolves(program) else reversed(first):
                if rows[-1].engine == "serial" or ahead() > SECOND_PAYS_AFTER * rows[-1].setup:
                    climb(name, min(first[name], power_of_two(wanted)), 4, FURTHER_PAYS_AFTER)
        else:
            climb("stacked", 2, 4)
    else:
        for name in engines or ("serial", "stacked"):
            if name == "serial":
                rate(name, 1)  # lanes take turns: the rate does not depend on their number
            else:
                climb(name, 2, 4 if cuda else 2)
        if engines is None and ahead() > COMPILE_PAYS_AFTER:
            rate("stacked, compiled", max(2, max(rows, key=lambda r: r.rate).lanes))
    # what an earlier sweep found out costs nothing, if it is for no more lanes than there will be
    allowed = engines or ENGINES
    rows += [row for row in known.others(rows) if row.engine in allowed and row.lanes <= power_of_two(wanted)]
    if not any(row.rate for row in rows):
        raise torch.OutOfMemoryError("no engine fits into memory, not even with one lane")
    fastest = max(rows, key=lambda r: r.rate)
    lanes = wanted if fastest.engine == "serial" else fastest.lanes
    return Choice(fastest.engine, lanes, tuple(rows), cached=known.save())


class _Known:
    """The rows of a program on a device that were ever measured, kept in a file."""

    def __init__(self, folder: Path | None, family: Family, program: Any, device: torch.device | str):
        self._stamp = {
            "program": program_key(family.name, program),
            "device": device_name(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "code": code_digest(family),
        }
        name = hashlib.sha256(json.dumps(self._stamp).encode()).hexdigest()[:16]
        self._path = folder / f"{name}.json" if folder else None
        self._rows = self._read()
        self._new: dict[tuple[str, int], Row] = {}

    def _read(self) -> dict[tuple[str, int], Row]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            table = [Row(**row) for row in json.loads(self._path.read_text())["table"]]
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged: its rows are measured again", self._path)
            return {}
        return {(row.engine, row.lanes): row for row in table}

    def get(self, engine: str, lanes: int) -> Row | None:
        return self._rows.get((engine, lanes))

    def add(self, row: Row) -> None:
        self._new[row.engine, row.lanes] = row

    def others(self, rows: list[Row]) -> list[Row]:
        """Those that are not among `rows`."""
        return [row for row in self._rows.values() if row not in rows]

    def save(self) -> bool:
        """Keep what is new, beside what another device's host may have kept meanwhile. True: nothing is new."""
        if self._new and self._path is not None:
            table = [asdict(row) for row in {**self._read(), **self._new}.values()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({"table": table, **self._stamp}).encode())
        return not self._new


def code_digest(family: Family) -> str:
    """Of the source of the engines and of the family: what was measured of other code may not hold."""
    return code_beside(probe, Family, family.Program)


def device_name(device: torch.device | str) -> str:
    """The device's model, for cache keys and the record: the GPU's name, or the processor's with its core count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} x{os.cpu_count()}"
