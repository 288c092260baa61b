"""Whole sweeps on bad ground, as processes: what they print, their exit codes, and that --resume goes on from there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.test_interruption import assert_resumed_as_if_undisturbed, ended
from tests.toy_sweeps import UNDISTURBED, Process, sweep

MISBEHAVING = {"module": "tests.toys.misbehaving"}
SECRET = "hunter2"


def one_line(text: str) -> str:
    """The last line on stderr; nothing before it is a traceback."""
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def statuses(folder: Path) -> list[tuple[str, str]]:
    """(kind, status) of every MLflow run of a sweep."""
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], f"tags.sweep = '{folder.name}'")
    return sorted((run.data.tags["kind"], run.info.status) for run in runs)


def test_crashes_in_a_row_stop_the_sweep_and_retry_failed_runs_them_again(tmp_path, monkeypatch):
    fault = tmp_path / "fault"
    fault.write_text("crash")
    monkeypatch.setenv("LANEWISE_TEST_FAULT", str(fault))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY")
    storage = tmp_path / "sweeps"
    arguments = ("widths", "--engine", "serial", "--max-concurrent", "1")
    swept = Process(storage, "star", *arguments, **MISBEHAVING).wait()
    assert swept.code == 1
    told = one_line(swept.err)
    assert "5 configs in a row crashed, the last with: ValueError: a bad star" in told
    assert "--resume star" in told
    assert told.endswith("--retry failed")
    assert [event["stop_reason"] for event in swept.events("end")] == ["crashed"] * 5
    assert swept.journal[-1]["reason"] == "too many crashes"
    errors = sorted((swept.folder / "errors").iterdir())
    assert len(errors) == 5
    assert all("Traceback" in path.read_text() and SECRET not in path.read_text() for path in errors)
    assert SECRET not in swept.err + swept.log + (swept.folder / "journal.jsonl").read_text()

    fault.write_text("oom 5")
    resumed = Process(storage, "star", "--resume", "star", "--retry", "failed", **MISBEHAVING).wait()
    assert resumed.code == 0, resumed.err
    assert len(resumed.events("retry")) == 5
    reasons = {event["config_key"]: event["stop_reason"] for event in resumed.events("end")}
    assert sorted(reasons.values()) == ["finished"] * 6 + ["oom"]
    runs = resumed.runs
    assert (len(runs), runs.run_key.nunique()) == (14, 14)
    assert set(runs[runs["program.width"] == 5].stop_reason) == {"oom"}
    assert set(runs[runs["program.width"] != 5].stop_reason) == {"finished"}
    assert runs[runs["program.width"] != 5].error.isna().all()
    assert any("out of memory" in event["text"] for event in resumed.events("notice"))
    assert "out of memory with 2 lanes, going on with 1" in resumed.out
    assert len(resumed.events("proposed")) == 7, "nothing is proposed twice"
    assert len(list((resumed.folder / "errors").iterdir())) == 1
    expected = [("config", "FAILED")] + [("config", "FINISHED")] * 6 + [("run", "FAILED")] * 2
    assert statuses(resumed.folder) == expected + [("run", "FINISHED")] * 12 + [("sweep", "FINISHED")]


def loopback_only(mark: str) -> list[str]:
    """Listening addresses, other than loopback's, of processes whose environment holds `mark`."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                sockets |= {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address = fields[1].rpartition(":")[0]
                if address not in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"):
                    found.append(fields[1])
    return found


@pytest.mark.heavy
def test_doors_a_second_driver_ctrl_c_and_a_stale_lock(tmp_path, undisturbed, capfd):
    """One sweep: what it listens on, who else may run it, one Ctrl-C, and the resume after it."""
    process = Process(tmp_path, "whole", *UNDISTURBED)
    process.when(ended(1))
    assert loopback_only(process._mark) == []
    os.kill(process._process.pid, signal.SIGSTOP)  # it does not finish meanwhile
    second = sweep(tmp_path, "whole", "--resume", "whole")
    os.kill(process._process.pid, signal.SIGCONT)
    assert second.code == 2
    assert second.out == ""
    assert len(second.err.splitlines()) == 1
    assert f"process {process._process.pid}, since" in second.err
    process.interrupt()
    swept = process.wait()
    assert swept.code == 130, swept.err
    assert "stopping: checkpoints, then the report" in swept.err
    assert "--resume whole" in one_line(swept.err)
    assert swept.journal[-1]["reason"] == "interrupted"
    assert (swept.folder / "report" / "index.html").is_file()
    assert process.left() == []
    open_runs = {key for event in swept.events("proposed") for key in event["runs"].values()}
    done = {event["config_key"] for event in swept.events("end")}
    open_runs -= {k for e in swept.events("proposed") if e["config_key"] in done for k in e["runs"].values()}
    for key in open_runs & set(swept.table("steps").run_key):
        assert list((swept.folder / "checkpoints" / key).glob("*.json")), "what trained was checkpointed"
    assert (swept.folder / "driver.lock").is_file(), "left behind, and held by nobody"
    resumed = sweep(tmp_path, "whole", "--resume", "whole")
    assert_resumed_as_if_undisturbed(resumed, undisturbed)


@pytest.mark.heavy
def test_ctrl_c_twice_is_now(tmp_path, undisturbed):
    process = Process(tmp_path, "whole", *UNDISTURBED)
    process.when(ended(1))
    os.kill(process._process.pid, signal.SIGINT)
    os.kill(process._process.pid, signal.SIGTERM)
    swept = process.wait(30)
    assert swept.code == 130
    assert one_line(swept.err).startswith("stopped at once; continue with: python")
    assert process.left() == []
    assert_resumed_as_if_undisturbed(sweep(tmp_path, "whole", "--resume", "whole"), undisturbed)


# --- storage ---


def fill(place: Path) -> Path:
    """Take all the room that is left."""
    block = place / "block"
    with open(block, "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                pass
            size //= 2
    return block


@pytest.mark.heavy
@pytest.mark.parametrize("ground", ["full", "gone"])
def test_a_storage_that_fails_meanwhile_is_one_line_and_resume_goes_on(tmp_path, small_disk, undisturbed, ground):
    storage = small_disk / "sweeps"
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = Process(storage, "whole", *UNDISTURBED, "--tracking-uri", database)  # the disk is the sweep's alone
    process.when(ended(2))
    os.kill(process._process.pid, signal.SIGSTOP)
    if ground == "full":
        block = fill(small_disk)
    else:
        os.rename(storage / "whole", storage / "elsewhere")
    os.kill(process._process.pid, signal.SIGCONT)
    swept = process.wait()
    assert swept.code == 1, swept.err
    told = one_line(swept.err)
    expected = {"full": "the storage is full", "gone": "has vanished"}[ground]
    assert told.startswith("the sweep stopped: ")
    assert expected in told
    assert "--resume whole" in told
    assert process.left() == []
    if ground == "full":
        block.unlink()
    else:
        made = sorted(str(path.relative_to(storage)) for path in storage.rglob("whole/**/*"))
        assert made == [], "nothing is made in its place"
        assert not (storage / "whole").exists()
        os.rename(storage / "elsewhere", storage / "whole")
    resumed = sweep(storage, "whole", "--resume", "whole")
    assert "crashed" not in set(resumed.runs.stop_reason)
    assert resumed.code == 0, resumed.err
    mine, other = (s.runs.sort_values("run_key") for s in (resumed, undisturbed))
    assert list(mine["final.test_loss"]) == list(other["final.test_loss"])
    assert list(mine.stop_reason) == list(other.stop_reason)


@pytest.mark.heavy
def test_nothing_secret_is_written_anywhere(tmp_path, monkeypatch):
    """Secrets in the command, the environment and the server's address, looked for in every file a sweep leaves."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "envtoken-4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret-4712")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:envpassword-4713@db/x")
    uri = "http://alice:urlpassword-4714@127.0.0.1:9"
    storage = tmp_path / "sweeps"
    swept = sweep(storage, "closed", "grid", "--trials", "1", "--engine", "serial", "--tracking-uri", uri)
    assert swept.code == 0, swept.err
    private = swept.folder / "secrets.json"
    assert json.loads(private.read_text()) == {"tracking_uri": uri}
    assert private.stat().st_mode & 0o077 == 0, "readable by its owner alone"
    said = swept.out + swept.err
    for secret in ("envtoken-4711", "envsecret-4712", "envpassword-4713", "urlpassword-4714"):
        assert secret not in said
        for path in storage.rglob("*"):
            if path.is_file() and path != private:
                assert secret.encode() not in path.read_bytes(), f"{secret} in {path}"
