"""Choosing among configs: which may be best, what choosing costs, how many more seeds would tell, and verdicts.

Scores come as a matrix [config, seed]; a seed is a column, NaN where a run is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.statistics import Difference, Interval, welch_interval

Verdict = Literal["holds", "noise", "wrong", "cannot tell"]
Matrix = NDArray[np.float64]

MOST_SEEDS = 10_000
"""Beyond this many seeds an answer is "too many to matter"."""


def probability_best(scores: Matrix, draws: int = 20_000, seed: int = 0) -> NDArray[np.float64]:
    """For each config, the probability that its true mean is the highest, given the scores (flip the sign to minimise).

    Assumes: score = config's mean + seed's effect + noise, noise normal with a spread of the config's own, and no
    opinion about the means beforehand. A config's mean then has Student's distribution around its average, the seeds'
    common effect taken out where all configs have all seeds. Draws from these are compared. A config with one run
    cannot be judged and its probability is NaN; the others are compared among themselves. With few seeds the answer is
    cautious: the noise itself is uncertain. Diverged runs that count as "worst seen" break normality; their config is
    hardly ever called best all the same.

    Source: Gelman et al., "Bayesian Data Analysis", 3rd ed., sections 3.2 and 4.1 (normal model, flat prior).
    """
    y = np.asarray(scores, dtype=float)
    out = np.full(len(y), np.nan)
    counts = np.isfinite(y).sum(1)
    able = np.flatnonzero(counts >= 2)
    if len(able) == 0:
        return out
    if len(able) == 1:
        out[able] = 1.0
        return out
    y = y[able]
    complete = bool(np.isfinite(y).all())
    mean = np.nanmean(y, axis=1)
    n = np.isfinite(y).sum(1)
    if complete:
        # Residuals after the seeds' means hold (k - 1) / k of a config's own variance when spreads are alike.
        residual = y - y.mean(0) - (mean - mean.mean())[:, None]
        variance = (residual**2).sum(1) / (n - 1) * len(y) / (len(y) - 1)
    else:
        variance = np.nanvar(y, axis=1, ddof=1)
    rng = np.random.default_rng(seed)
    wins = np.zeros(len(y))
    scale = np.sqrt(variance / n)
    chunk = max(1, min(draws, 4_000_000 // len(y)))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = mean[:, None] + scale[:, None] * rng.standard_t((n - 1)[:, None], size=(len(y), size))
        wins += np.bincount(drawn.argmax(0), minlength=len(y))
    out[able] = wins / draws
    return out


def more_seeds(
    a: ArrayLike, b: ArrayLike, paired: bool = True, alpha: float = 0.05, power: float = 0.8, size: float | None = None
) -> int | None:
    """How many more seeds a config would need to tell a from b. None: more than 10,000 in all, or nothing to go by.

    The smallest n at which Student's (or Welch's, equal n) two-sided test at `alpha` finds a difference of `size` with
    probability `power`, less the seeds at hand. Assumes normal scores with the spread seen here.

    Args:
        alpha: after correction: with m comparisons pass alpha / m.
        size: the true difference to detect; default: the one observed. That default answers "if it is what it looks
            like", no more: an observed difference is itself noise, so read the count as an order of magnitude.

    Source: Cohen, "Statistical Power Analysis", 1988, chapter 2 (exact power from the noncentral t distribution).
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if paired:
        both = np.isfinite(x) & np.isfinite(y)
        d = (x - y)[both]
        have, spread, gap, groups = len(d), float(d.std(ddof=1)) if len(d) > 1 else math.nan, float(np.mean(d)), 1
    else:
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        have, groups = min(len(x), len(y)), 2
        if have < 2:
            return None
        gap = float(x.mean() - y.mean())
        spread = math.sqrt(x.var(ddof=1) + y.var(ddof=1))  # of one difference of two runs
    gap = abs(gap if size is None else size)
    if not math.isfinite(spread) or have < 2 or gap == 0:
        return None
    if spread == 0:
        return 0
    low, high = 2, 2
    while t_power(high, gap / spread, alpha, groups) < power:
        low, high = high, high * 2
        if high > MOST_SEEDS:
            return None
    while low < high:
        middle = (low + high) // 2
        if t_power(middle, gap / spread, alpha, groups) >= power:
            high = middle
        else:
            low = middle + 1
    return max(0, high - have)


def t_power(n: int, ratio: float, alpha: float, groups: int = 1) -> float:
    """Chance that a two-sided t-test with n seeds (a side) finds a difference of `ratio` standard deviations.

    The standard deviation is that of one difference between two runs, paired (groups = 1) or not (groups = 2).
    """
    freedom = groups * (n - 1)
    shift = ratio * math.sqrt(n)
    critical = float(stats.t.isf(alpha / 2, freedom))
    power = float(stats.nct.sf(critical, freedom, shift))
    return power if math.isfinite(power) else 1.0  # scipy gives NaN where the power is 1 beyond its range


@dataclass(frozen=True)
class Curse:
    """By how much the winner's own score flatters it.

    Args:
        optimism: score it was chosen by, minus score on seeds that took no part; positive in the direction of "better".
        interval: of the optimism, where confirmation runs exist.
        agreement: share of held-out seeds on which the same config was chosen as on all seeds (leave-one-out only).
    """

    optimism: float
    interval: Interval | None = None
    agreement: float | None = None


def winners_curse(scores: Matrix) -> Curse:
    """Estimates the winner's curse without new runs: choose on all seeds but one, look at that one; each in turn.

    Higher is better (flip the sign to minimise). Assumes independent seeds and every config on every seed (rows with
    gaps are left out). Choosing by n - 1 seeds is a little noisier than by n, so this slightly overstates the optimism.
    Source: Cawley & Talbot, JMLR 11, 2010 (selection bias); Stone, JRSS B 36, 1974 (cross-validated choice).
    """
    y = np.asarray(scores, dtype=float)
    y = y[np.isfinite(y).all(1)]
    if y.shape[0] < 2 or y.shape[1] < 2:
        return Curse(math.nan)
    n = y.shape[1]
    rest = (y.sum(1, keepdims=True) - y) / (n - 1)
    chosen = rest.argmax(0)
    columns = np.arange(n)
    # The seed left out may be a hard or an easy one for all: compare with how all configs did on it.
    promised = rest[chosen, columns] - rest.mean(0)
    kept = y[chosen, columns] - y.mean(0)
    return Curse(float((promised - kept).mean()), agreement=float((chosen == y.mean(1).argmax()).mean()))


def confirmed_curse(search: ArrayLike, confirmed: ArrayLike) -> Curse:
    """The winner's scores in the search against its scores on fresh seeds (higher is better), with Welch's interval."""
    gap = welch_interval(search, confirmed)
    return Curse(gap.estimate, gap)


def verdict(
    found: Difference, claim: Literal["greater", "equal"], margin: float, large: bool = False, alpha: float = 0.05
) -> Verdict:
    """Judges "a > b" or "no difference" by the interval of a - b and the smallest difference that matters.

    "greater": *holds* when the interval lies above 0 (and the difference reaches `margin` if the claim says `large`);
        *wrong* when it lies below 0; *noise* when neither, and it lies inside ±margin.
    "equal": *holds* when the interval lies inside ±margin; *wrong* when it excludes 0 and the difference reaches
        `margin`.
    Anything else *cannot be told*; `more_seeds` says what would.

    Args:
        alpha: significance after correction, for claims that rest on excluding 0: `found.p` must be below it too.
    """
    low, high, gap = found.interval.low, found.interval.high, found.interval.estimate
    inside = -margin < low and high < margin
    excludes = found.p < alpha and (low > 0 or high < 0)
    if claim == "equal":
        if inside:
            return "holds"
        return "wrong" if excludes and abs(gap) >= margin else "cannot tell"
    if excludes and gap > 0 and (not large or gap >= margin):
        return "holds"
    if excludes and gap < 0:
        return "wrong"
    return "noise" if inside else "cannot tell"
