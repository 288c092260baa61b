"""The storm's judge sees what it is there to see: each kind of damage, done to a sweep by hand."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from tests.chaos.verdict import judge
from tests.toy_sweeps import Swept


@pytest.fixture
def copy(tmp_path, undisturbed) -> Swept:
    folder = tmp_path / "whole"
    shutil.copytree(undisturbed.folder, folder, ignore=shutil.ignore_patterns("ray"))
    shutil.copy(undisturbed.folder.parent / "mlflow.db", tmp_path / "mlflow.db")
    return Swept(folder, 0, "", "")


def found(copy: Swept, twin: Swept, kept: bytes = b"") -> dict[str, list[str]]:
    return vars(judge(copy, twin, True, kept, f"sqlite:///{copy.folder.parent / 'mlflow.db'}"))


def edit_runs(copy: Swept, change) -> None:
    path = copy.folder / "runs.parquet"
    table = pq.read_table(path)
    frame = change(table.to_pandas())
    pq.write_table(pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False), path)


def edit_journal(copy: Swept, change) -> None:
    path = copy.folder / "journal.jsonl"
    events = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_nothing_is_found_in_a_copy(copy, undisturbed):
    journal = (undisturbed.folder / "journal.jsonl").read_bytes()
    assert found(copy, undisturbed, journal) == {"lost": [], "doubled": [], "changed": [], "curves": []}


def test_a_lost_run(copy, undisturbed):
    edit_runs(copy, lambda frame: frame.iloc[1:])
    assert found(copy, undisturbed)["lost"]


def test_a_crashed_run_is_a_lost_one(copy, undisturbed):
    edit_runs(copy, lambda frame: frame.assign(stop_reason=["crashed", *frame.stop_reason[1:]]))
    assert found(copy, undisturbed)["lost"]


def test_a_doubled_run(copy, undisturbed):
    edit_runs(copy, lambda frame: pd.concat([frame, frame.iloc[:1]]))
    assert found(copy, undisturbed)["doubled"]


def test_another_value_in_the_table(copy, undisturbed):
    edit_runs(copy, lambda frame: frame.assign(**{"final.test_loss": frame["final.test_loss"] * (1 + 1e-15)}))
    assert found(copy, undisturbed)["changed"]


def test_a_decision_taken_twice_or_not_at_all(copy, undisturbed):
    at = next(i for i, event in enumerate(copy.journal) if event["event"] == "decision")
    edit_journal(copy, lambda events: [*events[: at + 1], events[at], *events[at + 1 :]])
    assert found(copy, undisturbed)["doubled"]
    edit_journal(copy, lambda events: [*events[:at], *events[at + 2 :]])
    assert found(copy, undisturbed)["changed"]


def test_a_journal_that_was_not_kept(copy, undisturbed):
    assert found(copy, undisturbed, b'{"event": "begin"}\n')["changed"]


@pytest.mark.parametrize("kind", ["epochs", "steps"])
def test_lost_and_other_rows_of_curves(copy, undisturbed, kind):
    path = sorted((copy.folder / kind).glob("*.parquet"))[0]
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert found(copy, undisturbed)["curves"]
    frame = table.to_pandas()
    frame.loc[0, "train_loss"] += 1e-6
    pq.write_table(pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False), path)
    assert found(copy, undisturbed)["curves"]


def test_mlflow(copy, undisturbed):
    client = MlflowClient(f"sqlite:///{copy.folder.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests.toys.regression/grid"]
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'run'")
    second = client.create_run(experiment.experiment_id, tags=dict(runs[0].data.tags))
    assert any("2 MLflow runs" in line for line in found(copy, undisturbed)["doubled"])
    client.delete_run(second.info.run_id)
    assert not found(copy, undisturbed)["doubled"]
    client.log_metric(runs[1].info.run_id, "test_loss", 0.5, step=1)
    assert any("twice" in line for line in found(copy, undisturbed)["doubled"])
    client.update_run(runs[2].info.run_id, status="RUNNING")
    assert any("RUNNING" in line for line in found(copy, undisturbed)["lost"])
    client.delete_run(runs[3].info.run_id)
    assert any("no run for" in line for line in found(copy, undisturbed)["lost"])
