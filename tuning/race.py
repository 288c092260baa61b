"""Racing: more seeds for the configs that may still be the best, until one is left or the seeds are used up.

The rule looks at the scores after a few planned numbers of seeds. A config drops out when a rival beats it on common
seeds: Student's paired t-test, one-sided, at level alpha_look / (m - 1) for m configs at the start. The levels of all
looks add up to alpha (spent in proportion to the seeds seen so far). So the truly best config drops out with
probability alpha at most: that would take a false positive of one of its m - 1 rivals at one of the looks, and by
Bonferroni's inequality all of these together have probability alpha. Holm's steps would gain nothing: for the best
config each of the m - 1 hypotheses "no rival is better" is true. Of several equally good best configs each is kept with
that probability.

With a margin the race also ends when no config left can be better than the leader by the margin: the upper confidence
bound of each one's lead over it, at the same kind of level, is below the margin. Half of alpha is then spent on either
question. The leader is then within the margin of the best with probability 1 - alpha.

Assumes: paired differences independent over seeds and roughly normal. `benchmarks/statistics_simulation.py` measures
the error under other noise, and the seeds saved.

Sources: Maron & Moore, "Hoeffding races", NIPS 1993, and Birattari et al., "A racing algorithm for configuring
metaheuristics", GECCO 2002 (racing; without correction for repeated looks); Lan & DeMets, Biometrika 70, 1983, and Kim
& DeMets, Biometrika 74, 1987 (spending alpha over looks; here linear, rho = 1, and summed by Bonferroni, which needs no
joint distribution); Gupta, Technometrics 7, 1965 (a subset that holds the best); Kim & Nelson, ACM TOMACS 11, 2001
(ending within a margin, the indifference zone, under common random numbers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

ALPHA = 0.05
GROWTH = 1.5
"""A round brings the number of seeds to about this times what it was."""

MOST = 5
"""The default maximum of seeds a config, as a multiple of the search's."""


@dataclass(frozen=True)
class Beaten:
    """A config that dropped out: it, the rival that beat it (indices), and the one-sided p of that test."""

    config: int
    by: int
    p: float


@dataclass(frozen=True)
class Look:
    """What one look found.

    Args:
        seeds: number of seeds looked at.
        beaten: configs that dropped out now.
        alive: configs that may still be the best, best mean first.
        verdict: "" while the race goes on; "one left"; "within the margin" (none left can be better than the first by
            the margin); "seeds used up" (those left cannot be told apart).
    """

    seeds: int
    beaten: tuple[Beaten, ...]
    alive: tuple[int, ...]
    verdict: str


def looks(first: int, most: int) -> tuple[int, ...]:
    """Numbers of seeds at which the race looks: from the search's own to the maximum."""
    counts = [first]
    while counts[-1] < most:
        counts.append(min(most, math.ceil(counts[-1] * GROWTH)))
    return tuple(counts)


def level(counts: tuple[int, ...], look: int, alpha: float = ALPHA) -> float:
    """What look number `look` (from 0) may spend of alpha."""
    before = counts[look - 1] if look else 0
    return alpha * (counts[look] - before) / counts[-1]


def take_look(
    scores: Matrix,
    alive: tuple[int, ...],
    started: int,
    counts: tuple[int, ...],
    look: int,
    margin: float | None = None,
    alpha: float = ALPHA,
) -> Look:
    """Decide after `counts[look]` seeds.

    Args:
        scores: [len(alive), counts[look]], higher is better, no gaps; a column is a seed.
        alive: indices of the rows' configs.
        started: number of configs at the start of the race.
        counts: all planned looks.
        margin: the smallest difference that matters, or None.
    """
    n = counts[look]
    share = level(counts, look, alpha if margin is None else alpha / 2) / max(1, started - 1)
    mean = scores.mean(1)
    p = _beats(scores)
    beaten = []
    for j in range(len(alive)):
        i = int(p[:, j].argmin())
        if p[i, j] <= share:
            beaten.append(Beaten(alive[j], alive[i], float(p[i, j])))
    out = {entry.config for entry in beaten}
    order = [j for j in np.argsort(-mean, kind="stable") if alive[j] not in out]
    left = tuple(alive[j] for j in order)
    if len(left) == 1:
        verdict = "one left"
    elif margin is not None and all(_lead(scores[j] - scores[order[0]], share) < margin for j in order[1:]):
        verdict = "within the margin"
    else:
        verdict = "seeds used up" if look == len(counts) - 1 else ""
    return Look(n, tuple(beaten), left, verdict)


def play(scores: Matrix, first: int, margin: float | None = None, alpha: float = ALPHA) -> list[Look]:
    """The whole race on scores that are known beforehand, [configs, maximum of seeds]: for simulation."""
    counts, alive = looks(first, scores.shape[1]), tuple(range(len(scores)))
    taken = []
    for look, n in enumerate(counts):
        taken.append(take_look(scores[list(alive), :n], alive, len(scores), counts, look, margin, alpha))
        alive = taken[-1].alive
        if taken[-1].verdict:
            break
    return taken


def _beats(scores: Matrix) -> Matrix:
    """One-sided p that row i is better than row j; 1 on the diagonal."""
    from scipy.special import stdtr  # only a race needs it, and every command would wait for it

    gaps = scores[:, None, :] - scores[None, :, :]
    n = scores.shape[1]
    mean, spread = gaps.mean(2), gaps.std(2, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = stdtr(n - 1, -mean / (spread / math.sqrt(n)))
    # a coarse score repeats itself: n equal differences say no more than that their signs agree
    return np.where(spread <= 1e-12 * (1 + np.abs(mean)), np.where(mean > 0, 0.5**n, 1.0), p)


def _lead(gaps: Matrix, share: float) -> float:
    """Upper confidence bound of the mean of `gaps`."""
    from scipy.special import stdtrit

    n, spread = len(gaps), float(gaps.std(ddof=1))
    if spread <= 1e-12 * (1 + abs(float(gaps.mean()))):
        return float(gaps.mean()) if 0.5**n <= share else math.inf
    return float(gaps.mean() + stdtrit(n - 1, 1 - share) * spread / math.sqrt(n))
