"""The racing rule, by hand and by simulation: the best drops out no more often than promised, and seeds are saved."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.race_simulation import race_rates
from tuning.race import ALPHA, level, looks, play, take_look


@pytest.mark.parametrize(("first", "most"), [(2, 3), (2, 10), (3, 15), (5, 25), (4, 400)])
def test_looks_are_planned_and_spend_all_of_alpha(first, most):
    counts = looks(first, most)
    assert (counts[0], counts[-1]) == (first, most)
    assert all(a < b for a, b in itertools.pairwise(counts))
    assert sum(level(counts, i) for i in range(len(counts))) == pytest.approx(ALPHA)


def test_a_look_by_hand():
    """Three seeds, differences 1, 2, 3 between two configs: t = 2 / (1 / sqrt 3) = 3.46, one-sided p = 0.0371."""
    scores = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    counts = (3,)
    found = take_look(scores, (7, 4), 2, counts, 0, alpha=0.0372)
    assert [(out.config, out.by) for out in found.beaten] == [(4, 7)]
    assert found.beaten[0].p == pytest.approx(0.03709, abs=1e-4)
    assert (found.alive, found.verdict) == ((7,), "one left")
    kept = take_look(scores, (7, 4), 2, counts, 0, alpha=0.0370)
    assert (kept.beaten, kept.alive, kept.verdict) == ((), (7, 4), "seeds used up")
    third = take_look(scores, (7, 4), 3, counts, 0, alpha=0.0372)
    assert third.beaten == (), "with three configs at the start a rival has half the level"


def test_equal_differences_on_few_seeds_prove_nothing():
    """A coarse accuracy differs by the same on three seeds: no spread, and still three signs only."""
    coarse = np.array([[0.9, 0.8, 0.7], [0.8, 0.7, 0.6]])
    assert len(play(coarse, 3)[-1].alive) == 2
    many = np.tile([[0.9], [0.8]], (1, 12))
    assert play(many, 3)[-1].alive == (0,)
    assert play(np.zeros((3, 6)), 3)[-1].verdict == "seeds used up"
    assert play(np.zeros((3, 20)), 3, margin=0.1)[-1].verdict == "within the margin"


def test_the_best_by_its_mean_is_never_out_and_rounds_add_up():
    rng = np.random.default_rng(1)
    for _ in range(50):
        scores = rng.normal(size=(5, 12)) + np.linspace(0, 3, 5)[:, None]
        taken = play(scores, 3)
        alive = set(range(5))
        for look in taken:
            best = max(alive, key=lambda i: scores[i, : look.seeds].mean())
            alive -= {out.config for out in look.beaten}
            assert best in alive
            assert set(look.alive) == alive


@pytest.mark.parametrize(("gap", "noise"), [(0.0, "normal"), (1.0, "normal"), (0.0, "one in ten lost")])
def test_the_best_is_eliminated_no_more_often_than_promised(gap, noise):
    """400 races of eight configs: the promised 5% has a standard error of 1.1%."""
    rates = race_rates(repeats=400, gap=gap, noise=noise)
    assert rates["best eliminated"] <= ALPHA + 2.5 * 0.011


def test_a_margin_ends_a_race_of_equals_and_lies_no_more_often_than_promised():
    """The best is better by just the margin: then every ending "within the margin" by another config would be a lie."""
    easy = race_rates(repeats=200, gap=0.0, most=25, margin=3.0)
    assert easy["ended early"] > 0.9
    assert easy["share of seeds"] < 0.8
    hard = race_rates(repeats=400, gap=0.5, most=25, margin=0.5)
    assert hard["wrong within the margin"] + hard["best eliminated"] <= ALPHA + 2.5 * 0.011


def test_seeds_are_saved_where_one_is_better():
    rates = race_rates(repeats=200, gap=4.0)
    assert rates["won"] > 0.95
    assert rates["share of seeds"] < 0.6
