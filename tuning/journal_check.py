"""Is a journal whole? Asked before a sweep goes on with it: a damaged line is told by its number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trainables.family import BadValue
from tuning.journal import Event, read

NUMBER = (int, float)
FIELDS: dict[str, dict[str, Any]] = {
    "proposed": {
        "index": int,
        "trial": str,
        "config_key": str,
        "label": str,
        "algorithm": str,
        "point": dict,
        "values": dict,
        "program": dict,
        "hyper": dict,
        "runs": dict,
        "epochs": int,
    },
    "resumed": {"trial": str, "config_key": str, "replaces": str},
    "report": {
        "trial": str,
        "config_key": str,
        "epoch": int,
        "progress": NUMBER,
        "values": dict,
        "per_seed": dict,
        "engine": str,
        "lanes": int,
        "device": str,
        "done": bool,
    },
    "decision": {"trial": str, "config_key": str, "epoch": int, "decision": str},
    "end": {"trial": str, "config_key": str, "stop_reason": str, "epoch": int},
    "race": {"look": int, "seeds": int, "started": int, "most": int, "beaten": list, "alive": list, "verdict": str},
    "confirm": {"k": int, "seeds": list, "chosen": list, "ties": list},
    "retry": {"trial": str, "config_key": str, "stop_reason": str},
    "finish": {"reason": str},
}
"""Event -> what must stand in it, and of which type. Others may; events that are not here are passed over."""
SEED = {"run_key": str, "status": str, "epoch": int, "step": int, "values": dict, "device_seconds": NUMBER}


def checked(path: Path) -> list[Event]:
    """All events of a journal.

    Raises:
        BadValue: a line is no event, lacks something, or speaks of a trial that no line before it made.
    """
    events: list[Event] = []
    trials: dict[str, str] = {}  # trial -> its newest event
    for number, (event, _) in enumerate(read(path), start=1):
        problem = _problem(event, trials)
        if problem:
            raise BadValue(
                f"{path} is damaged in line {number}: {problem}; bring back a copy of it, or begin a new sweep"
            )
        events.append(event)
        if "trial" in event:
            trials[event["trial"]] = event["event"]
    return events


def _problem(event: Event, trials: Mapping[str, str]) -> str:
    kind = event["event"]
    problem = _of_fields(event, {"time": str, **FIELDS.get(kind, {})})
    if problem:
        return f"its {kind} {problem}"
    try:
        datetime.fromisoformat(event["time"])
    except ValueError:
        return f"its {kind} has the time {event['time'][:40]!r}"
    if kind == "proposed":
        if not event["runs"] or not all(isinstance(key, str) for key in event["runs"].values()):
            return "its proposed has no runs"
    elif kind == "report":
        for seed in event["per_seed"].values():
            problem = _of_fields(seed, SEED) if isinstance(seed, dict) else "is no seed's"
            if problem:
                return f"a seed of its report {problem}"
    named = str(event.get("replaces") if kind == "resumed" else event.get("trial"))
    if kind != "proposed" and "trial" in FIELDS.get(kind, {}):
        if named not in trials:
            return f"its {kind} speaks of the trial {named[:40]!r}, which was never proposed"
        if kind in ("report", "decision") and trials[named] == "end":
            return f"its {kind} speaks of the trial {named!r}, which had ended"
        if kind == "decision" and trials[named] != "report":
            return f"its decision on the trial {named!r} follows no report"
    return ""


def _of_fields(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    for name, kind in fields.items():
        if name not in entry:
            return f"lacks {name}"
        value = entry[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (isinstance(value, float) and name == "progress" and not math.isfinite(value)):
            return f"has {name} = {str(value)[:40]}"
    return ""
