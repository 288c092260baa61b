"""A run as a stack knows it: where it stands, what of it is on the device, and what its config reports."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lanes.engine import Arrival, Chunk, Evaluation, Inspection
from lanes.job import Job, Report, SeedReport
from lanes.states import Parcel
from trainables.family import Family, State


@dataclass
class Run:
    """A run's progress. `epochs` are its per-epoch curves so far; `sums` those of the epoch it is in."""

    key: str
    seed: int
    job: Job
    status: str = "waiting"  # -> training -> parked -> ... -> finished | diverged
    epochs: dict[str, list[float]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    step: int = 0
    device_seconds: float = 0.0
    lanes: int = 0
    state: State | None = None
    accepted: int = 0  # epochs up to which its reports were accepted, or passed
    begun: int = 0  # the step at which it was attached
    passed: dict[int, tuple[Future | None, SeedReport]] = field(default_factory=dict)  # reports not told, by epoch
    hyper: Any = None
    written: Future | None = None  # of what must be on disk before its next report is told
    unsaved: float = 0.0  # seconds of training since its newest checkpoint


@dataclass(frozen=True)
class Flight:
    """Work the device has been given, and what is to be read when it is done.

    `trained` are the runs it advances; `ended` the lanes that end an epoch with it, `tests` and `covariates` theirs;
    `left` those that then gave up their slots for a report, `passed` those that came to a report and go on, each with
    its state where a checkpoint is to be made of it.
    """

    chunk: Chunk
    trained: Mapping[str, Run]
    ended: tuple[str, ...]
    left: Mapping[str, Parcel | None]
    passed: Mapping[str, Parcel | None]
    tests: Evaluation | None
    covariates: Inspection | None


def seed_report(run: Run, family: Family, program: Any) -> SeedReport:
    """What a run says of itself where it stands."""
    values = {}
    if run.epochs:
        curves = {name: np.asarray(values) for name, values in run.epochs.items()}
        values = family.summarize(program, curves)
    status = run.status if run.status in ("finished", "diverged") else "training"
    epoch = run.step // family.schedule(program).steps_per_epoch
    return SeedReport(run.key, status, epoch, run.step, values, run.device_seconds)


def report_of(token: str, seeds: Mapping[int, SeedReport], engine: str, lanes: int) -> Report:
    """What a config says of its runs, which all stand at the same report, or at their ends."""
    going = [seed.epoch for seed in seeds.values() if seed.status != "diverged"]
    epoch = max(going) if going else max(seed.epoch for seed in seeds.values())
    done = all(seed.status != "training" for seed in seeds.values())
    return Report(token, epoch, done, dict(seeds), engine, lanes)


def arrival(run: Run) -> Arrival:
    """A run that is to get a slot."""
    return Arrival(lane_key(run), run.hyper, run.seed, run.state, run.step)


def lane_key(run: Run) -> str:
    """What a run is called in an engine."""
    return f"{run.job.token}/{run.seed}"
