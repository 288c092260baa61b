"""What a config and a sweep came to, over runs: the numbers and tags that MLflow shows of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tuning.journal import Event
from tuning.objectives import Row, confirmed, front, means, searched

Values = dict[str, float]


def summary(row: Row) -> dict[str, float | None]:
    """final/ and best/ values of a row of the runs table."""
    return {
        name.replace(".", "/", 1): value
        for name, value in row.items()
        if name.startswith(("final.", "best.")) and value is not None
    }


def cost_tags(row: Mapping[str, Any], reason: str) -> Iterable[tuple[str, str]]:
    """How a run ended, what it ran on and what it cost."""
    return [
        ("stop_reason", reason),
        ("engine", str(row.get("engine", ""))),
        ("lanes", str(row.get("lanes", ""))),
        ("device", str(row.get("device", ""))),
        ("device_seconds", f"{row['device_seconds']:.3f}"),
    ]


def config_values(rows: Sequence[Row], costs: Iterable[str] = ()) -> Values:
    """Mean, spread and number of seeds of what a config's runs ended with: those it was chosen by, and, as `confirm/`,
    those on fresh seeds.

    Args:
        rows: the config's.
        costs: columns to average too.
    """
    values = _means(searched(rows), costs)
    fresh = [row for row in rows if row["phase"] == "confirm" and row["stop_reason"] == "finished"]
    if fresh:
        finals = {name.removeprefix("final/"): v for name, v in _means(fresh, costs).items() if "best/" not in name}
        values |= {f"confirm/{name}": value for name, value in finals.items()}
    return values


def _means(rows: Sequence[Row], costs: Iterable[str]) -> Values:
    values: Values = {"seeds": float(len(rows))}
    columns = [summary(row) | {name: row.get(name) for name in costs} for row in rows]
    for name in sorted({name for column in columns for name in column}):
        finite = [v for column in columns if (v := column.get(name)) is not None and math.isfinite(v)]
        if finite:
            values[name] = statistics.fmean(finite)
            if len(finite) > 1 and not name.startswith("best/"):
                values[f"{name}_sd"] = statistics.stdev(finite)
    return values


def result(rows: Iterable[Row], chosen_by: Event | None, plain: Mapping[str, Any]) -> tuple[Values, dict[str, str]]:
    """The sweep's result as metrics and tags: what the search's best config came to on fresh seeds. Empty where nothing
    was confirmed.

    Not the best of the confirmed: whoever picks that one by these figures is flattered again.
    """
    if chosen_by is None or not chosen_by["chosen"]:
        return {}, {}
    best = chosen_by["chosen"][0]
    objectives = (plain["metric"], *plain.get("others", ()))
    fresh = confirmed(rows, {name: plain["metrics"][name]["mode"] for name in objectives}, chosen_by["seeds"])
    values: Values = {}
    for name in objectives:
        numbers = list(fresh[name].get(best["config_key"], {}).values())
        if numbers:
            values |= {f"result/{name}": statistics.fmean(numbers), "result/seeds": float(len(numbers))}
            if len(numbers) > 1:
                values[f"result/{name}_sd"] = statistics.stdev(numbers)
    return values, {"result_config": best["label"], "result_config_key": best["config_key"]} if values else {}


def pareto_front(rows: Iterable[Row], plain: Mapping[str, Any]) -> list[str] | None:
    """Config keys of the front of a sweep with several objectives; None for one objective."""
    if not plain.get("others"):
        return None
    modes = {name: plain["metrics"][name]["mode"] for name in (plain["metric"], *plain["others"])}
    return front(means(rows, tuple(modes), modes), list(modes.values()))
