"""What a sweep optimises: one metric or several, each in its own direction; scores, ranks and Pareto fronts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainables.family import BadValue, Family, Metric

COSTS = {
    "device_seconds": Metric(
        "s", "min", "device time of one run: wall time divided by the lanes that shared the device"
    ),
}
"""What every sweep can also optimise, whatever the family: read off the runs table, not off `summarize`."""

Row = Mapping[str, Any]
Runs = Mapping[int, float]
"""Seed -> value of one config's runs."""


def parse(family: Family, text: str) -> tuple[str, ...]:
    """`--metric a,b` as names; `BadValue` where one is nothing that has a better and a worse."""
    names = tuple(part.strip() for part in text.split(","))
    known = [*(name for name, metric in family.metrics.items() if metric.mode != "none"), *COSTS]
    for name in names:
        if name not in known:
            raise BadValue(f"--metric {name} is nothing {family.name} can optimise; it has: {', '.join(known)}")
        if names.count(name) > 1:
            raise BadValue(f"--metric {text} names {name} twice")
    return names


def described(family: Family, name: str) -> Metric:
    """Unit, direction and meaning of an objective."""
    return family.metrics[name] if name in family.metrics else COSTS[name]


def check(objectives: Sequence[str], searcher: str, scheduler: str) -> None:
    """Searchers and schedulers that cannot do with these objectives: `BadValue`."""
    if scheduler != "none" and objectives[0] in COSTS:
        raise BadValue(
            f"--scheduler {scheduler} stops configs by the first metric, and {objectives[0]} says nothing of how good "
            "they are: name another metric first, or choose --scheduler none"
        )
    if len(objectives) == 1:
        return
    if searcher == "hyperopt":
        raise BadValue("--searcher hyperopt knows one metric only: choose optuna for several, or random, qmc, grid")
    if scheduler == "pbt":
        raise BadValue(
            "--scheduler pbt copies the best and so needs one metric: choose asha or median (they stop by the first "
            "metric), or none"
        )


# --- the runs table, read for decisions ---


def value(row: Row, metric: str) -> float:
    """A run's value of an objective, NaN where it has none."""
    found = row.get(metric) if metric in COSTS else row.get(f"final.{metric}")
    return math.nan if found is None else float(found)


def searched(rows: Iterable[Row]) -> list[Row]:
    """The runs that take part in choosing: all but the confirming ones."""
    return [row for row in rows if row["phase"] != "confirm"]


def judged(
    rows: Iterable[Row], metric: str, mode: str, ended: Sequence[str] = ("finished",)
) -> dict[str, dict[int, float]]:
    """Config key -> seed -> value of the runs that took part in choosing and may be compared, in order of proposal.

    Those are the runs of configs that ran to their end (as `ended` says). A diverged run counts as the worst value of
    the sweep's runs, as in `analysis.summary.scores`, except in what it cost.
    """
    chosen_by = searched(rows)
    finite = [v for row in chosen_by if row["stop_reason"] == "finished" and math.isfinite(v := value(row, metric))]
    worst = (min if mode == "max" else max)(finite, default=math.nan)
    found: dict[str, dict[int, float]] = {}
    for row in chosen_by:
        if row["config_stop_reason"] not in ended:
            continue
        diverged = row["stop_reason"] == "diverged" and metric not in COSTS
        number = worst if diverged else value(row, metric)
        if math.isfinite(number) and (diverged or row["stop_reason"] == "finished"):
            found.setdefault(row["config_key"], {})[row["seed"]] = number
    return found


def confirmed(
    rows: Iterable[Row], modes: Mapping[str, str], seeds: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """Objective -> config key -> seed -> value of the confirming runs on these seeds."""
    fresh = [{**row, "phase": "search"} for row in rows if row["phase"] == "confirm" and row["seed"] in set(seeds)]
    return {name: judged(fresh, name, mode, ("finished", "diverged")) for name, mode in modes.items()}


def mean(runs: Runs) -> float:
    return math.fsum(runs.values()) / len(runs)


def means(rows: Iterable[Row], objectives: Sequence[str], modes: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Config key -> mean over its judged runs of every objective; only configs that have them all."""
    rows = list(rows)
    columns = [judged(rows, name, modes[name]) for name in objectives]
    return {key: tuple(mean(column[key]) for column in columns) for key in columns[0] if all(key in c for c in columns)}


def front(points: Mapping[str, Sequence[float]], modes: Sequence[str]) -> list[str]:
    """Keys of the points that no other one matches in everything and beats in something, best by the first first."""
    keys = list(points)
    if not keys:
        return []
    good = np.array([points[key] for key in keys]) * [1.0 if mode == "max" else -1.0 for mode in modes]
    beaten = [bool(((good >= own).all(1) & (good > own).any(1)).any()) for own in good]
    order = sorted(range(len(keys)), key=lambda i: tuple(-good[i]))
    return [keys[i] for i in order if not beaten[i]]


def ranked(points: Mapping[str, Sequence[float]], modes: Sequence[str]) -> Iterator[list[str]]:
    """Keys from best to worst, in groups that are exactly equal in everything.

    With several objectives: first the Pareto front, then the front of what is left, and so on; within a front by the
    first metric.
    """
    left = dict(points)
    while left:
        if len(modes) == 1:
            layer = sorted(left, key=lambda key: left[key][0], reverse=modes[0] == "max")
        else:
            layer = front(left, modes)
        for _, group in itertools.groupby(layer, key=lambda key: tuple(points[key])):
            yield list(group)
        left = {key: point for key, point in left.items() if key not in set(layer)}
