"""MLflow gets what is on disk: the tree, tags, params, summaries and curves; twice is as good as once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

import tuning.sync
from search_spaces.space import Choice, Space
from tests.test_command_line import plan_of
from tests.toy_sweeps import ROOT
from trainables.family import BadValue
from tuning.journal import Journal
from tuning.locks import held
from tuning.mlflow_database import make_database, sqlite_file
from tuning.outbox import LIVE_SECONDS, Outbox
from tuning.runner import write_sweep_json
from tuning.searchers import Proposer, make_source
from tuning.tracking import Tracker

_TAGS = "family sweep algorithm config_key run_key seed stop_reason engine lanes device device_seconds git_commit"
LISTED = (*_TAGS.split(), "git_dirty")


def tree_of(uri: str) -> dict[str, list]:
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests.toys.regression/grid"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {kind: [run for run in runs if run.data.tags.get("kind") == kind] for kind in ("sweep", "config", "run")}


def contents(uri: str) -> dict[str, tuple]:
    """Everything that a second delivery could have changed."""
    client = MlflowClient(uri)
    return {
        run.info.run_id: (
            run.info.status,
            sorted(run.data.params.items()),
            sorted((k, v) for k, v in run.data.tags.items()),
            {
                name: [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for runs in tree_of(uri).values()
        for run in runs
    }


@pytest.fixture(scope="module")
def uri(undisturbed) -> str:
    return f"sqlite:///{undisturbed.folder.parent / 'mlflow.db'}"


def test_the_tree_is_sweep_config_run(undisturbed, uri):
    tree = tree_of(uri)
    assert {kind: len(runs) for kind, runs in tree.items()} == {"sweep": 1, "config": 6, "run": 12}
    (top,) = tree["sweep"]
    assert "mlflow.parentRunId" not in top.data.tags
    assert top.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in tree["config"]} == {top.info.run_id}
    config_of = {run.data.tags["config_key"]: run.info.run_id for run in tree["config"]}
    for run in tree["run"]:
        assert run.data.tags["mlflow.parentRunId"] == config_of[run.data.tags["config_key"]]
        assert run.info.status == "FINISHED"


def test_tags_params_and_summaries_are_the_runs_table_s(undisturbed, uri):
    table = undisturbed.runs.set_index("run_key")
    tree = tree_of(uri)
    for run in tree["run"]:
        row = table.loc[run.data.tags["run_key"]]
        assert set(LISTED) <= set(run.data.tags)
        assert run.data.tags["stop_reason"] == row.stop_reason
        assert run.data.tags["seed"] == str(row.seed)
        assert float(run.data.tags["device_seconds"]) == pytest.approx(row.device_seconds, abs=1e-3)
        assert run.data.params["lr"] == str(row["hyper.lr"])
        assert run.data.params["width"] == str(row["program.width"])
        for name in ("final", "best"):
            assert run.data.metrics[f"{name}/test_loss"] == row[f"{name}.test_loss"]
    for run in tree["config"]:
        rows = table[table.config_key == run.data.tags["config_key"]]
        assert run.data.metrics["seeds"] == len(rows)
        assert run.data.metrics["final/test_loss"] == pytest.approx(rows["final.test_loss"].mean())
        assert run.data.metrics["final/test_loss_sd"] == pytest.approx(rows["final.test_loss"].std())
        assert set(LISTED) - {"run_key", "seed"} <= set(run.data.tags)
    means = table[table.stop_reason == "finished"].groupby("config_key")["final.test_loss"].mean()
    assert tree["sweep"][0].data.metrics["best/test_loss"] == pytest.approx(means.min())


def test_curves_are_the_parquet_s(undisturbed, uri):
    client, epochs = MlflowClient(uri), undisturbed.table("epochs")
    for run in tree_of(uri)["run"]:
        rows = epochs[epochs.run_key == run.data.tags["run_key"]]
        for name in ("test_loss", "train_loss"):
            points = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, name))
            assert points == list(zip(rows.epoch, rows[name], strict=True))


def test_a_config_s_curve_is_the_mean_of_its_seeds(undisturbed, uri):
    client, epochs = MlflowClient(uri), undisturbed.table("epochs")
    for run in tree_of(uri)["config"]:
        rows = epochs[epochs.config_key == run.data.tags["config_key"]]
        assert rows.run_key.nunique() == 2
        points = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, "train_loss"))
        means = rows.groupby("epoch").train_loss.mean()
        assert [step for step, _ in points] == list(means.index)
        assert [value for _, value in points] == pytest.approx(list(means))


def test_the_page_of_the_experiment_shows_finished_configs_best_first(undisturbed, uri):
    tags = MlflowClient(uri).get_experiment_by_name("tests.toys.regression/grid").tags
    view = json.loads(json.loads(tags["mlflow.sharedViewState.lanewise"])["state"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`final/test_loss`", True)
    assert {"params.`lr`", "metrics.`final/test_loss_sd`"} <= set(view["selectedColumns"])
    run = tree_of(uri)["config"][0]
    kinds = {"params": run.data.params, "metrics": run.data.metrics}
    for column in view["selectedColumns"]:
        kind, name = column.rstrip("`").split(".`")
        assert name in kinds[kind]


def test_the_sweep_run_holds_the_artifacts(undisturbed, uri):
    client = MlflowClient(uri)
    (top,) = tree_of(uri)["sweep"]
    names = {item.path for item in client.list_artifacts(top.info.run_id)}
    assert {"sweep.json", "runs.parquet", "epochs", "steps", "report"} <= names
    report = {item.path for item in client.list_artifacts(top.info.run_id, "report")}
    files = [*(undisturbed.folder / "report").iterdir(), undisturbed.folder / "journal.md"]
    assert {f"report/{path.name}" for path in files} == report


def test_a_follower_delivers_at_a_word_and_ends_when_its_driver_hangs_up(undisturbed, tmp_path):
    """The driver tells it that the search is over, writes the report meanwhile, and closes the pipe."""
    shutil.copytree(undisturbed.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("tracking.json", "report"))
    plain = json.loads((tmp_path / "copy" / "sweep.json").read_text())
    own = {"name": "copy", "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    (tmp_path / "copy" / "sweep.json").write_text(json.dumps(plain | own))
    command = [sys.executable, "-m", "tuning.sync", "copy", "--storage", str(tmp_path), "--follow", str(os.getpid())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as sync:
        assert sync.stdin is not None
        sync.stdin.write(b"\n")
        sync.stdin.flush()
        while not (tmp_path / "copy" / "tracking.json").is_file():
            assert sync.poll() is None
        (tmp_path / "copy" / "report").mkdir()
        (tmp_path / "copy" / "report" / "index.html").write_text("late")
        sync.stdin.close()
        assert sync.wait() == 0
    (top,) = tree_of(own["tracking_uri"])["sweep"]
    client = MlflowClient(own["tracking_uri"])
    assert [item.path for item in client.list_artifacts(top.info.run_id, "report")] == [
        "report/index.html",
        "report/journal.md",
    ]


def test_delivering_again_changes_nothing_even_if_the_place_is_forgotten(undisturbed, uri):
    before = contents(uri)
    tuning.sync.deliver(undisturbed.folder)
    assert contents(uri) == before
    (undisturbed.folder / "tracking.json").unlink()
    tuning.sync.deliver(undisturbed.folder)
    assert contents(uri) == before


def test_a_server_that_is_away_costs_a_delay(undisturbed, uri, tmp_path, monkeypatch):
    folder = tmp_path / "sweeps" / undisturbed.folder.name
    shutil.copytree(undisturbed.folder, folder)
    (folder / "tracking.json").unlink()
    plain = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**plain, "tracking_uri": "http://127.0.0.1:9"}))
    monkeypatch.setattr(tuning.sync, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(tuning.sync, "FOLLOW_SECONDS", 0.01)
    with pytest.raises(BadValue, match="delivers it later"):
        tuning.sync.deliver(folder)
    there = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (folder / "sweep.json").write_text(json.dumps({**plain, "tracking_uri": there}))
    command = [sys.executable, "-m", "tuning.sync", folder.name, "--storage", str(folder.parent)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "delivered" in done.stdout
    mine, other = (
        sorted(str(value[1:]) for value in contents(u).values() if "seed" in str(value)) for u in (there, uri)
    )
    assert len(mine) == len(other) == 19
    curves = [
        sorted(str(run[3].get("test_loss")) for run in contents(u).values() if "test_loss" in run[3])
        for u in (there, uri)
    ]
    assert curves[0] == curves[1]


def test_a_config_proposed_again_is_one_config_with_more_runs(tmp_path):
    plan = replace(
        plan_of("grid", storage=tmp_path, name="twice"), space=Space((Choice("lr", (0.1, 0.2)),)), searcher="random",
        trials=5,
    )  # fmt: skip
    write_sweep_json(plan, ROOT)
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    for i in range(5):
        proposer.suggest(f"t{i}")
    journal.close()
    tuning.sync.deliver(plan.folder)
    tree = tree_of(plan.tracking_uri)
    assert {kind: len(runs) for kind, runs in tree.items()} == {"sweep": 1, "config": 2, "run": 7}
    assert {run.data.params["lr"] for run in tree["config"]} == {"0.1", "0.2"}


# --- what a kill leaves behind ---


def undelivered(undisturbed, folder) -> Path:
    """A copy of the sweep that MLflow has heard nothing of."""
    shutil.copytree(undisturbed.folder, folder, ignore=shutil.ignore_patterns("ray", "report"))
    (folder / "tracking.json").unlink()
    plain = json.loads((folder / "sweep.json").read_text())
    there = f"sqlite:///{folder.parent / 'mlflow.db'}"
    (folder / "sweep.json").write_text(json.dumps({**plain, "tracking_uri": there}))
    return folder


def points(uri: str) -> list[list[tuple]]:
    client = MlflowClient(uri)
    return sorted(
        sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, "test_loss"))
        for run in tree_of(uri)["run"]
    )


def test_part_files_of_two_hosts_are_read_in_the_order_of_recording(undisturbed, uri, tmp_path):
    """A host that replaced another may have the lower process id, so that its later epochs sort before."""
    folder = undelivered(undisturbed, tmp_path / "whole")
    parts = sorted((folder / "epochs").glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(path) for path in parts])
    for path in parts:
        path.unlink()
    late = pc.greater(rows["epoch"], 1)
    pq.write_table(rows.filter(pc.invert(late)), folder / "epochs" / "session-cpu0-200-000001.parquet")
    pq.write_table(rows.filter(late), folder / "epochs" / "session-cpu0-150-000001.parquet")
    tuning.sync.deliver(folder)
    assert points(f"sqlite:///{tmp_path / 'mlflow.db'}") == points(uri)


def test_a_second_run_that_a_slow_server_made_goes(undisturbed, tmp_path):
    folder = undelivered(undisturbed, tmp_path / "whole")
    tuning.sync.deliver(folder)
    there = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before, client = tree_of(there), MlflowClient(there)
    for kind in ("sweep", "config", "run"):
        first = before[kind][0]
        client.create_run(first.info.experiment_id, tags=dict(first.data.tags))
    client.update_run(before["run"][1].info.run_id, status="RUNNING")  # an old request, served after the last one
    tuning.sync.deliver(folder)
    after = tree_of(there)
    for kind, runs in before.items():
        assert {run.info.run_id for run in after[kind]} == {run.info.run_id for run in runs}
        assert {run.info.status for run in after[kind]} == {"FINISHED"}


def test_a_recorder_that_died_before_its_first_batch_loses_no_params(undisturbed, tmp_path, monkeypatch):
    folder = undelivered(undisturbed, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Tracker(folder).deliver()
    tuning.sync.deliver(folder)
    (top,) = tree_of(f"sqlite:///{tmp_path / 'mlflow.db'}")["sweep"]
    assert top.data.params["searcher"] == "grid"


def test_nothing_is_noted_where_the_sweep_was(undisturbed, tmp_path, monkeypatch):
    """Its folder vanishes meanwhile, and Ray Tune makes another in its place: left empty, the old one can come back."""
    folder, send = undelivered(undisturbed, tmp_path / "whole"), MlflowClient.log_batch

    def vanish(*args, **named):
        if (folder / "sweep.json").is_file():
            folder.rename(tmp_path / "elsewhere")
            (folder / "ray").mkdir(parents=True)
        return send(*args, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", vanish)
    with pytest.raises(FileNotFoundError):
        Tracker(folder).deliver()
    assert [path.name for path in folder.iterdir()] == ["ray"]


def test_points_sent_but_not_noted_are_sent_again_as_they_were(undisturbed, tmp_path, monkeypatch):
    """Killed after the server took a batch; meanwhile the same epochs were trained again, at another time."""
    folder = undelivered(undisturbed, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Tracker(folder).deliver()
    for path in sorted((folder / "epochs").glob("*.parquet")):
        table = pq.read_table(path)
        earlier = pc.subtract(table["time"], pa.scalar(timedelta(hours=1)))
        again = table.set_column(
            table.schema.get_field_index("time"), "time", earlier.cast(table.schema.field("time").type)
        )
        pq.write_table(again, path.with_name(f"0-{path.name}"))
    tuning.sync.deliver(folder)
    for curve in points(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        assert len({step for step, _ in curve}) == len(curve)


def test_no_request_is_repeated_by_the_client(undisturbed, monkeypatch):
    """MLflow's own client repeats requests that make runs; a server that only was slow makes two of each."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    Tracker(undisturbed.folder)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_sweep_that_does_not_exist_is_one_line(tmp_path):
    command = [sys.executable, "-m", "tuning.sync", "nothing", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


# --- a database of its own ---


@pytest.mark.parametrize("step", [1, 10, 60])
def test_a_recorder_killed_while_the_database_is_made_leaves_none_behind(undisturbed, uri, tmp_path, step):
    """MLflow makes it in some seventy steps, and cannot open one that has only some of them."""
    folder = undelivered(undisturbed, tmp_path / "whole")
    there = tmp_path / "mlflow.db"
    die_within = f"""
import os
from alembic.runtime.migration import HeadMaintainer
from pathlib import Path
import tuning.sync
steps, step = iter(range(1, 1000)), HeadMaintainer.update_to_step
HeadMaintainer.update_to_step = lambda *made: os._exit(9) if next(steps) == {step} else step(*made)
tuning.sync.deliver(Path({str(folder)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", die_within], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert not there.exists()
    tuning.sync.deliver(folder)
    assert points(f"sqlite:///{there}") == points(uri)


def test_a_database_that_another_process_makes_meanwhile_is_waited_for_and_kept(tmp_path):
    path = tmp_path / "mlflow.db"
    with ThreadPoolExecutor(1) as other:
        with held(tmp_path / ".mlflow.db.lock"):
            waits = other.submit(make_database, f"sqlite:///{path}")
            path.write_bytes(b"theirs")
        waits.result(timeout=60)
    assert path.read_bytes() == b"theirs"


def test_only_a_database_in_a_file_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("http://127.0.0.1:9", "postgresql://me@db/x", "databricks", "sqlite://", "sqlite:///:memory:"):
        assert sqlite_file(uri) is None
        make_database(uri)
    assert list(tmp_path.iterdir()) == []
    assert sqlite_file("sqlite:////a/b.db") == Path("/a/b.db")
    assert sqlite_file("sqlite+pysqlite:///b.db?timeout=5") == Path("b.db")


def test_a_database_of_another_version_of_mlflow_is_named_as_such(undisturbed, uri, tmp_path, monkeypatch):
    folder = undelivered(undisturbed, tmp_path / "whole")
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '75868b020152'")
        database.commit()
    monkeypatch.setattr(tuning.sync, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(tuning.sync.Away) as away:
        tuning.sync.deliver(folder)
    assert f"`mlflow db upgrade sqlite:///{tmp_path}/mlflow.db` has to change it: everything is on" in str(away.value)


# --- what can wait ---


def test_news_of_a_run_that_goes_on_waits_and_is_not_forgotten(undisturbed, uri, tmp_path):
    """Half a sweep is delivered, its recorder dies, another delivers the rest: each run's news in one call, and none is
    lost that the first one held back."""
    folder = undelivered(undisturbed, tmp_path / "whole")
    journal, there = folder / "journal.jsonl", f"sqlite:///{tmp_path / 'mlflow.db'}"
    lines = journal.read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["event"] for line in lines]
    journal.write_text("".join(lines[: kinds.index("proposed", kinds.index("end")) + 1]))
    Tracker(folder).deliver(patient=True)
    tree = tree_of(there)
    ended = [run for run in tree["run"] if run.info.status == "FINISHED"]
    going = [run for run in tree["run"] if run.info.status == "RUNNING"]
    assert ended
    assert going
    assert all(run.data.params and run.data.metrics for run in ended)
    assert not any(run.data.params or run.data.metrics for run in going)
    journal.write_text("".join(lines))
    tuning.sync.deliver(folder)
    mine, other = (
        {run.data.tags["run_key"]: (run.data.params, run.data.metrics) for run in tree_of(u)["run"]}
        for u in (there, uri)
    )
    assert mine == other
    assert points(there) == points(uri)
    assert json.loads((folder / "tracking.json").read_text())["held"] == []


def test_old_news_is_sent_of_runs_that_go_on_too():
    now = [0.0]
    outbox = Outbox(clock=lambda: now[0])
    outbox.metrics(("run", "a"), {"loss": 1.0, "broken": math.nan}, 5, 1)
    outbox.metrics(("run", "b"), {"loss": 1.0}, 5, 1)
    outbox.status(("run", "b"), "FINISHED", 6)
    assert outbox.due(patient=False) == [("run", "a"), ("run", "b")]
    assert outbox.due(patient=True) == [("run", "b")]
    now[0] = LIVE_SECONDS
    outbox.metrics(("run", "a"), {"loss": 0.5}, 7, 2)
    outbox.tags(("run", "c"), [("stop_reason", "")])
    assert outbox.due(patient=True) == [("run", "a"), ("run", "b")]
    outbox.drop([("run", "a"), ("run", "b")])
    kept = Outbox(json.loads(json.dumps(outbox.held())))
    assert kept.due(patient=False) == [("run", "c")]
    assert kept.held() == outbox.held()


def test_curves_of_many_runs_have_fewer_points(undisturbed, uri, tmp_path, monkeypatch):
    """And the same ones whoever delivers, the last among them."""
    monkeypatch.setattr("tuning.tracking.SWEEP_POINTS", 24)
    monkeypatch.setattr("tuning.tracking.FEWEST_POINTS", 2)
    folder = undelivered(undisturbed, tmp_path / "whole")
    tuning.sync.deliver(folder)
    thin, full = points(f"sqlite:///{tmp_path / 'mlflow.db'}"), points(uri)
    plain = json.loads((folder / "sweep.json").read_text())
    epochs = plain["schedule"]["epochs"]
    stride = -(-epochs // max(2, 24 // (plain["trials"] * plain["seeds"])))
    assert stride > 1
    assert thin == sorted([p for p in curve if p[0] % stride == 0 or p[0] == epochs] for curve in full)
