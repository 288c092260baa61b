"""What is on disk: curves, checkpoints, the journal, the runs table."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError

from tests.test_command_line import plan_of
from tuning.checkpoints import CheckpointStore, _checksum
from tuning.curves import CurveWriter, metadata
from tuning.journal import Journal, read
from tuning.progress import Progress
from tuning.recorder import Recorder
from tuning.runs import RunTable
from tuning.trial import pack

METRICS = {"loss": {"unit": "nats", "mode": "min", "doc": "d"}, "acc": {"unit": "fraction", "mode": "max", "doc": "d"}}


# --- curves ---


def test_curves_are_readable_part_by_part_with_units_and_values(tmp_path):
    writer = CurveWriter(tmp_path, "host-1", metadata("s", "toy", METRICS))
    losses = np.arange(6, dtype=np.float64) / 3
    writer.steps("r1", 1, {"loss": losses[:4]})
    writer.flush(force=True)
    (part,) = (tmp_path / "steps").iterdir()
    assert pq.read_table(part)["step"].to_pylist() == [1, 2, 3, 4], "readable while the writer goes on"
    writer.steps("r1", 5, {"loss": losses[4:]})
    writer.steps("r2", 1, {"loss": np.array([np.nan])})
    writer.epoch(
        "r1", {"config_key": "c", "seed": 0, "epoch": 1, "task": 0, "step": 6}, {"loss": 0.1 + 0.2, "acc": 0.5}
    )
    writer.covariates("r1", 1, {"age": np.arange(6).reshape(2, 3)})
    writer.flush(force=True)
    writer.flush(force=True)  # nothing new: no file
    assert len(list((tmp_path / "steps").iterdir())) == 2

    steps = pq.read_table(tmp_path / "steps").to_pandas().sort_values(["run_key", "step"])
    np.testing.assert_array_equal(steps.loc[steps.run_key == "r1", "loss"], losses.astype(np.float32))
    assert steps.loc[steps.run_key == "r2", "loss"].isna().all()
    (row,) = pq.read_table(tmp_path / "epochs").to_pylist()
    assert (row["loss"], row["acc"], row["task"], row["step"]) == (0.1 + 0.2, 0.5, 0, 6)
    assert row["time"].tzinfo is not None
    (row,) = pq.read_table(tmp_path / "covariates").to_pylist()
    assert (row["name"], row["shape"], row["values"]) == ("age", [2, 3], [0, 1, 2, 3, 4, 5])
    for kind, types in {
        "steps": {"run_key": "string", "step": "int64", "loss": "float"},
        "epochs": {"seed": "int32", "epoch": "int32", "task": "int32", "step": "int64", "loss": "double"},
        "covariates": {"epoch": "int32", "name": "string"},
    }.items():
        schema = pq.read_schema(next((tmp_path / kind).iterdir()))
        assert {name: str(schema.field(name).type) for name in types} == types
        plain = json.loads(schema.metadata[b"lanewise"])
        assert plain["schema_version"] == 1
        assert plain["metrics"]["loss"]["unit"] == "nats"


def test_no_scratch_file_is_left_beside_the_parts(tmp_path):
    writer = CurveWriter(tmp_path, "host-1", metadata("s", "toy", METRICS))
    writer.steps("r", 1, {"loss": np.zeros(3)})
    writer.flush(force=True)
    assert [path.suffix for path in (tmp_path / "steps").iterdir()] == [".parquet"]


# --- checkpoints ---


def state(value: float) -> dict:
    return {
        "step": torch.tensor(3, dtype=torch.int32),
        "params": {"w/a.b": torch.full((2, 3), value, dtype=torch.float64), "mask": torch.tensor([True, False])},
    }


def test_checkpoints_come_back_bit_for_bit_and_two_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (5, 10, 15):
        store.save("run", step, state(step / 7), {"step": step, "epochs": {"loss": [0.1]}})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"{step:012d}.{end}" for step in (10, 15) for end in ("json", "safetensors")
    ]
    loaded, extra = store.load("run")
    assert extra == {"step": 15, "epochs": {"loss": [0.1]}}
    assert loaded["step"].dtype == torch.int32
    assert torch.equal(loaded["params"]["w/a.b"], state(15 / 7)["params"]["w/a.b"])
    assert torch.equal(loaded["params"]["mask"], torch.tensor([True, False]))
    assert store.load("run", at_most=12)[1]["step"] == 10
    assert store.load("other") is None
    store.discard("run")
    assert store.load("run") is None


def test_a_state_keeps_the_order_of_its_names_and_what_is_empty_in_it(tmp_path):
    """Some methods keep no statistics; a program compiled for states of one order is compiled again for another."""
    one = {
        "z": torch.tensor(1.0),
        "none": {},
        "inner": {"b": torch.tensor(2), "none": {"none": {}}, "a": torch.ones(3)},
    }
    store = CheckpointStore(tmp_path)
    store.save("run", 5, {**one, "a": torch.zeros(1, dtype=torch.float16)}, {})
    assert store.copy("run", 5, "copy")
    for key in ("run", "copy"):
        loaded, _ = store.load(key)
        assert list(loaded) == ["z", "none", "inner", "a"]
        assert list(loaded["inner"]) == ["b", "none", "a"]
        assert loaded["none"] == {}
        assert loaded["inner"]["none"] == {"none": {}}
        assert torch.equal(loaded["inner"]["a"], torch.ones(3))


def test_a_checkpoint_of_before_names_were_kept_is_read(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("run", 5, state(5.0), {"step": 5})
    path = tmp_path / "run" / f"{5:012d}.json"
    plain = json.loads(path.read_text())
    del plain["names"], plain["check"]
    path.write_text(json.dumps(plain | {"check": _checksum(plain)}))
    loaded, _ = store.load("run")
    assert torch.equal(loaded["params"]["w/a.b"], state(5.0)["params"]["w/a.b"])


@pytest.mark.parametrize("names", [["step"], ["step", "params::mask", "params::w/a.b", "more"], [1], {"step": 1}])
def test_a_checkpoint_whose_names_are_not_its_tensors_is_passed_over(tmp_path, caplog, names):
    store = CheckpointStore(tmp_path)
    store.save("run", 5, state(5.0), {"step": 5})
    store.save("run", 10, state(10.0), {"step": 10})
    path = tmp_path / "run" / f"{10:012d}.json"
    plain = json.loads(path.read_text()) | {"names": names}
    del plain["check"]
    path.write_text(json.dumps(plain | {"check": _checksum(plain)}))
    assert store.load("run")[1] == {"step": 5}
    assert "falling back" in caplog.text


def test_no_room_for_a_checkpoint_is_a_fault_of_the_storage(tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        CheckpointStore(tmp_path).save("run", 5, state(5.0), {"step": 5})
    assert CheckpointStore(tmp_path).load("run") is None


def test_a_state_on_its_way_to_disk_leaves_no_scratch_file(tmp_path, monkeypatch):
    scratch, store = tmp_path / "scratch", tmp_path / "store"
    scratch.mkdir()
    store.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    CheckpointStore(store).save("run", 5, state(5.0), {"step": 5})
    assert CheckpointStore(store).load("run") is not None
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("damage", ["torn tensors", "flipped bit", "torn json", "no tensors", "future version"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path)
    store.save("run", 5, state(5.0), {"step": 5})
    store.save("run", 10, state(10.0), {"step": 10})
    tensors, vouch = (tmp_path / "run" / f"{10:012d}.{end}" for end in ("safetensors", "json"))
    if damage == "torn tensors":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "flipped bit":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(bytes(data))
    elif damage == "torn json":
        vouch.write_text(vouch.read_text()[:20])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        vouch.write_text(json.dumps({**json.loads(vouch.read_text()), "schema_version": 99}))
    with caplog.at_level(logging.WARNING):
        loaded, extra = store.load("run")
    assert extra == {"step": 5}
    assert loaded["params"]["w/a.b"][0, 0] == 5.0
    assert "falling back" in caplog.text


def test_a_copy_starts_where_its_donor_was_and_has_cost_nothing(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (5, 10):
        store.save("donor", step, state(float(step)), {"step": step, "device_seconds": 7.0})
    assert store.copy("donor", 5, "copy")
    store.save("donor", 15, state(15.0), {"step": 15, "device_seconds": 9.0})  # the donor lets go of its own
    loaded, extra = store.load("copy")
    assert extra == {"step": 5, "device_seconds": 0.0}
    assert loaded["params"]["w/a.b"][0, 0] == 5.0
    assert not caplog.text
    assert not store.copy("donor", 5, "late")
    (tmp_path / "donor" / f"{15:012d}.safetensors").write_bytes(b"torn")
    assert not store.copy("donor", 15, "torn")
    assert store.load("late") is store.load("torn") is None


def test_tensors_without_their_json_do_not_count(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("run", 5, state(5.0), {"step": 5})
    (tmp_path / "run" / f"{9:012d}.safetensors").write_bytes(b"killed before the JSON was written")
    assert store.load("run")[1] == {"step": 5}


def test_checkpoints_hold_no_pickle(tmp_path):
    CheckpointStore(tmp_path).save("run", 5, state(5.0), {"step": 5})
    for path in (tmp_path / "run").iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        assert path.suffix in (".json", ".safetensors")


# --- the journal ---


def test_a_half_written_line_is_cut_before_the_journal_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("begin", session=1)
    journal.write("report", value=np.float64(0.5), nan=float("nan"))
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"event": "repo')
    assert [event["event"] for event, _ in read(path)] == ["begin", "report"], "a reader leaves the torn line"
    journal = Journal(path)
    journal.write("finish", reason="done")
    journal.close()
    events = [event for event, _ in read(path)]
    assert [event["event"] for event in events] == ["begin", "report", "finish"]
    assert events[1]["value"] == 0.5
    *_, (_, offset) = read(path)
    assert offset == path.stat().st_size
    assert list(read(path, offset)) == []


def test_the_journal_refuses_what_json_cannot_hold(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(TypeError, match="set does not belong in the journal"):
        journal.write("begin", what={1})
    journal.close()


# --- the runs table ---

PLAIN = {"name": "s", "family": "toy", "metrics": METRICS, "headline": "acc", "metric": "acc", "mode": "max"}
NOW = datetime(2026, 1, 2, tzinfo=UTC).isoformat()


def proposed(trial="t1", key="c1", runs=None, **more) -> dict:
    return {
        "event": "proposed",
        "time": NOW,
        "index": 0,
        "trial": trial,
        "config_key": key,
        "label": "lr=0.1",
        "algorithm": "",
        "point": {"lr": 0.1},
        "values": {"lr": 0.1},
        "program": {"width": 8, "shape": [1, 3, 1]},
        "hyper": {"lr": 0.1},
        "runs": runs or {"0": "r0", "1": "r1"},
        "epochs": 9,
        **more,
    }


def report(trial, epoch, values, statuses=("training", "training"), runs=("r0", "r1")) -> dict:
    return {
        "event": "report",
        "time": NOW,
        "trial": trial,
        "config_key": "c1",
        "epoch": epoch,
        "engine": "serial",
        "lanes": 2,
        "device": "cpu:0",
        "per_seed": {
            str(i): {
                "run_key": run,
                "status": status,
                "epoch": epoch,
                "step": epoch * 6,
                "values": {"acc": value, "loss": -value},
                "device_seconds": 1.5,
            }
            for i, (run, status, value) in enumerate(zip(runs, statuses, values, strict=True))
        },
    }


def end(trial, reason, epoch, error=None) -> dict:
    return {
        "event": "end", "time": NOW, "trial": trial, "config_key": "c1", "stop_reason": reason, "epoch": epoch,
        "error": error,
    }  # fmt: skip


def fold(*events) -> dict[str, dict]:
    table = RunTable(PLAIN)
    for event in events:
        table.apply(event)
    return table.rows


def test_runs_are_folded_from_the_journal():
    rows = fold(
        proposed(),
        report("t1", 1, (0.9, 0.2)),
        report("t1", 3, (0.5, float("nan")), ("training", "diverged")),
        end("t1", "stopped", 3),
    )
    assert (rows["r0"]["stop_reason"], rows["r1"]["stop_reason"]) == ("stopped", "diverged")
    assert rows["r0"]["config_stop_reason"] == rows["r1"]["config_stop_reason"] == "stopped"
    assert (rows["r0"]["rung"], rows["r0"]["epoch"], rows["r0"]["step"]) == (3, 3, 18)
    assert (rows["r0"]["final.acc"], rows["r0"]["best.acc"], rows["r0"]["best.loss"]) == (0.5, 0.9, -0.9)
    assert rows["r1"]["best.acc"] == 0.2
    assert rows["r0"]["program.shape"] == "1-3-1"


def test_what_was_still_running_is_cancelled_and_resumes():
    finish = {"event": "finish", "time": NOW, "reason": "interrupted"}
    rows = fold(proposed(), report("t1", 1, (0.9, 0.2)), finish)
    assert {row["stop_reason"] for row in rows.values()} == {"cancelled"}
    resumed = {"event": "resumed", "time": NOW, "trial": "t2", "config_key": "c1", "replaces": "t1"}
    rows = fold(
        proposed(),
        report("t1", 1, (0.9, 0.2)),
        finish,
        resumed,
        report("t2", 9, (1.0, 0.1), ("finished", "finished")),
        end("t2", "finished", 9),
    )
    assert {(row["stop_reason"], row["trial"], row["epoch"]) for row in rows.values()} == {("finished", "t2", 9)}


def test_a_crash_tells_its_line_and_a_copy_its_parent():
    rows = fold(proposed(), end("t1", "crashed", 0, error="RuntimeError: no"))
    assert {(row["stop_reason"], row["error"]) for row in rows.values()} == {("crashed", "RuntimeError: no")}
    rows = fold(proposed(index=-1, parent={"0": ["p0", 4], "1": ["p1", 4]}))
    assert [(row["parent_run_key"], row["parent_epoch"]) for row in rows.values()] == [("p0", 4), ("p1", 4)]


def test_runs_parquet_has_the_documented_columns(tmp_path):
    table = RunTable(PLAIN)
    for event in (proposed(), report("t1", 9, (0.5, 0.6), ("finished", "finished")), end("t1", "finished", 9)):
        table.apply(event)
    table.apply(proposed("t2", "c2", {"0": "r2"}, point={"lr": "auto"}))
    table.write(tmp_path)
    read_back = pq.read_table(tmp_path / "runs.parquet")
    plain = json.loads(read_back.schema.metadata[b"lanewise"])
    assert (plain["headline"], plain["mode"]) == ("acc", "max")
    assert str(read_back.schema.field("axis.lr").type) == "string", "an axis of numbers and words is text"
    assert str(read_back.schema.field("hyper.lr").type) == "double"
    assert str(read_back.schema.field("program.width").type) == "int64"
    assert str(read_back.schema.field("started_at").type) == "timestamp[ms, tz=UTC]"
    assert read_back["final.acc"].to_pylist() == [0.5, 0.6, None]


# --- the recorder ---


@pytest.fixture
def recorder(tmp_path):
    plan = plan_of("grid", storage=tmp_path, name="s", scheduler="pbt")
    plan.folder.mkdir()
    progress = Progress(None, plan.budget, plan.metric, "min")
    journal = Journal(plan.folder / "journal.jsonl")
    made = Recorder(plan, journal, RunTable(plan.to_plain()), progress)
    made.progress, made.path = progress, plan.folder / "journal.jsonl"  # type: ignore[attr-defined]
    return made


def result_of(epoch: int, runs=("r0", "r1"), key="c1") -> dict:
    seeds = report("t2", epoch, (0.5, 0.6), runs=runs)["per_seed"]
    for seed in seeds.values():
        seed["values"] = {"test_loss": 0.5}
    fields = {"values": {"test_loss": 0.5}, "spread": {}, "per_seed": seeds, "engine": "serial", "lanes": 2}
    return pack(
        {**fields, "device": "cpu:0", "done": False, "epoch": epoch, "progress": float(epoch), "config_key": key}
    )


def test_a_copy_follows_the_decision_that_made_it_even_in_a_resumed_trial(recorder):
    resumed = {"event": "resumed", "time": NOW, "trial": "t2", "config_key": "c1", "replaces": "t1"}
    for event in (proposed(), resumed):
        recorder.apply(event)
    abandoned: list = []
    recorder.on_abandon = abandoned.append
    trial = SimpleNamespace(trial_id="t2", last_result=None, config={"config_key": "c1"})
    made = proposed("t2", "c2", {"0": "p0", "1": "p1"}, parent={"0": ["d0", 4], "1": ["d1", 4]})
    recorder.on_exploit("t2", {**made, "program": json.dumps(made["program"])})
    recorder.on_decision(trial, {}, "NOOP")
    recorder.on_trial_result(0, [], trial, result_of(5))
    events = [event for event, _ in read(recorder.path)]
    assert [event["event"] for event in events] == ["report", "decision", "end", "proposed"]
    assert events[1]["decision"] == "EXPLOIT"
    assert (events[2]["config_key"], events[2]["stop_reason"]) == ("c1", "stopped")
    assert (events[3]["index"], events[3]["config_key"], events[3]["parent"]["0"]) == (-1, "c2", ["d0", 4])
    assert abandoned == ["t2"]
    assert dict(recorder.progress.ended) == {}, "the trial goes on"


def test_a_trial_that_the_time_budget_ended_has_no_end_yet(recorder):
    recorder.apply(proposed())
    trial = SimpleNamespace(
        trial_id="t1", last_result=result_of(3), config={"config_key": "c1"}, metric_n_steps={"epoch": [3]}
    )
    recorder.on_decision(trial, {}, "CONTINUE")
    recorder.on_trial_result(0, [], trial, result_of(3))
    recorder.on_trial_complete(0, [], trial)
    assert [event["event"] for event, _ in read(recorder.path)] == ["report", "decision"]
    recorder.on_decision(trial, {}, "STOP")
    recorder.on_trial_result(0, [], trial, result_of(4))
    recorder.on_trial_complete(0, [], trial)
    assert [event["event"] for event, _ in read(recorder.path)][2:] == ["report", "decision", "end"]
    assert trial.metric_n_steps == {}, "what Tune keeps of a trial that has ended is let go"


def test_what_one_result_brings_reaches_the_disk_together(tmp_path, monkeypatch):
    waits: list[int] = []
    monkeypatch.setattr("tuning.journal.os.fsync", waits.append)
    journal, path = Journal(tmp_path / "journal.jsonl"), tmp_path / "journal.jsonl"
    journal.write("proposed", trial="t1")
    assert len(waits) == 1, "before anybody trains it"
    for kind in ("report", "decision", "end"):
        journal.write(kind, trial="t1")
    assert [event["event"] for event, _ in read(path)] == ["proposed", "report", "decision", "end"], "a kill loses none"
    assert len(waits) == 1
    journal.settle()
    journal.settle()
    assert len(waits) == 2
    journal.write("report", trial="t2")
    journal.close()
    assert len(waits) == 3


def test_tune_keeps_of_a_result_only_the_numbers_it_decides_by(recorder):
    recorder.apply(proposed())
    trial = SimpleNamespace(trial_id="t1", last_result=None, config={"config_key": "c1"})
    result = {**result_of(3), "config": {"config_key": "c1"}, "test_loss": 0.5}
    recorder.on_decision(trial, {}, "CONTINUE")
    recorder.on_trial_result(0, [], trial, result)
    assert result == {"test_loss": 0.5, "done": False, "epoch": 3, "progress": 3.0, "config_key": "c1"}
    told = [event for event, _ in read(recorder.path) if event["event"] == "report"]
    assert told[0]["per_seed"]["0"]["values"] == {"test_loss": 0.5}
