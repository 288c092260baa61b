"""Replaying finished curves: the rules by hand, against Ray's own ASHA, and on sweeps with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.cli import app
from analysis.errors import UserError
from analysis.replay import Asha, Median, NoScheduler, finished_curves, play, replay
from analysis.store import open_sweep
from tests.sweep_factory import Arm, lr_arms, write_sweep


def curves_of(rng, configs=30, epochs=27):
    ends = rng.uniform(0, 1, configs)
    return {f"c{i}": end * np.linspace(0.5, 1, epochs) + rng.normal(0, 0.05, epochs) for i, end in enumerate(ends)}


def test_without_a_scheduler_all_run_and_the_best_is_chosen():
    curves = curves_of(np.random.default_rng(0))
    played = play(curves, list(curves), NoScheduler(), concurrent=4)
    assert set(played.epochs.values()) == {27}
    assert played.chosen == max(curves, key=lambda c: curves[c][-1])


def test_asha_by_hand():
    """Factor 2, grace 1, one at a time: rungs 1, 2, 4; a value passes if not below the median of those before."""
    curves = {
        "a": np.array([0.5, 0.6, 0.7, 0.8, 0.9]),  # first everywhere: always goes on
        "b": np.array([0.4, 0.9, 0.9, 0.9, 0.9]),  # below 0.5 at epoch 1
        "c": np.array([0.6, 0.5, 0.9, 0.9, 0.9]),  # above 0.45 at epoch 1, below 0.6 at epoch 2
        "d": np.array([0.5, 0.6, 0.9, 0.9, 0.95]),  # equals the median 0.5, above 0.55, above 0.8
        "e": np.array([0.9, np.nan, 0.9, 0.9, 0.9]),  # diverges
    }
    played = play(curves, list("abcde"), Asha(1, 2, 5), concurrent=1)
    assert played.epochs == {"a": 5, "b": 1, "c": 2, "d": 5, "e": 2}
    assert played.chosen == "d"


@pytest.mark.parametrize(("grace", "factor"), [(1, 3), (2, 2), (3, 4)])
def test_asha_decides_as_rays_own_scheduler(grace, factor):
    """The same arrivals to Ray's AsyncHyperBandScheduler: equal decisions, report by report."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    rng = np.random.default_rng(grace)
    curves = curves_of(rng)
    theirs = AsyncHyperBandScheduler(
        time_attr="epoch", metric="score", mode="max", grace_period=grace, reduction_factor=factor, max_t=27
    )
    ours = Asha(grace, factor, 27)
    trials = {name: Trial("stub", stub=True) for name in curves}
    for trial in trials.values():
        theirs.on_trial_add(None, trial)
    alive = dict.fromkeys(curves, 0)
    stopped = 0
    while alive:
        name = str(rng.choice(list(alive)))
        alive[name] += 1
        epoch, value = alive[name], float(curves[name][alive[name] - 1])
        decision = theirs.on_trial_result(None, trials[name], {"epoch": epoch, "score": value})
        mine = ours.goes_on(name, epoch, value) and epoch < 27
        assert mine == (decision == TrialScheduler.CONTINUE), (name, epoch)
        if not mine:
            stopped += epoch < 27
            del alive[name]
    assert stopped > 10


def test_median_by_hand():
    curves = {name: np.full(4, value) for name, value in zip("abcd", (0.5, 0.6, 0.7, 0.4), strict=True)}
    curves["e"] = np.full(4, 0.65)
    played = play(curves, list("abcde"), Median(grace=2), concurrent=1)
    # d meets means 0.5, 0.6, 0.7 at epoch 2: below their median; e meets 0.5, 0.6, 0.7, 0.4 and is above theirs
    assert played.epochs == {"a": 4, "b": 4, "c": 4, "d": 2, "e": 4}


def test_concurrency_lets_more_pass_the_first_rungs():
    curves = curves_of(np.random.default_rng(2), configs=27)
    order = sorted(curves, key=lambda c: curves[c][0])  # worst first: asynchronous halving at its worst
    one = sum(play(curves, order, Asha(1, 3, 27), 1).epochs.values())
    best_first = sum(play(curves, order[::-1], Asha(1, 3, 27), 1).epochs.values())
    assert best_first < one


def test_replay_of_a_sweep_saves_and_keeps_the_winner_where_ranks_are_stable(tmp_path):
    arms = [Arm(f"x={i}", 0.5 + 0.02 * i, axis={"x": float(i)}) for i in range(20)]
    write_sweep(tmp_path, arms, epochs=27, steps=False, seeds=3)
    table = replay(tmp_path, "demo", grace=[1, 9], factor=[3.0], order="random", repeats=10)
    by_grace = table.set_index("grace")
    assert by_grace.loc[1, "saved"] > by_grace.loc[9, "saved"] > 0.1
    assert by_grace["kept_winner"].tolist() == [1.0, 1.0]
    assert by_grace["regret"].tolist() == [0.0, 0.0]
    none = replay(tmp_path, "demo", scheduler="none").iloc[0]
    assert (none["saved"], none["kept_winner"]) == (0.0, 1.0)


def test_replay_of_a_sweep_whose_late_bloomer_is_lost_by_a_short_grace(tmp_path):
    arms = [Arm(f"x={i}", 0.80, axis={"x": float(i)}, tau=1.0) for i in range(9)]
    arms.append(Arm("late", 0.95, axis={"x": 99.0}, tau=30.0))
    write_sweep(tmp_path, arms, epochs=27, steps=False, seeds=3)
    table = replay(tmp_path, "demo", grace=[1, 25], factor=[3.0]).set_index("grace")
    assert table.loc[1, "kept_winner"] == 0
    assert table.loc[1, "regret"] == pytest.approx(0.15, abs=0.02)
    assert table.loc[25, "kept_winner"] == 1


def test_pruned_configs_cannot_be_played_and_are_counted(tmp_path):
    arms = lr_arms()
    arms[0] = replace(arms[0], stop_epoch=3)
    arms[4] = replace(arms[4], diverges=(0, 1, 2, 3, 4))
    write_sweep(tmp_path, arms)
    curves, order, left_out = finished_curves(open_sweep(tmp_path, "demo"))
    assert left_out == 1
    assert order == [arm.key for arm in arms[1:]]
    assert np.isnan(curves[arms[4].key][-1])
    assert replay(tmp_path, "demo")["configs"].iloc[0] == 4
    write_sweep(tmp_path, [replace(arm, stop_epoch=3) for arm in arms], name="all")
    with pytest.raises(UserError, match="replay needs two"):
        replay(tmp_path, "all")


def test_command_line(tmp_path):
    write_sweep(tmp_path, lr_arms())
    storage = ["--storage", str(tmp_path)]
    run = CliRunner().invoke
    done = run(app, ["replay", "demo", "--grace", "1", "--grace", "3", "--factor", "2", *storage])
    assert done.exit_code == 0, done.output
    assert "kept_winner" in done.stdout
    for arguments, message in [
        (["--scheduler", "hyperband"], "no scheduler 'hyperband'"),
        (["--grace", "0"], "at least 1 epoch"),
        (["--factor", "1"], "above 1"),
        (["--concurrent", "0"], "at least 1"),
        (["--order", "sorted"], "none of recorded"),
        (["--metric", "nope"], "no curve metric"),
    ]:
        refused = run(app, ["replay", "demo", *arguments, *storage])
        assert refused.exit_code == 2
        assert message in refused.stderr
