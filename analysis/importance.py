"""Which axes of the space matter: the share of variance between configs that each explains by itself."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.store import Sweep

BINS = 6
"""A continuous axis is cut into at most this many parts of equally many configs."""


def main_effects(
    sweep: Sweep, table: pd.DataFrame, metric: str | None = None, resamples: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Main effect of each axis: `axis, share, low, high, configs`, largest first.

    The share is epsilon squared: between-group over total variance of the configs' means, less what chance would give;
    the interval is a bootstrap over configs (90%). Ranks of means are used, so that a few broken configs (accuracy at
    chance) do not hide what distinguishes the good ones. An axis that exists only for some configs is judged among
    those. Assumes nothing about shape, but sees main effects only: two axes that matter only together look idle, and a
    search that dwells where results are good shows less of an axis than a grid.

    Source: Kelley, PNAS 21, 1935 (epsilon squared); as functional ANOVA's first order, Hutter et al., ICML 2014.
    """
    rows = []
    rng = np.random.default_rng(seed)
    for column in sweep.axis_columns(table):
        used = table[table[column].notna() & table["mean"].notna()]
        if len(used) < 4 or used[column].nunique() < 2:
            continue
        groups = _groups(used[column])
        ranks = used["mean"].rank().to_numpy(dtype=float)
        picks = rng.integers(0, len(ranks), size=(resamples, len(ranks)))
        shares = [_epsilon(ranks[pick], groups[pick]) for pick in picks]
        low, high = np.quantile(shares, [0.05, 0.95])
        rows.append((column.removeprefix("axis."), max(0.0, _epsilon(ranks, groups)), max(0.0, low), high, len(used)))
    frame = pd.DataFrame(rows, columns=["axis", "share", "low", "high", "configs"])
    return frame.sort_values("share", ascending=False, kind="stable").reset_index(drop=True)


def _groups(values: pd.Series) -> np.ndarray:
    """The axis cut into groups; a range, where hardly two configs share a value, into parts of five or more configs."""
    if pd.api.types.is_numeric_dtype(values) and 3 * values.nunique() > len(values) > 3:
        bins = min(BINS, max(2, len(values) // 5))
        return pd.qcut(values.rank(method="first"), bins, labels=False).to_numpy()
    return pd.factorize(values)[0]


def _epsilon(y: np.ndarray, groups: np.ndarray) -> float:
    """Epsilon squared: 1 - (within variance / total variance), both unbiased."""
    total = ((y - y.mean()) ** 2).sum()
    counts = np.bincount(groups)
    sums = np.bincount(groups, weights=y)
    kept = counts > 0
    within = total - ((sums[kept] / counts[kept] - y.mean()) ** 2 * counts[kept]).sum()
    free = len(y) - kept.sum()
    if free <= 0 or total == 0:
        return 0.0
    return float(1 - (within / free) / (total / (len(y) - 1)))
