"""Follows Ray Tune from inside the driver: writes the journal, keeps the runs table, moves the progress line.

A Tune callback runs in the driver's loop, so that nothing here may wait for a network: MLflow is fed from the journal
by a process of its own (`tuning.sync`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.tune import Callback

from tuning.checkpoints import CheckpointStore
from tuning.journal import Event, Journal
from tuning.progress import Progress
from tuning.runs import RunTable
from tuning.secrets import redact
from tuning.sweep import SweepPlan
from tuning.trial import PACKED, note_worst, unpack

TABLE_SECONDS = 5.0
TABLE_SHARE = 0.02
"""The most of the driver's time that writing the runs table may take: large tables are written less often."""
COPIED = ("config_key", "label", "algorithm", "point", "values", "program", "hyper", "runs", "epochs", "parent")
"""What the journal says of a config that PBT made."""
log = logging.getLogger(__name__)


class Recorder(Callback):
    """One for a sweep. `on_decision` and `on_exploit` are for the scheduler, `apply` for events that others wrote.

    `on_abandon(trial_id)` is told when a trial goes on with another config than the one that was proposed (PBT),
    `on_storage(line)` when a host could not write, `on_event(event)` of everything this session journals; `on_step` is
    called again and again while the sweep runs.
    """

    on_abandon: Callable[[str], None]
    on_storage: Callable[[str], None] = staticmethod(lambda line: None)
    on_event: Callable[[Event], None] = staticmethod(lambda event: None)
    on_step: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, plan: SweepPlan, journal: Journal, table: RunTable, progress: Progress):
        self._plan, self._journal, self._table, self._progress = plan, journal, table, progress
        self._checkpoints = CheckpointStore(plan.store.at("checkpoints"))
        self._aside = ThreadPoolExecutor(1, "discard")
        self._decisions: dict[str, str] = {}
        self._exploits: dict[str, dict[str, Any]] = {}
        self._last: dict[str, str] = {}  # trial -> what was decided of its last report
        self._config_of: dict[str, str] = {}
        self._modes = {name: metric.mode for name, metric in plan.loaded.metrics.items()}
        self._worst: dict[str, dict[str, float]] = {}  # trial -> the worst it has reported of each metric
        self._write_table_at = time.monotonic() + TABLE_SECONDS
        self.results = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never used; the journal is what lasts."""
        return {}

    def apply(self, event: Event) -> None:
        """Take an event into the table and the progress line."""
        if event["event"] in ("proposed", "resumed"):
            self._config_of[event["trial"]] = event["config_key"]
        self._table.apply(event)
        self._progress.apply(event)

    def on_decision(self, trial: Any, result: Mapping[str, Any], decision: str) -> None:
        self._decisions[trial.trial_id] = decision

    def on_exploit(self, trial: str, config: dict[str, Any]) -> None:
        """PBT gives a trial, whose result is being decided, another's states and perturbed hypers."""
        self._exploits[trial] = config

    def write(self, kind: str, **fields: Any) -> Event:
        """Journal an event, and take it in. Returns it."""
        event = self._journal.write(kind, **fields)
        self.apply(event)
        self.on_event(event)
        return event

    # --- Tune's side ---

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get("notice"):
            self.write("notice", text=result["notice"])
            self._progress.say(result["notice"])
        reason = result.get("stop_reason")
        if reason == "storage":  # no fault of the config: it has no end, and --resume goes on with it
            self.on_storage(last_line(result["error"]))
            self._last[trial.trial_id] = ""
            return
        if reason in ("crashed", "oom"):  # nothing to report: `on_trial_complete` tells it
            self._last[trial.trial_id] = "STOP"
            return
        self.results += 1
        result.update(unpack(result))
        identity = {"trial": trial.trial_id, "config_key": result["config_key"]}
        fields = ("epoch", "progress", "values", "spread", "per_seed", "engine", "lanes", "device")
        self.write(
            "report",
            **identity,
            **{name: result[name] for name in fields},
            done=bool(reason),  # not result["done"]: Tune has set that where the scheduler said STOP
            fraction=result["progress"] / self._plan.length,
        )
        worst = self._worst.setdefault(trial.trial_id, dict(trial.config.get("worst", {})))
        for seed in result["per_seed"].values():
            note_worst(worst, seed["values"], self._modes)
        decision = "STOP" if result["done"] else self._decisions.pop(trial.trial_id, "CONTINUE")
        exploit = self._exploits.pop(trial.trial_id, None)
        self._last[trial.trial_id] = decision = "EXPLOIT" if exploit else decision
        copied: dict[str, Any] = {}
        if exploit:
            told = {**exploit, "program": json.loads(exploit["program"])}
            copied = {"copy": {name: told[name] for name in COPIED}}
            self._keep_start(copied["copy"])
        self.write("decision", **identity, epoch=result["epoch"], decision=decision, **copied)
        if exploit:
            self._exploited(trial.trial_id, result["epoch"], copied["copy"])
        # Tune keeps every trial's last result for good: of a report it needs no more than the few numbers beside it
        for name in (*PACKED, "packed", "config"):
            result.pop(name, None)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if self._last.get(trial.trial_id) != "STOP":
            return  # ended by the time budget, not by itself or the scheduler: it has no end yet, and --resume goes on
        reason = result.get("stop_reason") or "stopped"
        self._end(trial, reason, result.get("epoch", 0), result.get("error"))

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tune runs a trial again whose process was lost: what it has reported, it does not report again."""
        epoch = (trial.last_result or {}).get("epoch", 0)
        trial.config["reports"] = [at for at in trial.config["reports"] if at > epoch]
        trial.config["worst"] = dict(self._worst.get(trial.trial_id, trial.config.get("worst", {})))
        log.warning("trial %s was lost after epoch %s: it continues elsewhere", trial.trial_id, epoch)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        path = trial.error_file
        text = Path(path).read_text() if path and Path(path).is_file() else "the trial's process died"
        self._end(trial, "crashed", (trial.last_result or {}).get("epoch", 0), text)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self._progress.draw()
        self._journal.settle()
        self.on_step()
        if time.monotonic() > self._write_table_at:
            self.write_table()

    def discard_ended(self) -> None:
        """Drop checkpoints that a kill left behind after their config's end."""
        for key, row in self._table.rows.items():
            if self._plan.scheduler != "pbt" and row["config_stop_reason"] in ("finished", "stopped", "diverged"):
                self._discard(key)

    def close(self) -> None:
        """Wait until the checkpoints of all that ended are gone."""
        self._aside.shutdown()

    def write_table(self) -> None:
        """runs.parquet as of now."""
        begun = time.monotonic()
        if self._table.rows:
            self._table.write(self._plan.store)
        now = time.monotonic()
        self._write_table_at = now + max(TABLE_SECONDS, (now - begun) / TABLE_SHARE)

    def _discard(self, run: str) -> None:
        """Remove a run's checkpoints beside the driver's loop: a bucket is far away, a large file takes a disk long."""
        self._aside.submit(self._checkpoints.discard, run)

    def _end(self, trial: Any, reason: str, epoch: int, error: str | None = None) -> None:
        key = self._config_of.get(trial.trial_id, trial.config["config_key"])
        trial.metric_n_steps.clear()  # windows over the results that Tune keeps of every trial, 1.5 KB a number
        self._worst.pop(trial.trial_id, None)
        line = None
        if error is not None:
            error = redact(error)
            self._plan.store.write(f"errors/{key}.txt", error.encode())
            line = last_line(error)
        else:
            self._plan.store.remove(f"errors/{key}.txt")  # of a try before --retry
        self.write("end", trial=trial.trial_id, config_key=key, stop_reason=reason, epoch=epoch, error=line)
        if self._plan.scheduler != "pbt" and reason not in ("crashed", "oom"):  # PBT's others may still take from it
            for run in self._table.runs_of.get(trial.trial_id, ()):
                self._discard(run)

    def _keep_start(self, copy: Mapping[str, Any]) -> None:
        """Give a copy its start before anyone can know of the copy: its donor goes on and keeps two checkpoints, and
        after a kill may be far ahead when the copy trains."""
        for seed, run in copy["runs"].items():
            donor, epoch = copy["parent"][seed]
            row = self._table.rows.get(donor)  # as of its last report, that epoch's or a later one's
            if row and row["epoch"]:
                self._checkpoints.copy(donor, epoch * row["step"] // row["epoch"], run)

    def _exploited(self, trial: str, epoch: int, config: Mapping[str, Any]) -> None:
        """The old config ends; a new one goes on in the same trial, from its parent's states."""
        self.write(
            "end", trial=trial, config_key=self._config_of[trial], stop_reason="stopped", epoch=epoch, error=None
        )
        self.on_abandon(trial)
        self._worst.pop(trial, None)
        self.write("proposed", index=-1, phase="search", trial=trial, **config)


def last_line(text: str) -> str:
    """What a traceback says in the end."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown error")[:500]
