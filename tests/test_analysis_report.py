"""Reading a sweep's folder, and the report that is made of it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import analysis
from analysis.cli import app
from analysis.curves import curve_metric, learning_curves
from analysis.errors import UserError
from analysis.journal import MARK
from analysis.mlflow_link import fitting
from analysis.report import write_report
from analysis.store import open_sweep
from analysis.summary import list_sweeps, pivot, scores, summarise
from tests.sweep_factory import Arm, grid_arms, lr_arms, tree, write_sweep

ALLOWED = {
    "analysis",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "matplotlib",
    "plotly",
    "jinja2",
    "PIL",
    "typer",
    "rich",
    "mlflow",
}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            roots.add((node.module or "").split(".")[0])
    return roots - set(sys.stdlib_module_names)


def test_analysis_imports_none_of_the_running_machinery():
    modules = sorted(Path(analysis.__file__).parent.rglob("*.py"))
    assert len(modules) > 5
    for path in modules:
        extra = imported_roots(path) - ALLOWED - {"tuning"}  # `tests/test_architecture.py` says which module of it
        assert not extra, f"{path.name} imports {extra}"
    with_mlflow = [path.name for path in modules if "mlflow" in imported_roots(path)]
    assert with_mlflow == ["mlflow_link.py"]


def test_reading_loads_neither_torch_nor_ray_nor_mlflow(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    code = (
        "import sys; from analysis.report import write_report; "
        f"write_report({str(tmp_path)!r}, 'demo'); "
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'tuning.runner') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_scores_are_what_was_written(tmp_path):
    written = write_sweep(tmp_path, lr_arms())
    runs = scores(open_sweep(tmp_path, "demo"))
    assert len(runs) == 25
    for row in runs.itertuples():
        assert row.value == pytest.approx(written.finals[row.label][row.seed], abs=1e-12)
    assert runs["judged"].all()


def test_table_is_sorted_and_its_numbers_are_the_textbook_ones(tmp_path):
    written = write_sweep(tmp_path, lr_arms())
    sweep = open_sweep(tmp_path, "demo")
    table = summarise(sweep, scores(sweep))
    assert list(table["mean"]) == sorted(table["mean"], reverse=True)
    for row in table.itertuples():
        values = np.array(list(written.finals[row.label].values()))
        assert row.n == 5
        assert row.mean == pytest.approx(values.mean())
        assert row.sd == pytest.approx(values.std(ddof=1))
        half = 2.7764451051977987 * values.std(ddof=1) / np.sqrt(5)  # t(4) at 97.5%, from a printed table
        assert (row.low, row.high) == pytest.approx((values.mean() - half, values.mean() + half))
        assert row.median == pytest.approx(np.median(values))
        middle = np.sort(values)  # quarter off each end of five: 0.75, 1, 0.75 of the middle three
        assert row.iqm == pytest.approx((0.75 * middle[1] + middle[2] + 0.75 * middle[3]) / 2.5)
        assert row.device_seconds == pytest.approx(18.0)


def test_a_metric_to_minimise_puts_the_least_first(tmp_path):
    write_sweep(tmp_path, lr_arms(), metrics={"last_test_acc": {"unit": "nats", "mode": "min", "doc": ""}})
    sweep = open_sweep(tmp_path, "demo")
    assert summarise(sweep, scores(sweep))["label"].iloc[0] == "lr=0.1"


def test_stopped_configs_are_shown_and_not_judged(tmp_path):
    arms = lr_arms()
    arms[3] = replace(arms[3], stop_epoch=3)  # the true winner, cut off: its last value is low
    write_sweep(tmp_path, arms)
    sweep = open_sweep(tmp_path, "demo")
    table = summarise(sweep, scores(sweep)).set_index("label")
    assert not table.loc["lr=0.03", "judged"]
    assert table.loc["lr=0.03", "stop_reason"] == "stopped"
    assert table.loc["lr=0.03", "rung"] == 3
    assert list(table.index)[-1] == "lr=0.03"
    assert arms[3].key not in pivot(scores(sweep)).index


def test_at_an_epoch_all_configs_that_reached_it_are_judged(tmp_path):
    arms = lr_arms()
    arms[3] = replace(arms[3], stop_epoch=3)
    write_sweep(tmp_path, arms)
    sweep = open_sweep(tmp_path, "demo")
    third = scores(sweep, "test_acc", "epoch=3")
    assert third["judged"].all()
    assert third[third["label"] == "lr=0.03"]["value"].mean() > third[third["label"] == "lr=0.1"]["value"].mean()
    fourth = scores(sweep, "test_acc", "epoch=4")
    assert set(fourth[~fourth["judged"]]["label"]) == {"lr=0.03"}
    at_step = scores(sweep, "train_acc", "step=30").set_index("run_key")["value"]
    at_epoch = scores(sweep, "train_acc", "epoch=3").set_index("run_key")["value"]
    np.testing.assert_allclose(at_step, at_epoch[at_step.index], atol=1e-6)


def test_a_diverged_seed_counts_as_the_worst_seen(tmp_path):
    arms = [*lr_arms(), Arm("wild", 0.95, axis={"lr": 1.0}, hyper={"lr": 1.0}, diverges=(0, 1))]
    write_sweep(tmp_path, arms)
    runs = scores(open_sweep(tmp_path, "demo"))
    wild = runs[runs["label"] == "wild"].set_index("seed")
    worst = runs["value"].min()
    assert (wild.loc[[0, 1], "value"] == worst).all()
    assert worst < 0.75
    assert wild.loc[2, "value"] > 0.9


def test_rows_written_twice_are_read_once_and_aside_files_not_at_all(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=4)
    folder = tmp_path / "demo" / "epochs"
    part = pq.read_table(folder / "000000.parquet")
    pq.write_table(part, folder / "000009.parquet")  # as after a resume from a checkpoint
    (folder / ".000010.parquet").write_bytes(b"half a file")
    (folder / "000011.parquet.tmp").write_bytes(b"half a file")
    rows = open_sweep(tmp_path, "demo").epochs(["test_acc"])
    assert len(rows) == 5 * 2 * 4
    assert not rows.duplicated(["run_key", "epoch"]).any()


def test_projection_reads_only_what_is_asked(tmp_path):
    write_sweep(tmp_path, lr_arms())
    sweep = open_sweep(tmp_path, "demo")
    key = lr_arms()[0].key
    rows = sweep.epochs(["test_acc"], configs=[key], epochs=[1, 9])
    assert set(rows["config_key"]) == {key}
    assert set(rows["epoch"]) == {1, 9}
    assert "train_loss" not in rows
    with pytest.raises(UserError, match="did you mean test_acc"):
        sweep.epochs(["tset_acc"])


def test_missing_columns_and_a_sweep_that_has_just_begun(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=4)
    path = tmp_path / "demo" / "runs.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["rung", "device_seconds", "label", "error", "lanes"]), path)
    report = write_report(tmp_path, "demo")
    assert set(report.table["label"]) == {arm.key for arm in lr_arms()}
    path.unlink()
    for part in (tmp_path / "demo" / "epochs").iterdir():
        part.unlink()
    assert "No run has reported yet" in write_report(tmp_path, "demo").page.read_text()


def test_a_running_sweep_says_so(tmp_path):
    arms = lr_arms()
    arms[0] = replace(arms[0], running_at=2)
    write_sweep(tmp_path, arms)
    page = write_report(tmp_path, "demo").page.read_text()
    assert "5 runs have not ended" in page
    assert list_sweeps(tmp_path).loc[0, "running"] == 5


def test_the_curve_of_a_headline_without_curve(tmp_path):
    write_sweep(tmp_path, lr_arms())
    sweep = open_sweep(tmp_path, "demo")
    assert sweep.metric == "last_test_acc"
    assert curve_metric(sweep) == "test_acc"
    assert curve_metric(sweep, "train_loss") == "train_loss"


def test_curves_are_means_over_seeds_and_points_of_a_stream_are_tasks(tmp_path):
    write_sweep(tmp_path, lr_arms(), epochs=12, epochs_per_task=3)
    sweep = open_sweep(tmp_path, "demo")
    key = lr_arms()[2].key
    data = learning_curves(sweep, [key])
    assert list(data.table["x"]) == [1, 2, 3, 4]
    assert "task" in data.x_label
    by_hand = sweep.epochs(["test_acc"], configs=[key], epochs=[6])["test_acc"]
    second = data.table.iloc[1]
    assert second["mean"] == pytest.approx(by_hand.mean())
    assert second["high"] - second["low"] == pytest.approx(2 * by_hand.std(ddof=1))
    assert second["n"] == 5


def test_long_curves_are_averaged_in_blocks_without_moving_their_mean(tmp_path):
    write_sweep(tmp_path, lr_arms()[:1], epochs=450, seeds=2, steps=False)
    sweep = open_sweep(tmp_path, "demo")
    data = learning_curves(sweep, [lr_arms()[0].key])
    assert list(data.table["x"][:3]) == [3, 6, 9]
    raw = sweep.epochs(["test_acc"])
    assert data.table["mean"].iloc[0] == pytest.approx(raw[raw["epoch"] <= 3]["test_acc"].mean())
    assert data.table["mean"].mean() == pytest.approx(raw["test_acc"].mean())


def test_report_is_self_contained_and_escapes_what_users_wrote(tmp_path):
    arms = lr_arms()
    arms[3] = replace(arms[3], label="<script>alert(1)</script>", axis={"lr": 0.03})
    write_sweep(tmp_path, arms, doc="<b>bold</b> & <img src=x onerror=alert(2)>")
    report = write_report(tmp_path, "demo")
    page = report.page.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<img src=x" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    live = (report.folder / "interactive.html").read_text()
    assert "<img src=x" not in live
    assert not re.findall(r"<script[^>]* src=|<link[^>]* href=", live)
    for file in report.files:
        assert file.exists()
    assert (report.folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in report.folder.parent.iterdir() if p.name.startswith(".")]


def test_report_over_many_axes_and_conditional_ones(tmp_path):
    arms = [
        Arm(f"{method} {strength:g}", 0.8, axis={"method": method, f"{method}.strength": strength})
        for method in ("l2", "cbp")
        for strength in (1e-4, 1e-2)
    ]
    write_sweep(tmp_path, arms, seeds=2, epochs=3)
    table = write_report(tmp_path, "demo").table
    assert table["axis.cbp.strength"].notna().sum() == 2


def test_command_line_report_and_its_refusals(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    run = CliRunner().invoke
    done = run(app, ["report", "demo", "--storage", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert Path(done.stdout.strip()).name == "index.html"
    before = tree(tmp_path)
    for arguments, message in [
        (["report", "dmo"], "no sweep 'dmo'"),
        (["report", "../demo"], "no sweep"),
        (["report", "demo", "--metric", "last_tst_acc"], "did you mean last_test_acc"),
        (["report", "demo", "--at", "later"], "none of final"),
        (["report", "demo", "--tracking-uri", f"sqlite:///{tmp_path}/none.db"], "no MLflow database"),
    ]:
        refused = run(app, [*arguments, "--storage", str(tmp_path)])
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert {name for name in tree(tmp_path) if "report/" not in name} == {n for n in before if "report/" not in n}
    missing = run(app, ["list", "--storage", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2


def test_list_shows_every_sweep(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    write_sweep(tmp_path, grid_arms(), name="grid", seeds=2, epochs=3)
    table = list_sweeps(tmp_path).set_index("name")
    assert table.loc["grid", "configs"] == 9
    assert table.loc["grid", "best_config"] == "cbp lr=0.01"
    assert table.loc["demo", "runs"] == 10


def test_broken_files_are_named_in_one_line(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    (tmp_path / "demo" / "runs.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"runs\.parquet cannot be read"):
        write_report(tmp_path, "demo")
    assert not (tmp_path / "demo" / "report" / "index.html").exists()
    (tmp_path / "demo" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json is not JSON"):
        open_sweep(tmp_path, "demo")


def test_report_and_description_reach_the_sweeps_mlflow_run(tmp_path):
    from mlflow.tracking import MlflowClient

    from analysis.mlflow_link import log_to_sweep_run

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("toy/demo", artifact_location=(tmp_path / "artifacts").as_uri())
    config = client.create_run(experiment, tags={"sweep": "demo", "kind": "config"})
    target = client.create_run(experiment, tags={"sweep": "demo", "kind": "sweep"})
    client.create_run(experiment, tags={"sweep": "other", "kind": "sweep"})
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3, tracking_uri=uri)
    done = CliRunner().invoke(app, ["report", "demo", "--storage", str(tmp_path)])
    assert done.exit_code == 0, done.output
    run_id = target.info.run_id
    logged = {item.path for item in client.list_artifacts(run_id, "report")}
    assert {"report/index.html", "report/interactive.html", "report/curves.png", "report/hyper.png"} <= logged
    assert client.list_artifacts(config.info.run_id) == []
    sweep = open_sweep(tmp_path, "demo")
    assert log_to_sweep_run(sweep, uri, description="# journal") == run_id
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "**journal**"
    with pytest.raises(UserError, match="does not answer"):
        log_to_sweep_run(sweep, "http://127.0.0.1:9")


def test_a_description_too_long_for_mlflow_loses_runs_and_no_words():
    listed = [f"- lr={i} -> 0.9 ± 0.1 (n=5)" for i in range(1000)]
    text = "\n".join(
        ["# Title", "asked", "", *listed, "", "Observations:", "- a beats b", "", MARK, "result: mine", ""]
    )
    cut = fitting(text)
    assert 7500 < len(cut) <= 8000
    assert cut.startswith("**Title**\nasked\n\n- lr=0 ->")
    assert "Observations:\n- a beats b" in cut
    assert cut.endswith("result: mine\n")
    left = int(re.search(r"- \.\.\. (\d+) more lines in the artifact report/journal.md", cut)[1])
    assert left + cut.count("- lr=") == 1000
    own = fitting(f"# Title\n{MARK}\n" + "my words " * 2000 + "the end")
    assert len(own) <= 8000
    assert own.endswith("the end")


@pytest.mark.parametrize("runs", ["running", "none"])
def test_every_command_reads_a_sweep_that_runs_or_has_just_begun(tmp_path, runs):
    """No command ends with a traceback; those with nothing to say refuse in one line."""
    arms = [replace(arm, running_at=4) if i else arm for i, arm in enumerate(lr_arms())]
    write_sweep(tmp_path, arms, epochs=9)
    if runs == "none":
        (tmp_path / "demo" / "runs.parquet").unlink()
        for part in (tmp_path / "demo" / "epochs").iterdir():
            part.unlink()
    out = ["--out", str(tmp_path / "out")]
    commands = [
        ["list"], ["report", "demo", "--journal"], ["journal", "demo"], ["doctor", "demo"], ["note", "demo", "so far"],
        ["compare", "demo", "--at", "epoch=3", "--metric", "test_acc"], ["table", "demo", "--rows", "lr"],
        ["plot", "demo"], ["replay", "demo"], ["export", "demo", "--layout", "csv", *out],
    ]  # fmt: skip
    for arguments in commands:
        done = CliRunner().invoke(app, [*arguments, "--storage", str(tmp_path)])
        assert done.exit_code in (0, 2), (arguments, done.output, done.exception)
        if done.exit_code == 2:
            assert done.stderr.startswith("error: "), arguments
            assert done.stderr.count("\n") == 1, arguments
        assert done.exit_code == 0 or arguments[0] == "replay" or runs == "none", (arguments, done.stderr)


def test_a_stored_tracking_server_that_is_away_costs_a_line_and_nothing_else(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3, tracking_uri="http://127.0.0.1:9")
    done = CliRunner().invoke(app, ["report", "demo", "--storage", str(tmp_path)])
    assert done.exit_code == 0
    assert "not logged to MLflow" in done.stderr
    assert (tmp_path / "demo" / "report" / "index.html").exists()


def test_ten_thousand_runs_are_summarised_without_their_curves(tmp_path):
    """The table reads runs.parquet alone: with the curves taken away, it still comes."""
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=2)
    path = tmp_path / "demo" / "runs.parquet"
    one = pq.read_table(path).to_pandas()
    many = []
    for copy in range(1000):
        part = one.copy()
        for key in ("config_key", "run_key"):
            part[key] = part[key].str[:6] + f"{copy:06x}"
        many.append(part)
    frame = pd.concat(many)
    frame.to_parquet(path)
    for part in (tmp_path / "demo" / "epochs").iterdir():
        part.write_bytes(b"unreadable")
    sweep = open_sweep(tmp_path, "demo")
    table = summarise(sweep, scores(sweep))
    assert len(table) == 5000
    assert json.loads(json.dumps(table["n"].tolist())) == [2] * 5000


def test_a_report_that_waits_is_written_when_told_and_not_without(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    command = [sys.executable, "-m", "analysis", "report", "demo", "--storage", str(tmp_path), "--tracking-uri", "none"]
    for told, written in (("", False), ("\n", True)):  # whoever starts it may be gone before the sweep is over
        done = subprocess.run([*command, "--when-told"], input=told, text=True, capture_output=True, check=True)
        assert (tmp_path / "demo" / "report" / "index.html").exists() == written == bool(done.stdout), done.stderr
