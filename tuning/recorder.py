"""Follows Ray Tune from inside the driver: writes the journal, keeps the runs table, moves the progress line.

A Tune callback runs in the driver's loop, so that nothing here may wait for a network: MLflow is fed from the journal
by a process of its own (`tuning.sync`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from tuning.checkpoints import CheckpointStore
from tuning.journal import Event, Journal
from tuning.progress import Progress
from tuning.runs import RunTable
from tuning.sweep import SweepPlan

TABLE_SECONDS = 5.0
log = logging.getLogger(__name__)


class Recorder(Callback):
    """One for a sweep. `on_decision` and `on_exploit` are for the scheduler, `apply` for events that others wrote.

    `on_abandon(trial_id)` is told when a trial goes on with another config than the one that was proposed (PBT).
    """

    on_abandon: Callable[[str], None]

    def __init__(self, plan: SweepPlan, journal: Journal, table: RunTable, progress: Progress):
        self._plan, self._journal, self._table, self._progress = plan, journal, table, progress
        self._checkpoints = CheckpointStore(plan.folder / "checkpoints")
        self._decisions: dict[str, str] = {}
        self._exploits: dict[str, dict[str, Any]] = {}
        self._last: dict[str, str] = {}  # trial -> what was decided of its last report
        self._config_of: dict[str, str] = {}
        self._written = time.monotonic()
        self.results = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never used; the journal is what lasts."""
        return {}

    def apply(self, event: Event) -> Event:
        """Take an event into the table and the progress line. Returns it."""
        if event["event"] in ("proposed", "resumed"):
            self._config_of[event["trial"]] = event["config_key"]
        self._table.apply(event)
        self._progress.apply(event)
        return event

    def on_decision(self, trial: Any, result: Mapping[str, Any], decision: str) -> None:
        self._decisions[trial.trial_id] = decision

    def on_exploit(self, trial: str, config: dict[str, Any]) -> None:
        """PBT gives a trial, whose result is being decided, another's states and perturbed hypers."""
        self._exploits[trial] = config

    def _write(self, kind: str, **fields: Any) -> None:
        self.apply(self._journal.write(kind, **fields))

    # --- Tune's side ---

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get("stop_reason") == "crashed":  # nothing to report: `on_trial_complete` tells it
            self._last[trial.trial_id] = "STOP"
            return
        self.results += 1
        identity = {"trial": trial.trial_id, "config_key": result["config_key"]}
        fields = ("epoch", "progress", "values", "spread", "per_seed", "engine", "lanes", "device", "done")
        self._write(
            "report",
            **identity,
            **{name: result[name] for name in fields},
            fraction=result["progress"] / self._plan.length,
        )
        decision = "STOP" if result["done"] else self._decisions.pop(trial.trial_id, "CONTINUE")
        exploit = self._exploits.pop(trial.trial_id, None)
        self._last[trial.trial_id] = decision = "EXPLOIT" if exploit else decision
        self._write("decision", **identity, epoch=result["epoch"], decision=decision)
        if exploit:
            self._exploited(trial.trial_id, result["epoch"], exploit)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if self._last.get(trial.trial_id) != "STOP":
            return  # ended by the time budget, not by itself or the scheduler: it has no end yet, and --resume goes on
        reason = result.get("stop_reason") or "stopped"
        error = last_line(result["error"]) if reason == "crashed" else None
        self._end(trial, reason, result.get("epoch", 0), error)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tune runs a trial again whose process was lost: what it has reported, it does not report again."""
        epoch = (trial.last_result or {}).get("epoch", 0)
        trial.config["reports"] = [at for at in trial.config["reports"] if at > epoch]
        log.warning("trial %s was lost after epoch %s: it continues elsewhere", trial.trial_id, epoch)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        path = trial.error_file
        text = Path(path).read_text() if path and Path(path).is_file() else "the trial's process died"
        self._end(trial, "crashed", (trial.last_result or {}).get("epoch", 0), last_line(text))

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self._progress.draw()
        if time.monotonic() - self._written > TABLE_SECONDS:
            self.write_table()

    def write_table(self) -> None:
        """runs.parquet as of now."""
        if self._table.rows:
            self._table.write(self._plan.folder / "runs.parquet")
        self._written = time.monotonic()

    def _end(self, trial: Any, reason: str, epoch: int, error: str | None = None) -> None:
        key = self._config_of.get(trial.trial_id, trial.config["config_key"])
        self._write("end", trial=trial.trial_id, config_key=key, stop_reason=reason, epoch=epoch, error=error)
        if self._plan.scheduler != "pbt" and reason not in ("crashed", "oom"):  # PBT's others may still take from it
            for run in self._table.runs_of.get(trial.trial_id, ()):
                self._checkpoints.discard(run)

    def _exploited(self, trial: str, epoch: int, config: Mapping[str, Any]) -> None:
        """The old config ends; a new one goes on in the same trial, from its parent's states."""
        self._write(
            "end", trial=trial, config_key=self._config_of[trial], stop_reason="stopped", epoch=epoch, error=None
        )
        self.on_abandon(trial)
        fields = ("config_key", "label", "algorithm", "point", "values", "program", "hyper", "runs", "epochs", "parent")
        made = {name: config[name] for name in fields}
        self._write("proposed", index=-1, phase="search", trial=trial, **made)


def last_line(text: str) -> str:
    """What a traceback says in the end."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown error")[:500]
