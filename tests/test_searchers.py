"""Searchers: conformance of all five over all kinds of spaces, and what they are told of a trial's end."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from search_spaces.space import Choice, Range, Space, union
from tests.test_command_line import plan_of
from tuning.journal import Journal, read
from tuning.searchers import FAIL, PRUNED, HyperOptSource, OptunaSource, Proposer, make_source
from tuning.sweep import SweepPlan

SPACES = {
    "choices": Space((Choice("width", (3, 8)), Choice("lr", (0.3, 0.1, 0.03, 0.01)))),
    "ranges": Space((Range("lr", 1e-4, 0.3, log=True), Range("noise", -1.0, 1.0), Range("width", 2, 9, integer=True))),
    "log whole numbers": Space((Range("batch", 1, 32, log=True, integer=True), Choice("lr", (0.1, 0.2)))),
    "conditional": Space(
        (
            Choice("data", ("a", "b")),
            Range("lr", 1e-4, 0.3, log=True, when={"data": ("a",)}),
            Choice("width", (3, 5, 8), when={"data": ("b",)}),
            Range("noise", 0.0, 0.1, when={"width": (8,)}),
        )
    ),
    "union": union(
        {
            "small": (Space((Range("lr", 1e-3, 0.1, log=True),)), {"width": 3}),
            "big": (Space((Choice("lr", (0.1, 0.2)), Range("noise", 0.0, 0.1))), {"width": 8}),
        },
        name="net",
    ),
}
SEARCHERS = ("grid", "random", "qmc", "optuna", "hyperopt")
PAIRS = [
    (searcher, space)
    for searcher in SEARCHERS
    for space in SPACES
    if searcher != "grid" or SPACES[space].size() is not None
]


def plan_for(searcher: str, space: Space, seed: int = 0, trials: int = 40) -> SweepPlan:
    return replace(plan_of("grid", seed=seed), searcher=searcher, space=space, trials=trials)


def score(point: dict) -> float:
    return sum(float(value) if isinstance(value, (int, float)) else len(str(value)) for value in point.values())


def drive(plan: SweepPlan, count: int) -> list[dict]:
    """Ask and tell in turn, as with --max-concurrent 1; every third trial is pruned, every seventh diverges."""
    source, points = make_source(plan), []
    for i in range(count):
        point = source.ask(f"t{i}")
        if point is None:
            break
        points.append(point)
        source.report(f"t{i}", 1.0, score(point))
        if i % 7 == 3:
            source.tell(f"t{i}", FAIL, None)
        else:
            source.tell(f"t{i}", PRUNED if i % 3 else "complete", score(point))
    return points


@pytest.mark.parametrize(("searcher", "space"), PAIRS)
def test_points_are_in_the_space_and_the_same_for_the_same_seed(searcher, space):
    where = SPACES[space]
    points = drive(plan_for(searcher, where), 24)
    for point in points:
        assert list(point) == [axis.name for axis in where.active(point)], "exactly the active axes, in order"
        for axis in where.active(point):
            value = point[axis.name]
            if isinstance(axis, Range):
                assert axis.low <= value <= axis.high
                assert isinstance(value, int if axis.integer else float)
            else:
                assert value in axis.values
    assert drive(plan_for(searcher, where), 24) == points
    if searcher != "grid":
        assert len(points) == 24
        assert drive(plan_for(searcher, where, seed=1), 24) != points


def test_grid_goes_in_the_notebook_s_order():
    assert drive(plan_for("grid", SPACES["choices"]), 100) == list(SPACES["choices"].grid())


@pytest.mark.parametrize("searcher", ["random", "qmc"])
def test_draws_cover_the_space_evenly(searcher):
    source = make_source(plan_for(searcher, SPACES["ranges"]))
    points = [source.ask(str(i)) for i in range(512)]
    logs = np.log([p["lr"] for p in points])
    assert stats.kstest(logs, stats.uniform(math.log(1e-4), math.log(3000)).cdf).pvalue > 1e-3
    widths = np.bincount([p["width"] for p in points], minlength=10)[2:]
    assert stats.chisquare(widths).pvalue > 1e-3
    if searcher == "qmc":
        assert widths.std() < 2, "quasi-random points are more even than chance (random: about 8)"


@pytest.mark.parametrize("axis", [Choice("lr", (0.1, 0.2, 0.3, 0.4)), Range("width", 2, 5, integer=True)], ids=str)
def test_hyperopt_s_ends_are_as_likely_as_its_middle(axis):
    source = HyperOptSource(Space((axis,)), "min", 0, startup=10_000)  # every ask is a draw from the prior
    counts = Counter(source.ask(f"t{i}")[axis.name] for i in range(800))
    assert len(counts) == 4
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_hyperopt_s_log_whole_numbers_reach_both_ends():
    source = HyperOptSource(Space((Range("batch", 1, 4, log=True, integer=True),)), "min", 0, startup=10_000)
    counts = Counter(source.ask(f"t{i}")["batch"] for i in range(400))
    assert set(counts) == {1, 2, 3, 4}
    assert counts[1] > counts[2] > counts[4]


# --- what Optuna's study holds ---


def test_optuna_is_told_the_truth():
    source = OptunaSource(SPACES["ranges"], ["min"], 0, startup=5)
    for trial in ("done", "pruned", "diverged", "running"):
        source.ask(trial)
    source.report("done", 1.0, 0.5)
    source.report("done", 3.0, 0.4)
    source.tell("done", "complete", 0.3)
    source.report("pruned", 1.0, 0.9)
    source.report("pruned", 1.0, 0.9)  # played again after a restart
    source.tell("pruned", PRUNED, 0.9)
    source.report("diverged", 1.0, float("nan"))
    source.tell("diverged", FAIL, None)
    trials = source._search._ot_study.trials
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [t.intermediate_values for t in trials] == [{1000: 0.5, 3000: 0.4}, {1000: 0.9}, {}, {}]
    assert trials[0].value == 0.3
    assert trials[2].value is None


@pytest.mark.parametrize("searcher", ["optuna", "hyperopt"])
def test_models_learn_and_do_not_rank_failures(searcher):
    space = Space((Range("lr", 0.0, 1.0),))
    source = make_source(plan_for(searcher, space, trials=100))
    points = []
    for i in range(60):
        point = source.ask(f"t{i}")
        points.append(point["lr"])
        value = abs(point["lr"] - 0.3)
        if i % 10 == 9:
            source.tell(f"t{i}", FAIL, None)
        else:
            source.report(f"t{i}", 1.0, value)
            source.tell(f"t{i}", "complete", value)
    assert np.median(np.abs(np.array(points[-30:]) - 0.3)) < 0.5 * np.median(np.abs(np.array(points[:10]) - 0.3))


# --- the proposer ---


@pytest.fixture
def proposer(tmp_path):
    def proposer(searcher="grid", space=SPACES["choices"], trials=40, **more):
        plan = plan_for(searcher, space, trials=trials)
        source = make_source(plan)
        events: list = []
        journal = Journal(tmp_path / "journal.jsonl")
        return Proposer(plan, source, journal, events.append, **more), source, events

    return proposer


def test_a_proposal_is_on_disk_before_it_is_handed_out(proposer, tmp_path: Path):
    proposing, _, events = proposer(trials=3)
    config = proposing.suggest("t0")
    (event,) = [event for event, _ in read(tmp_path / "journal.jsonl")]
    assert events == [event]
    assert (event["index"], event["trial"], event["config_key"]) == (0, "t0", config["config_key"])
    assert event["runs"] == config["runs"]
    assert proposing.remaining == 2
    proposing.suggest("t1")
    proposing.suggest("t2")
    assert proposing.suggest("t3") == proposing.FINISHED
    assert proposing.remaining == 0


def test_a_duplicate_becomes_one_more_seed(proposer):
    proposing, _, events = proposer("random", Space((Choice("lr", (0.1, 0.2)),)), trials=6)
    for i in range(6):
        proposing.suggest(f"t{i}")
    seeds: dict[str, list] = {}
    for event in events:
        seeds.setdefault(event["config_key"], []).extend(event["runs"])
    assert len(seeds) == 2
    for each in seeds.values():
        assert each == [str(i) for i in range(len(each))], "fresh seeds, none twice"
    keys = [key for event in events for key in event["runs"].values()]
    assert len(set(keys)) == len(keys)


def result(progress, value, reason="") -> dict:
    return {"progress": progress, "test_loss": value, "stop_reason": reason}


def test_a_stopped_trial_is_pruned_with_the_value_at_which_it_was_stopped(proposer):
    """Tune does not show its searcher the result that the scheduler stopped at."""
    proposing, source, _ = proposer("optuna", SPACES["ranges"])
    for trial in ("first rung", "second rung", "finished", "diverged", "crashed", "copied"):
        proposing.suggest(trial)
    proposing.on_trial_complete("first rung", result(1.0, 0.9))
    proposing.on_trial_result("second rung", result(1.0, 0.8))
    proposing.on_trial_complete("second rung", result(3.0, 0.7))
    proposing.on_trial_result("finished", result(1.0, 0.8))
    proposing.on_trial_complete("finished", result(9.0, 0.1, "finished"))
    proposing.on_trial_complete("diverged", result(3.0, 0.6, "diverged"))
    proposing.on_trial_complete("crashed", None, error=True)
    proposing.on_trial_result("copied", result(1.0, 0.5))
    proposing.abandon("copied")
    proposing.on_trial_result("copied", result(2.0, 0.01))  # another config's results now
    proposing.on_trial_complete("copied", result(9.0, 0.001, "finished"))
    trials = source._search._ot_study.trials
    assert [(t.state.name, t.intermediate_values) for t in trials] == [
        ("PRUNED", {1000: 0.9}),
        ("PRUNED", {1000: 0.8, 3000: 0.7}),
        ("COMPLETE", {1000: 0.8}),
        ("FAIL", {}),
        ("FAIL", {}),
        ("PRUNED", {1000: 0.5}),
    ]


def test_unfinished_proposals_come_first_and_only_report_what_is_missing(proposer):
    first, _, events = proposer(trials=4)
    first.suggest("t0")
    handed: list = []
    again, _, more = proposer(
        trials=4,
        proposed=1,
        seeds_used={events[0]["config_key"]: 2},
        unfinished=[{**events[0], "trial_first": "t0", "reported": 5}],
        on_resume=lambda new, old: handed.append((new, old)),
    )
    config = again.suggest("n0")
    assert handed == [("n0", "t0")]
    assert (more[0]["event"], more[0]["trial"], more[0]["replaces"]) == ("resumed", "n0", "t0")
    assert config["runs"] == events[0]["runs"]
    assert min(config["reports"]) > 5
