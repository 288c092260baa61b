"""Resuming: searcher, scheduler and tables are brought back by playing the journal to them, in its order.

Tune's own restore loses rungs (ray#30838) and trials whose checkpoint was rotated; here nothing of Tune's is restored.
The searcher is asked for every point it gave and told every end, so that its random state and its model are where they
were; the scheduler hears every report again, so that rungs hold what they held; a config without an end is proposed
again under a new trial id and continues from its newest checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.journal import Event, read
from tuning.schedulers import Fifo
from tuning.searchers import Source, tell_end
from tuning.sweep import SweepPlan

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
    """

    events: list[Event] = field(default_factory=list)
    proposed: int = 0
    seeds_used: dict[str, int] = field(default_factory=dict)
    unfinished: list[Event] = field(default_factory=list)
    trials: dict[str, PastTrial] = field(default_factory=dict)


def replay(plan: SweepPlan, journal: Path, source: Source, scheduler: Any) -> Past:
    """Play the journal to a fresh source and scheduler."""
    past = Past()
    open_trials: dict[str, Event] = {}
    stand_ins = past.trials
    listener: Any = scheduler if scheduler.replayable else Fifo()
    decisions = 0
    results: dict[str, dict[str, Any]] = {}
    for event, _ in read(journal):
        past.events.append(event)
        trial = event.get("trial", "")
        if event["event"] == "proposed":
            event.setdefault("phase", "search")  # journals from before there were others
            stand_ins[trial] = PastTrial(trial, {"phase": event["phase"]})
            if event["index"] >= 0:
                _ask_again(source, event)
                past.proposed += 1
                key = event["config_key"]
                past.seeds_used[key] = past.seeds_used.get(key, 0) + len(event["runs"])
                listener.on_trial_add(None, stand_ins[trial])
            born = max((epoch for _, epoch in event.get("parent", {}).values()), default=0)
            open_trials[trial] = {**event, "trial_first": trial, "reported": born}
        elif event["event"] == "resumed":
            earlier = open_trials.pop(event["replaces"])
            open_trials[trial] = {**earlier, "trial": trial}
            stand_ins[trial] = stand_ins[event["replaces"]]
            results[trial] = results.get(event["replaces"], {})
        elif event["event"] == "report":
            proposal = open_trials[trial]
            proposal["reported"] = event["epoch"]
            values = {name: event["values"].get(name, float("nan")) for name in plan.objectives}
            results[trial] = {"progress": event["progress"], "done": event["done"], **values}
        elif event["event"] == "decision":
            proposal, result = open_trials[trial], results[trial]
            if not result["done"]:
                listener.on_trial_result(None, stand_ins[trial], result)
                decisions += 1
                if event["decision"] != "STOP" and proposal["index"] >= 0:
                    source.report(proposal["trial_first"], result["progress"], result[plan.metric])
        elif event["event"] == "end":
            proposal = open_trials.pop(trial)
            result = {**results.get(trial, {}), "stop_reason": event["stop_reason"]}
            error = event["stop_reason"] in ("crashed", "oom")
            if error:
                listener.on_trial_error(None, stand_ins[trial])
            else:
                listener.on_trial_complete(None, stand_ins[trial], result)
            if proposal["index"] >= 0:
                tell_end(source, proposal["trial_first"], result, error, plan.objectives)
    past.unfinished = list(open_trials.values())
    if not scheduler.replayable:
        scheduler.skip(decisions)
    return past


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
