"""Configs that nobody would stop pass their reports: they report what others do, and do not wait."""

# ruff: noqa: F811  fixtures are imported

from dataclasses import replace

import pytest

from lanes.serial import SerialEngine
from lanes.stacked import StackedEngine
from tests.test_stack import STEPS, Memory, Shelf, alone, job, make, train  # noqa: F401

PER_EPOCH = 6


def free(token="a", **values):
    return replace(job(token, **values), stops=False)


def finish(stack, most=300) -> list:
    """All reports until nothing is left to do; nobody says `proceed`."""
    reports = []
    for _ in range(most):
        if not stack.busy:
            return reports
        reports += stack.tick()
    raise AssertionError("not finished")


def finish_with(stack, *jobs) -> list:
    for each in jobs:
        stack.attach(each)
    return finish(stack)


@pytest.mark.parametrize("engine", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_they_report_what_those_report_that_stop(make, engine):
    stopping, passing = Memory(), Memory()
    expected = train(make(engine, recorder=stopping), [job("a", noise=0.01)])["a"]
    found = finish_with(make(engine, recorder=passing), free(noise=0.01))
    assert [(r.epoch, r.done) for r in found] == [(1, False), (3, False), (9, True)]
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours.seeds) == list(theirs.seeds)
        for seed, other in zip(ours.seeds.values(), theirs.seeds.values(), strict=True):
            assert replace(seed, device_seconds=0.0) == replace(other, device_seconds=0.0)
            assert seed.device_seconds > 0
    assert passing.step_rows == stopping.step_rows


def test_they_keep_their_lanes(make):
    came: list[str] = []

    class Counting(SerialEngine):
        def insert_all(self, arrivals):
            came.extend(arrival.key for arrival in arrivals)
            super().insert_all(arrivals)

    finish_with(make(Counting), free("a"), free("b", lr=0.1))
    assert sorted(came) == ["a/0", "a/1", "b/0", "b/1"]


def test_beside_configs_that_stop(make, alone):
    memory = Memory()
    stack = make(StackedEngine, lanes=3, recorder=memory)
    stops, passes = job("stops", lr=0.1), free("passes", noise=0.01)
    stack.attach(passes)
    stack.attach(stops)
    reports = finish(stack)
    assert [r.epoch for r in reports if r.token == "passes"] == [1, 3, 9]
    assert [r.epoch for r in reports if r.token == "stops"] == [1]
    expected = alone(passes)
    for key in passes.runs.values():
        assert memory.step_rows[key] == pytest.approx(expected.step_rows[key], rel=1e-9)


def test_a_decision_that_comes_late_tells_nothing_twice(make):
    stack = make()
    reports = finish_with(stack, free())
    assert reports[-1].done
    stack.proceed("a")
    assert not stack.busy
    assert stack.tick() == []
    stack.release("a")
    assert not stack.busy


def test_they_can_be_let_go_in_between(make):
    memory = Memory()
    stack = make(recorder=memory)
    stack.attach(free())
    stack.attach(free("b", lr=0.1))
    while not (reports := stack.tick()):
        pass
    assert {report.epoch for report in reports} == {1}
    stack.release("a")
    assert [(r.token, r.epoch) for r in finish(stack) if r.token == "a"] == []
    assert all(max(memory.step_rows[key]) < STEPS for key in free().runs.values())


def test_a_config_that_diverges_after_a_report_it_passed(make):
    reports = finish_with(make(), free(explode_at=9.0))
    assert [(r.epoch, r.done, {s.status for s in r.seeds.values()}) for r in reports] == [
        (1, False, {"training"}),
        (1, True, {"diverged"}),
    ]


def test_a_seed_that_diverged_is_told_with_the_others_next_report(make):
    stack = make()
    stack.attach(free(seeds=(0, 1, 2)))
    poisoned = stack._runs["a"][1]
    poisoned.hyper = replace(poisoned.hyper, explode_at=9.0)
    reports = finish(stack)
    assert [(r.epoch, [s.status for s in r.seeds.values()]) for r in reports] == [
        (1, ["training"] * 3),
        (3, ["training", "diverged", "training"]),
        (9, ["finished", "diverged", "finished"]),
    ]


def reported_twice(make) -> Shelf:
    """The checkpoints of a config that was heard of after its first and its third epoch."""
    shelf = Shelf()
    first = make(shelf=shelf)
    first.attach(free())
    while not any(report.epoch == 3 for report in first.tick()):
        pass
    first.writer.settle()
    return shelf


def forget(shelf: Shelf, key: str, after: int) -> None:
    """A run's checkpoints of later epochs."""
    for step in [step for step in shelf.saved[key] if step > after * PER_EPOCH]:
        del shelf.saved[key][step]


def test_continued_at_a_report_it_is_made_again_and_one_before_is_not(make):
    shelf = reported_twice(make)
    for key in shelf.saved:  # as if it had been lost right after its second report
        forget(shelf, key, after=3)
    again = finish_with(make(shelf=shelf), free())
    assert [(r.epoch, r.done) for r in again] == [(3, False), (9, True)]


def test_seeds_continued_at_different_steps_report_together(make):
    shelf = reported_twice(make)
    keys = list(free().runs.values())
    forget(shelf, keys[0], after=1)
    forget(shelf, keys[1], after=3)
    again = finish_with(make(shelf=shelf), free())
    # of the first epoch's report one seed knows nothing any more; the second is whole
    assert [(r.epoch, [s.epoch for s in r.seeds.values()]) for r in again] == [(3, [3, 3]), (9, [9, 9])]


def test_continued_beyond_a_report_the_next_one_is_made(make):
    shelf = Shelf()
    first = make(shelf=shelf)
    first.attach(free())
    while first._runs["a"][0].step < 4 * PER_EPOCH:
        first.tick()
    first.save_all()
    assert min(max(saved) for saved in shelf.saved.values()) > 3 * PER_EPOCH
    again = finish_with(make(shelf=shelf), free())
    assert [(r.epoch, r.done) for r in again] == [(9, True)]
