"""Intervals and tests for a handful of seeds.

Scores here are one number a run. Configs of a sweep train on the same seeds, and a seed fixes initial weights and data
order, so that differences between configs are taken seed by seed (paired) wherever seeds are shared.

What the tests assume stands with each of them. `tests/test_analysis_statistics.py` and
`benchmarks/statistics_simulation.py` check by simulation that intervals cover and false positives stay near alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.errors import UserError

Test = Literal["t", "permutation", "wilcoxon"]
TESTS: tuple[Test, ...] = ("t", "permutation", "wilcoxon")

EXACT_LIMIT = 20_000
"""Permutation tests enumerate every arrangement up to this many; beyond, they draw this many at random."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval at `level`."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


# --- one config -----------------------------------------------------------------------------------------------------


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half: robust to one lucky or lost seed, less noisy than the median.

    A quarter of the values is cut from each end, a fractional value in proportion, so that three seeds give more than
    their median. Source: Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021.
    """
    x = _finite(values)
    return float(_middle_half(x[None, :])[0]) if len(x) else math.nan


def _middle_half(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """The interquartile mean of each row."""
    n = samples.shape[1]
    edge = np.arange(n + 1)
    weight = np.clip(np.minimum(edge[1:], 0.75 * n) - np.maximum(edge[:-1], 0.25 * n), 0, None)
    return np.sort(samples, axis=1) @ (weight / weight.sum())


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval for the mean.

    Assumes: independent runs, roughly normal scores. With few seeds it is the honest default; with a strongly skewed
    score (most seeds fine, some lost) it is too short on the long tail's side. One run has no interval (infinite).
    Source: "Student", Biometrika 6, 1908.
    """
    x = _finite(values)
    n = len(x)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, level)
    mean = float(x.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, level)


def bootstrap_interval(
    values: ArrayLike,
    level: float = 0.95,
    statistic: Literal["mean", "median", "iqm"] = "mean",
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over seeds, for statistics that have no formula (median, interquartile mean).

    Assumes: independent runs that stand for the population. It is too short with few seeds: for the mean of five normal
    runs a nominal 95% covers about 83% (the simulation table says how much at each n); use `t_interval` for means.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    x = _finite(values)
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, level)
    rng = np.random.default_rng(seed)
    samples = x[rng.integers(0, len(x), size=(resamples, len(x)))]
    if statistic == "iqm":
        points, estimate = _middle_half(samples), interquartile_mean(x)
    elif statistic == "median":
        points, estimate = np.median(samples, axis=1), float(np.median(x))
    else:
        points, estimate = samples.mean(1), float(x.mean())
    low, high = np.quantile(points, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level)


# --- two configs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """a minus b over seeds: estimate with interval, p of "no difference", and sizes.

    Args:
        n_a, n_b: runs that entered; equal when paired.
        paired: seed by seed.
        effect: the difference in standard deviations of one run (Hedges' g).
        superiority: probability that a run of a scores above a run of b (ties count half).
    """

    interval: Interval
    p: float
    test: Test
    paired: bool
    n_a: int
    n_b: int
    effect: float
    superiority: float


def difference(a: ArrayLike, b: ArrayLike, paired: bool = True, test: Test = "t", level: float = 0.95) -> Difference:
    """Compares two configs' scores.

    Args:
        a, b: scores; when paired, entries at the same index share a seed, and one missing (NaN) in either is left out.
        test: "t" (paired Student or Welch), "permutation", or "wilcoxon" (signed rank, or rank sum when not paired).
            The interval is Student's or Welch's whatever the test.
    """
    if test not in TESTS:
        raise UserError(f"no test '{test}': there is {', '.join(TESTS)}")
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if paired:
        if x.shape != y.shape:
            raise ValueError("paired scores need the same seeds in the same order")
        both = np.isfinite(x) & np.isfinite(y)
        x, y = x[both], y[both]
        interval = t_interval(x - y, level)
        p = paired_p(x - y, test)
    else:
        x, y = _finite(x), _finite(y)
        interval = welch_interval(x, y, level)
        p = unpaired_p(x, y, test)
    return Difference(interval, p, test, paired, len(x), len(y), hedges_g(x, y), superiority(x, y))


def paired_p(differences: ArrayLike, test: Test = "t") -> float:
    """Two-sided p that seed-by-seed differences are centred at zero. NaN with fewer than two seeds.

    "t": Student's paired test. Assumes differences independent over seeds and roughly normal.
        Source: "Student", Biometrika 6, 1908.
    "permutation": sign flips of each difference, all 2^n of them while that is at most 20,000, else 20,000 drawn at
        random (with a fixed seed). Assumes only that under the null each difference is symmetric about zero. Its
        smallest p is 2/2^n: with five seeds it can never go below 0.0625.
        Source: Fisher, "The Design of Experiments", 1935, section 21.
    "wilcoxon": signed ranks, exact for small n without ties. Assumes symmetric differences; less swayed by one far
        value. The same floor of 2/2^n. Source: Wilcoxon, Biometrics Bulletin 1, 1945; Demsar, JMLR 7, 2006.
    """
    d = _finite(differences)
    n = len(d)
    if n < 2:
        return math.nan
    if np.all(d == 0):
        return 1.0
    if test == "t":
        spread = d.std(ddof=1)
        if spread == 0:
            return 0.0
        return float(2 * stats.t.sf(abs(d.mean()) / (spread / math.sqrt(n)), n - 1))
    if test == "wilcoxon":
        return float(stats.wilcoxon(d).pvalue)
    if 2**n <= EXACT_LIMIT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return _at_least(np.abs(signs @ d), abs(d.sum()))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(EXACT_LIMIT, n))
    return _drawn(np.abs(signs @ d), abs(d.sum()))


def unpaired_p(a: ArrayLike, b: ArrayLike, test: Test = "t") -> float:
    """Two-sided p that two independent groups of runs have the same mean (or distribution). NaN below two runs a side.

    "t": Welch's test. Assumes independent, roughly normal scores; variances may differ.
        Source: Welch, Biometrika 34, 1947.
    "permutation": the difference of means over all splits of the pooled runs (20,000 random ones where there are more).
        Assumes that under the null all runs are exchangeable, equal spread included.
        Source: Pitman, Supplement to the Journal of the Royal Statistical Society 4, 1937.
    "wilcoxon": rank sum (Mann-Whitney). Assumes the same, and asks which group tends to score higher.
        Source: Mann & Whitney, Annals of Mathematical Statistics 18, 1947.
    """
    x, y = _finite(a), _finite(b)
    if min(len(x), len(y)) < 2:
        return math.nan
    pooled = np.concatenate([x, y])
    if np.all(pooled == pooled[0]):
        return 1.0
    if test == "t":
        variance = x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y)
        return float(stats.ttest_ind(x, y, equal_var=False).pvalue) if variance > 0 else 0.0
    if test == "wilcoxon":
        return float(stats.mannwhitneyu(x, y, alternative="two-sided").pvalue)
    n, total = len(x), pooled.sum()
    observed = abs(x.mean() - y.mean())
    if math.comb(len(pooled), n) <= EXACT_LIMIT:
        sums = np.array([pooled[list(chosen)].sum() for chosen in combinations(range(len(pooled)), n)])
        return _at_least(np.abs(sums / n - (total - sums) / len(y)), observed)
    rng = np.random.default_rng(0)
    sums = rng.permuted(np.tile(pooled, (EXACT_LIMIT, 1)), axis=1)[:, :n].sum(1)
    return _drawn(np.abs(sums / n - (total - sums) / len(y)), observed)


def welch_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Interval for mean(a) - mean(b) of independent groups with their own variances.

    Assumes: independent, roughly normal scores. Source: Welch 1947 (degrees of freedom after Satterthwaite).
    """
    x, y = _finite(a), _finite(b)
    if not len(x) or not len(y):
        return Interval(math.nan, math.nan, math.nan, level)
    gap = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return Interval(gap, -math.inf, math.inf, level)
    vx, vy = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if vx + vy == 0:
        return Interval(gap, gap, gap, level)
    freedom = (vx + vy) ** 2 / (vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(vx + vy)
    return Interval(gap, gap - half, gap + half, level)


def hedges_g(a: ArrayLike, b: ArrayLike) -> float:
    """(mean a - mean b) / pooled standard deviation of one run, corrected for few runs. NaN below two runs a side.

    About 0.2 is small, 0.5 middling, 0.8 large (Cohen 1988); tuned configs against broken ones give tens.
    Source: Hedges, Journal of Educational Statistics 6, 1981.
    """
    x, y = _finite(a), _finite(b)
    freedom = len(x) + len(y) - 2
    if min(len(x), len(y)) < 2:
        return math.nan
    pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / freedom)
    gap = float(x.mean() - y.mean())
    if pooled == 0:
        return 0.0 if gap == 0 else math.copysign(math.inf, gap)
    return gap / pooled * (1 - 3 / (4 * freedom - 1))


def superiority(a: ArrayLike, b: ArrayLike) -> float:
    """Share of pairs (one run of a, one of b) in which a scores higher, ties half.

    The "probability of improvement" of Agarwal et al. 2021; Mann & Whitney's U over n_a n_b.
    """
    x, y = _finite(a), _finite(b)
    if not len(x) or not len(y):
        return math.nan
    gaps = x[:, None] - y[None, :]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def equivalent(interval: Interval, margin: float) -> bool:
    """Whether a difference is shown to be smaller than `margin`: its whole interval lies inside ±margin.

    With a 95% interval this is two one-sided tests at 2.5% each. Source: Schuirmann, J. Pharmacokinetics 15, 1987.
    """
    return -margin < interval.low and interval.high < margin


# --- many configs ---------------------------------------------------------------------------------------------------


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment: comparing each with alpha keeps the chance of any false positive at alpha or below.

    Assumes nothing about dependence between the tests. NaN (no test was possible) stays NaN and does not count.
    When the best config was picked by the same numbers, correct over ALL pairs and not over its k - 1 comparisons:
    picking the best is itself a look at every pair. Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p, dtype=float)
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    m = len(order)
    out[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (m - np.arange(m))))
    return out


def all_pairs_p(scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Paired t-tests of every pair of rows of `scores` [config, seed] (no gaps), at once: (i, j, p).

    Assumes and is, pair by pair, what `paired_p` says of "t".
    """
    i, j = np.triu_indices(len(scores), 1)
    gaps = scores[i] - scores[j]
    n = scores.shape[1]
    if n < 2:
        return i, j, np.full(len(i), np.nan)
    mean, spread = gaps.mean(1), gaps.std(1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean) / (spread / math.sqrt(n))
    p = 2 * stats.t.sf(t, n - 1)
    return i, j, np.where(spread == 0, np.where(mean == 0, 1.0, 0.0), p)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=float).ravel()
    return x[np.isfinite(x)]


_ROUNDING = 1e-9
"""Sums of the same numbers in another order differ by rounding; such arrangements count as equal to the observed."""


def _at_least(arrangements: NDArray[np.float64], observed: float) -> float:
    return float((arrangements >= observed * (1 - _ROUNDING)).mean())


def _drawn(arrangements: NDArray[np.float64], observed: float) -> float:
    """p of drawn arrangements; the observed one counts as one of them, so that p is never 0 (Phipson & Smyth 2010)."""
    reached = int((arrangements >= observed * (1 - _ROUNDING)).sum())
    return (reached + 1) / (len(arrangements) + 1)
