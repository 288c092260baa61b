"""Schedulers: rungs where they should be, decisions as computed by hand, what PBT makes, NaN never kept running."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tests.toys.regression as toy
from lanes.job import Report, SeedReport
from search_spaces.space import Choice, Range, Space
from tests.test_command_line import plan_of
from trainables.family import Schedule
from tuning.schedulers import descend, make_scheduler, mutations
from tuning.sweep import MOST_RUNGS, REDUCTION, clamp
from tuning.trial import summarize


def plan_with(scheduler="asha", epochs=9, **more):
    plan = plan_of("grid", scheduler=scheduler, settings=[f"epochs={epochs}"])
    return replace(plan, **more)


def progress_at(plan, epoch, epochs):
    return epoch * plan.length / epochs


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 8, 9, 10, 17, 26, 27, 28, 81, 100, 250, 999])
def test_asha_s_reports_fall_on_or_after_their_rungs(epochs):
    plan = plan_with(epochs=epochs)
    rungs = min(MOST_RUNGS, math.floor(math.log(epochs, REDUCTION) + 1e-9))
    assert plan.length == REDUCTION**rungs
    reports = plan.reference.reports
    assert reports[-1] == epochs
    by_hand = {-(-epochs // REDUCTION**k) for k in range(1, rungs + 1)} | {epochs}
    assert set(reports) == by_hand
    for rung in range(rungs):
        reached = min(e for e in reports if progress_at(plan, e, epochs) >= REDUCTION**rung)
        earlier = [e for e in range(1, reached) if progress_at(plan, e, epochs) >= REDUCTION**rung]
        assert earlier == [], "the report is made at the first whole epoch that reaches the rung"
    assert progress_at(plan, epochs, epochs) == plan.length


@pytest.mark.parametrize("moved_after", [0, 1, 2])
def test_asha_counts_a_config_once_although_it_goes_on_under_another_trial(moved_after):
    """As after a resume: the second config is heard of under one id up to some report, and under another from there."""
    plan = plan_with(epochs=27)
    curves = [[0.74, 0.39, 0.34], [0.38, 0.387, 0.35], [0.371, 0.351, 0.34], [0.3875]]

    def decisions(moved: int | None) -> list[str]:
        scheduler, found = make_scheduler(plan), []
        for number, losses in enumerate(curves):
            trial = SimpleNamespace(trial_id=f"t{number}", config={})
            scheduler.on_trial_add(None, trial)
            for rung, loss in enumerate(losses):
                if number == 1 and rung == moved:
                    past, trial = trial, SimpleNamespace(trial_id="t1again", config={})
                    scheduler.adopt(trial.trial_id, past, None)
                    scheduler.on_trial_add(None, trial)
                told = {"progress": float(3**rung), "test_loss": loss}
                found.append(scheduler.on_trial_result(None, trial, told))
            scheduler.on_trial_complete(None, trial, {**told, "stop_reason": "stopped"})
        return found

    undisturbed = decisions(None)
    assert undisturbed[6] == "CONTINUE", "the third config is the best so far at the first rung"
    assert decisions(moved_after) == undisturbed


@pytest.mark.parametrize(("tasks", "per_task"), [(1, 7), (3, 2), (9, 1), (10, 4), (500, 2)])
def test_reports_of_a_continual_stream_wait_for_the_end_of_a_task(tasks, per_task):
    plan = plan_with()
    schedule = Schedule(steps_per_epoch=3, epochs=tasks * per_task, epochs_per_task=per_task)
    reports = plan.report_epochs(schedule)
    assert reports[-1] == schedule.epochs
    if tasks > 1:
        assert all(epoch % per_task == 0 for epoch in reports)
    for scheduler in ("median", "pbt", "none"):
        other = replace(plan, scheduler=scheduler).report_epochs(schedule)
        assert list(other) == sorted(set(other))
        assert other[-1] == schedule.epochs


@pytest.mark.parametrize("epochs", [1, 3, 9, 10, 27, 50])
def test_configs_of_other_lengths_reach_the_same_rungs(epochs):
    plan = plan_with(epochs=9)
    schedule = Schedule(6, epochs, epochs)
    reached = [progress_at(plan, e, epochs) for e in plan.report_epochs(schedule)]
    assert reached[-1] == plan.length
    for rung in (1.0, 3.0):
        if any(r < plan.length for r in reached if r >= rung):
            assert min(r for r in reached if r >= rung) < rung + plan.length / epochs + 1e-9


def feed(scheduler, curves: dict[str, dict[float, float]]) -> dict[tuple[str, float], str]:
    """Give results in order of progress, then of name. {(trial, progress): decision}"""
    decisions, trials, stopped = {}, {}, set()
    for name in curves:
        trials[name] = Trial(name)
        scheduler.on_trial_add(Controller(trials), trials[name])
    for progress in sorted({p for curve in curves.values() for p in curve}):
        for name, curve in curves.items():
            if progress in curve and name not in stopped:
                result = {"progress": progress, "test_loss": curve[progress], "epoch": 1}
                decision = scheduler.on_trial_result(Controller(trials), trials[name], result)
                decisions[name, progress] = decision
                if decision == "STOP":
                    stopped.add(name)
    return decisions


class Trial:
    def __init__(self, name):
        self.trial_id = name
        self.status = "RUNNING"
        self.config: dict = {}


class Controller(SimpleNamespace):
    def __init__(self, trials):
        super().__init__(search_alg=None, get_trials=lambda: list(trials.values()), get_live_trials=list)


def test_asha_s_decisions_are_those_computed_by_hand():
    plan = plan_with(epochs=9)
    rng = np.random.default_rng(0)
    curves = {f"t{i:02d}": {1.0: rng.random(), 3.0: rng.random(), 9.0: rng.random()} for i in range(20)}
    decisions = feed(make_scheduler(plan), curves)
    # Li et al.'s stopping variant: go on if among the best third of what this rung has seen BEFORE
    recorded: dict[float, list[float]] = {1.0: [], 3.0: []}
    stopped: set[str] = set()
    for rung in (1.0, 3.0):
        for name, curve in curves.items():
            if name in stopped:
                continue
            value = -curve[rung]
            seen = recorded[rung]
            keep = not seen or value >= np.percentile(seen, 100 * (1 - 1 / REDUCTION))
            seen.append(value)
            assert decisions[name, rung] == ("CONTINUE" if keep else "STOP"), (name, rung)
            if not keep:
                stopped.add(name)
    assert 8 < len(stopped) < 20


def test_median_stops_what_is_below_the_median_and_nothing_in_its_grace():
    plan = plan_with("median", epochs=10)
    curves = {f"t{i}": {float(p): float(i) for p in range(1, 11)} for i in range(7)}
    decisions = feed(make_scheduler(plan), curves)
    stopped = {name: progress for (name, progress), decision in decisions.items() if decision == "STOP"}
    # by hand: a trial that always says i has running mean and best i; it is compared with all that got as far
    reached, expected = dict.fromkeys(range(7), 0.0), {}
    for progress in range(1, 11):
        for i in range(7):
            if f"t{i}" in expected:
                continue
            reached[i] = progress
            others = [j for j in reached if j != i and reached[j] >= progress]
            if progress >= 3 and len(others) >= 3 and i > np.median(others):
                expected[f"t{i}"] = float(progress)
    assert stopped == expected
    assert 2 < len(stopped) < 6
    assert min(stopped.values()) == 3.0


def test_decisions_are_told():
    scheduler = make_scheduler(plan_with(epochs=9))
    told: list = []
    scheduler.on_decision = lambda trial, result, decision: told.append((trial.trial_id, decision))
    decisions = feed(scheduler, {"good": {1.0: 0.1}, "bad": {1.0: 0.9}})
    assert told == [("good", "CONTINUE"), ("bad", "STOP")]
    assert list(decisions.values()) == ["CONTINUE", "STOP"]


# --- PBT ---

POPULATION = Space(
    (
        Choice("width", (3, 8)),
        Range("lr", 0.01, 0.1, log=True),
        Choice("noise", (0.0, 0.001, 0.01)),
        Range("explode_at", 1e6, 1e9, when={"width": (8,)}),
    )
)


def test_pbt_perturbs_hypers_that_are_always_there_never_the_program():
    plan = plan_with("pbt", space=POPULATION)
    found = mutations(plan)
    assert set(found) == {"lr", "noise"}
    random.seed(0)
    draws = [found["lr"]() for _ in range(200)]
    assert all(0.01 <= value <= 0.1 for value in draws)
    assert np.median(draws) == pytest.approx(10**-1.5, rel=0.2), "log-even, as the range is"


def trial_config(plan, point, seeds=(0, 1)):
    config = plan.resolve(point)
    return {
        "config_key": config.key,
        "point": dict(point),
        "runs": {str(s): plan.run_key(config.key, s) for s in seeds},
        "parent": {},
    }


def test_a_copy_is_its_donor_s_config_perturbed_and_back_in_range():
    plan = plan_with("pbt", space=POPULATION)
    donor = trial_config(plan, {"width": 8, "lr": 0.09, "noise": 0.001, "explode_at": 1e8}, seeds=(0, 1, 2))
    old = trial_config(plan, {"width": 3, "lr": 0.02, "noise": 0.0})
    explored = {**donor, "point": {**donor["point"], "lr": 0.09 * 1.2}}
    made = descend(plan, explored, donor, 4, old)
    assert made["point"] == {"width": 8, "lr": 0.1, "noise": 0.001, "explode_at": 1e8}
    assert json.loads(made["program"])["width"] == 8
    assert made["parent"] == {seed: (key, 4) for seed, key in donor["runs"].items()}
    assert made["runs"].keys() == donor["runs"].keys()
    assert not set(made["runs"].values()) & {*donor["runs"].values(), *old["runs"].values()}
    assert all(epoch > 4 for epoch in made["reports"])
    assert made["reports"][-1] == 9
    again = descend(plan, explored, donor, 4, old)
    assert again == made
    other = descend(plan, explored, donor, 4, trial_config(plan, {"width": 3, "lr": 0.03, "noise": 0.0}))
    assert not set(other["runs"].values()) & set(made["runs"].values()), "two copies of one donor are two runs"
    assert other["config_key"] == made["config_key"]


def test_clamp_keeps_whole_numbers_whole():
    space = Space((Range("width", 2, 9, integer=True), Range("lr", 0.1, 0.2)))
    assert clamp(space, {"width": 10.8, "lr": 0.05}) == {"width": 9, "lr": 0.1}
    assert clamp(space, {"width": 4.4, "lr": 0.15}) == {"width": 4, "lr": 0.15}


# --- NaN ---

SETTINGS = {"objectives": ("test_loss",), "modes": {"test_loss": "min", "train_loss": "min"}, "length": 9}
CONFIG = {"config_key": "c", "epochs": 9}


def report_of(*values: float | None, epoch=1, done=False) -> Report:
    seeds = {
        i: SeedReport(
            f"r{i}",
            "diverged" if value is None else "finished" if done else "training",
            epoch,
            6 * epoch,
            {} if value is None else {"test_loss": value},
            0.1,
        )
        for i, value in enumerate(values)
    }
    return Report("t", epoch, done, seeds, "serial", 2)


def test_a_result_is_the_mean_over_seeds_and_a_lost_seed_counts_as_the_worst_seen():
    worst: dict[str, float] = {}
    result = summarize(report_of(0.2, 0.4, 0.6), CONFIG, SETTINGS, worst)
    assert result["test_loss"] == pytest.approx(0.4)
    assert result["spread"]["test_loss"] == pytest.approx(0.2)
    assert (result["progress"], result["done"], result["stop_reason"]) == (1.0, False, "")
    result = summarize(report_of(0.1, None, 0.2, epoch=3), CONFIG, SETTINGS, worst)
    assert result["test_loss"] == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert (result["done"], result["stop_reason"]) == (False, "")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((None, None, 0.2), "diverged"),
        ((None,), "diverged"),
        ((math.nan, 0.2), "diverged"),
        ((math.inf,), "diverged"),
        ((None, 0.2), ""),
    ],
)
def test_a_config_that_is_lost_is_done_and_never_kept_running(values, reason):
    result = summarize(report_of(*values), CONFIG, SETTINGS, {})
    assert result["stop_reason"] == reason
    assert result["done"] is bool(reason)
    if not reason:
        assert math.isfinite(result["test_loss"])


def test_an_end_is_finished():
    result = summarize(report_of(0.2, 0.4, epoch=9, done=True), CONFIG, SETTINGS, {})
    assert (result["stop_reason"], result["done"], result["progress"]) == ("finished", True, 9.0)
    assert toy.FAMILY.metrics["test_loss"].mode == "min"
