"""Finished curves under another scheduler: what it would have saved, and whether it would have kept the winner.

Nothing trains: configs' recorded curves are played to a scheduler, epoch by epoch, a few at a time, as a sweep would.
That makes it a test bed for schedulers, too: seconds instead of days.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pandas as pd

from analysis.curves import curve_metric
from analysis.errors import UserError
from analysis.store import Sweep, open_sweep
from analysis.summary import scores

Order = Literal["recorded", "random"]
Curves = Mapping[str, np.ndarray]
"""Config -> metric after each epoch (index 0: epoch 1), higher is better."""


class Scheduler(Protocol):
    """Decides after each epoch of a config whether it goes on. `value` is higher-is-better, NaN once it diverged."""

    def goes_on(self, config: str, epoch: int, value: float) -> bool: ...


class NoScheduler:
    """Every config runs to its end."""

    def goes_on(self, config: str, epoch: int, value: float) -> bool:
        return True


@dataclass
class Asha:
    """Asynchronous successive halving, the stopping variant that Ray Tune runs.

    At epochs grace, grace x factor, ... a config goes on if it is among the best 1/factor of those that came there
    before it. The first to arrive always goes on. A diverged config stops at once.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020; the rule as in Ray's
    `AsyncHyperBandScheduler` (one bracket): a percentile over earlier arrivals, its own value not among them.
    """

    grace: int
    factor: float
    max_t: int
    rungs: dict[int, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.rungs = {}
        rung = self.grace
        while rung < self.max_t:
            self.rungs[rung] = []
            rung = max(rung + 1, int(rung * self.factor))

    def goes_on(self, config: str, epoch: int, value: float) -> bool:
        if not np.isfinite(value):
            return False
        seen = self.rungs.get(epoch)
        if seen is None:
            return True
        cutoff = np.percentile(seen, 100 * (1 - 1 / self.factor)) if seen else -np.inf
        seen.append(value)
        return bool(value >= cutoff)


@dataclass
class Median:
    """Stops a config whose best value so far is below the median of the others' running means at the same epoch.

    Source: Golovin et al., "Google Vizier", KDD 2017; Ray's `MedianStoppingRule` (with three others to compare with).
    """

    grace: int
    seen: dict[str, list[float]] = field(default_factory=dict)

    def goes_on(self, config: str, epoch: int, value: float) -> bool:
        if not np.isfinite(value):
            return False
        self.seen.setdefault(config, []).append(value)
        if epoch < self.grace:
            return True
        others = [np.mean(v[:epoch]) for c, v in self.seen.items() if c != config and len(v) >= epoch]
        return len(others) < 3 or max(self.seen[config]) >= float(np.median(others))


@dataclass(frozen=True)
class Played:
    """One replay: epochs that each config ran, and which would have been chosen among those that reached the end."""

    epochs: dict[str, int]
    chosen: str | None


def play(
    curves: Curves, order: Sequence[str], scheduler: Scheduler, concurrent: int, ends: Mapping[str, float] | None = None
) -> Played:
    """Plays curves to a scheduler: `concurrent` configs at a time, each epoch taking equally long.

    The choice is the best among the configs that ran their whole curve, by `ends` (default: the curves' last values).
    """
    waiting = list(reversed(order))
    ran: dict[str, int] = {}
    events: list[tuple[int, int, str]] = []  # (time, arrival, config): ties in the order of arrival
    arrivals = 0
    time = 0

    def start() -> None:
        nonlocal arrivals
        while waiting and len(events) < concurrent:
            config = waiting.pop()
            ran[config] = 0
            heapq.heappush(events, (time + 1, arrivals, config))
            arrivals += 1

    start()
    while events:
        time, arrival, config = heapq.heappop(events)
        ran[config] += 1
        epoch = ran[config]
        if scheduler.goes_on(config, epoch, float(curves[config][epoch - 1])) and epoch < len(curves[config]):
            heapq.heappush(events, (time + 1, arrival, config))
        start()
    scored = ends if ends is not None else {c: float(curve[-1]) for c, curve in curves.items()}
    whole = [c for c, n in ran.items() if n == len(curves[c]) and np.isfinite(scored.get(c, np.nan))]
    return Played(ran, max(whole, key=lambda c: scored[c]) if whole else None)


def make_scheduler(name: str, grace: int, factor: float, max_t: int) -> Scheduler:
    """A scheduler by the command line's name: none, asha or median."""
    if grace < 1:
        raise UserError(f"--grace {grace} should be at least 1 epoch")
    if factor <= 1:
        raise UserError(f"--factor {factor:g} should be above 1")
    if name == "asha":
        return Asha(grace, factor, max_t)
    if name == "median":
        return Median(grace)
    if name == "none":
        return NoScheduler()
    raise UserError(f"no scheduler '{name}' to replay: there is none, asha, median")


def replay(
    storage: Path | str,
    name: str,
    scheduler: str = "asha",
    grace: Sequence[int] = (1,),
    factor: Sequence[float] = (3.0,),
    order: Order = "recorded",
    repeats: int = 20,
    concurrent: int | None = None,
    metric: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What a scheduler would have made of a sweep's finished configs, for every grace and factor given.

    Only configs whose curve goes to the end can be played (a pruned one's future is unknown): run the sweep, or some
    controls of it, with `--scheduler none`. Curves are means over seeds, as the search sees them.

    Args:
        order: "recorded": as they were proposed; "random": `repeats` random orders, as another searcher might propose.
        concurrent: configs that train at a time (default: as many as did in the sweep, by their start and end times).

    Returns:
        One row a setting: `scheduler, grace, factor, configs, left_out, concurrent, saved` (share of epochs),
        `kept_winner` (share of orders in which the truly best config ran to its end), `regret` (mean loss in the metric
        by choosing among survivors; 0 is none), `regret_max`, `orders`.

    Raises:
        UserError: fewer than two configs with a whole curve, or a wrong setting.
    """
    sweep = open_sweep(storage, name)
    curves, proposed, left_out = finished_curves(sweep, metric)
    ends = final_scores(sweep, curves, metric)
    if len(curves) < 2:
        raise UserError(f"{name} has {len(curves)} configs with a whole curve: replay needs two or more")
    if order not in ("recorded", "random"):
        raise UserError(f"--order {order} is none of recorded, random")
    if concurrent is not None and concurrent < 1:
        raise UserError(f"--concurrent {concurrent} should be at least 1")
    at_once = concurrent or _concurrency(sweep)
    rng = np.random.default_rng(seed)
    orders = [proposed] if order == "recorded" else [list(rng.permutation(proposed)) for _ in range(repeats)]
    longest = max(len(c) for c in curves.values())
    if not ends:
        raise UserError(f"{name} has no config that ended with a finite score")
    winner = max(ends, key=lambda c: ends[c])
    total = sum(len(c) for c in curves.values())
    rows = []
    for one_grace in grace:
        for one_factor in factor:
            saved, kept, regret = [], [], []
            for arrangement in orders:
                rule = make_scheduler(scheduler, one_grace, one_factor, longest)
                played = play(curves, arrangement, rule, at_once, ends)
                saved.append(1 - sum(played.epochs.values()) / total)
                kept.append(played.epochs[winner] == len(curves[winner]))
                regret.append(ends[winner] - ends[played.chosen] if played.chosen else np.nan)
            rows.append(
                {
                    "scheduler": scheduler,
                    "grace": one_grace,
                    "factor": one_factor,
                    "configs": len(curves),
                    "left_out": left_out,
                    "concurrent": at_once,
                    "saved": float(np.mean(saved)),
                    "kept_winner": float(np.mean(kept)),
                    "regret": float(np.mean(regret)),
                    "regret_max": float(np.max(regret)),
                    "orders": len(orders),
                }
            )
    return pd.DataFrame(rows)


def finished_curves(sweep: Sweep, metric: str | None = None) -> tuple[dict[str, np.ndarray], list[str], int]:
    """Mean curves (higher is better) of configs that ran to the end or diverged; their keys in the order they were
    proposed; and how many configs were left out because they were stopped or have not ended."""
    metric = curve_metric(sweep, metric)
    runs = scores(sweep, columns=[])
    ended = runs["stop_reason"].isin(["finished", "diverged"])
    whole = ended.groupby(runs["config_key"], sort=False).all()
    keys = [str(key) for key in whole.index[whole]]
    order = list(dict.fromkeys(str(event["config_key"]) for event in sweep.events("proposed")))
    keys.sort(key=lambda key: order.index(key) if key in order else len(order))
    sign = -1.0 if sweep.mode(metric) == "min" else 1.0
    rows = sweep.of_search(sweep.epochs([metric], configs=keys))
    # A diverged seed makes the config's mean NaN from there on: schedulers see it as diverged.
    seeds = runs.groupby("config_key")["seed"].nunique()
    grouped = rows.groupby(["config_key", "epoch"])[metric].agg(["mean", "count"])
    length = int(rows["epoch"].max()) if len(rows) else 0
    curves = {}
    for key in keys:
        if key not in grouped.index.get_level_values(0):
            continue
        own = grouped.loc[key].reindex(range(1, length + 1))
        curves[key] = (sign * own["mean"].where(own["count"] > seeds[key] / 2)).to_numpy(dtype=float)
    return curves, [key for key in keys if key in curves], int((~whole).sum())


def final_scores(sweep: Sweep, curves: Curves, metric: str | None = None) -> dict[str, float]:
    """Config -> what it is judged by, higher is better.

    That is its mean score by the sweep's headline, which may be more than the last point of a curve (a mean over the
    last tasks, say); or, for a curve asked for by name, its last point.
    """
    if metric is not None:
        ends = {key: float(curve[-1]) for key, curve in curves.items()}
    else:
        runs = scores(sweep, columns=[])
        runs = runs[runs["stop_reason"] == "finished"]
        sign = -1.0 if sweep.mode() == "min" else 1.0
        means = sign * runs.groupby("config_key")["value"].mean()
        ends = {key: float(means[key]) for key in curves if key in means.index and np.isfinite(curves[key][-1])}
    return {key: value for key, value in ends.items() if np.isfinite(value)}


def _concurrency(sweep: Sweep) -> int:
    """Most configs that trained at the same time."""
    runs = sweep.runs([])
    spans = runs.groupby("config_key").agg({"started_at": "min", "ended_at": "max"}).dropna()
    if not len(spans):
        return 1
    changes = sorted([(t, 1) for t in spans["started_at"]] + [(t, -1) for t in spans["ended_at"]])
    return int(max(np.cumsum([change for _, change in changes]).max(), 1))
