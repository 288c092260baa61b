"""Which differences are real: arms of one sweep or several compared seed by seed, corrected for their number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.confirmation import phase_to_compare
from analysis.errors import UserError, unknown
from analysis.figures import rounded
from analysis.selection import more_seeds, probability_best, verdict, winners_curse
from analysis.statistics import Test, bootstrap_interval, difference, equivalent, holm, t_interval
from analysis.store import Sweep, open_sweep
from analysis.summary import scores

Pick = Literal["best", "all"]

MOST_ARMS = 60
"""All pairs of more arms than this are not compared: nothing would survive the correction."""

_CLAIM = re.compile(r"^(.+?)\s*(>>|>|=)\s*(.+)$")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        arms: `arm, config` (the one that stands for it), `configs` (it was picked from), `n, mean, sd, low, high` (t
            interval), `median, iqm, iqm_low, iqm_high` (bootstrap interval), `p_best`, best first.
        pairs: `a, b` (a has the better mean), `difference` (a - b), `low, high` (95%), `p, p_holm, test, paired, n,
            effect, superiority, verdict, more_seeds`.
        notes: what a reader has to know: runs left out, floors of the test, choice on the same seeds.
        phase: "confirm" where only runs on fresh seeds were compared, else "search".
    """

    metric: str
    mode: str
    arms: pd.DataFrame
    pairs: pd.DataFrame
    notes: list[str]
    phase: str = "search"


def compare(
    storage: Path | str,
    names: Sequence[str],
    by: str | None = None,
    metric: str | None = None,
    at: str = "final",
    test: Test = "t",
    against: str | None = None,
    margin: float | None = None,
    claim: str | None = None,
    pick: Pick = "best",
    paired: bool = True,
    alpha: float = 0.05,
    phase: str | None = None,
) -> Comparison:
    """Compares the arms that `by` makes: all pairs, or each with `against`, Holm-corrected.

    Args:
        names: one sweep or several.
        by: a field (`lr`, `hyper.lr`, `axis.method`), `config`, or `sweep`. Default: `config`, or `sweep` for several.
        at: as `summary.scores`.
        margin: the smallest difference that matters, for "same within ±margin" and for claims.
        claim: `A > B` (better), `A >> B` (better by `margin` at least), or `A = B`: judged as holds, noise, wrong or
            cannot tell; only that pair is tested.
        pick: where an arm holds several configs: "best" takes the one with the best mean (each arm at its own best
            setting; the choice is made on the same seeds, and said so), "all" averages over the settings of the other
            axes that all arms have.
        paired: seed by seed where two arms share two seeds or more; False: as if seeds had nothing in common.
        phase: "confirm" compares results on fresh seeds, "search" the scores that configs were chosen by. Default:
            the results, where two configs or more of a sweep (one or more of each of several) have them.

    Raises:
        UserError: unknown names, fewer than two arms, nothing finished.
    """
    sweeps = [open_sweep(storage, name) for name in names]
    if not sweeps:
        raise UserError("compare needs the name of a sweep")
    metric = metric or sweeps[0].metric
    mode = sweeps[0].mode(metric)
    by = by or ("config" if len(sweeps) == 1 else "sweep")
    phase, said = phase_to_compare(sweeps, metric, at, phase)
    runs, notes = _collect(sweeps, by, metric, at, phase)
    notes += said
    matrix, chosen = _arms(runs, mode, pick)
    if pick == "best" and (chosen["configs"] > 1).any():
        notes.append("Each arm is its best config, picked on the same seeds: its score flatters it (winner's curse).")
    arms = _arm_table(matrix, chosen, mode)
    wanted = _pairs_wanted(list(arms["arm"]), against, claim)
    rows = [_pair(matrix, a, b, mode, test, paired) for a, b in wanted]
    pairs = pd.DataFrame(rows)
    pairs["p_holm"] = holm(pairs["p"].to_numpy(dtype=float))
    open_pairs = int((~(pairs["p_holm"] < alpha)).sum())
    kind = _CLAIM.match(claim)[2] if claim and _CLAIM.match(claim) else None  # type: ignore[index]
    if kind and margin is None:
        raise UserError("a claim is judged against the smallest difference that matters: give --margin")
    verdicts, needs = [], []
    for row in pairs.to_dict("records"):
        verdicts.append(_verdict(row, mode, margin, kind, alpha))
        told = row["p_holm"] < alpha
        size = margin if margin is not None else None
        x, y = matrix.loc[row["a"]].to_numpy(), matrix.loc[row["b"]].to_numpy()
        needs.append(None if told else more_seeds(x, y, row["paired"], alpha / max(1, open_pairs), size=size))
    pairs["verdict"] = verdicts
    pairs["more_seeds"] = pd.array(needs, dtype="Int64")
    notes += _floor_notes(pairs, test, alpha) + _curse_note(matrix, mode)
    columns = ["a", "b", "difference", "low", "high", "p", "p_holm", "verdict", "more_seeds"]
    rest = [name for name in pairs.columns if name not in columns and name != "found"]
    return Comparison(metric, mode, arms, pairs[columns + rest], notes, phase)


def _collect(sweeps: Sequence[Sweep], by: str, metric: str, at: str, phase: str) -> tuple[pd.DataFrame, list[str]]:
    """Runs of all sweeps that may be compared, with `arm`, `config` and `setting` (the other axes' values)."""
    parts, notes = [], []
    for sweep in sweeps:
        columns = sweep.run_columns
        axes = [name for name in columns if name.startswith("axis.")]
        field = None if by in ("config", "sweep") else sweep.field(by, columns)
        runs = scores(sweep, metric, at, [*axes, *([field] if field else [])], phase)
        reasons = runs["stop_reason"][~runs["judged"]].value_counts()
        if len(reasons):
            left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            notes.append(f"{sweep.name}: not compared at '{at}': {left} runs.")
        diverged = int((runs["judged"] & (runs["stop_reason"] == "diverged")).sum())
        if diverged:
            notes.append(f"{sweep.name}: {diverged} diverged runs count as the worst value seen.")
        runs = runs[runs["judged"]].copy()
        names = runs["label"] if by == "config" else runs[field] if field else sweep.name
        runs["arm"] = pd.Series(names, index=runs.index).map(plain)
        if by == "config" and runs.groupby("arm")["config_key"].nunique().gt(1).any():
            runs["arm"] = runs["arm"] + " " + runs["config_key"]  # two configs of one label
        if by == "config" and len(sweeps) > 1:
            runs["arm"] = sweep.name + "/" + runs["arm"]
        runs["config"] = runs["config_key"]
        others = [axis for axis in axes if axis != field and not _decides(runs, axis, "arm")]
        runs["setting"] = runs[others].map(plain).agg(" ".join, axis=1) if others else ""
        parts.append(runs[["arm", "config", "label", "setting", "seed", "value"]])
    runs = pd.concat(parts)
    arms = runs["arm"].nunique()
    if arms < 2:
        found = f"only {runs['arm'].iloc[0]!r}" if arms else "none"
        hint = "" if at != "final" else "; --at epoch=N compares runs that have not finished"
        raise UserError(f"nothing to compare: by {by}, at {at}, there is {found}{hint}")
    return runs, notes


def _decides(runs: pd.DataFrame, axis: str, of: str) -> bool:
    """Whether a value of `axis` belongs to one arm only (the axis is another name for the arms, or exists in one)."""
    return bool((runs.groupby(axis, dropna=True)[of].nunique() <= 1).all())


def _arms(runs: pd.DataFrame, mode: str, pick: Pick) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores as arms x seeds, and for each arm the config that stands for it and how many there were."""
    if pick not in ("best", "all"):
        raise UserError(f"--pick {pick} is none of best, all")
    configs = runs.groupby("arm")["config"].nunique()
    if pick == "all":
        shared = set.intersection(*(set(group["setting"]) for _, group in runs.groupby("arm")))
        if not shared:
            raise UserError("the arms have no setting of the other axes in common: use --pick best")
        used = runs[runs["setting"].isin(shared)]
        # A seed enters only with all shared settings, else arms would be averaged over different ones.
        whole = used.groupby(["arm", "seed"])["setting"].nunique() == len(shared)
        means = used.groupby(["arm", "seed"])["value"].mean()[whole]
        labels = pd.Series(f"mean of {len(shared)} settings", index=configs.index)
        return means.unstack("seed"), pd.DataFrame({"config": labels, "configs": configs})
    by_config = runs.groupby(["arm", "config", "label"])["value"].agg(["mean", "count"]).reset_index()
    # A config with fewer seeds than its rivals is not picked: one lucky seed would do.
    most = by_config.groupby("arm")["count"].transform("max")
    by_config = by_config[by_config["count"] == most]
    by_config = by_config.sort_values("mean", ascending=mode == "min", kind="stable")
    best = by_config.groupby("arm").first()
    used = runs.merge(best["config"].rename("_best"), left_on="arm", right_index=True)
    used = used[used["config"] == used["_best"]]
    matrix = used.pivot_table(index="arm", columns="seed", values="value", aggfunc="last")
    return matrix, pd.DataFrame({"config": best["label"], "configs": configs})


def _arm_table(matrix: pd.DataFrame, chosen: pd.DataFrame, mode: str) -> pd.DataFrame:
    sign = -1.0 if mode == "min" else 1.0
    p_best = probability_best(sign * matrix.to_numpy(dtype=float))
    rows = []
    for index, arm in enumerate(map(str, matrix.index)):
        x = matrix.loc[arm].dropna().to_numpy(dtype=float)
        interval, middle = t_interval(x), bootstrap_interval(x, statistic="iqm", resamples=2000)
        rows.append(
            {
                "arm": arm,
                "config": chosen.loc[arm, "config"],
                "configs": chosen.loc[arm, "configs"],
                "n": len(x),
                "mean": interval.estimate,
                "sd": x.std(ddof=1) if len(x) > 1 else np.nan,
                "low": interval.low,
                "high": interval.high,
                "median": np.median(x),
                "iqm": middle.estimate,
                "iqm_low": middle.low if len(x) > 1 else np.nan,
                "iqm_high": middle.high if len(x) > 1 else np.nan,
                "p_best": p_best[index],
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values("mean", ascending=mode == "min", kind="stable").reset_index(drop=True)


def _pairs_wanted(arms: list[str], against: str | None, claim: str | None) -> list[tuple[str, str]]:
    """Pairs in the order of their means, or the claim's own, as (a, b)."""
    if claim is not None:
        parts = _CLAIM.match(claim)
        if parts is None:
            raise UserError(f"claim '{claim}' is not of the form 'A > B', 'A >> B' or 'A = B'")
        a, b = (_arm_named(name.strip(), arms) for name in (parts[1], parts[3]))
        if a == b:
            raise UserError(f"claim '{claim}' compares {a} with itself")
        return [(a, b)]
    if against is not None:
        base = _arm_named(against, arms)
        return [(a, base) for a in arms if a != base]
    if len(arms) > MOST_ARMS:
        raise UserError(f"{len(arms)} arms make too many pairs: give --against ARM, or another --by")
    return [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]


def _arm_named(name: str, arms: Sequence[str]) -> str:
    for arm in arms:
        if arm == name or arm == plain(_number(name)):
            return arm
    raise unknown("arm", name, arms)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _pair(matrix: pd.DataFrame, a: str, b: str, mode: str, test: Test, paired: bool) -> dict[str, Any]:
    x, y = matrix.loc[a].to_numpy(dtype=float), matrix.loc[b].to_numpy(dtype=float)
    together = paired and int((np.isfinite(x) & np.isfinite(y)).sum()) >= 2
    found = difference(x, y, together, test)
    return {
        "a": a,
        "b": b,
        "difference": found.interval.estimate,
        "low": found.interval.low,
        "high": found.interval.high,
        "p": found.p,
        "test": test,
        "paired": together,
        "n": min(found.n_a, found.n_b),
        "effect": found.effect,
        "superiority": found.superiority,
        "found": found,
    }


def _verdict(row: dict[Any, Any], mode: str, margin: float | None, claim: str | None, alpha: float) -> str:
    found = row["found"]
    sign = -1.0 if mode == "min" else 1.0
    if claim is not None and margin is not None:
        interval = found.interval
        if sign < 0:
            interval = type(interval)(-interval.estimate, -interval.high, -interval.low, interval.level)
        oriented = type(found)(interval, row["p_holm"], *_rest(found))
        return verdict(oriented, "equal" if claim == "=" else "greater", margin, claim == ">>", alpha)
    if margin is not None and equivalent(found.interval, margin):
        return f"same within ±{margin:g}"
    if row["p_holm"] < alpha:
        higher = row["a"] if found.interval.estimate > 0 else row["b"]
        lower = row["b"] if higher == row["a"] else row["a"]
        if mode not in ("max", "min"):
            return f"{higher} is higher"
        return f"{higher if sign > 0 else lower} is better"
    return "cannot tell"


def _rest(found: Any) -> tuple[Any, ...]:
    return found.test, found.paired, found.n_a, found.n_b, found.effect, found.superiority


def _curse_note(matrix: pd.DataFrame, mode: str) -> list[str]:
    """By how much the best arm's own score flatters it."""
    sign = -1.0 if mode == "min" else 1.0
    y = (sign * matrix).dropna().to_numpy(dtype=float)
    if len(y) < 3 or y.shape[1] < 2:
        return []
    optimism, spread = winners_curse(y).optimism, float(np.median(y.std(1, ddof=1)))
    if not optimism > 0.1 * spread:
        return []
    return [f"Picked and scored on the same seeds, the best arm flatters itself by about {rounded(optimism, spread)}."]


def _floor_notes(pairs: pd.DataFrame, test: Test, alpha: float) -> list[str]:
    notes = []
    if (pairs["n"] < 2).any():
        notes.append("Arms with one seed cannot be tested: noise is unknown.")
    paired = pairs[pairs["paired"]]
    if test != "t" and len(paired):
        floor = 2 / 2 ** int(paired["n"].max())
        if floor * len(pairs) > alpha:
            notes.append(
                f"With {int(paired['n'].max())} seeds the {test} test cannot go below p = {floor:.3g}, "
                f"and {len(pairs)} comparisons need {alpha / len(pairs):.3g}: use --test t, or more seeds."
            )
    return notes


def sentences(found: Comparison, alpha: float = 0.05) -> list[str]:
    """The pairs in words, those that tell something first."""
    lines = []
    for row in found.pairs.to_dict("records"):
        p = p_text(row["p_holm"])
        gap = rounded(abs(row["difference"]), (row["high"] - row["low"]) / 4)
        if row["verdict"] in ("holds", "noise", "wrong", "cannot tell") and not row["p_holm"] < alpha:
            more = "" if pd.isna(row["more_seeds"]) else f"; {int(row['more_seeds'])} more seeds would tell"
            lines.append(f"{row['a']} and {row['b']}: {row['verdict']} ({p}, n={row['n']}{more})")
        else:
            lines.append(f"{row['a']} and {row['b']}: {row['verdict']}, by {gap} ({p}, n={row['n']})")
    return lines


def spread_text(mean: float, sd: float, n: int) -> str:
    """`0.9150 ± 0.0011 (n=5)`."""
    return f"{rounded(mean, sd)} ± {rounded(sd, sd)} (n={n})" if n > 1 else f"{rounded(mean)} (n={n})"


def p_text(p: float) -> str:
    """`p=0.003`, `p<0.001`, or `no test`."""
    if not np.isfinite(p):
        return "no test"
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def plain(value: Any) -> str:
    """A field's value as users write it: 0.001, 64, cbp; "" where there is none."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)


def grid(
    storage: Path | str,
    name: str,
    rows: str,
    columns: str | None = None,
    metric: str | None = None,
    at: str = "final",
    pick: Pick = "best",
) -> pd.DataFrame:
    """One row a cell of two fields: `row, column, config, configs, n, mean, sd`.

    Args:
        pick: where a cell holds several configs: its best one, or "all" (mean and spread over all their runs).
    """
    sweep = open_sweep(storage, name)
    known = sweep.run_columns
    fields = [sweep.field(field, known) for field in ([rows] if columns is None else [rows, columns])]
    runs = scores(sweep, metric, at, fields)
    runs = runs[runs["judged"]]
    if not len(runs):
        raise UserError(f"{name} has no run to show at '{at}' yet")
    runs = runs.assign(row=runs[fields[0]], column=runs[fields[1]] if columns else metric or sweep.metric)
    cells = []
    for (row, column), cell in runs.groupby(["row", "column"], sort=True):
        means = cell.groupby("config_key")["value"].mean()
        if pick == "best":
            best = means.idxmin() if sweep.mode(metric) == "min" else means.idxmax()
            shown = cell[cell["config_key"] == best]
        else:
            shown = cell
        values = shown["value"].to_numpy(dtype=float)
        cells.append(
            {
                "row": row,
                "column": column,
                "config": shown["label"].iloc[0] if pick == "best" else "",
                "configs": len(means),
                "n": len(values),
                "mean": values.mean(),
                "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
            }
        )
    return pd.DataFrame(cells)


def table(storage: Path | str, name: str, rows: str, columns: str | None = None, **options: Any) -> pd.DataFrame:
    """`grid` laid out: rows x columns of `mean ± sd (n=5)`; options as `grid`'s."""
    cells = grid(storage, name, rows, columns, **options)
    cells["text"] = [spread_text(cell["mean"], cell["sd"], cell["n"]) for cell in cells.to_dict("records")]
    laid = cells.pivot(index="row", columns="column", values="text").fillna("")
    laid.index = pd.Index([plain(value) for value in laid.index], name=rows)
    laid.columns = pd.Index([plain(value) for value in laid.columns], name=columns or "")
    return laid
