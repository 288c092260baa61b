"""What is decided after the search, from runs tables made by hand: who is raced, who is confirmed, who is left out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from tests.test_command_line import plan_of
from tuning.followup import Followup, choose
from tuning.objectives import front, judged, ranked
from tuning.sweep import CONFIRMING, SweepPlan


def table(plan: SweepPlan, scores: dict[str, list[float]], reason: str = "finished", **more) -> dict[str, dict]:
    rows = {}
    for key, values in scores.items():
        for seed, value in zip(plan.run_seeds(len(values)), values, strict=True):
            run = plan.run_key(key, seed)
            status = "diverged" if math.isnan(value) else reason
            rows[run] = {"config_key": key, "run_key": run, "seed": seed, "phase": "search", "final.test_loss": value}
            rows[run] |= {"stop_reason": status, "config_stop_reason": reason, "device_seconds": 1.0, **more}
    return rows


def proposals(*keys: str) -> list[dict]:
    return [{"event": "proposed", "phase": "search", "config_key": key, "label": key.upper(), "index": i}
            for i, key in enumerate(keys)]  # fmt: skip


class Driver:
    """Runs what a follow-up asks for: `score(config, seed, phase)` is what comes out, None for a crash."""

    def __init__(self, plan, rows, score, past=()):
        self.plan, self.rows, self.score = plan, rows, score
        self.events: list[dict] = []
        keys = dict.fromkeys(row["config_key"] for row in rows.values())
        self.followup = Followup(plan, rows, self.write, [*proposals(*keys), *past])

    def write(self, kind, **fields):
        self.events.append({"event": kind, **fields})
        return self.events[-1]

    def run(self, most: int = 1000) -> list[tuple[str, str, tuple[int, ...]]]:
        """Everything to its end, or the first `most` proposals: (phase, config, seeds)."""
        made = []
        while len(made) < most and (proposal := self.followup.next(running=False)) is not None:
            made.append((proposal["phase"], proposal["config_key"], tuple(map(int, proposal["runs"]))))
            for seed, run in proposal["runs"].items():
                value = self.score(proposal["config_key"], int(seed), proposal["phase"])
                reason = "crashed" if value is None else "finished"
                self.rows[run] = {"config_key": proposal["config_key"], "run_key": run, "seed": int(seed),
                                  "phase": proposal["phase"], "final.test_loss": value, "stop_reason": reason,
                                  "config_stop_reason": reason, "device_seconds": 1.0}  # fmt: skip
        return made


def wobble(seed: int) -> float:
    return math.sin(12.9898 * (seed + 1)) * 43758.5453 % 1


def spread_out(key: str, seed: int, phase: str = "") -> float:
    """Configs a < b < c < d by far, on seeds that matter to all of them."""
    return "abcd".index(key) + wobble(seed) + 0.02 * wobble(seed + 100 * ord(key))


def test_the_k_best_by_their_mean_and_a_tie_is_told():
    plan = replace(plan_of("grid", seeds=2), confirm=2)
    rows = table(plan, {"a": [0.5, 0.7], "b": [0.3, 0.5], "c": [0.7, 0.5], "d": [0.9, 0.1]})
    rows |= table(plan, {"early": [0.0, 0.0]}, "stopped")
    driver = Driver(plan, rows, lambda *_: 0.5)
    made = driver.run()
    (event,) = driver.events
    assert [entry["config_key"] for entry in event["chosen"]] == ["b", "d"]
    assert [entry["label"] for entry in event["ties"]] == []
    assert made == [("confirm", key, (CONFIRMING, CONFIRMING + 1)) for key in "bd"]
    assert not driver.followup.left
    tied = Driver(replace(plan, confirm=3), dict(rows), lambda *_: 0.5)
    tied.run()
    assert [entry["config_key"] for entry in tied.events[0]["chosen"]] == ["b", "d", "a"], "in order of proposal"
    assert [entry["label"] for entry in tied.events[0]["ties"]] == ["C"]


def test_a_diverged_seed_counts_as_the_worst_and_a_stopped_config_is_no_candidate():
    plan = replace(plan_of("grid", seeds=3), confirm=5)
    rows = table(plan, {"a": [0.1, 0.1, math.nan], "b": [0.4, 0.4, 0.4], "c": [0.9, 0.9, 0.9]})
    rows |= table(plan, {"early": [0.0] * 3}, "stopped") | table(plan, {"lost": [math.nan] * 3}, "diverged")
    assert judged(rows.values(), "test_loss", "min")["a"] == {0: 0.1, 1: 0.1, 2: 0.9}
    driver = Driver(plan, rows, lambda *_: 0.5)
    driver.run()
    assert [entry["config_key"] for entry in driver.events[0]["chosen"]] == ["a", "b", "c"]


def test_confirming_runs_take_no_part_in_choosing():
    plan = replace(plan_of("grid", seeds=2), confirm=1)
    rows = table(plan, {"a": [0.5, 0.5], "b": [0.6, 0.6]})
    first = Driver(plan, rows, lambda *_: 9.0)
    assert first.run() == [("confirm", "a", (CONFIRMING, CONFIRMING + 1))]
    more = Driver(replace(plan, confirm=2), rows, lambda *_: 9.0, first.events)
    assert more.run() == [("confirm", "b", (CONFIRMING, CONFIRMING + 1))], "a keeps its runs, bad as they are"
    assert [entry["config_key"] for entry in more.events[0]["chosen"]] == ["a", "b"]
    same = Driver(replace(plan, confirm=2), rows, lambda *_: 9.0, [*first.events, *more.events])
    assert (same.run(), same.events) == ([], [])


def test_a_race_drops_who_is_beaten_and_ends_with_the_best():
    plan = replace(plan_of("grid", seeds=3), race=True, race_seeds=20, confirm=1)
    rows = table(plan, {key: [spread_out(key, s) for s in range(3)] for key in "dbca"})
    driver = Driver(plan, rows, spread_out)
    made = driver.run()
    race = [event for event in driver.events if event["event"] == "race"]
    assert race[-1]["verdict"] == "one left"
    assert [entry["config_key"] for entry in race[-1]["alive"]] == ["a"]
    assert race[-1]["seeds"] < 20, "it ends when the answer is known"
    out = [entry["config_key"] for event in race for entry in event["beaten"]]
    assert sorted(out) == ["b", "c", "d"]
    for before, after in itertools.pairwise(race):
        alive = {entry["config_key"] for entry in before["alive"]}
        new = tuple(range(before["seeds"], after["seeds"]))
        assert {key for phase, key, seeds in made if seeds == new} == alive
    assert made[-1] == ("confirm", "a", tuple(CONFIRMING + i for i in range(3)))


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_race_that_was_cut_anywhere_goes_on_as_if_it_had_not_been(cut):
    plan = replace(plan_of("grid", seeds=3), race=True, race_seeds=8, confirm=2)
    start = table(plan, {key: [spread_out(key, s) / 40 + wobble(s * 7 + ord(key)) for s in range(3)] for key in "abcd"})
    score = lambda key, seed, phase: spread_out(key, seed) / 40 + wobble(seed * 7 + ord(key))
    whole = Driver(plan, dict(start), score)
    made = whole.run()
    assert len(made) == 8
    part = Driver(plan, dict(start), score)
    begun = part.run(cut)
    rest = Driver(plan, part.rows, score, part.events)
    assert begun + rest.run() == made
    assert part.events + rest.events == whole.events
    assert rest.rows == whole.rows


def test_seeds_that_a_duplicate_brought_are_used_and_a_crash_ends_a_config_s_race():
    plan = replace(plan_of("grid", seeds=2), race=True, race_seeds=3)
    rows = table(plan, {"a": [0.5, 0.6, 0.4], "b": [0.5, 0.4], "c": [0.4, 0.5]})
    driver = Driver(plan, rows, lambda key, seed, phase: None if key == "c" else 0.45)
    assert driver.run() == [("race", "b", (2,)), ("race", "c", (2,))], "a has that seed"
    last = driver.events[-1]
    assert [entry["config_key"] for entry in last["crashed"]] == ["c"]
    assert {entry["config_key"] for entry in last["alive"]} == {"a", "b"}
    assert last["verdict"] == "seeds used up"


def test_nothing_is_decided_while_something_runs():
    plan = replace(plan_of("grid", seeds=2), confirm=1)
    driver = Driver(plan, table(plan, {"a": [0.5, 0.5]}), lambda *_: 0.5)
    assert driver.followup.next(running=True) is None
    assert driver.followup.left
    assert driver.events == []


def test_nothing_finished_is_told():
    plan = replace(plan_of("grid", seeds=2), race=True, race_seeds=4, confirm=1)
    driver = Driver(plan, table(plan, {"a": [0.5, 0.5]}, "stopped"), lambda *_: 0.5)
    assert driver.run() == []
    assert [event["event"] for event in driver.events] == ["race", "confirm"]
    assert driver.events[0]["verdict"] == "nothing to race"
    assert driver.events[1]["chosen"] == []


# --- fronts and ranks ---


def test_fronts_by_hand():
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 6.0), "d": (4.0, 1.0), "e": (2.0, 5.0)}
    assert front(points, ["min", "min"]) == ["a", "b", "e", "d"]
    assert front(points, ["max", "min"]) == ["d"]
    assert list(ranked(points, ["min", "min"])) == [["a"], ["b", "e"], ["d"], ["c"]]
    assert list(ranked({key: point[:1] for key, point in points.items()}, ["max"])) == [["d"], ["c"], ["b", "e"], ["a"]]
    assert choose([["a"], ["b", "c", "d"]], 2) == (["a", "b"], ["c", "d"])
    assert choose([], 2) == ([], [])


def test_the_front_is_the_one_that_analysis_draws():
    import numpy as np

    from analysis.objectives import nondominated

    rng = np.random.default_rng(0)
    for modes in (["max", "min"], ["min", "min", "max"]):
        values = rng.integers(0, 8, size=(60, len(modes))).astype(float)
        points = {str(i): tuple(row) for i, row in enumerate(values)}
        mine = {int(key) for key in front(points, modes)}
        assert mine == set(np.flatnonzero(nondominated(values, modes)))
