"""What goes to a host and what comes back: plain data, importable without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def program_name(fields: Mapping[str, Any]) -> str:
    """A program as one text, equal wherever its fields are: what placement tells programs apart by."""
    return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True)
class Job:
    """A config to train: what `Host.attach` takes.

    Args:
        token: fresh for every attachment; a config attached twice has two tokens.
        family: name for `trainables.family.load_family`.
        values: program and hyper fields.
        config_key: the config's key.
        runs: seed -> run key.
        reports: epochs after which to report, ascending; the last is the end.
        covariates: also record what the family's `inspect` says, after every epoch.
        parent: seed -> (run key, epoch) whose checkpoint a run without one of its own continues from (PBT's exploit).
        stops: whether its runs wait at a report until it is accepted; where nobody would stop them there, they go on.
        donates: whether others may continue from its states at reports (PBT): then each of them has its checkpoint.
    """

    token: str
    family: str
    values: Mapping[str, Any]
    config_key: str
    runs: Mapping[int, str]
    reports: tuple[int, ...]
    covariates: bool = False
    parent: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    stops: bool = True
    donates: bool = False


@dataclass(frozen=True)
class SeedReport:
    """One run at a report: the family's summary so far, or why it ended early."""

    run_key: str
    status: str  # "training", "finished" or "diverged"
    epoch: int
    step: int
    values: dict[str, float]
    device_seconds: float


@dataclass(frozen=True)
class Report:
    """A config at a report epoch: every seed is there, or has diverged."""

    token: str
    epoch: int
    done: bool
    seeds: dict[int, SeedReport]
    engine: str
    lanes: int
    error: str | None = None
    device: str = ""
    reason: str = "crashed"  # where there is an error: its stop reason, "crashed", "oom" or "storage"
    notice: str = ""  # something the user should see, in one line
