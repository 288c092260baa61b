"""Stacks and hosts without Ray: parking at reports, freed lanes, late attachments, checkpoints, neighbours."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.toys.regression as toy
from lanes.compiling import compile_lanes
from lanes.engine import Chunk
from lanes.host import Host, HostSettings
from lanes.job import Job
from lanes.probe import ENGINES, probe
from lanes.serial import SerialEngine
from lanes.stack import Stack
from lanes.stacked import StackedEngine
from lanes.writer import Writer
from tests.families import arrays_of, build_case
from trainables.family import config_key, run_key

EPOCHS = 9
STEPS = 54


class Memory:
    """Curves in dicts; a (run, step) written twice keeps the last, as a reader of the Parquet files would."""

    def __init__(self):
        self.step_rows: dict[str, dict[int, float]] = defaultdict(dict)
        self.epoch_rows: dict[str, dict[int, dict]] = defaultdict(dict)
        self.covariate_rows: dict[str, dict[int, dict]] = defaultdict(dict)

    def steps(self, run_key, first_step, curves):
        for i, value in enumerate(curves["train_loss"]):
            self.step_rows[run_key][first_step + i] = float(value)

    def epoch(self, run_key, row, values):
        self.epoch_rows[run_key][row["epoch"]] = {**row, **values}

    def covariates(self, run_key, epoch, values):
        self.covariate_rows[run_key][epoch] = values

    def flush(self, force=False):
        pass


class Shelf:
    """Checkpoints in a dict, all kept."""

    def __init__(self):
        self.saved: dict[str, dict[int, tuple]] = defaultdict(dict)

    def save(self, key, step, state, extra):
        self.saved[key][step] = copy.deepcopy((state, dict(extra)))

    def load(self, key, at_most=None):
        steps = sorted(step for step in self.saved.get(key, ()) if at_most is None or step <= at_most)
        return copy.deepcopy(self.saved[key][steps[-1]]) if steps else None


def job(token: str, seeds=(0, 1), reports=(1, 3, 9), lr=0.05, parent=None, covariates=False, **values) -> Job:
    values = {"lr": lr, **values}
    key = config_key("toy", *toy.FAMILY.build(values))
    runs = {seed: run_key(key, seed) for seed in seeds}
    return Job(token, "tests.toys.regression", values, key, runs, tuple(reports), covariates, parent or {})


@pytest.fixture(params=[False, True], ids=["read at once", "run ahead"])
def make(request, cache_dir):
    """Stacks that read each chunk before the next is launched, and stacks that do as on a GPU."""

    def make(engine=SerialEngine, lanes=8, recorder=None, shelf=None, case="noisy", **more) -> Stack:
        family, program, _ = build_case("tests.toys.regression", case)
        arrays = arrays_of(family, program, cache_dir)

        def make_engine():
            made = engine(family, program, arrays)
            made.runs_ahead = request.param
            return made, lanes

        return Stack(
            family,
            program,
            make_engine,
            Writer(recorder or Memory(), shelf if shelf is not None else Shelf()),
            **{"report_seconds": -1.0, **more},  # saved at every report
        )

    return make


def tick_until_reports(stack, most=300) -> list:
    for _ in range(most):
        reports = stack.tick()
        if reports:
            stack.writer.settle()
            return reports
    raise AssertionError("no report came")


def train(stack, jobs, most=300) -> dict[str, list]:
    """Attach, and accept every report until all are done."""
    reports: dict[str, list] = defaultdict(list)
    for each in jobs:
        stack.attach(each)
    open_tokens = {each.token for each in jobs}
    for _ in range(most):
        assert stack.busy, "a host would wait for somebody to call"
        for report in stack.tick():
            reports[report.token].append(report)
            if report.done:
                stack.release(report.token)
                open_tokens.discard(report.token)
            else:
                stack.proceed(report.token)
        if not open_tokens:
            stack.writer.settle()
            return reports
    raise AssertionError(f"not finished: {open_tokens}")


@pytest.fixture
def alone(make):
    """The undisturbed curves of a job, trained by itself on the serial engine."""

    def alone(each: Job) -> Memory:
        memory = Memory()
        train(make(recorder=memory), [replace(each, token="alone")])
        return memory

    return alone


def test_a_run_never_trains_past_a_report_before_it_is_accepted(make):
    memory = Memory()
    stack = make(recorder=memory)
    stack.attach(job("a"))
    (report,) = tick_until_reports(stack)
    assert (report.token, report.epoch, report.done) == ("a", 1, False)
    assert {seed.status for seed in report.seeds.values()} == {"training"}
    assert not stack.busy, "parked runs hold no slot"
    for _ in range(5):
        assert stack.tick() == []
    assert {max(rows) for rows in memory.epoch_rows.values()} == {1}
    stack.proceed("a")
    (report,) = tick_until_reports(stack)
    assert report.epoch == 3
    stack.release("a")
    stack.proceed("a")  # a decision that came too late changes nothing
    assert not stack.busy
    assert stack.tick() == []


@pytest.mark.parametrize("engine", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_reports_summaries_and_curves_are_the_run_s(make, engine):
    memory = Memory()
    reports = train(make(engine, recorder=memory), [job("a", noise=0.01)])["a"]
    assert [r.epoch for r in reports] == [1, 3, 9]
    assert [r.done for r in reports] == [False, False, True]
    for report in reports:
        for seed in report.seeds.values():
            row = memory.epoch_rows[seed.run_key][report.epoch]
            assert seed.values == {"test_loss": row["test_loss"], "train_loss": row["train_loss"]}
            assert (seed.epoch, seed.step) == (report.epoch, report.epoch * 6)
    for key, rows in memory.step_rows.items():
        assert sorted(rows) == list(range(1, STEPS + 1))
        for epoch, row in memory.epoch_rows[key].items():
            mean = np.mean([rows[s] for s in range(6 * epoch - 5, 6 * epoch + 1)])
            assert row["train_loss"] == pytest.approx(mean, rel=1e-12)
    assert {seed.status for seed in reports[-1].seeds.values()} == {"finished"}
    assert all(seed.device_seconds > 0 for seed in reports[-1].seeds.values())


@pytest.mark.parametrize("engine", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_more_seeds_than_lanes_and_configs_that_come_late(make, alone, engine):
    memory = Memory()
    stack = make(engine, lanes=2, recorder=memory)
    jobs = [job("a", seeds=range(3)), job("b", lr=0.1, seeds=range(2))]
    late = job("c", lr=0.2, noise=0.01)
    stack.attach(jobs[0])
    done: set[str] = set()
    stack.attach(jobs[1])
    for i in range(400):
        assert len(stack._training) <= 2
        if i == 5:
            stack.attach(late)
        for report in stack.tick():
            if report.done:
                done.add(report.token)
                stack.release(report.token)
            else:
                stack.proceed(report.token)
        if len(done) == 3:
            break
    assert done == {"a", "b", "c"}
    for each in (*jobs, late):
        expected = alone(each)
        for key in each.runs.values():
            np.testing.assert_allclose(
                [memory.step_rows[key][s] for s in range(1, STEPS + 1)],
                [expected.step_rows[key][s] for s in range(1, STEPS + 1)],
                rtol=1e-9,
            )


@pytest.mark.parametrize("engine", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_a_diverged_run_frees_its_lane_and_its_neighbours_do_not_notice(make, alone, engine):
    memory = Memory()
    stack = make(engine, lanes=2, recorder=memory)
    sick, well = job("sick", seeds=(0,), explode_at=9.0), job("well", seeds=(0, 1), noise=0.01)
    reports = train(stack, [sick, well])
    (key,) = sick.runs.values()
    seeds = [report.seeds[0] for report in reports["sick"]]
    assert [(s.status, s.epoch, s.step) for s in seeds] == [("training", 1, 6), ("diverged", 1, 9)]
    assert reports["sick"][-1].done
    assert sorted(memory.step_rows[key]) == list(range(1, 10)), "nothing is recorded after the infinite step"
    assert np.isinf(memory.step_rows[key][9])
    expected = alone(well)
    for key in well.runs.values():
        values = [memory.step_rows[key][s] for s in range(1, STEPS + 1)]
        other = [expected.step_rows[key][s] for s in range(1, STEPS + 1)]
        np.testing.assert_allclose(values, other, rtol=1e-9 if engine is StackedEngine else 0)


def test_one_diverged_seed_of_a_config_is_marked_and_the_others_go_on(make, monkeypatch):
    step = toy.FAMILY.step

    def explode_seed_1(program, state, hyper, data):
        state, metrics = step(program, state, hyper, data)
        bad = (state["seed"] == 1) & (state["step"] >= 8)
        return state, {"train_loss": metrics["train_loss"] * (1.0 / (~bad).double())}

    stack = make(StackedEngine)
    stack.family = replace(stack.family, step=explode_seed_1)
    stack._need_engine().family = stack.family
    reports = train(stack, [job("a", seeds=(0, 1, 2))])["a"]
    assert [{n: s.status for n, s in r.seeds.items()} for r in reports] == [
        {0: "training", 1: "training", 2: "training"},
        {0: "training", 1: "diverged", 2: "training"},
        {0: "finished", 1: "diverged", 2: "finished"},
    ]
    assert reports[1].epoch == 3


@pytest.mark.parametrize("engine", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_continuing_from_checkpoints_in_the_middle_of_an_epoch_is_exact(make, engine, cut):
    each = job("a", noise=0.01)
    undisturbed = Memory()
    train(make(engine, recorder=undisturbed), [each])
    memory, shelf = Memory(), Shelf()
    stack = make(engine, recorder=memory, shelf=shelf, checkpoint_seconds=-1.0)
    stack._step_seconds = 1e9  # one step a tick
    stack.attach(each)
    while stack._runs["a"][0].step < 6 + cut:
        for report in stack.tick():
            stack.proceed(report.token)
        stack._step_seconds = 1e9
    stack.writer.settle()
    assert {max(shelf.saved[key]) for key in each.runs.values()} == {6 + cut}
    again = make(engine, recorder=memory, shelf=shelf)
    reports = train(again, [replace(each, token="again", reports=(3, 9))])["again"]
    assert [r.epoch for r in reports] == [3, 9]
    assert memory.step_rows == undisturbed.step_rows
    for key, rows in undisturbed.epoch_rows.items():
        assert memory.epoch_rows[key] == rows


def test_where_the_disk_is_slow_reports_go_without_checkpoints_and_nothing_is_lost(make, monkeypatch):
    each, shelf, memory = job("a", noise=0.01), Shelf(), Memory()
    expected = train(make(), [each])["a"][-1]
    monkeypatch.setattr(Writer, "keeps_up", lambda *_: False)
    stack = make(shelf=shelf, recorder=memory)
    stack.attach(each)
    tick_until_reports(stack)
    stack.proceed("a")
    (report,) = tick_until_reports(stack)
    assert report.epoch == 3
    assert not shelf.saved
    assert all(sorted(memory.epoch_rows[key]) == [1, 2, 3] for key in each.runs.values()), "rows vouch for a report"
    again = train(make(shelf=shelf, recorder=Memory()), [replace(each, token="again", reports=(9,))])["again"][-1]
    assert {n: seed.values for n, seed in again.seeds.items()} == {n: s.values for n, s in expected.seeds.items()}


@pytest.mark.parametrize(("how", "seconds"), [({"donates": True}, 60.0), ({}, -1.0)], ids=["donates", "old"])
def test_what_must_be_saved_is_saved_where_the_disk_is_slow(make, monkeypatch, how, seconds):
    each, shelf = replace(job("a"), **how), Shelf()
    monkeypatch.setattr(Writer, "keeps_up", lambda *_: False)
    stack = make(shelf=shelf, checkpoint_seconds=seconds)
    stack.attach(each)
    tick_until_reports(stack)
    assert all(6 in shelf.saved[key] for key in each.runs.values())


def test_a_run_that_has_trained_little_since_it_was_saved_is_not_saved_at_a_report(make):
    now, shelf = [0.0], Shelf()

    def clock() -> float:
        now[0] += 0.2
        return now[0]

    each = job("a", seeds=(0,), reports=tuple(range(1, 10)))
    stack = make(shelf=shelf, report_seconds=2.0, clock=clock)
    stack.attach(each)
    trained: list[float] = []
    while not trained or stack._runs["a"][0].status != "finished":
        tick_until_reports(stack)
        trained.append(stack._runs["a"][0].unsaved)
        stack.proceed("a")
    saved = sorted(shelf.saved[each.runs[0]])
    assert 0 < len(saved) < 8, saved
    assert max(trained) < 4.0, "little more than the two seconds is ever at stake"


def test_runs_restored_from_checkpoints_of_different_age_report_together(make):
    each, shelf = job("a", noise=0.01), Shelf()
    stack = make(shelf=shelf)
    stack.attach(each)
    tick_until_reports(stack)
    stack.proceed("a")
    (report,) = tick_until_reports(stack)
    assert report.epoch == 3
    del shelf.saved[each.runs[1]][18]  # this run's newest checkpoint was lost
    memory = Memory()
    again = make(shelf=shelf, recorder=memory)
    again.attach(replace(each, token="again"))
    (report,) = tick_until_reports(again)
    assert {seed.epoch for seed in report.seeds.values()} == {3}
    assert sorted(memory.epoch_rows[each.runs[1]]) == [2, 3]
    assert each.runs[0] not in memory.epoch_rows


def test_a_config_killed_between_its_end_and_its_last_report_reports_without_a_new_epoch(make):
    """The state after the last epoch is not kept (nothing continues from it): the run redoes what follows its last
    checkpoint and ends with the same numbers."""
    each, shelf, first, second = job("a", noise=0.01), Shelf(), Memory(), Memory()
    expected = train(make(shelf=shelf, recorder=first), [each])["a"][-1]
    actual = train(make(shelf=shelf, recorder=second), [replace(each, token="again", reports=(9,))])["again"][-1]
    assert {n: seed.values for n, seed in actual.seeds.items()} == {n: s.values for n, s in expected.seeds.items()}
    for key in each.runs.values():
        assert sorted(second.epoch_rows[key]) == [4, 5, 6, 7, 8, 9]


def test_a_copy_continues_its_parent_s_states_with_other_hypers(make):
    donor, shelf, memory = replace(job("donor", noise=0.01), donates=True), Shelf(), Memory()
    stack = make(shelf=shelf, recorder=memory)
    stack.attach(donor)
    tick_until_reports(stack)
    stack.proceed("donor")
    tick_until_reports(stack)  # epoch 3
    values = {"lr": 0.2, "noise": 0.01}
    copied = replace(
        job("copy", lr=0.2, noise=0.01),
        runs={0: "copy0", 1: "copy1"},
        reports=(9,),
        parent={seed: (key, 3) for seed, key in donor.runs.items()},
        values=values,
    )
    stack.attach(copied)
    (report,) = tick_until_reports(stack)
    assert (report.token, report.epoch, report.done) == ("copy", 9, True)
    assert sorted(memory.epoch_rows["copy0"]) == [4, 5, 6, 7, 8, 9], "its own curves begin after its parent's"

    # by hand: the donor's hypers for three epochs, then the copy's
    engine = make()._need_engine()
    engine.insert("x", toy.Hyper(lr=0.05, noise=0.01), 0)
    for _ in range(3):
        engine.advance(6)
    state = engine.state("x")
    engine.remove(["x"])
    engine.insert("x", toy.Hyper(lr=0.2, noise=0.01), 0, state=state)
    expected = np.concatenate([engine.advance(6)["train_loss"][:, 0] for _ in range(6)])
    np.testing.assert_array_equal([memory.step_rows["copy0"][s] for s in range(19, 55)], expected)
    with pytest.raises(RuntimeError, match="run nobody, which has no checkpoint"):
        stack.attach(replace(copied, token="orphan", runs={0: "orphan0"}, parent={0: ("nobody", 3)}))


def test_covariates_are_recorded_only_where_asked(make):
    memory = Memory()
    train(make(StackedEngine, recorder=memory), [job("a", covariates=True), job("b", lr=0.1)])
    assert {key: sorted(rows) for key, rows in memory.covariate_rows.items()} == {
        key: list(range(1, 10)) for key in job("a").runs.values()
    }
    assert memory.covariate_rows[job("a").runs[0]][1]["weight_norm"].shape == (2,)


# --- the host ---


@pytest.fixture
def host(tmp_path):
    memory, shelf = Memory(), Shelf()

    def host(engine="serial", lanes=4) -> Host:
        settings = HostSettings(engine, lanes, 4, 0.0, None, tmp_path, lambda label: memory, lambda: shelf)
        return Host(settings, "cpu", "cpu:0@here")

    host.memory, host.shelf = memory, shelf
    return host


def run_host(host: Host, jobs, most=400) -> dict[str, list]:
    reports: dict[str, list] = defaultdict(list)
    open_tokens = set()
    for each in jobs:
        host.attach(each)
        open_tokens.add(each.token)
    for _ in range(most):
        for report in host.tick():
            reports[report.token].append(report)
            if report.done:
                host.release(report.token)
                open_tokens.discard(report.token)
            else:
                host.proceed(report.token)
        if not open_tokens:
            host.flush()
            return reports
    raise AssertionError(f"not finished: {open_tokens}")


def test_two_programs_share_a_device(host, alone):
    jobs = [job("narrow", width=3, precision="float64"), job("wide", width=8)]
    made = host()
    turns: list[set] = []
    for each in jobs:
        made.attach(each)
    made.tick()
    made.flush()
    turns.append({key for key, rows in host.memory.step_rows.items() if rows})
    assert turns[0] == {*jobs[0].runs.values(), *jobs[1].runs.values()}, "both train within one turn"
    for each in jobs:
        made.release(each.token)
    reports = run_host(host(), [replace(each, token=f"{each.token}2") for each in jobs])
    assert {token: [r.epoch for r in rs] for token, rs in reports.items()} == {
        "narrow2": [1, 3, 9],
        "wide2": [1, 3, 9],
    }
    assert {r.device for rs in reports.values() for r in rs} == {"cpu:0@here"}


def test_a_family_that_raises_takes_only_its_own_stack(host, monkeypatch, caplog):
    evaluate = toy.FAMILY.evaluate

    def fail_when_narrow(program, state, hyper, data):
        if program.width == 3:
            raise RuntimeError("this family is broken")
        return evaluate(program, state, hyper, data)

    monkeypatch.setattr(toy, "FAMILY", replace(toy.FAMILY, evaluate=fail_when_narrow))
    with caplog.at_level(logging.ERROR):
        reports = run_host(host(), [job("bad", width=3), job("good", width=8)])
    (failed,) = reports["bad"]
    assert failed.done
    assert "this family is broken" in failed.error
    assert [r.epoch for r in reports["good"]] == [1, 3, 9]
    assert all(r.error is None for r in reports["good"])


def test_values_that_make_no_program_are_refused_at_once(host):
    with pytest.raises(ValueError, match="no field 'depth'"):
        host().attach(replace(job("a"), values={"depth": 3}))


def test_a_released_token_may_be_released_again(host):
    made = host()
    made.attach(job("a"))
    made.tick()
    made.release("a")
    made.release("a")
    made.proceed("a")
    made.save("a")
    assert not made.busy
    assert made.tick() == []


def test_the_same_config_attached_twice_is_two_attachments(host):
    """Tune may bring a trial up twice: the loser's release must not free the winner's lanes."""
    made = host()
    made.attach(job("loser"))
    made.attach(job("winner"))
    made.tick()
    made.release("loser")
    assert made.busy
    reports: list = []
    while not reports:
        reports = made.tick()
    assert {r.token for r in reports} == {"winner"}


def test_arrays_of_one_memory_mapped_file_are_put_on_the_device_once(host, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    made = host()
    first, second = made._put({"x": mapped}), made._put({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})
    assert first["x"] is second["x"]
    assert made._put({"x": np.arange(6.0)})["x"] is not first["x"]
    assert made._put({"x": mapped[:3]})["x"].tolist() == [0, 1, 2]  # another part of it is another tensor
    assert made._put({"x": mapped[3:]})["x"].tolist() == [3, 4, 5]


# --- the probe ---


def test_the_probe_never_chooses_a_row_slower_than_serial_and_remembers(tmp_path, cache_dir, monkeypatch):
    family, program, hyper = build_case("tests.toys.regression", "plain")
    arrays = arrays_of(family, program, cache_dir)
    choice = probe(family, program, hyper, arrays, "cpu", wanted=4, seconds=0.01, cache=tmp_path)
    serial = next(row.rate for row in choice.table if row.engine == "serial")
    chosen = max(row.rate for row in choice.table if row.engine == choice.engine)
    assert chosen >= serial
    assert choice.engine in ENGINES
    assert 1 <= choice.lanes <= 4
    assert sum("<- chosen" in line for line in choice.lines()) == 1
    monkeypatch.setattr("lanes.probe.measure", lambda *args: pytest.fail("measured again"))
    again = probe(family, program, hyper, arrays, "cpu", wanted=4, seconds=0.01, cache=tmp_path)
    assert again.cached
    assert (again.engine, again.lanes, again.table) == (choice.engine, choice.lanes, choice.table)


@pytest.mark.parametrize("rates", [{"serial": 100.0, "stacked": 10.0}, {"serial": 10.0, "stacked": 100.0}])
def test_the_probe_takes_the_knee(tmp_path, cache_dir, monkeypatch, rates):
    family, program, hyper = build_case("tests.toys.regression", "plain")
    arrays = arrays_of(family, program, cache_dir)
    measured = []

    def measure(engine, hyper, lanes, seconds):
        measured.append((engine.name, lanes))
        gain = {2: 1.0, 4: 2.0, 8: 2.1, 16: 9.0}.get(lanes, 1.0)  # doubling from 4 to 8 brings too little
        return rates[engine.name] * gain, 0.1

    monkeypatch.setattr("lanes.probe.measure", measure)
    choice = probe(family, program, hyper, arrays, "cpu", wanted=16)
    assert measured == [("serial", 1), ("stacked", 2), ("stacked", 4), ("stacked", 8)]
    if rates["serial"] > rates["stacked"]:
        assert (choice.engine, choice.lanes) == ("serial", 16)
    else:
        assert choice.engine == "stacked"
        assert choice.lanes in (4, 8)


SPEEDS = {"serial": 10.0, "stacked": 100.0, "stacked, compiled": 1000.0, "branched": 500.0}
STACK, BRANCH = "stacked, compiled", "branched"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The probe measures on a GPU that is not there, by the function that the fixture is called with."""

    def measure_by(measure):
        monkeypatch.setattr("lanes.probe.make_engine", lambda name, *_: name)
        monkeypatch.setattr("lanes.probe.device_name", lambda device: "a GPU")
        monkeypatch.setattr("lanes.probe.measure", measure)

    return measure_by


@pytest.fixture
def measured(on_a_gpu):
    """The rows measured so far on that GPU: 20 s of set-up each, and little gained by 128 lanes over 32."""
    rows = []

    def measure(engine, hyper, lanes, seconds):
        rows.append((engine, lanes))
        return SPEEDS[engine] * {128: 1.2}.get(lanes, 1.0), 20.0

    on_a_gpu(measure)
    return rows


@pytest.mark.parametrize(
    ("convolves", "steps", "expected"),
    [
        (False, 500, [("serial", 1), ("stacked", 2), ("stacked", 8)]),  # 50 s ahead: nothing is compiled
        (False, 5e4, [("serial", 1), (STACK, 32)]),  # 50 s are left, and a further row takes 20
        (False, 8e4, [("serial", 1), (STACK, 32), (STACK, 128)]),
        (False, 3e6, [("serial", 1), (STACK, 32), (STACK, 128), (BRANCH, 8), (BRANCH, 32)]),
        (True, 2e4, [("serial", 1), (BRANCH, 8)]),
    ],
    ids=str,
)
def test_on_a_gpu_no_row_costs_more_than_it_can_bring(measured, convolves, steps, expected):
    family, program, hyper = build_case("tests.toys.regression", "plain")
    family = replace(family, convolves=lambda _: convolves)
    choice = probe(family, program, hyper, {}, "cuda", wanted=128, expected_steps=steps)
    assert measured == expected
    assert choice.engine == max(choice.table, key=lambda row: row.rate).engine


def test_a_longer_sweep_measures_only_what_a_shorter_one_did_not(tmp_path, measured, monkeypatch):
    family, program, hyper = build_case("tests.toys.regression", "plain")
    turn = lambda steps, wanted=128: probe(
        family, program, hyper, {}, "cuda", wanted=wanted, expected_steps=steps, cache=tmp_path
    )
    assert (turn(5e4).lanes, measured) == (32, [("serial", 1), (STACK, 32)])
    longer = turn(8e4)
    assert measured[2:] == [(STACK, 128)]
    assert (longer.engine, longer.lanes, longer.cached) == (STACK, 128, False)
    for steps, wanted, lanes in ((8e4, 128, 128), (5e4, 128, 128), (5e4, 40, 32)):
        again = turn(steps, wanted)
        assert (again.lanes, again.cached) == (lanes, True), "a known row costs nothing, where there are so many lanes"
    monkeypatch.setattr("lanes.probe.code_digest", lambda family: "another")
    assert not turn(5e4).cached
    assert len(measured) == 5


def test_a_damaged_file_of_rows_is_measured_again_and_mended(tmp_path, cache_dir, caplog):
    family, program, hyper = build_case("tests.toys.regression", "plain")
    what = family, program, hyper, arrays_of(family, program, cache_dir), "cpu"
    first = probe(*what, wanted=2, seconds=0.0, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for damage in ("{", "[]", '{"table": [{"engine": "serial"}]}'):
        path.write_text(damage)
        again = probe(*what, wanted=2, seconds=0.0, cache=tmp_path)
        assert not again.cached
        assert "is damaged" in caplog.text
        assert {(row.engine, row.lanes) for row in again.table} == {(row.engine, row.lanes) for row in first.table}
        assert probe(*what, wanted=2, seconds=0.0, cache=tmp_path).cached
        caplog.clear()


def test_where_the_first_number_of_lanes_does_not_fit_fewer_are_tried(on_a_gpu):
    family, program, hyper = build_case("tests.toys.regression", "plain")

    def measure(engine, hyper, lanes, seconds):
        if lanes > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return SPEEDS[engine], 1.0

    on_a_gpu(measure)
    choice = probe(family, program, hyper, {}, "cuda", wanted=128, expected_steps=5e3)
    assert (choice.engine, choice.lanes) == (STACK, 2)
    assert [row.lanes for row in choice.table if row.engine == STACK] == [32, 8, 2]


def test_files_of_another_program_are_not_its_choice(tmp_path, cache_dir):
    paths = set()
    for case in ("plain", "narrow"):
        family, program, hyper = build_case("tests.toys.regression", case)
        probe(
            family, program, hyper, arrays_of(family, program, cache_dir), "cpu", wanted=2, seconds=0.0, cache=tmp_path
        )
        paths |= set(Path(tmp_path).iterdir())
    assert len(paths) == 2


class Slots(SerialEngine):
    """The serial engine with the slots of a compiled stack: as many as it was ever given, until it is compacted."""

    setup_seconds = 0.0
    capacity = 8

    @property
    def spare(self):
        return self.capacity - len(self.lanes)

    def compact(self):
        self.capacity = len(self.lanes)


def test_a_stack_that_stays_half_empty_is_made_smaller_where_that_pays(make, alone):
    now = [0.0]
    made = []

    class Watched(Slots):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    memory = Memory()
    stack = make(Watched, recorder=memory, clock=lambda: now[0])
    each = job("a", seeds=range(3), reports=(9,))
    stack.attach(each)
    for _ in range(3):
        now[0] += 10.0
        stack.tick()
    (engine,) = made
    assert engine.capacity == 8, "empty for a moment only"
    engine.setup_seconds = 1e9
    now[0] += 100.0
    stack.tick()
    assert engine.capacity == 8, "compiling again would cost more than it saves"
    engine.setup_seconds = -1.0
    while not stack.tick():
        now[0] += 10.0
    assert engine.capacity <= 3
    expected = alone(each)
    for key in each.runs.values():
        assert memory.step_rows[key] == expected.step_rows[key]


def watching(note) -> type[SerialEngine]:
    """An engine that tells `note` of each chunk that is launched and each that is read: which, and its lanes' keys."""

    class Watched(Chunk):
        def wait(self):
            note("read", self.keys)
            return super().wait()

    class Watching(SerialEngine):
        def launch(self, steps):
            chunk = super().launch(steps)
            note("launch", chunk.keys)
            return Watched(**vars(chunk))

    return Watching


def test_the_next_chunk_is_launched_before_the_one_before_is_read(make):
    order: list[str] = []
    stack = make(watching(lambda what, keys: order.append(what)))
    stack.attach(job("a", seeds=(0,), reports=(9,)))
    tick_until_reports(stack)
    ahead = stack._engine.runs_ahead
    assert order[-1] == "read"
    first = order.index("read")
    assert order[:first].count("launch") == (2 if ahead else 1), order


def test_slots_are_filled_again_before_the_results_of_those_who_left_are_read(make):
    order: list = []
    stack = make(watching(lambda what, keys: order.append((what, *keys))), lanes=1)
    first, second = job("a", seeds=(0,), reports=(1, 9)), job("b", seeds=(0,), lr=0.1, reports=(9,))
    stack.attach(first)
    stack.attach(second)
    (report,) = tick_until_reports(stack)
    assert (report.token, report.epoch) == ("a", 1)
    ahead = stack._engine.runs_ahead
    last_read = max(i for i, event in enumerate(order) if event == ("read", "a/0"))
    assert (("launch", "b/0") in order[:last_read]) == ahead


def test_a_config_that_has_ended_leaves_without_waiting_for_those_that_train(make):
    order: list[str] = []
    stack = make(watching(lambda what, keys: order.append(what)))
    short, long = job("a", seeds=(0,), reports=(9,)), job("b", seeds=(0,), lr=0.1, reports=(9,))
    stack.attach(short)
    for _ in range(3):
        stack.tick()
    stack.attach(long)
    (report,) = tick_until_reports(stack)
    assert (report.token, report.done) == ("a", True)
    order.clear()
    stack.release("a")
    assert not order
    stack.release("b")  # it trains: where a chunk of its is under way, that is read first
    assert len(order) == stack._engine.runs_ahead
    stack.tick()
    assert not stack.busy


def test_the_ninth_program_is_compiled_too():
    class Program:
        def __init__(self, number):
            self.number = number
            self.compiled = 0
            self.step = compile_lanes(self._step, backend=self._backend)

        def _step(self, x):
            return x * self.number + 1

        def _backend(self, graph, example):
            self.compiled += 1
            return graph.forward

    programs = [Program(i) for i in range(12)]
    for program in programs:
        assert float(program.step(torch.ones(1))) == program.number + 1
    assert [program.compiled for program in programs] == [1] * 12
