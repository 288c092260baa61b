"""Exports hold what was recorded, in the layouts promised, and never write over anything unasked."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from analysis.cli import app
from analysis.errors import UserError
from analysis.export import export, short_number
from analysis.store import open_sweep
from tests.sweep_factory import lr_arms, tree, write_sweep


def test_the_notebooks_folders(tmp_path):
    write_sweep(tmp_path / "sweeps", lr_arms(), name="lr_sweep", seeds=3)
    out = tmp_path / "results" / "deeper"
    made = export(tmp_path / "sweeps", "lr_sweep", "folders", out)
    assert len(made) == 15
    place = out / "lr_sweep" / "Vanilla_lr_1e-1" / "seed_0"
    assert {path.name for path in place.iterdir()} == {"test_acc.pkl", "train_acc.pkl", "train_loss.pkl"}
    with (place / "test_acc.pkl").open("rb") as file:
        test_acc = pickle.load(file)
    assert type(test_acc) is list
    assert {type(value) for value in test_acc} == {float}
    sweep = open_sweep(tmp_path / "sweeps", "lr_sweep")
    rows = sweep.epochs(["test_acc"], configs=[lr_arms()[4].key])
    np.testing.assert_array_equal(test_acc, rows[rows["seed"] == 0]["test_acc"])
    with (place / "train_loss.pkl").open("rb") as file:
        assert len(pickle.load(file)) == 9 * 10  # one a step


def test_numbers_in_folder_names_read_like_the_notebooks():
    values = {0.1: "1e-1", 1e-6: "1e-6", 0.84: "0.84", 0.016: "0.016", 3.0: "3", 0.0005: "5e-4", 0.0: "0", 1.0: "1"}
    assert {value: short_number(value) for value in values} == values


def test_names_that_clash_or_hold_odd_characters(tmp_path):
    arms = [replace(arm, axis={"method": "../a b"}, program={}) for arm in lr_arms()]
    write_sweep(tmp_path / "sweeps", arms, seeds=1)
    made = export(tmp_path / "sweeps", "demo", "folders", tmp_path / "out")
    assert made["path"].nunique() == 5
    assert all(str(tmp_path / "out" / "demo") in path and ".." not in path for path in made["path"])


@pytest.mark.parametrize("layout", ["csv", "parquet"])
def test_tables_hold_every_row(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("analysis.export.AT_ONCE", 4)  # several parts
    write_sweep(tmp_path / "sweeps", lr_arms(), seeds=3)
    made = export(tmp_path / "sweeps", "demo", layout, tmp_path / "out").set_index("path")
    read = pd.read_csv if layout == "csv" else pd.read_parquet
    folder = tmp_path / "out" / "demo"
    tables = {name: read(folder / f"{name}.{layout}") for name in ("runs", "epochs", "steps")}
    assert [len(tables[name]) for name in tables] == [15, 15 * 9, 15 * 90]
    assert made["rows"].tolist() == [15, 15 * 9, 15 * 90]
    for name in ("epochs", "steps"):
        key = ["run_key", name.removesuffix("s")]
        assert not tables[name].duplicated(key).any()
        assert set(tables[name]["label"]) == {arm.label for arm in lr_arms()}
    source = open_sweep(tmp_path / "sweeps", "demo").epochs(["test_acc"]).set_index(["run_key", "epoch"])["test_acc"]
    copied = tables["epochs"].set_index(["run_key", "epoch"])["test_acc"]
    np.testing.assert_allclose(copied.loc[source.index], source, rtol=0, atol=1e-15)
    if layout == "parquet":
        assert b'"mode": "max"' in pq.read_schema(folder / "epochs.parquet").metadata[b"lanewise"]


def test_nothing_is_overwritten_without_the_flag_and_nothing_half_written(tmp_path):
    write_sweep(tmp_path / "sweeps", lr_arms(), seeds=1)
    out = tmp_path / "out"
    export(tmp_path / "sweeps", "demo", "csv", out)
    (out / "demo" / "runs.csv").write_text("mine")
    before = tree(out)
    with pytest.raises(UserError, match="--force"):
        export(tmp_path / "sweeps", "demo", "csv", out)
    assert tree(out) == before
    export(tmp_path / "sweeps", "demo", "csv", out, force=True)
    assert (out / "demo" / "runs.csv").read_text() != "mine"
    with pytest.raises(UserError, match="is the sweep itself"):
        export(tmp_path / "sweeps", "demo", "csv", tmp_path / "sweeps", force=True)
    part = next((tmp_path / "sweeps" / "demo" / "steps").iterdir())
    part.write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        export(tmp_path / "sweeps", "demo", "folders", tmp_path / "other")
    assert not (tmp_path / "other" / "demo").exists()
    assert list((tmp_path / "other").iterdir()) == []


def test_command_line(tmp_path):
    write_sweep(tmp_path / "sweeps", lr_arms(), seeds=1)
    storage = ["--storage", str(tmp_path / "sweeps")]
    run = CliRunner().invoke
    done = run(app, ["export", "demo", "--layout", "csv", "--out", str(tmp_path / "out"), *storage])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "demo" / "epochs.csv").exists()
    for arguments, message in [
        (["--layout", "xlsx", "--out", str(tmp_path / "b")], "no layout 'xlsx'"),
        (["--layout", "csv", "--out", str(tmp_path / "out")], "--force"),
    ]:
        refused = run(app, ["export", "demo", *arguments, *storage])
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (tmp_path / "b").exists()
