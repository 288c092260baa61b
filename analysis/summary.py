"""Scores of runs and one row a config: what tables, figures and tests start from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import UserError, unknown
from analysis.statistics import interquartile_mean
from analysis.store import COSTS, ENDED, Sweep, open_sweep, sweep_names
from tuning.mirror import is_url

_AT = re.compile(r"(epoch|step)=(\d+)")


def scores(
    sweep: Sweep,
    metric: str | None = None,
    at: str = "final",
    columns: Sequence[str] | None = None,
    phase: str = "search",
) -> pd.DataFrame:
    """One row a run, with its `value` of `metric`.

    Args:
        metric: a summary key, a curve's metric or one of `store.COSTS`; default: what the sweep optimised.
        at: "final" (last report), "best" (best report: optimistic, and said so in reports), "epoch=N" or "step=N" (the
            curve's value there; runs that ended before have none).
        columns: further run columns to read (None: every axis).
        phase: "search": runs that took part in choosing, those of a race among them; "confirm": runs on fresh seeds
            that did not (the column `phase` of runs.parquet says which; without it all runs are of the search).

    Returns:
        Run columns, `value` (NaN where there is none), and `judged`: whether the run may be compared at `at`: it
        finished, or it diverged (then its value is the worst finite one of the sweep, as the search counted it), or
        `at` names an epoch or step that it reached.

    Raises:
        UserError: unknown metric or `at`.
    """
    metric = metric or sweep.metric
    known = sweep.run_columns
    if columns is None:
        columns = [name for name in known if name.startswith("axis.")]
    named = _AT.fullmatch(at)
    if at not in ("final", "best") and not named:
        raise UserError(f"--at {at} is none of final, best, epoch=N, step=N")
    if named:
        runs = _of_phase(sweep.runs([*columns, "phase"]), phase)
        runs["value"] = _curve_values(sweep, runs, metric, named[1], int(named[2]))
        runs["judged"] = np.isfinite(runs["value"])
    else:
        column = metric if metric in COSTS else f"{at}.{metric}"
        runs = _of_phase(sweep.runs([*columns, column, "phase"]), phase)
        if column not in runs and len(runs):
            have = [name.split(".", 1)[1] for name in known if name.startswith(f"{at}.")]
            if not have and metric == sweep.metric:
                runs[column] = np.nan  # the sweep has just begun: no report yet
            else:
                raise unknown(f"{at} metric", metric, have)
        runs["value"] = runs[column].astype("float64") if column in runs else np.nan
        runs["judged"] = (runs["stop_reason"] == "finished") & np.isfinite(runs["value"])
    return _count_diverged_as_worst(runs, sweep.mode(metric))


def _of_phase(runs: pd.DataFrame, phase: str) -> pd.DataFrame:
    if "phase" not in runs:
        return runs if phase == "search" else runs.iloc[:0].copy()
    confirming = runs["phase"] == "confirm"
    return runs[confirming if phase == "confirm" else ~confirming].copy()


def _curve_values(sweep: Sweep, runs: pd.DataFrame, metric: str, unit: str, at: int) -> pd.Series:
    rows = sweep.epochs([metric], epochs=[at]) if unit == "epoch" else sweep.steps([metric], between=(at, at))
    by_run = rows.set_index("run_key")[metric]
    return runs["run_key"].map(by_run).astype("float64")


def _count_diverged_as_worst(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    diverged = runs["stop_reason"] == "diverged"
    finite = runs["value"][np.isfinite(runs["value"])]
    if diverged.any() and len(finite) and mode in ("max", "min"):
        worst = finite.min() if mode == "max" else finite.max()
        runs.loc[diverged, "value"] = worst
        runs.loc[diverged, "judged"] = True
    return runs


def summarise(sweep: Sweep, runs: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """One row a config, best first: configs that were judged, then those still running or stopped, by epoch and mean.

    Args:
        runs: what `scores` returned.

    Returns:
        `config_key, label, n` (runs with a value), `mean, sd, median, sem, low, high` (95% t interval), `iqm,
        stop_reason, stop_reasons` (of the runs, counted), `judged` (all its runs are), `epoch` (least of its runs),
        `epochs_total, rung, device_seconds, device, engine`, then the axes.
    """
    if not len(runs):
        columns = ["config_key", "label", "n", "mean", "sd", "low", "high", "stop_reason", "judged", "epoch"]
        return pd.DataFrame(columns=columns)
    axes = sweep.axis_columns(runs)
    runs = runs.assign(value=runs["value"].where(np.isfinite(runs["value"])))
    grouped = runs.groupby("config_key", sort=False)
    table = grouped["value"].agg(n="count", mean="mean", sd="std", median="median")
    table.insert(0, "label", grouped["label"].first())
    table["sem"] = table["sd"] / np.sqrt(table["n"])
    half = stats.t.ppf(0.975, np.maximum(table["n"] - 1, 1)) * table["sem"]
    half = half.where(table["n"] > 1, np.inf).where(table["n"] > 0, np.nan)
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    table["iqm"] = grouped["value"].agg(interquartile_mean)
    counted = _counted(runs)
    table["stop_reason"] = _config_stop_reasons(runs)
    table["stop_reasons"] = counted
    table["judged"] = grouped["judged"].all()
    table["epoch"] = grouped["epoch"].min().astype(int)
    table["epochs_total"] = grouped["epochs_total"].max().astype(int)
    table["rung"] = grouped["rung"].max()
    table["device_seconds"] = grouped["device_seconds"].sum()
    for name in ("device", "engine"):
        table[name] = grouped[name].agg(lambda values: ", ".join(sorted({str(v) for v in values if v})))
    for axis in axes:
        table[axis] = grouped[axis].first()
    sign = 1.0 if sweep.mode(metric) == "min" else -1.0
    order = pd.DataFrame(
        {
            "lost": table["stop_reason"].isin(["diverged", "crashed", "oom", "cancelled"]),
            "unjudged": ~table["judged"],
            "epoch": np.where(table["judged"], 0, -table["epoch"]),
            "value": sign * table["mean"],
        },
        index=table.index,
    )
    table = table.loc[order.sort_values(list(order.columns), kind="stable").index]
    return table.reset_index()


def _counted(runs: pd.DataFrame) -> pd.Series:
    """Per config: how its runs stand, as `4 finished, 1 diverged`."""
    counts = runs.groupby(["config_key", "stop_reason"], sort=False).size().reset_index(name="count")
    counts = counts.sort_values("count", ascending=False, kind="stable")
    counts["text"] = counts["count"].astype(str) + " " + counts["stop_reason"]
    return counts.groupby("config_key", sort=False)["text"].agg(", ".join)


def _config_stop_reasons(runs: pd.DataFrame) -> pd.Series:
    """The config's own reason, where written; of its runs otherwise: `running` while any is, else the most frequent."""
    firsts = runs.groupby("config_key", sort=False)["config_stop_reason"].first()
    unended = runs[~runs["stop_reason"].isin(ENDED)].groupby("config_key", sort=False)["stop_reason"].first()
    frequent = _counted(runs).str.split(", ").str[0].str.split(" ").str[1]
    derived = unended.reindex(firsts.index).fillna(frequent.reindex(firsts.index))
    return firsts.where(firsts.isin(ENDED), derived)


def pivot(runs: pd.DataFrame, judged: bool = True) -> pd.DataFrame:
    """Scores as configs x seeds; NaN where a run has no value or (with `judged`) may not be compared."""
    used = runs[runs["judged"]] if judged else runs
    return used.pivot_table(index="config_key", columns="seed", values="value", aggfunc="last", sort=False)


def complete(matrix: pd.DataFrame) -> pd.DataFrame:
    """Scores without gaps: the configs that have every seed; where that is less than half of them (some were given more
    seeds than others), the seeds that every config has."""
    by_rows = matrix.dropna()
    return by_rows if 2 * len(by_rows) >= len(matrix) else matrix.dropna(axis=1)


def list_sweeps(storage: Path | str) -> pd.DataFrame:
    """One row a sweep: configs, runs, how they stand, the best mean so far, device hours, when it started."""
    if not is_url(storage) and not Path(storage).is_dir():
        raise UserError(f"no folder {storage}: give --storage the folder that holds the sweeps")
    rows = []
    for name in sweep_names(storage):
        sweep = open_sweep(storage, name, curves=())
        runs = scores(sweep, columns=[])
        table = summarise(sweep, runs)
        fresh = scores(sweep, columns=[], phase="confirm")
        judged = table[table["judged"]] if len(table) else table
        rows.append(
            {
                "name": name,
                "family": sweep.family,
                "sweep": sweep.info.get("sweep", ""),
                "configs": runs["config_key"].nunique(),
                "runs": len(runs),
                "finished": int((runs["stop_reason"] == "finished").sum()),
                "running": int((~runs["stop_reason"].isin(ENDED)).sum()),
                "metric": sweep.metric,
                "best": judged["mean"].iloc[0] if len(judged) else np.nan,
                "best_config": judged["label"].iloc[0] if len(judged) else "",
                "confirmed": fresh["config_key"][fresh["judged"]].nunique(),
                "device_hours": float(runs["device_seconds"].sum()) / 3600,
                "started_at": str(sweep.info.get("started_at", "")),
            }
        )
    columns = ["name", "family", "sweep", "configs", "runs", "finished", "running"]
    return pd.DataFrame(rows, columns=None if rows else columns)
