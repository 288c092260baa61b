"""Several objectives: what each config has of every one, and which configs nothing beats in all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.store import COSTS, Sweep
from analysis.summary import scores


def tradeoff(sweep: Sweep, runs: pd.DataFrame, metric: str, at: str = "final") -> pd.DataFrame:
    """One row a config whose every run may be compared, best by `metric` first: `config_key, label`, a column an
    objective (mean over its runs), and `front`: whether no other config matches it in everything and beats it in
    something.

    The objectives are `metric` and the sweep's others; of a sweep with one they are that one and the device time of a
    run. What a diverged run cost is left out of its config's mean.

    Args:
        runs: what `summary.scores` returned for `metric`.
    """
    names = [metric, *others_of(sweep, metric)]
    whole = runs.groupby("config_key")["judged"].transform("all") if len(runs) else runs.get("judged")
    used = runs[whole] if len(runs) else runs
    if not len(used):
        return pd.DataFrame(columns=["config_key", "label", *names, "front"])
    table = used.groupby("config_key", sort=False)["label"].first().to_frame()
    for name in names:
        found = used if name == metric else scores(sweep, name, at, [])
        if name in COSTS:
            found = found[found["stop_reason"] != "diverged"]
        table[name] = found.groupby("config_key")["value"].mean()
    table = table.dropna()
    table["front"] = nondominated(table[names].to_numpy(dtype=float), [sweep.mode(name) for name in names])
    table = table.sort_values(metric, ascending=sweep.mode(metric) == "min", kind="stable")
    return table.reset_index()


def others_of(sweep: Sweep, metric: str) -> list[str]:
    """What a config is weighed by beside `metric`."""
    names = [name for name in sweep.objectives if name != metric]
    return names or [name for name in COSTS if name != metric]


def nondominated(points: NDArray[np.float64], modes: Sequence[str]) -> NDArray[np.bool_]:
    """Which rows of `points` [config, objective] no other row matches everywhere and beats somewhere."""
    good = points * np.array([-1.0 if mode == "min" else 1.0 for mode in modes])
    return np.array([not ((good >= own).all(1) & (good > own).any(1)).any() for own in good], dtype=bool)


def front_line(sweep: Sweep, points: pd.DataFrame, metric: str) -> str | None:
    """The front of a sweep that optimised several objectives, in a sentence."""
    if len(sweep.objectives) < 2 or not len(points):
        return None
    names = [metric, *others_of(sweep, metric)]
    front = points[points["front"]]
    shown = [
        f"{row['label']} ({', '.join(f'{row[name]:.4g}' for name in names)})"
        for row in front.head(6).to_dict("records")
    ]
    more = f" and {len(front) - 6} more" if len(front) > 6 else ""
    directions = ", ".join(f"{name} ({sweep.mode(name)})" for name in names)
    return f"Pareto front of {directions}, {len(front)} of {len(points)} configs: {'; '.join(shown)}{more}"
