"""Resuming: searcher, scheduler and tables are brought back by playing the journal to them, in its order.

Tune's own restore loses rungs (ray#30838) and trials whose checkpoint was rotated; here nothing of Tune's is restored.
The searcher is asked for every point it gave and told every end, so that its random state and its model are where they
were; the scheduler hears every report again, so that rungs hold what they held; a config without an end is proposed
again under a new trial id and continues from its newest checkpoint.

A driver may die between any two lines of the journal. What a line had begun is ended here, in `Past.unwritten`: a
report without its decision is decided now, by the scheduler as it stood then; a decision to stop, or to copy another
config (PBT), without what follows from it is followed up. So no decision is lost and none is taken twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.journal import Event, read
from tuning.schedulers import Fifo
from tuning.searchers import Source, tell_end
from tuning.sweep import SweepPlan
from tuning.trial import note_worst

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastTrial:
    """Stands for a trial of the session before. `config` says its phase, as a trial's does."""

    trial_id: str
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass
class Past:
    """What the journal says of a sweep so far.

    Args:
        events: all of them.
        proposed: number of proposals.
        seeds_used: config key -> runs it has.
        unfinished: proposals without an end: the `proposed` event with `trial` its newest id, `trial_first` the id the
            searcher knows, and `reported` the last epoch whose report was journalled.
        trials: trial id -> what stood for the trial when the scheduler heard its reports again.
        last: trial id of an unfinished proposal -> the last result that the scheduler has judged.
        unwritten: (event, fields) to journal before anything else.
        retried: configs that failed and are to run again.
    """

    events: list[Event] = field(default_factory=list)
    proposed: int = 0
    seeds_used: dict[str, int] = field(default_factory=dict)
    unfinished: list[Event] = field(default_factory=list)
    trials: dict[str, PastTrial] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    unwritten: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    retried: int = 0


FAILED = ("crashed", "oom", "diverged")
"""Stop reasons that `--retry failed` takes back."""


def replay(plan: SweepPlan, journal: Path, source: Source, scheduler: Any, retry: bool = False) -> Past:
    """Play the journal to a fresh source and scheduler.

    Args:
        retry: give configs that crashed, ran out of memory or diverged another go.
    """
    replayed = _Replay(plan, source, scheduler)
    for event, _ in read(journal):
        replayed.past.events.append(event)
        replayed.hear(event)
    replayed.settle()
    if retry:
        replayed.retry()
    past = replayed.past
    past.unfinished = list(replayed.open.values())
    past.last = {trial: replayed.last(trial) for trial in replayed.open if replayed.last(trial)}
    if not scheduler.replayable:
        scheduler.skip(replayed.decisions)
    return past


class _Replay:
    """The state of a replay: what each open config was last heard of."""

    def __init__(self, plan: SweepPlan, source: Source, scheduler: Any):
        self.plan, self.source = plan, source
        self.past = Past()
        self.open: dict[str, Event] = {}  # trial -> its proposal, and how far it came
        self.decisions = 0
        self._ended: dict[str, Event] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._undecided: dict[str, Event] = {}  # trial -> the report whose decision is not there yet
        self._following: dict[str, Event] = {}  # trial -> a decision whose consequence is not there yet
        self._listener: Any = scheduler if scheduler.replayable else Fifo()
        self._modes = {name: metric.mode for name, metric in plan.loaded.metrics.items()}

    def last(self, trial: str) -> dict[str, Any]:
        """The last result that counted; the progress of a copy that has not reported is that of its parent."""
        result, proposal = self._results.get(trial), self.open[trial]
        if not result or result["done"]:
            return {}
        epoch = proposal["reported"]
        return {**result, "epoch": epoch, "progress": epoch * self.plan.length / proposal["epochs"]}

    def hear(self, event: Event) -> None:
        getattr(self, f"_{event['event']}", lambda event: None)(event)

    def _proposed(self, event: Event) -> None:
        trial = event["trial"]
        event.setdefault("phase", "search")  # journals from before there were others
        if event["phase"] != "search":
            self.past.trials[trial] = PastTrial(trial, {"phase": event["phase"]})
        if event["index"] >= 0:
            _ask_again(self.source, event)
            self.past.proposed += 1
            key = event["config_key"]
            self.past.seeds_used[key] = self.past.seeds_used.get(key, 0) + len(event["runs"])
            self.past.trials[trial] = PastTrial(trial)
            self._listener.on_trial_add(None, self.past.trials[trial])
        born = max((epoch for _, epoch in event.get("parent", {}).values()), default=0)
        self._following.pop(trial, None)
        self.open[trial] = {**event, "trial_first": trial, "reported": born, "worst": {}}

    def _resumed(self, event: Event) -> None:
        trial, before = event["trial"], event["replaces"]
        self.open[trial] = {**self.open.pop(before), "trial": trial}
        self.past.trials[trial] = self.past.trials[before]
        self._results[trial] = self._results.get(before, {})

    def _retry(self, event: Event) -> None:
        trial = event["trial"]
        # the searcher was told that it failed, and keeps to that: `heard` says that it is told no more
        again = {**self._ended.pop(trial), "heard": True}
        if event["stop_reason"] == "diverged":
            again["worst"] = {}  # its checkpoints went with its end: it starts anew
        self.open[trial] = again
        self._results.pop(trial, None)
        self.past.trials[trial] = PastTrial(
            f"{trial}+", self.past.trials[trial].config
        )  # the scheduler has closed its books on the first
        self._listener.on_trial_add(None, self.past.trials[trial])

    def _report(self, event: Event) -> None:
        trial = event["trial"]
        values = {name: event["values"].get(name, math.nan) for name in self.plan.objectives}
        self._results[trial] = {"progress": event["progress"], **values, "done": bool(self._reason(event))}
        for seed in event["per_seed"].values():
            note_worst(self.open[trial]["worst"], seed["values"], self._modes)
        self._undecided[trial] = event

    def _decision(self, event: Event) -> None:
        trial = event["trial"]
        del self._undecided[trial]
        if not self._results[trial]["done"]:
            self._listener.on_trial_result(None, self.past.trials[trial], self._results[trial])
        self._decided(trial, event)

    def _decided(self, trial: str, event: Event) -> None:
        proposal, result = self.open[trial], self._results[trial]
        if not result["done"]:
            self.decisions += 1
            proposal["reported"] = event["epoch"]
            if event["decision"] != "STOP" and self._learns(proposal):
                self.source.report(proposal["trial_first"], result["progress"], result[self.plan.metric])
        if event["decision"] in ("STOP", "EXPLOIT"):
            self._following[trial] = event

    def _end(self, event: Event) -> None:
        trial = event["trial"]
        follows = self._following.get(trial)
        if follows is None or follows["decision"] != "EXPLOIT":
            self._following.pop(trial, None)
        self._undecided.pop(trial, None)
        proposal = self._ended[trial] = self.open.pop(trial)
        result = {**self._results.get(trial, {}), "stop_reason": event["stop_reason"]}
        error = event["stop_reason"] in ("crashed", "oom")
        if error:
            self._listener.on_trial_error(None, self.past.trials[trial])
        else:
            self._listener.on_trial_complete(None, self.past.trials[trial], result)
        if self._learns(proposal):
            tell_end(self.source, proposal["trial_first"], result, error, self.plan.objectives)
        proposal["failed"] = event["stop_reason"] if event["stop_reason"] in FAILED else ""

    def _learns(self, proposal: Event) -> bool:
        """What PBT made, and what failed once, is nothing the searcher hears of."""
        return proposal["index"] >= 0 and not proposal.get("heard")

    # --- what a kill cut off ---

    def settle(self) -> None:
        """Take the decisions that are missing, and draw the consequences that are."""
        for trial, report in list(self._undecided.items()):
            decision = "STOP"
            if not self._results[trial]["done"]:
                decision = self._listener.on_trial_result(None, self.past.trials[trial], self._results[trial])
            fields = {"trial": trial, "config_key": report["config_key"], "epoch": report["epoch"]}
            self._write("decision", **fields, decision=decision)
            self._decided(trial, {**fields, "decision": decision})
        self._undecided.clear()
        for trial, decided in list(self._following.items()):
            copied = decided.get("copy")
            if decided["decision"] == "EXPLOIT" and copied is None:
                continue  # of a version that did not say what the copy would be: the config goes on itself
            if trial in self.open:
                last = next(e for e in reversed(self.past.events) if e["event"] == "report" and e["trial"] == trial)
                reason = self._reason(last) or "stopped"
                end = {"trial": trial, "config_key": self.open[trial]["config_key"], "stop_reason": reason}
                self._consequence("end", **end, epoch=decided["epoch"], error=None)
            if copied is not None:
                self._consequence("proposed", index=-1, trial=trial, **copied)
        self._following.clear()

    def _reason(self, report: Event) -> str:
        """Why a config ended by itself at this report, or "" where it did not. Its `done` does not say that in every
        journal: Tune sets it, in the result it was given, when the scheduler says STOP."""
        statuses = [seed["status"] for seed in report["per_seed"].values()]
        finite = all(math.isfinite(report["values"].get(name, math.nan)) for name in self.plan.objectives)
        if 2 * statuses.count("diverged") > len(statuses) or not finite:
            return "diverged"
        return "" if "training" in statuses else "finished"

    def retry(self) -> None:
        """Take back the ends of configs that failed."""
        for trial, proposal in list(self._ended.items()):
            if proposal.get("failed"):
                self._consequence(
                    "retry", trial=trial, config_key=proposal["config_key"], stop_reason=proposal["failed"]
                )
                self.past.retried += 1

    def _consequence(self, kind: str, **fields: Any) -> None:
        self._write(kind, **fields)
        self.hear({"event": kind, **fields})

    def _write(self, kind: str, **fields: Any) -> None:
        self.past.unwritten.append((kind, fields))


def _ask_again(source: Source, event: Event) -> None:
    point = source.ask(event["trial"])
    if point is None or _plain(point) != _plain(event["point"]):
        log.warning(
            "the searcher now proposes %s where it proposed %s: a library changed since; what ran keeps its results, "
            "what comes next may differ from an undisturbed run",
            point,
            event["point"],
        )


def _plain(point: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in point.items()}
