"""Learning curves of configs: means and spreads over seeds, ready to draw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import unknown
from analysis.store import Sweep

MAX_POINTS = 200
"""A longer curve is averaged in blocks: a figure cannot show more."""


@dataclass(frozen=True)
class Curves:
    """Curves of some configs.

    Args:
        table: `config_key, x, mean, sd` (over seeds), `low, high` (mean ± sd), `n`.
        metric: what is drawn.
        x_label: what x counts.
    """

    table: pd.DataFrame
    metric: str
    x_label: str


def curve_metric(sweep: Sweep, metric: str | None = None) -> str:
    """The metric of the epoch curves that stands for the sweep's headline, or `metric` itself.

    A headline such as `last_test_acc` is a summary and has no curve: then the curve whose name shares most words with
    it among those with the same direction.
    """
    known = sweep.metrics_of("epochs")
    if metric is not None:
        if metric not in known:
            raise unknown("curve metric", metric, known)
        return metric
    headline = sweep.metric
    if headline in known or not known:
        return headline
    words = set(headline.split("_"))
    alike = [name for name in known if sweep.mode(name) == sweep.mode()] or known
    return max(alike, key=lambda name: (len(words & set(name.split("_"))), name.startswith("test"), -known.index(name)))


def learning_curves(sweep: Sweep, configs: Iterable[str], metric: str | None = None) -> Curves:
    """Mean and standard deviation over seeds of each config's curve, the seeds it was chosen by.

    On a continual stream (several epochs a task) a point is a task: the metric after the task's last epoch, which is
    what the notebooks read. Curves longer than 200 points are averaged in blocks, per run, before the mean over seeds.
    """
    metric = curve_metric(sweep, metric)
    configs = list(configs)
    total, per_task = sweep.schedule.get("epochs", 0), sweep.schedule.get("epochs_per_task", 0)
    by_task = 0 < per_task < total
    epochs = range(per_task, total + 1, per_task) if by_task else None
    rows = sweep.of_search(sweep.epochs([metric], configs=configs, epochs=epochs))
    rows = rows[np.isfinite(rows[metric])]
    rows = rows.assign(x=rows["epoch"] // per_task if by_task else rows["epoch"])
    label = "task (after its last epoch)" if by_task else "epoch"
    longest = int(rows["x"].max()) if len(rows) else 0
    block = -(-longest // MAX_POINTS)
    if block > 1:
        # A run that ended inside a block is left out of it: its mean would stand for other epochs than its neighbours'.
        grouped = rows.assign(x=(rows["x"] - 1) // block).groupby(["config_key", "run_key", "x"], sort=False)[metric]
        sizes = grouped.size()
        means = grouped.mean()[sizes == block]
        rows = means.reset_index()
        rows["x"] = (rows["x"] + 1) * block
        label += f", means of {block}"
    grouped = rows.groupby(["config_key", "x"], sort=True)[metric]
    table = grouped.agg(["mean", "std", "count"]).reset_index()
    table = table.rename(columns={"std": "sd", "count": "n"})
    spread = table["sd"].fillna(0.0)
    table["low"], table["high"] = table["mean"] - spread, table["mean"] + spread
    return Curves(table, metric, label)
