"""MLflow on a real PostgreSQL, behind a real `mlflow server`: killed or frozen in the middle of a write, or away for a
whole sweep. No run twice, none left RUNNING, no point lost or doubled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tuning.sync
from tests.chaos.verdict import judge_mlflow
from tests.postgres import MlflowServer, Postgres, postgres
from tests.test_interruption import assert_resumed_as_if_undisturbed, ended
from tests.toy_sweeps import ROOT, UNDISTURBED, Process, Swept, sweep
from tuning.tracking import Tracker


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def server(database, tmp_path_factory) -> Iterator[MlflowServer]:
    with MlflowServer(database.uri(), tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def undelivered(tmp_path, undisturbed) -> Callable[[str, str], Swept]:
    """undelivered(name, uri): a finished sweep that MLflow at `uri` has heard nothing of."""

    def make(name: str, uri: str) -> Swept:
        folder = tmp_path / name
        shutil.copytree(undisturbed.folder, folder, ignore=shutil.ignore_patterns("ray", "report"))
        (folder / "tracking.json").unlink()
        plain = json.loads((folder / "sweep.json").read_text())
        (folder / "sweep.json").write_text(json.dumps({**plain, "name": name, "tracking_uri": uri}))
        return Swept(folder, 0, "", "")

    return make


class Interrupted(Exception):
    """Stands for the recorder's own death."""


def disturb(monkeypatch: pytest.MonkeyPatch, method: str, number: int, strike: Callable[[], None]) -> None:
    """Do something at the n-th call of a method of MLflow's client, after the server has answered it."""
    from mlflow import MlflowClient

    plain, calls = getattr(MlflowClient, method), iter(range(1, 10**9))

    def called(self, *args, **kwargs):
        answer = plain(self, *args, **kwargs)
        if next(calls) == number:
            strike()
        return answer

    monkeypatch.setattr(MlflowClient, method, called)


def die() -> None:
    raise Interrupted


def test_a_recorder_or_a_database_killed_in_a_delivery_leaves_nothing_twice(database, undelivered, monkeypatch):
    """The recorder dies after a run was made, and after points were taken but not noted; then PostgreSQL dies."""
    swept = undelivered("direct", database.uri())
    for method, number in (("create_run", 4), ("log_batch", 9), ("set_terminated", 3)):
        with monkeypatch.context() as patch:
            disturb(patch, method, number, die)
            with pytest.raises(Interrupted):
                Tracker(swept.folder).deliver()
    monkeypatch.setattr(tuning.sync, "FOLLOW_SECONDS", 0.05)

    def restart() -> None:
        database.kill()
        threading.Timer(0.3, database.start).start()

    disturb(monkeypatch, "log_batch", 4, restart)
    tuning.sync.deliver(swept.folder)
    verdict = judge_mlflow(swept, database.uri())
    assert verdict.clean, verdict.lines()
    assert tuning.sync.deliver(swept.folder) == 0


@pytest.mark.heavy
def test_a_server_killed_in_the_middle_of_a_delivery(database, server, undelivered, monkeypatch):
    swept = undelivered("killed", server.uri)
    monkeypatch.setattr(tuning.sync, "FOLLOW_SECONDS", 0.2)
    monkeypatch.setattr(tuning.sync, "PATIENCE_SECONDS", 200.0)

    def restart() -> None:
        server.kill()
        threading.Thread(target=server.start).start()

    disturb(monkeypatch, "create_run", 5, restart)
    disturb(monkeypatch, "log_batch", 3, restart)
    tuning.sync.deliver(swept.folder)
    verdict = judge_mlflow(swept, database.uri())
    assert verdict.clean, verdict.lines()


@pytest.mark.heavy
def test_requests_that_a_frozen_server_serves_late(database, server, undelivered, monkeypatch):
    """The client gives up on requests that are carried out later, after it has asked again."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tuning.sync, "FOLLOW_SECONDS", 0.2)
    monkeypatch.setattr(tuning.sync, "PATIENCE_SECONDS", 200.0)
    swept = undelivered("frozen", server.uri)

    def freeze(seconds: float) -> None:
        database.freeze()
        threading.Timer(seconds, database.thaw).start()

    disturb(monkeypatch, "create_run", 3, lambda: freeze(5.0))
    disturb(monkeypatch, "log_batch", 2, lambda: freeze(5.0))
    disturb(monkeypatch, "set_terminated", 2, lambda: freeze(5.0))
    tuning.sync.deliver(swept.folder)
    verdict = judge_mlflow(swept, database.uri())
    assert verdict.clean, verdict.lines()


@pytest.mark.heavy
def test_a_driver_killed_while_it_delivers_to_a_server(tmp_path, database, server, undisturbed):
    process = Process(tmp_path, "whole", *UNDISTURBED, "--tracking-uri", server.uri)
    process.when(ended(2))
    for pid in process.pids():  # all at once: driver, hosts and recorder
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    process.wait()
    resumed = sweep(tmp_path, "whole", "--resume", "whole")
    assert_resumed_as_if_undisturbed(resumed, undisturbed)
    verdict = judge_mlflow(resumed, database.uri())
    assert verdict.clean, verdict.lines()


@pytest.mark.heavy
def test_a_server_away_for_a_whole_sweep(tmp_path, database, server):
    server.kill()
    try:
        swept = sweep(tmp_path, "alone", *UNDISTURBED, "--tracking-uri", server.uri)
    finally:
        server.start()
    assert swept.code == 0, swept.err
    assert len(swept.runs) == 12
    assert judge_mlflow(swept, database.uri()).lost, "nothing was delivered"
    command = [sys.executable, "-m", "tuning.sync", "alone", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict = judge_mlflow(swept, database.uri())
    assert verdict.clean, verdict.lines()


def test_a_database_s_password_is_not_shown(tmp_path, database, capfd):
    """The tracking URI of a database has one."""
    password = database.uri().partition("lanewise:")[2].partition("@")[0]
    from tests.toys.sweeps import SWEEPS
    from tuning.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(SWEEPS, ["grid", "--tracking-uri", database.uri().replace("/mlflow", "/"), "--storage", str(tmp_path)])
    _, err = capfd.readouterr()
    assert stopped.value.code == 2
    assert "names no database" in err
    assert password not in err
    assert list(Path(tmp_path).iterdir()) == []


def test_frozen_and_thawed_it_answers(database):
    """The fixture itself: what is frozen answers nobody, and goes on as if nothing had been."""
    database.freeze()
    begun = time.monotonic()
    threading.Timer(0.5, database.thaw).start()
    database.ping()
    assert time.monotonic() - begun >= 0.45
