"""What the racing rule does on scores whose truth is known; `benchmarks/statistics_simulation.py` writes the tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.simulation import NOISES
from tuning.race import play


def race_rates(
    repeats: int = 1000,
    configs: int = 8,
    first: int = 3,
    most: int = 15,
    gap: float = 0.0,
    noise: str = "normal",
    margin: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Rates over many races. One config is better than all others, which are equal, by `gap` standard deviations of a
    run; all share seeds whose effect is twice the noise.

    Returns:
        `best eliminated`: it dropped out (with gap 0: config 0, which is as good as any). `won`: it alone was left.
        `ended early`: before the seeds were used up. `wrong within the margin`: another config was called good enough
        although the best is better by the margin or more. `share of seeds`: of what every config on the maximum of
        seeds would have taken.
    """
    rng = np.random.default_rng([seed, configs, most])
    lost = won = early = wrong = used = 0
    for _ in range(repeats):
        scores = NOISES[noise](rng, (configs, most)) + 2 * rng.normal(size=(1, most))
        scores[0] += gap
        taken = play(scores, first, margin)
        alive, before = configs, 0
        for look in taken:
            used += alive * (look.seeds - before)
            alive, before = len(look.alive), look.seeds
        last = taken[-1]
        lost += 0 not in last.alive
        won += last.alive == (0,)
        early += last.verdict != "seeds used up"
        good_enough = last.verdict == "within the margin" and last.alive[0] != 0
        wrong += bool(good_enough and margin is not None and gap >= margin and 0 in last.alive)
    return {
        "best eliminated": lost / repeats,
        "won": won / repeats,
        "ended early": early / repeats,
        "wrong within the margin": wrong / repeats,
        "share of seeds": used / (repeats * configs * most),
    }


def race_table(
    repeats: int, noises: Sequence[str], gaps: Sequence[float] = (0.0, 1.0, 2.0, 4.0), seed: int = 0
) -> pd.DataFrame:
    """`race_rates` of races from 3 to at most 15 seeds and from 5 to at most 25, one row a case."""
    rows = []
    for noise in noises:
        for first, most in ((3, 15), (5, 25)):
            for gap in gaps:
                rates = race_rates(repeats, first=first, most=most, gap=gap, noise=noise, seed=seed)
                shown = {name: rates[name] for name in ("best eliminated", "won", "share of seeds")}
                rows.append({"noise": noise, "seeds": f"{first} to {most}", "gap": gap, **shown})
    return pd.DataFrame(rows)
