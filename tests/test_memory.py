"""Out of memory: fewer lanes, the same results, nothing doubled; at one lane `oom`, and the others go on."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

import tests.toys.regression as toy
from lanes.host import Host, HostSettings
from lanes.memory import is_out_of_memory
from lanes.records import OnceRecorder, StorageLost
from lanes.serial import SerialEngine
from lanes.stacked import StackedEngine
from tests.test_stack import STEPS, Memory, Shelf, alone, job, make, run_host  # noqa: F401  # fixtures

CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "80000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ERRORS = {
    "cuda": CUDA,
    "python": MemoryError(),
    "cpu allocator": CPU_ALLOCATOR,
    "map": OSError(12, "Cannot allocate memory"),
}


class Strict(Memory):
    """A row that comes twice is an error."""

    def steps(self, run_key, first_step, curves):
        rows = range(first_step, first_step + len(curves["train_loss"]))
        assert not self.step_rows[run_key].keys() & set(rows), f"{run_key}: steps doubled"
        super().steps(run_key, first_step, curves)

    def epoch(self, run_key, row, values):
        assert row["epoch"] not in self.epoch_rows[run_key], f"{run_key}: epoch doubled"
        super().epoch(run_key, row, values)


class Small:
    """Engines on a device that holds `room` lanes: one more raises, at a chosen place, having half done its work."""

    def __init__(self, room: int, place: str, error: Exception, base=StackedEngine):
        self.room, self.place, self.error, self.base = room, place, error, base
        self.made: list = []
        self.most = 0

    def __call__(self, name, lanes, family, program, arrays, device, host_arrays=None):
        small = self
        if small.place == "make" and lanes > small.room:
            raise copy.copy(small.error)

        class Engine(small.base):
            def _place(self, arrived):
                super()._place(arrived)
                if small.place == "insert":
                    self.check(len(arrived))

            def _advance(self, steps):
                if small.place == "advance" and len(self.lanes) > small.room:
                    super()._advance(min(2, steps))  # states have moved on when it raises
                    self.check(0)
                return super()._advance(steps)

            def _evaluate(self, keys, rows):
                if small.place == "evaluate":
                    self.check(0)
                small.most = max(small.most, len(self.lanes))
                return super()._evaluate(keys, rows)

            def check(self, more):
                if len(self.lanes) + more > small.room:
                    raise copy.copy(small.error)

        made = Engine(family, program, arrays, device)
        small.made.append(weakref.ref(made))
        return made


@pytest.fixture
def host(tmp_path, monkeypatch):
    def host(small: Small | None = None, lanes=8, memory: Memory | None = None) -> Host:
        if small is not None:
            monkeypatch.setattr("lanes.probe.make_engine", small)
        memory, shelf = memory or Strict(), Shelf()
        settings = HostSettings("stacked", lanes, lanes, 0.0, None, tmp_path, lambda label: memory, lambda: shelf)
        made = Host(settings, "cpu", "cpu:0@here")
        made.memory = memory  # type: ignore[attr-defined]
        return made

    return host


@pytest.mark.parametrize("error", ERRORS)
def test_errors_that_are_a_lack_of_memory(error):
    assert is_out_of_memory(ERRORS[error])
    wrapped = ValueError("while training")
    wrapped.__cause__ = ERRORS[error]
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(ValueError("out of ideas"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("base", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
@pytest.mark.parametrize("place", ["make", "insert", "advance", "evaluate"])
def test_lanes_are_halved_until_they_fit_and_nothing_is_lost_or_doubled(host, alone, caplog, base, place):  # noqa: F811
    small = Small(3, place, CUDA, base)
    made = host(small)
    jobs = [job(f"t{i}", seeds=(0, 1), lr=0.01 * (i + 1), noise=0.01) for i in range(4)]
    with caplog.at_level(logging.WARNING):
        reports = run_host(made, jobs)
    for each in jobs:
        assert [r.epoch for r in reports[each.token]] == [1, 3, 9], "no report is made twice"
        assert all(r.error is None for r in reports[each.token])
        for key in each.runs.values():
            assert sorted(made.memory.step_rows[key]) == list(range(1, STEPS + 1))
            assert sorted(made.memory.epoch_rows[key]) == list(range(1, 10))
    last = jobs[-1]
    expected = alone(last)
    for key in last.runs.values():
        np.testing.assert_allclose(
            [made.memory.step_rows[key][s] for s in range(1, STEPS + 1)],
            [expected.step_rows[key][s] for s in range(1, STEPS + 1)],
            rtol=0 if base is SerialEngine else 1e-9,
        )
    assert small.most == 2, "8 lanes, then 4, then 2"
    notices = [r.notice for rs in reports.values() for r in rs if r.notice]
    assert " ".join(notices).count("out of memory with") == 2
    assert "out of memory with 8 lanes, going on with 4" in caplog.text
    gc.collect()
    assert sum(ref() is not None for ref in small.made) <= 1, "the engines that did not fit are gone"


def test_a_long_way_into_training_lanes_continue_from_their_checkpoints(host, alone):  # noqa: F811
    """Memory runs out late, when every run has reports behind it."""
    small = Small(99, "advance", CUDA)
    made = host(small, lanes=4)
    jobs = [job(f"t{i}", lr=0.02 * (i + 1), noise=0.01) for i in range(2)]
    reports = defaultdict(list)
    for each in jobs:
        made.attach(each)
    done: set = set()
    for _ in range(400):
        for report in made.tick():
            reports[report.token].append(report)
            if report.epoch == 3 and report.token == "t0":
                small.room = 2
            (made.release if report.done else made.proceed)(report.token)
            done |= {report.token} if report.done else set()
        if len(done) == 2:
            break
    for each in jobs:
        assert [r.epoch for r in reports[each.token]] == [1, 3, 9]
        for key in each.runs.values():
            expected = alone(each).step_rows[key]
            mine = made.memory.step_rows[key]
            np.testing.assert_allclose(
                [mine[s] for s in range(1, STEPS + 1)], [expected[s] for s in range(1, STEPS + 1)], rtol=1e-9
            )


@pytest.mark.parametrize("engine", ["stacked", "auto"])
def test_what_does_not_fit_alone_ends_as_oom_and_the_others_go_on(host, monkeypatch, engine):
    step = toy.FAMILY.step

    def hungry(program, state, hyper, data):
        if program.width == 5:
            raise copy.copy(CPU_ALLOCATOR)
        return step(program, state, hyper, data)

    monkeypatch.setattr(toy, "FAMILY", replace(toy.FAMILY, step=hungry))
    made = host(lanes=8)
    made.settings = replace(made.settings, engine=engine, lanes=0 if engine == "auto" else 8)
    reports = run_host(made, [job("big", width=5), job("small", width=3), job("big too", width=5, lr=0.2)])
    for token in ("big", "big too"):
        (report,) = reports[token]
        assert (report.done, report.reason) == (True, "oom")
        assert ("can't allocate memory" if engine == "stacked" else "not even with one lane") in report.error
    assert [r.epoch for r in reports["small"]] == [1, 3, 9]


def test_a_program_with_one_lane_gets_room_from_the_largest_other(host, alone):  # noqa: F811
    room = 5

    class Shared(Small):
        """All engines together hold `room` lanes."""

        def __call__(self, *args):
            made = super().__call__(*args)
            live = lambda: sum(len(e.lanes) for ref in self.made if (e := ref()) is not None)
            insert = made._place

            def place(arrived):
                if live() + len(arrived) > room:
                    raise copy.copy(CUDA)
                insert(arrived)

            made._place = place
            return made

    many, one = job("many", seeds=range(5), width=3, reports=(9,)), job("one", seeds=(0,), width=8, reports=(9,))
    made = host(Shared(99, "", CUDA))
    reports = run_host(made, [many, one])
    assert [r.reason for rs in reports.values() for r in rs if r.error] == []
    assert {token: [r.epoch for r in rs] for token, rs in reports.items()} == {"many": [9], "one": [9]}
    for each in (many, one):
        assert all(sorted(made.memory.step_rows[key]) == list(range(1, STEPS + 1)) for key in each.runs.values())


def test_a_storage_that_fails_is_no_program_s_fault(host):
    class Full(Memory):
        def flush(self, force=False):
            raise OSError(28, "No space left on device")

    made = host(memory=Full())
    made.attach(job("a"))
    reports: list = []
    while not reports:
        reports = made.tick()
    assert [(r.done, r.reason) for r in reports] == [(True, "storage")]
    assert "No space left on device" in reports[0].error
    with pytest.raises(StorageLost, match="No space left"):
        made.flush()


def test_a_recorder_that_takes_rows_once():
    memory = Strict()
    once = OnceRecorder(memory)
    curve = lambda first, last: {"train_loss": np.arange(first, last + 1, dtype=float)}
    for first, last in ((1, 4), (3, 6), (1, 6), (7, 7), (5, 9)):
        once.steps("r", first, curve(first, last))
    assert memory.step_rows["r"] == {step: float(step) for step in range(1, 10)}
    for epoch in (1, 2, 1, 2, 3):
        once.epoch("r", {"epoch": epoch}, {})
        once.covariates("r", epoch, {})
    assert sorted(memory.epoch_rows["r"]) == [1, 2, 3]
    once.steps("other", 1, curve(1, 2))
    assert sorted(memory.step_rows["other"]) == [1, 2]
