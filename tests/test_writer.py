"""What is written beside the training: in order, told only when it is on disk, and no failure goes unnoticed."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lanes.records import StorageLost
from lanes.serial import SerialEngine
from lanes.stack import Stack
from lanes.states import Parcel, copy_into, copy_of, leaves
from lanes.underway import Underway
from lanes.writer import MOST_WAITING, Writer
from tests.families import arrays_of, build_case
from tests.test_stack import Memory, Shelf, job


class Logged(Memory):
    """Notes what it is told."""

    def __init__(self, log: list):
        super().__init__()
        self.log = log

    def steps(self, run_key, first_step, curves):
        self.log.append(("steps", run_key, first_step))

    def flush(self, force=False):
        self.log.append(("flush", force))


class Gate(Shelf):
    """Checkpoints that wait for leave to be written."""

    def __init__(self, log: list | None = None):
        super().__init__()
        self.open, self.log = threading.Event(), log if log is not None else []

    def save(self, key, step, state, extra):
        assert self.open.wait(60)
        self.log.append(("save", key, step))
        super().save(key, step, state, extra)


def state(value: float = 0.0) -> dict:
    return {"step": torch.tensor(3), "params": {"w": torch.full((2, 3), value)}}


def test_rows_are_flushed_before_the_checkpoint_that_vouches_for_them():
    log: list = []
    shelf = Gate(log)
    shelf.open.set()
    writer = Writer(Logged(log), shelf)
    writer.steps("r", 1, {"loss": np.zeros(3)})
    writer.save("r", 3, Parcel(state()), {})
    writer.steps("r", 4, {"loss": np.zeros(3)})
    writer.write_some()
    writer.settle()
    assert log == [("steps", "r", 1), ("flush", True), ("save", "r", 3), ("steps", "r", 4), ("flush", False)]


def test_the_newest_checkpoint_is_found_though_it_is_still_being_written():
    shelf = Gate()
    writer = Writer(Memory(), shelf)
    writer.save("r", 3, Parcel(state(1.0)), {"step": 3})
    with ThreadPoolExecutor(1) as other:
        loading = other.submit(writer.load, "r")
        assert not loading.done()
        shelf.open.set()
        found = loading.result()
    assert found is not None
    assert float(found[0]["params"]["w"][0, 0]) == 1.0


def test_no_checkpoint_is_written_while_the_rows_before_it_could_not_be():
    class Full(Memory):
        full = True

        def flush(self, force=False):
            if self.full:
                raise StorageLost("curves could not be written: disk full")

    recorder, shelf = Full(), Shelf()
    writer = Writer(recorder, shelf)
    with pytest.raises(StorageLost, match=r"no checkpoint without the rows before it.*disk full"):
        writer.save("r", 3, Parcel(state()), {}).result()
    assert "r" not in shelf.saved
    recorder.full = False
    writer.save("r", 3, Parcel(state()), {}).result()
    assert list(shelf.saved["r"]) == [3]


def test_an_error_that_nobody_waits_for_is_raised_at_the_next_check_and_once():
    class Broken(Memory):
        def steps(self, run_key, first_step, curves):
            raise OSError("gone")

    writer = Writer(Broken(), Shelf())
    writer.steps("r", 1, {})
    with pytest.raises(OSError, match="gone"):
        writer.settle()
    writer.check()


def test_checkpoints_that_wait_are_bounded():
    shelf = Gate()
    writer = Writer(Memory(), shelf)
    for i in range(MOST_WAITING):
        writer.save(f"r{i}", 1, Parcel(state()), {})
    with ThreadPoolExecutor(1) as other:
        one_more = other.submit(writer.save, "more", 1, Parcel(state()), {})
        assert not one_more.done()
        shelf.open.set()
        one_more.result().result()
    assert len(shelf.saved) == MOST_WAITING + 1


def test_a_disk_keeps_up_while_little_waits_for_it():
    shelf = Gate()
    writer = Writer(Memory(), shelf)
    each = Parcel(state()).bytes
    assert writer.keeps_up(10**12), "one checkpoint is always taken that waits for none"
    assert not writer.keeps_up(10**12, each), "and the next one with it is not"
    writer.save("a", 1, Parcel(state()), {})
    assert writer.keeps_up(each)
    assert not writer.keeps_up(10**12)
    shelf.open.set()
    writer.settle()
    assert writer.keeps_up(10**12)


def test_what_is_under_way_is_counted_until_it_is_done():
    works = [Future() for _ in range(3)]
    underway = Underway()
    for size, work in enumerate(works, 1):
        underway.add(work, size)
    assert underway.bytes == 6
    works[0].set_result(None)
    assert underway.bytes == 5
    works[1].set_exception(OSError())
    underway.wait_for_oldest()
    assert underway.bytes == 3
    works[2].set_result(None)
    assert underway.bytes == 0


def test_a_report_is_told_when_its_checkpoint_is_on_disk_and_others_train_meanwhile(cache_dir: Path):
    family, program, _ = build_case("tests.toys.regression", "noisy")
    shelf, memory = Gate(), Memory()
    engine = SerialEngine(family, program, arrays_of(family, program, cache_dir))
    stack = Stack(family, program, lambda: (engine, 2), Writer(memory, shelf), report_seconds=-1.0)
    first, second = job("a", seeds=(0, 1), reports=(1, 9)), job("b", seeds=(0, 1), lr=0.1, reports=(9,))
    stack.attach(first)
    stack.attach(second)
    told: list = []
    while not any(run.step for run in stack._runs["b"]):  # it got the slots of the first, which waits for its report
        told += stack.tick()
    assert not told
    assert all(run.status == "parked" for run in stack._runs["a"])
    assert stack.busy
    shelf.open.set()
    while not told:
        told += stack.tick()
    assert [(report.token, report.epoch) for report in told] == [("a", 1)]
    assert all(list(shelf.saved[key]) == [6] for key in first.runs.values())


def test_a_config_that_leaves_takes_no_late_checkpoint_with_it(cache_dir: Path):
    """Whoever released it may remove its checkpoints at once."""
    family, program, _ = build_case("tests.toys.regression", "noisy")
    shelf = Gate()
    engine = SerialEngine(family, program, arrays_of(family, program, cache_dir))
    stack = Stack(family, program, lambda: (engine, 2), Writer(Memory(), shelf), report_seconds=-1.0)
    stack.attach(job("a", seeds=(0,), reports=(1, 9)))
    while not any(run.status == "parked" for run in stack._runs["a"]):
        stack.tick()
    with ThreadPoolExecutor(1) as other:
        leaving = other.submit(stack.release, "a")
        assert not leaving.done()
        shelf.open.set()
        leaving.result()
    assert len(shelf.saved) == 1
    assert not stack.busy


def test_copies_are_by_name_and_share_nothing():
    target = {"a": torch.zeros(2), "b": {"c": torch.zeros(3, dtype=torch.int64)}}
    source = {"b": {"c": torch.arange(3)}, "a": torch.ones(2)}
    copy_into(target, source)
    assert target["a"].tolist() == [1, 1]
    assert target["b"]["c"].tolist() == [0, 1, 2]
    taken = copy_of(target)
    target["a"].zero_()
    assert taken["a"].tolist() == [1, 1]
    assert list(taken) == ["a", "b"]
    assert [tuple(leaf.shape) for leaf in leaves(taken)] == [(2,), (3,)]


def test_a_parcel_from_the_host_is_the_state():
    given = state(2.0)
    assert Parcel(given).wait() is given


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_parcel_from_the_gpu_is_as_it_was_when_it_was_sent():
    given = {"n": torch.arange(5, device="cuda"), "w": {"a": torch.randn(3, 4, device="cuda"), "b": torch.tensor(2.0)}}
    expected = {"n": given["n"].tolist(), "a": given["w"]["a"].tolist()}
    parcel = Parcel(given)
    given["n"].zero_()
    given["w"]["a"].zero_()
    got = parcel.wait()
    assert not got["w"]["a"].is_cuda
    assert (got["n"].tolist(), got["w"]["a"].tolist(), float(got["w"]["b"])) == (expected["n"], expected["a"], 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_more_parcels_than_may_be_on_the_way_wait_for_each_other(monkeypatch):
    monkeypatch.setattr("lanes.states.MOST_ON_THE_WAY", 1000)
    given = [{"w": torch.full((100,), float(i), device="cuda")} for i in range(20)]
    parcels = [Parcel(state) for state in given]
    assert [float(parcel.wait()["w"].mean()) for parcel in parcels] == list(range(20))
