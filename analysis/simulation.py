"""What the intervals and tests of this package do on data whose truth is known: coverage and error rates.

`benchmarks/statistics_simulation.py` writes the large tables; the tests run small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.statistics import (
    Interval,
    all_pairs_p,
    bootstrap_interval,
    holm,
    paired_p,
    t_interval,
    unpaired_p,
    welch_interval,
)

Sampler = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]

NOISES: dict[str, Sampler] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: 1.0 - rng.exponential(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3.0),
    "one in ten lost": lambda rng, shape: rng.normal(size=shape) - 8.0 * (rng.random(shape) < 0.1) + 0.8,
}
"""Noise of one run, mean 0: normal; a long tail to the bad side; Student's with 3 degrees; a tenth of seeds fail."""


def interval_coverage(
    repeats: int = 2000,
    seeds_per_config: Sequence[int] = (3, 5, 10, 20),
    noises: Sequence[str] = ("normal",),
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How often nominal 95% intervals hold the truth: `interval, noise, n, coverage, error` (standard error), `width`.

    "t" and "bootstrap": the mean of one config. "paired t": the difference of two configs on common seeds whose effect
    is twice the noise. "Welch": the difference of two configs on other seeds, one three times as noisy.
    """
    rows = []
    for noise in noises:
        draw = NOISES[noise]
        for n in seeds_per_config:
            rng = np.random.default_rng([seed, n])
            found: dict[str, list[tuple[bool, float]]] = {"t": [], "bootstrap": [], "paired t": [], "Welch": []}
            for repeat in range(repeats):
                a, b = draw(rng, (n,)), draw(rng, (n,))
                common = 2 * rng.normal(size=n)
                intervals: dict[str, Interval] = {
                    "t": t_interval(a, level),
                    "bootstrap": bootstrap_interval(a, level, resamples=1000, seed=repeat),
                    "paired t": t_interval((a + common) - (b + common), level),
                    "Welch": welch_interval(a, 3 * b, level),
                }
                for name, interval in intervals.items():
                    found[name].append((0.0 in interval, interval.high - interval.low))
            for name, hits in found.items():
                covered, width = np.mean([hit for hit, _ in hits]), np.median([width for _, width in hits])
                error = np.sqrt(covered * (1 - covered) / repeats)
                rows.append((name, noise, n, covered, error, width))
    return pd.DataFrame(rows, columns=["interval", "noise", "n", "coverage", "error", "width"])


def error_rates(
    repeats: int = 1000,
    configs: int = 8,
    seeds_per_config: Sequence[int] = (3, 5, 10),
    noises: Sequence[str] = ("normal",),
    gap: float = 0.0,
    alpha: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """How often something is called different although all configs are equal; with `gap`, how often the one true
    difference is found.

    All configs share seeds whose effect is twice the noise. With `gap` the first config is better by `gap` standard
    deviations of one run, and `power` is the rate at which it is told from the second.

    Returns:
        `procedure, noise, n, false positive rate, error`; and `power` where a gap was given.
    """
    rows = []
    for noise in noises:
        draw = NOISES[noise]
        for n in seeds_per_config:
            rng = np.random.default_rng([seed, n, configs])
            hits: dict[str, int] = {}
            powers: dict[str, int] = {}
            for _ in range(repeats):
                scores = draw(rng, (configs, n)) + 2 * rng.normal(size=(1, n))
                scores[0] += gap
                for name, (i, j, p) in _procedures(scores).items():
                    among_equals = (i != 0) & (j != 0) if gap else np.ones(len(i), dtype=bool)
                    hits[name] = hits.get(name, 0) + bool(np.any(p[among_equals] < alpha))
                    powers[name] = powers.get(name, 0) + bool(np.any(p[(i == 0) & (j == 1)] < alpha))
            for name, count in hits.items():
                rate = count / repeats
                row = {"procedure": name, "noise": noise, "n": n, "false positive rate": rate}
                row["error"] = np.sqrt(rate * (1 - rate) / repeats)
                rows.append({**row, "power": powers[name] / repeats} if gap else row)
    return pd.DataFrame(rows)


Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _procedures(scores: NDArray[np.float64]) -> dict[str, Pairs]:
    """Every way of testing that is compared: name -> (i, j, p) of the pairs it looks at."""
    i, j, p = all_pairs_p(scores)
    exact = np.array([paired_p(scores[a] - scores[b], "permutation") for a, b in zip(i, j, strict=True)])
    welch = unpaired_p(scores[0], scores[1])
    winner = int(scores.mean(1).argmax())
    against = (i == winner) | (j == winner)
    return {
        "one pair, t": (i[:1], j[:1], p[:1]),
        "one pair, Welch (pairing ignored)": (i[:1], j[:1], np.array([welch])),
        "all pairs, t, uncorrected": (i, j, p),
        "all pairs, t, Holm": (i, j, holm(p)),
        "all pairs, permutation, Holm": (i, j, holm(exact)),
        "winner against rest, t, Holm over k - 1": (i[against], j[against], holm(p[against])),
    }
