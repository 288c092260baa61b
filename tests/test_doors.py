"""What keeps a sweep from harm without running one: secrets, locks, clocks, data that changed, code that changed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import tests.toys.regression as toy
import tuning.continuity
from tests.test_command_line import plan_of, refused
from tests.test_records import end, proposed
from tests.toy_sweeps import ROOT
from trainables.datasets.cache import cached, files_read
from trainables.family import BadValue
from trainables.files import write_atomically
from tuning.continuity import check, check_unchanged, data_facts, differences, facts
from tuning.ground import StorageFailed, trouble
from tuning.journal import Journal, cut_off, read
from tuning.locks import Taken, held
from tuning.runner import write_sweep_json
from tuning.runs import RunTable, load_plain
from tuning.searchers import Proposer, make_source
from tuning.secrets import redact, redact_command
from tuning.stopping import CRASHES, Stopping
from tuning.sweep import SweepPlan

# --- files ---


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, b"one")

    def half(file):
        file.write(b"tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, half)
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- secrets ---

SECRETS = {
    "postgresql://alice:pa55@db:5432/mlflow": "postgresql://alice:***@db:5432/mlflow",
    "mysql+pymysql://alice:p%40ss@db/x": "mysql+pymysql://alice:***@db/x",
    "https://dapi0123@host/x": "https://***@host/x",
    "postgresql://alice@db/mlflow?password=pa55&x=1": "postgresql://***@db/mlflow?password=***&x=1",
    "MLFLOW_TRACKING_PASSWORD=pa55 python": "MLFLOW_TRACKING_PASSWORD=*** python",
    '{"aws_secret_access_key": "wJalr/x+y"}': '{"aws_secret_access_key": "***"}',
    "AKIAIOSFODNN7EXAMPLE": "***",
    "--api-key 0123 --lr 0.1": "--api-key *** --lr 0.1",
    "Authorization: Bearer abcdefgh12345678": "Authorization: Bearer ***",
    "s3://b/x?X-Amz-Signature=0a1b&v=2": "s3://b/x?X-Amz-Signature=***&v=2",
    "hf_abcdefghijklmnopqrstuv": "***",
    "ghp_0123456789abcdefghij0123456789abcdef": "***",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(text):
    assert redact(text) == SECRETS[text]
    assert redact(SECRETS[text]) == SECRETS[text]


@pytest.mark.parametrize(
    "text",
    ["sqlite:////home/me/sweeps/mlflow.db", "http://127.0.0.1:5000", "--set lr=0.1", "--set tokens=512", "exp@home: 5"],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_a_secret_behind_its_flag_is_hidden():
    words = ["tune.py", "--tracking-uri", "http://u:pw@h", "--auth-token", "t0k", "--name", "x"]
    assert redact_command(words) == [
        "tune.py", "--tracking-uri", "http://u:***@h", "--auth-token", "***", "--name", "x",
    ]  # fmt: skip


def test_a_password_in_the_tracking_uri_outlasts_a_resume_and_stands_in_no_record(tmp_path, monkeypatch):
    uri = "postgresql://alice:pa55@db:5432/mlflow"
    monkeypatch.setattr(sys, "argv", ["tune_toy.py", "--tracking-uri", uri])
    plan = plan_of("grid", storage=tmp_path, name="s", tracking_uri=uri)
    write_sweep_json(plan, ROOT)
    assert "pa55" not in (plan.folder / "sweep.json").read_text()
    assert SweepPlan.load(plan.folder).tracking_uri == uri
    assert (plan.folder / "secrets.json").stat().st_mode & 0o777 == 0o600
    other = plan_of("grid", storage=tmp_path, name="open")
    write_sweep_json(other, ROOT)
    assert not (other.folder / "secrets.json").exists()


# --- names ---


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", ".", "a\0b", "a\nb", "-x", "x" * 101, ""])
def test_names_stay_inside_the_storage(tmp_path, capfd, name):
    storage = tmp_path / "a" / "sweeps"
    for flag in ("--name", "--resume"):
        if name or flag == "--resume":
            refused(["grid", f"{flag}={name}"], storage, capfd)
    assert list(tmp_path.iterdir()) == []


def test_reading_commands_stay_inside_the_storage(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "sweep.json").write_text("{}")
    storage = tmp_path / "sweeps"
    storage.mkdir()
    for command in (["tuning.sync", "../outside"], ["analysis", "report", "../outside"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--storage", str(storage)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in outside.iterdir()] == ["sweep.json"]


# --- locks ---


def test_the_second_is_told_who_the_first_is_and_a_dead_one_does_not_block(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tuning.locks import held\n"
        "with held(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "driver.lock"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(Taken, match=rf"on .* \(process {other.pid}, since 20"), held(path):
        pytest.fail("both hold it")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert str(other.pid) in path.read_text(), "the dead one's name is still there"
    with held(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text("torn {")
    with held(path):
        pass


# --- clocks ---


def test_the_journal_s_time_never_goes_back(tmp_path):
    start, passed = datetime(2026, 5, 1, 12, tzinfo=UTC), [0.0]
    wall = [start]

    def session() -> Journal:
        return Journal(tmp_path / "journal.jsonl", wall=lambda: wall[0], clock=lambda: passed[0])

    journal = session()
    journal.write("begin")
    passed[0] += 10
    wall[0] = start - timedelta(days=400)  # set back while the sweep runs
    journal.write("a")
    wall[0] = start + timedelta(days=400)  # and forward
    passed[0] += 10
    journal.write("b")
    journal.close()
    wall[0] = start - timedelta(days=1)  # and back, while nobody looks
    journal = session()
    journal.write("begin")
    passed[0] += 5
    journal.write("c")
    times = [datetime.fromisoformat(event["time"]) for event, _ in read(tmp_path / "journal.jsonl")]
    assert times == sorted(set(times))
    assert [(b - a).total_seconds() for a, b in itertools.pairwise(times)] == [10, 10, 0.001, 5]


def test_rows_of_a_run_never_end_before_they_began(tmp_path):
    plain = {"name": "s", "family": "toy", "metrics": {}, "headline": "acc", "metric": "acc", "mode": "max"}
    table, wall = RunTable(plain), [datetime(2026, 5, 1, tzinfo=UTC)]
    journal = Journal(tmp_path / "journal.jsonl", wall=lambda: wall[0])
    first = {name: value for name, value in proposed().items() if name not in ("event", "time")}
    table.apply(journal.write("proposed", **first))
    journal.close()
    wall[0] -= timedelta(days=30)
    journal = Journal(tmp_path / "journal.jsonl", wall=lambda: wall[0])
    last = {name: value for name, value in end("t1", "finished", 9).items() if name not in ("event", "time")}
    table.apply(journal.write("end", **last))
    assert all(row["ended_at"] >= row["started_at"] for row in table.rows.values())


def test_the_time_budget_is_measured_by_a_clock_that_cannot_be_set():
    now = [100.0]
    stopping = Stopping(60.0, 10, clock=lambda: now[0])
    assert not stopping.stop_all()
    now[0] += 59
    assert not stopping.stop_all()
    now[0] += 1
    assert stopping.stop_all()
    assert stopping.reason == "time budget"


# --- stopping ---


def ends(stopping: Stopping, *reasons: str) -> str:
    for reason in reasons:
        stopping.apply({"event": "end", "stop_reason": reason, "error": f"{reason}!"})
    return stopping.reason


def test_five_crashes_in_a_row_stop_a_sweep_and_nothing_less():
    assert CRASHES == 5
    assert ends(Stopping(0, 100), *["crashed"] * 4) == ""
    assert ends(Stopping(0, 100), *["crashed"] * 4, "finished", *["crashed"] * 4) == ""
    assert ends(Stopping(0, 100), *["crashed"] * 4, "diverged", *["crashed"] * 4) == ""
    assert ends(Stopping(0, 100), *["oom"] * 9) == ""
    assert ends(Stopping(0, 100), "finished", *["crashed"] * 2, "oom", *["crashed"] * 3) == "too many crashes"
    assert ends(Stopping(0, 2), *["crashed"] * 2) == "too many crashes", "all of a small sweep"
    stopping = Stopping(0, 100)
    ends(stopping, *["crashed"] * 5)
    assert stopping.detail == "5 configs in a row crashed, the last with: crashed!"


def test_what_trains_is_saved_once_before_a_sweep_stops():
    stopping, saved = Stopping(0, 10), []
    stopping.save = lambda: saved.append(1)
    assert not stopping.stop_all()
    stopping.stop("interrupted")
    stopping.stop("too many crashes")
    assert stopping.stop_all()
    assert stopping.stop_all()
    assert (stopping.reason, saved) == ("interrupted", [1])
    stopping = Stopping(0, 10)
    stopping.save = lambda: pytest.fail("there is nowhere to save to")
    stopping.stop("storage")
    assert stopping.stop_all()


# --- ground ---


def test_a_journal_whose_folder_vanished_says_so_instead_of_writing_into_nothing(tmp_path):
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    journal = Journal(folder / "journal.jsonl")
    journal.write("begin")
    assert trouble(folder) == ""
    os.rename(folder, tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="could not be written"):
        journal.write("a")
    assert "has vanished" in trouble(folder)
    folder.mkdir()
    (folder / "journal.jsonl").write_text("")
    with pytest.raises(StorageFailed, match="another file"):
        journal.write("b")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_by_the_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(StorageFailed, match="No space left on device"):
        journal.write("begin")
    journal.close()


def test_a_read_only_storage_is_one_line_and_changes_nothing(small_disk, capfd):
    plan = plan_of("grid", storage=small_disk / "sweeps", name="s")
    write_sweep_json(plan, ROOT)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    told = refused(["--resume", "s"], small_disk / "sweeps", capfd)
    assert "cannot be written: Read-only file system" in told
    assert "cannot be written" in refused(["grid", "--name", "new"], small_disk / "sweeps", capfd)
    assert trouble(plan.folder).startswith("the storage has become read-only")
    assert [path.name for path in plan.folder.iterdir()] == ["sweep.json"]


def test_trouble_told_by_its_error_although_the_folder_is_well_again(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    full = OSError(28, "No space left on device")
    assert trouble(tmp_path, full).startswith("the storage is full (")
    assert trouble(tmp_path, ValueError("a bug")) == ""
    elsewhere = FileNotFoundError(2, "No such file or directory", "/nowhere/x")
    assert trouble(tmp_path, elsewhere) == "", "a file elsewhere that is missing is no trouble of the storage"


def test_a_cut_off_journal_is_known(tmp_path):
    path = tmp_path / "journal.jsonl"
    for reason, expected in (("done", False), ("time budget", False), ("interrupted", True)):
        path.write_text(
            json.dumps({"event": "begin"}) + "\n" + json.dumps({"event": "finish", "reason": reason}) + "\n"
        )
        assert cut_off(path) is expected
    path.write_text(json.dumps({"event": "begin"}) + "\n" + '{"ev')
    assert cut_off(path)
    path.write_text("")
    assert cut_off(path)


# --- data ---


@pytest.fixture
def on_file(tmp_path, monkeypatch):
    """The toy family on a file of data."""
    source = tmp_path / "data" / "x.npy"
    source.parent.mkdir()
    np.save(source, np.arange(192.0).reshape(48, 4))

    def load(program, data_dir, cache_dir):
        return cached(cache_dir, "toy", [source], lambda: {"x": np.load(source), "y": np.ones((48, 1))})

    monkeypatch.setattr(toy, "FAMILY", replace(toy.FAMILY, load=load))
    monkeypatch.setenv("LANEWISE_CACHE", str(tmp_path / "cache"))
    return source


def test_files_that_data_are_made_of_are_known(on_file, tmp_path):
    from tuning.runner import check_data

    plan = plan_of("grid", storage=tmp_path, name="s")
    for _ in range(2):  # decoded, and found decoded
        assert check_data(plan) == {on_file}
    with files_read() as files:
        pass
    assert files == set()


@pytest.mark.parametrize("harm", ["truncated", "changed", "gone"])
def test_data_that_changed_since_the_sweep_began_is_refused(on_file, tmp_path, capfd, harm):
    plan = plan_of("grid", storage=tmp_path / "sweeps", name="s")
    write_sweep_json(plan, ROOT, [on_file])
    before = load_plain(plan.folder)["data"]
    assert before == data_facts([on_file], tmp_path / "cache")
    os.utime(on_file)
    check_unchanged(before, tmp_path / "cache")  # touched, and the same
    data = on_file.read_bytes()
    if harm == "truncated":
        on_file.write_bytes(data[:-8])
    elif harm == "changed":
        on_file.write_bytes(data[:-1] + b"\x01")
    else:
        on_file.unlink()
    told = refused(["--resume", "s"], tmp_path / "sweeps", capfd)
    assert str(on_file) in told
    assert {"truncated": "bytes", "changed": "SHA-256", "gone": "is gone"}[harm] in told
    assert not (plan.folder / "journal.jsonl").exists()


# --- code and versions ---


@pytest.fixture
def begun(tmp_path) -> SweepPlan:
    plan = plan_of("grid", storage=tmp_path, name="s")
    write_sweep_json(plan, ROOT)
    journal = Journal(plan.folder / "journal.jsonl")
    journal.write("begin", **facts(plan))
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    for i in range(3):
        proposer.suggest(f"t{i}")
    journal.close()
    return plan


def test_nothing_changed_nothing_said(begun, tmp_path):
    assert check(SweepPlan.load(begun.folder), load_plain(begun.folder), tmp_path) == []


def test_other_versions_and_code_are_listed_once(begun, monkeypatch):
    now = facts(begun)
    monkeypatch.setattr(
        tuning.continuity,
        "facts",
        lambda plan: {
            "versions": {**now["versions"], "torch": "9.9"},
            "git": now["git"],
            "code": {**now["code"], "lanes/stack.py": "0" * 12},
        },
    )
    events = [event for event, _ in read(begun.folder / "journal.jsonl")]
    told = differences(begun, load_plain(begun.folder), events)
    assert told == [f"torch {now['versions']['torch']} -> 9.9", "code lanes/stack.py"]
    again = [*events, {"event": "begin", **tuning.continuity.facts(begun)}]
    assert differences(begun, load_plain(begun.folder), again) == [], "said when it changed, not for ever"


@pytest.mark.parametrize("change", ["default", "field", "length"])
def test_a_program_that_means_something_else_is_refused(begun, tmp_path, monkeypatch, capfd, change):
    if change == "default":
        program = toy.Program(width=9)
        fields = toy.Program.__dataclass_fields__
        monkeypatch.setattr(fields["width"], "default", program.width)
        monkeypatch.setattr(toy.Program, "width", 9)
        monkeypatch.setattr(toy.Program.__init__, "__defaults__", tuple(
            9 if name == "width" else value
            for name, value in zip(fields, toy.Program.__init__.__defaults__, strict=True)
        ))  # fmt: skip
    elif change == "field":
        family = replace(toy.FAMILY, Hyper=type("Hyper", (), {}))
        monkeypatch.setattr(toy, "FAMILY", family)
        monkeypatch.setattr(family.Hyper, "__dataclass_fields__", {}, raising=False)
    else:
        schedule = toy.FAMILY.schedule
        longer = lambda program: replace(schedule(program), epochs=12, epochs_per_task=12)
        monkeypatch.setattr(toy, "FAMILY", replace(toy.FAMILY, schedule=longer))
    with pytest.raises(BadValue) as caught:
        check(SweepPlan.load(begun.folder), load_plain(begun.folder), tmp_path)
    told = {"default": "width 8 -> 9", "field": "this code reads it no more", "length": "epochs of a run 9 -> 12"}[
        change
    ]
    assert told in str(caught.value)
    assert "begin a new sweep" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_retry_needs_a_sweep(tmp_path, capfd):
    assert "--retry failed needs --resume" in refused(["grid", "--retry", "failed"], tmp_path, capfd)
