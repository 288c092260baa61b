"""Health checks of a sweep: cards PASS, WARN or FAIL, with one line of evidence and one of advice.

A check that does not apply (no covariates, one config, no train metric) gives no card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis.compare import plain
from analysis.curves import curve_metric, learning_curves
from analysis.early import check_controls, early_ranks
from analysis.figures import rounded
from analysis.importance import main_effects
from analysis.patient import Card, Patient, Status
from analysis.statistics import paired_p
from analysis.store import Sweep, open_sweep
from analysis.summary import scores


def examine(storage: Path | str, name: str, metric: str | None = None, controls: str | None = None) -> pd.DataFrame:
    """All cards of a sweep, worst first: `status, check, evidence, advice`.

    Args:
        controls: a sweep of the same family and length that ran without pruning, for the question whether pruning was
            safe.
    """
    unpruned = None if controls is None else open_sweep(storage, controls)
    cards = list(cards_of(open_sweep(storage, name), metric, unpruned))
    order = {"FAIL": 0, "WARN": 1, "PASS": 2}
    cards.sort(key=lambda card: order[card.status])
    return pd.DataFrame([asdict(card) for card in cards], columns=["status", "check", "evidence", "advice"])


def cards_of(sweep: Sweep, metric: str | None = None, controls: Sweep | None = None) -> Iterator[Card]:
    patient = Patient(sweep, metric or sweep.metric, controls)
    if controls is not None:
        check_controls(sweep, controls, patient.metric)
    if not len(patient.runs):
        return
    for check in CHECKS:
        card = check(patient)
        if card is not None:
            yield card


# --- the checks -----------------------------------------------------------------------------------------------------


def failures(patient: Patient) -> Card | None:
    """Crashed and out-of-memory runs."""
    lost = patient.runs[patient.runs["stop_reason"].isin(["crashed", "oom"])]
    if not len(lost):
        return Card("PASS", "failures", f"none of {len(patient.runs)} runs crashed or ran out of memory")
    first = next((str(e) for e in lost["error"] if isinstance(e, str) and e), "no error was recorded")
    return Card(
        "FAIL",
        "failures",
        f"{len(lost)} of {len(patient.runs)} runs crashed or ran out of memory; the first: {first}",
        "mend the cause, then resume the sweep: --resume NAME",
    )


def seeds(patient: Patient) -> Card | None:
    """Whether noise can be known at all."""
    n = patient.runs.groupby("config_key")["seed"].nunique()
    if n.max() < 2:
        return Card("FAIL", "seeds", "one seed a config: noise is unknown", "run again with --seeds 5")
    if n.median() < 3:
        return Card("WARN", "seeds", f"{n.median():.0f} seeds a config: intervals are very wide", "--seeds 5")
    return Card("PASS", "seeds", f"{n.median():.0f} seeds a config")


def edge_of_space(patient: Patient) -> Card | None:
    """The best config at the end of an axis: FAIL where it is better than everything inside, beyond noise."""
    if len(patient.judged) < 3 or len(patient.matrix) < 3:
        return None
    best = patient.judged.iloc[0]
    at_edge, checked = [], 0
    for axis in patient.sweep.axes:
        column = f"axis.{axis['name']}"
        limits = _limits(axis)
        if limits is None or column not in patient.judged or pd.isna(best[column]):
            continue
        checked += 1
        side = _side(float(best[column]), *limits)
        if side is not None:
            inside = patient.judged[column].map(lambda v, s=limits: pd.notna(v) and _side(float(v), *s) is None)
            at_edge.append((axis["name"], side, float(best[column]), patient.judged[inside]))
    if not checked:
        return None
    if not at_edge:
        return Card("PASS", "edge of the space", f"the best, {best['label']}, lies inside every numeric axis")
    sure = [name for name, _, _, inside in at_edge if _beats(patient, best["config_key"], inside)]
    words = ", ".join(f"{name} = {value:g}, its {side} end" for name, side, value, _ in at_edge)
    status: Status = "FAIL" if sure else "WARN"
    beyond = "better than all inside beyond noise" if sure else "though not told from the best inside"
    return Card(
        status,
        "edge of the space",
        f"the best, {best['label']}, has {words}: {beyond}",
        f"widen the axis: --space {at_edge[0][0]}=...",
    )


def _limits(axis: dict) -> tuple[float, float, bool] | None:
    """Low, high and whether the scale is logarithmic, of a numeric axis with at least three values."""
    if axis.get("kind") == "range":
        return float(axis["low"]), float(axis["high"]), bool(axis.get("log"))
    values = axis.get("values") or []
    if len(values) < 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    low, high = float(min(values)), float(max(values))
    return low, high, low > 0 and high / low >= 20


def _side(value: float, low: float, high: float, log: bool) -> str | None:
    """ "lower" or "upper" where the value lies in the outermost 2% of the axis."""
    if log:
        value, low, high = np.log(value), np.log(low), np.log(high)
    way = (value - low) / (high - low)
    return "lower" if way <= 0.02 else "upper" if way >= 0.98 else None


def _beats(patient: Patient, key: str, others: pd.DataFrame) -> bool:
    if not len(others) or key not in patient.matrix.index or others["config_key"].iloc[0] not in patient.matrix.index:
        return False
    gap = patient.matrix.loc[key] - patient.matrix.loc[others["config_key"].iloc[0]]
    return paired_p(gap.to_numpy(dtype=float)) < 0.05 and gap.mean() > 0


def still_improving(patient: Patient) -> Card | None:
    """The best config's curve over its last fifth against its noise."""
    if not len(patient.judged) or not patient.sweep.metrics_of("epochs"):
        return None
    best = patient.judged.iloc[0]
    metric = curve_metric(patient.sweep)
    rows = patient.sweep.of_search(patient.sweep.epochs([metric], configs=[best["config_key"]]))
    total = rows["epoch"].max() if len(rows) else 0
    if total < 5 or patient.sweep.schedule.get("epochs_per_task", total) < total:
        return None  # on a stream of tasks the last epochs are a task's, and plasticity has a check of its own
    sign = -1.0 if patient.sweep.mode(metric) == "min" else 1.0
    rows = rows.assign(value=rows[metric] * sign)
    late = rows[rows["epoch"] > 0.9 * total].groupby("seed")["value"].mean()
    before = rows[(rows["epoch"] > 0.7 * total) & (rows["epoch"] <= 0.8 * total)].groupby("seed")["value"].mean()
    start = rows[rows["epoch"] == rows["epoch"].min()]["value"].mean()
    gain = (late - before).dropna()
    if len(gain) < 2:
        return None
    p = paired_p(gain.to_numpy(dtype=float))
    share = gain.mean() / max(1e-12, abs(late.mean() - start))
    evidence = f"{metric} of {best['label']} gained {rounded(float(gain.mean()))} from 75% to the end of its epochs"
    if p < 0.05 and gain.mean() > 0 and share > 0.02:
        return Card("WARN", "still improving", f"{evidence} (p={p:.2g})", "train longer, or judge at equal epochs")
    if p >= 0.05 and share > 0.02:
        return Card("PASS", "still improving", f"{evidence}, no more than its seeds' noise (p={p:.2g}, n={len(gain)})")
    return Card("PASS", "still improving", f"{evidence}, {share:.1%} of all it learned")


def noise(patient: Patient) -> Card | None:
    """Seed variance against config variance among the better half: is there anything to choose?"""
    matrix = patient.matrix
    if matrix.shape[0] < 3 or matrix.shape[1] < 2:
        return None
    better = matrix.loc[matrix.mean(axis=1).sort_values(ascending=False).index[: max(3, -(-len(matrix) // 2))]]
    y = better.to_numpy(dtype=float)
    k, n = y.shape
    residual = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    within = (residual**2).sum() / ((k - 1) * (n - 1))
    between = n * y.mean(1).var(ddof=1)
    if within == 0:
        return None
    p = float(stats.f.sf(between / within, k - 1, (k - 1) * (n - 1)))
    spread, run = np.sqrt(max(0.0, (between - within) / n)), np.sqrt(within)
    evidence = (
        f"among the better {k} configs, true means differ by about {spread:.2g} (sd), one run's noise is {run:.2g} "
        f"(F test p={p:.2g})"
    )
    if p > 0.05:
        return Card("FAIL", "noise", evidence, "their order is noise: more seeds, or take any of them")
    if spread < run:
        return Card("WARN", "noise", evidence, "single runs cannot be ranked: keep the seeds")
    return Card("PASS", "noise", evidence)


def diverged_region(patient: Patient) -> Card | None:
    """How many runs diverged, and where in the space."""
    bad = patient.runs["stop_reason"] == "diverged"
    if not bad.any():
        return Card("PASS", "diverged region", "no run diverged")
    where = ""
    for axis in patient.sweep.axes:
        column = f"axis.{axis['name']}"
        if _limits(axis) is None or column not in patient.runs:
            continue
        values = patient.runs[column].astype(float)
        low, high = values[bad].min(), values[bad].max()
        if ((values >= low) & ~bad).sum() == 0 or (values[~bad] < low).mean() > 0.9:
            where = f", nearly all with {axis['name']} >= {low:g}"
        elif (values[~bad] > high).mean() > 0.9:
            where = f", nearly all with {axis['name']} <= {high:g}"
    share = bad.mean()
    evidence = f"{int(bad.sum())} of {len(bad)} runs diverged ({share:.0%}){where}"
    return Card("FAIL" if share > 0.3 else "WARN", "diverged region", evidence, "cut that part of the space")


def train_test_gap(patient: Patient) -> Card | None:
    """The best config's train against test value of the same metric."""
    metric = patient.metric
    twin = metric.replace("test", "train")
    columns = patient.sweep.run_columns
    if twin == metric or f"final.{twin}" not in columns or not len(patient.judged):
        return None
    best = patient.judged.iloc[0]
    train = scores(patient.sweep, twin)
    value = float(train[train["config_key"] == best["config_key"]]["value"].mean())
    sign = -1.0 if patient.sweep.mode(metric) == "min" else 1.0
    gap = sign * (value - best["mean"])
    evidence = f"{best['label']}: {twin} {rounded(value)}, {metric} {rounded(best['mean'])}"
    limit = 0.1 if patient.sweep.unit(metric) == "fraction" else 0.5 * abs(value)
    if gap > limit:
        return Card("WARN", "train/test gap", evidence, "it memorises: more decay, augmentation or data")
    return Card("PASS", "train/test gap", evidence)


def plasticity(patient: Patient) -> Card | None:
    """On a stream of tasks: does the best config learn late tasks as well as early ones?"""
    per_task = patient.sweep.schedule.get("epochs_per_task", 0)
    if not per_task or per_task >= patient.sweep.schedule.get("epochs", 0) or not len(patient.judged):
        return None
    best = patient.judged.iloc[0]
    data = learning_curves(patient.sweep, [best["config_key"]])
    table = data.table
    if len(table) < 10:
        return None
    sign = -1.0 if patient.sweep.mode(data.metric) == "min" else 1.0
    tenth = max(1, len(table) // 10)
    # The very first tasks are met by a net that is still warming up: compare the second tenth with the last.
    early, late = table["mean"].iloc[tenth : 2 * tenth], table["mean"].iloc[-tenth:]
    drop = sign * (early.mean() - late.mean())
    noise_sd = float(np.sqrt((early.var() if tenth > 1 else 0.0) + (late.var() if tenth > 1 else 0.0)) / np.sqrt(tenth))
    noise_sd = max(noise_sd, float(table["sd"].median()) / np.sqrt(max(1, table["n"].max())))
    evidence = (
        f"{best['label']}: {data.metric} {rounded(early.mean())} on early tasks, {rounded(late.mean())} on the last"
    )
    if drop > 2 * noise_sd and drop > 0.01 * abs(early.mean()):
        return Card("WARN", "plasticity", evidence, "it loses plasticity (or late tasks are harder: run a fresh start)")
    return Card("PASS", "plasticity", evidence)


def covariates(patient: Patient) -> Card | None:
    """Dead units and collapsed attention entropy in the best config, where recorded."""
    names = [n for n in patient.sweep.covariate_names() if "dead" in n or "entropy" in n]
    if not names or not len(patient.judged):
        return None
    best = patient.judged.iloc[0]
    keys = patient.runs[patient.runs["config_key"] == best["config_key"]]["run_key"]
    rows = patient.sweep.covariates(names, keys)
    rows["mean"] = [float(np.mean(v)) if len(v) else np.nan for v in rows["values"]]
    found, bad = [], []
    for name, group in rows.groupby("name"):
        by_epoch = group.groupby("epoch")["mean"].mean()
        first, last = float(by_epoch.iloc[0]), float(by_epoch.iloc[-1])
        found.append(f"{name} {rounded(first)} -> {rounded(last)}")
        grew = "dead" in str(name) and last > 2 * max(first, 0.01)
        collapsed = "entropy" in str(name) and last < 0.2 * first
        if grew or collapsed:
            bad.append(str(name))
    evidence = f"{best['label']}: {', '.join(found)}"
    if bad:
        return Card(
            "WARN",
            "units and entropy",
            evidence,
            f"look at {', '.join(bad)} over time, and at their learning rate and decay",
        )
    return Card("PASS", "units and entropy", evidence)


def dimensions(patient: Patient) -> Card | None:
    """Dimensions that change nothing, and configs proposed twice."""
    proposed: dict[str, int] = {}
    for event in patient.sweep.events("proposed"):
        if event.get("phase", "search") != "search":
            continue  # more seeds on purpose
        key = str(event.get("config_key"))
        proposed[key] = proposed.get(key, 0) + 1
    twice = sum(count - 1 for count in proposed.values())
    idle = [a["name"] for a in patient.sweep.axes if _stuck(patient, a["name"]) and _choices(a) > 1]
    same = _same_results(patient)
    effects = main_effects(patient.sweep, patient.judged, patient.metric)
    weak = [str(r["axis"]) for r in effects.to_dict("records") if r["high"] < 0.01] if len(patient.judged) >= 20 else []
    said = []
    if twice:
        said.append(f"{twice} proposals repeated an earlier config")
    if idle:
        said.append(f"only one value of {', '.join(idle)} was tried")
    if same:
        said.append(f"{same[0]} and {same[1]} gave equal results on every seed: what differs between them is not used")
    if weak:
        said.append(f"{', '.join(weak)} explain less than 1% of the variance")
    if said:
        return Card("WARN", "dimensions", "; ".join(said), "drop what changes nothing from the space")
    return Card("PASS", "dimensions", "every axis was varied and no two configs gave equal results")


def _stuck(patient: Patient, axis: str) -> bool:
    """Whether three configs or more have the axis, and all at one value."""
    column = f"axis.{axis}"
    if column not in patient.table:
        return False
    return int(patient.table[column].notna().sum()) >= 3 and int(patient.table[column].nunique()) == 1


def _choices(axis: dict) -> int:
    if axis.get("kind") == "range":
        return 2
    return len(axis.get("values") or axis.get("arms") or [])


def _same_results(patient: Patient) -> tuple[str, str] | None:
    matrix = patient.matrix
    alive = matrix[(matrix != matrix.min().min()).all(axis=1)]  # diverged runs are equal by definition
    repeated = alive[alive.duplicated(keep=False)]
    if len(repeated) < 2:
        return None
    labels = patient.table.set_index("config_key")["label"]
    first = repeated.index[0]
    equal = repeated.index[(repeated == repeated.loc[first]).all(axis=1)]
    return labels[equal[0]], labels[equal[1]]


def driver(patient: Patient) -> Card | None:
    """Share of the sweep's wall time in which its devices trained: the rest is start-up, driver, logging, idling."""
    runs = patient.runs[patient.runs["device_seconds"] > 0]
    started, ended = pd.to_datetime(runs["started_at"], utc=True), pd.to_datetime(runs["ended_at"], utc=True)
    if not len(runs) or started.isna().all() or ended.isna().all():
        return None
    wall = (ended.max() - started.min()).total_seconds()
    devices = runs["device"].nunique()
    if wall <= 0:
        return None
    busy = runs["device_seconds"].sum() / (wall * devices)
    reports = sum(1 for _ in patient.sweep.events("report"))
    evidence = (
        f"{plain(devices)} device{'s' if devices != 1 else ''} trained {min(busy, 1.0):.0%} of {wall:.0f} s; "
        f"{reports / wall:.1f} reports a second"
    )
    if busy < 0.5:
        advice = "the driver, logging or too few trials at once hold it back: report less often, raise --max-concurrent"
        return Card("FAIL" if busy < 0.2 else "WARN", "driver", evidence, advice)
    return Card("PASS", "driver", evidence)


CHECKS: tuple[Callable[[Patient], Card | None], ...] = (
    failures,
    seeds,
    edge_of_space,
    still_improving,
    early_ranks,
    noise,
    diverged_region,
    train_test_gap,
    plasticity,
    covariates,
    dimensions,
    driver,
)
