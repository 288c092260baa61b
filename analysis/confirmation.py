"""Results on fresh seeds that took no part in choosing, beside the scores that configs were chosen by; and races."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from analysis.errors import UserError
from analysis.figures import rounded
from analysis.selection import confirmed_curse
from analysis.statistics import t_interval
from analysis.store import Sweep
from analysis.summary import scores

COLUMNS = ["config_key", "label", "n", "mean", "sd", "low", "high", "search", "search_n", "optimism"]


def confirmed_table(sweep: Sweep, runs: pd.DataFrame, confirmed: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a confirmed config, in the search's order: the sweep's results.

    Args:
        runs, confirmed: what `summary.scores` returned for the two phases.

    Returns:
        `config_key, label, n, mean, sd, low, high` (95% t interval) on the fresh seeds; `search, search_n`: mean and
        number of the seeds it was chosen by; `optimism, optimism_low, optimism_high`: by how much that was too good
        (Welch's 95%, positive: too good), the winner's curse.
    """
    sign = -1.0 if sweep.mode(metric) == "min" else 1.0
    rows = []
    for key, fresh in confirmed[confirmed["judged"]].groupby("config_key", sort=False):
        values = fresh["value"].to_numpy(dtype=float)
        search = runs[(runs["config_key"] == key) & runs["judged"]]["value"].to_numpy(dtype=float)
        interval = t_interval(values)
        row = {
            "config_key": key,
            "label": fresh["label"].iloc[0],
            "n": len(values),
            "mean": interval.estimate,
            "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
            "low": interval.low,
            "high": interval.high,
            "search": search.mean() if len(search) else np.nan,
            "search_n": len(search),
        }
        gap = confirmed_curse(sign * search, sign * values).interval
        if gap is not None:
            row.update(optimism=gap.estimate, optimism_low=gap.low, optimism_high=gap.high)
        rows.append(row)
    columns = [*COLUMNS, "optimism_low", "optimism_high"]
    table = pd.DataFrame(rows, columns=columns)
    places = chosen_order(sweep)
    return table.sort_values(
        "config_key", key=lambda keys: keys.map(lambda k: places.get(k, len(places))), kind="stable"
    )


def chosen_order(sweep: Sweep) -> dict[str, int]:
    """Config key -> its place in the search, of those that were last chosen to be confirmed."""
    last = _last(sweep.events("confirm"))
    return {entry["config_key"]: entry["place"] for entry in last["chosen"]} if last else {}


def ties(sweep: Sweep) -> list[str]:
    """Labels of configs that were equal to the last one chosen and are not confirmed."""
    last = _last(sweep.events("confirm"))
    return [entry["label"] for entry in last["ties"]] if last else []


def race_line(sweep: Sweep) -> str | None:
    """How the sweep's race ended, or how far it is; None without one."""
    looks = list(sweep.events("race"))
    if not looks:
        return None
    last, out = looks[-1], [beaten for look in looks for beaten in look["beaten"]]
    alive = [entry["label"] for entry in last["alive"]]
    if not alive:
        return "race: no config ran to its end"
    after = f"after {last['seeds']} of at most {last['most']} seeds"
    dropped = f"; {len(out)} dropped out, the last: {out[-1]['label']} (beaten by {out[-1]['by']})" if out else ""
    if last["verdict"] == "one left":
        return f"race: {alive[0]} is the best of {last['started']} configs, {after}{dropped}"
    if last["verdict"] == "within the margin":
        return f"race: no config left is better than {alive[0]} by {last['margin']:g} or more, {after}{dropped}"
    names = ", ".join(alive[:4]) + (f" and {len(alive) - 4} more" if len(alive) > 4 else "")
    state = "cannot be told apart" if last["verdict"] else "are still in contention"
    return f"race: {len(alive)} of {last['started']} configs {state} {after}: {names}{dropped}"


def phase_to_compare(sweeps: Sequence[Sweep], metric: str, at: str, phase: str | None) -> tuple[str, list[str]]:
    """Which runs to compare, and what to say of it."""
    if phase not in (None, "search", "confirm"):
        raise UserError(f"--phase {phase} is none of search, confirm")
    confirmed = []
    for sweep in sweeps:
        fresh = scores(sweep, metric, at, [], "confirm") if "phase" in sweep.run_columns else None
        confirmed.append(0 if fresh is None else int(fresh["config_key"][fresh["judged"]].nunique()))
    if phase == "confirm" and not any(confirmed):
        raise UserError("nothing was confirmed on fresh seeds: --resume the sweep with --confirm K, or --phase search")
    least = 2 if len(sweeps) == 1 else 1
    if phase is None:
        phase = "confirm" if all(count >= least for count in confirmed) else "search"
    if phase == "confirm":
        return phase, ["Results: only runs on fresh seeds that took no part in choosing (--phase search: the others)."]
    if any(confirmed):
        return phase, [
            "Scores that configs were chosen by; results are those on fresh seeds (--phase confirm, journal)."
        ]
    return phase, []


def flattery(row: dict) -> str:
    """`0.0031 too good (-0.001 to 0.007)` of a row of `confirmed_table`; "" where it has no search score."""
    if not np.isfinite(row["search"]):
        return ""
    size = rounded(abs(row["optimism"]), row["sd"])
    told = f"{size} too {'good' if row['optimism'] >= 0 else 'bad'}"
    if np.isfinite(row["optimism_low"]):
        told += f" (95%: {rounded(row['optimism_low'], row['sd'])} to {rounded(row['optimism_high'], row['sd'])})"
    return told


def _last(events: Iterable[dict]) -> dict | None:
    found = None
    for found in events:  # noqa: B007  # the last one is what is asked for
        pass
    return found
