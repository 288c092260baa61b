"""Sweeps end to end, as processes: what they print, and that everything they leave on disk tells one story."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import termios
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.toy_sweeps import UNDISTURBED, Process, Swept, sweep

FINISHED_COLUMNS = ("config", "test_loss", "± sd", "seeds", "epochs", "stop reason", "device time")


def assert_consistent(swept: Swept, network: str = "127.0.0.1", lost: bool = False) -> None:
    """runs.parquet, epochs, steps and the journal agree with one another and with docs/storage.md."""
    runs, epochs, steps = swept.runs.set_index("run_key"), swept.table("epochs"), swept.table("steps")
    last = {}
    for event in swept.events("report"):
        for seed in event["per_seed"].values():
            last[seed["run_key"]] = seed
    keys = {key for event in swept.events("proposed") for key in event["runs"].values()}
    assert set(runs.index) == keys
    assert set(epochs.run_key) <= keys
    for key, row in runs.iterrows():
        mine, updates = epochs[epochs.run_key == key], steps[steps.run_key == key]
        first = 0 if pd.isna(row.parent_epoch) else int(row.parent_epoch)
        per_epoch = 6
        reported = last[key]
        assert (row.epoch, row.step) == (reported["epoch"], reported["step"])
        assert set(range(first + 1, row.epoch + 1)) <= set(mine.epoch)
        assert list(updates.step) == list(range(first * per_epoch + 1, int(updates.step.max()) + 1))
        assert (mine.config_key == row.config_key).all()
        assert (mine.seed == row.seed).all()
        assert (mine.step == mine.epoch * per_epoch).all()
        whole = updates[updates.step <= mine.epoch.max() * per_epoch]
        means = whole.train_loss.to_numpy(np.float64).reshape(-1, per_epoch).mean(1)
        np.testing.assert_allclose(mine.train_loss, means, rtol=1e-6)
        if row.stop_reason != "diverged":
            at_end = mine[mine.epoch == row.epoch].iloc[0]
            assert row["final.test_loss"] == at_end.test_loss == reported["values"]["test_loss"]
        assert row["best.test_loss"] <= row["final.test_loss"] or math.isnan(row["final.test_loss"])
        assert row.stop_reason in ("finished", "stopped", "diverged", "cancelled")
        assert (
            (row.rung == row.epoch)
            if row.stop_reason == "stopped"
            else pd.isna(row.rung) or row.stop_reason == "diverged"
        )
        assert row.device_seconds > 0
        # on one machine Ray listens to nobody else
        assert row.device.rpartition("@")[2].startswith(network)
        assert row.started_at <= row.ended_at
    assert lost or "Traceback" not in swept.log
    assert "Failed to fetch metrics" not in swept.log
    assert "MLflow is away" not in swept.log


def assert_only_what_was_promised(out: str) -> None:
    """Progress lines, one table, three lines."""
    lines = out.rstrip("\n").split("\n")
    head = next(i for i, line in enumerate(lines) if line.startswith("config "))
    for line in lines[:head]:
        assert " done · " in line or " ... " in line, line
    blank = lines.index("", head)
    assert all(name in lines[head] for name in FINISHED_COLUMNS)
    assert [line.split()[0] for line in lines[blank + 1 :]] == ["report", "MLflow", "resume"]


def test_a_whole_sweep_prints_what_was_promised(undisturbed):
    assert undisturbed.code == 0, undisturbed.err
    assert undisturbed.err == ""
    assert_only_what_was_promised(undisturbed.out)
    assert str(undisturbed.folder.name) in undisturbed.out.splitlines()[-1]


def on_terminal(storage: Path, *arguments: str, interrupt: Sequence[str] = ()) -> tuple[int, str]:
    """A sweep of the toy on a terminal of 80 columns: its exit code, and all that was drawn.

    interrupt: what is waited for on the screen before each Ctrl-C.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = Process(storage, "drawn", "grid", "--engine", "serial", *arguments, terminal=theirs)
    os.close(theirs)
    drawn, waited_for = b"", list(interrupt)
    with contextlib.suppress(OSError):  # nobody has the terminal open any more
        while chunk := os.read(ours, 65536):
            drawn += chunk
            if waited_for and waited_for[0].encode() in drawn:
                waited_for.pop(0)
                process.interrupt()
    os.close(ours)
    swept = process.wait()
    assert not waited_for, drawn.decode()
    return swept.code, drawn.decode()


def lines_of(drawn: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_terminal_shows_the_same_and_nothing_of_what_libraries_say(tmp_path):
    code, drawn = on_terminal(tmp_path, "--trials", "2")
    assert code == 0, drawn
    assert "authentication" in (tmp_path / "drawn" / "log.txt").read_text(), "Ray does say something"
    lines = lines_of(drawn)
    head = next(i for i, line in enumerate(lines) if line.startswith("config "))
    assert {line for line in lines[:head] if " done · " not in line and " ... " not in line} == set()
    assert any("2/2 done" in line for line in lines[:head])
    assert [line.split()[0] for line in lines[head + 1 :]] == ["lr=0.3", "lr=0.1", "report", "MLflow", "resume"]
    assert max(map(len, lines[: head + 3])) <= 80


def test_a_terminal_is_left_in_order_by_ctrl_c_twice(tmp_path):
    code, drawn = on_terminal(tmp_path, "--set", "epochs=2187", interrupt=[" done · ", "stopping: "])
    assert code == 130, drawn
    said = [line for line in lines_of(drawn) if "stop" in line]
    assert said[0] == "stopping: checkpoints, then the report; once more to stop now"
    assert said[-1].startswith("stopped at once; continue with: python tune_toy.py --resume drawn")
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l"), "the cursor is shown again"


@pytest.mark.heavy
def test_two_sweeps_that_begin_at_once_in_one_new_storage_are_both_whole(tmp_path, undisturbed):
    """From two terminals: neither MLflow's database nor its experiment is there yet."""
    both = [Process(tmp_path, name, *UNDISTURBED) for name in ("left", "right")]
    client = None
    for process in both:
        swept = process.wait()
        assert swept.code == 0, swept.err + swept.log
        assert list(swept.runs["final.test_loss"]) == list(undisturbed.runs["final.test_loss"])
        client = client or MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name.startswith("tests.toys")]
        runs = client.search_runs([experiment.experiment_id], f"tags.sweep = '{process.name}'", max_results=1000)
        kinds = Counter((run.data.tags["kind"], run.info.status) for run in runs)
        assert kinds == {("sweep", "FINISHED"): 1, ("config", "FINISHED"): 6, ("run", "FINISHED"): 12}


def test_a_whole_sweep_leaves_one_story(undisturbed):
    assert_consistent(undisturbed)
    kinds = [event["event"] for event in undisturbed.journal]
    assert (kinds[0], kinds[-1]) == ("begin", "finish")
    assert undisturbed.journal[-1]["reason"] == "done"
    runs = undisturbed.runs
    assert len(runs) == 12
    assert set(runs.seed) == {0, 1}
    assert {"finished", "stopped"} <= set(runs.stop_reason)
    assert not [path for path in (undisturbed.folder / "checkpoints").glob("*") if path.is_dir()], (
        "checkpoints of ended configs go"
    )
    assert (undisturbed.folder / "report" / "index.html").is_file()
    plain = json.loads((undisturbed.folder / "sweep.json").read_text())
    assert plain["scheduler"]["name"] == "asha"
    assert plain["versions"]["ray"]


def test_asha_in_a_sweep_decides_as_computed_by_hand(undisturbed):
    seen: dict[float, list[float]] = {}
    values = {}
    for event in undisturbed.journal:
        if event["event"] == "report":
            values[event["trial"]] = (event["progress"], -event["values"]["test_loss"], event["done"])
        elif event["event"] == "decision":
            progress, value, done = values[event["trial"]]
            rung = max(r for r in (1.0, 3.0, 9.0, 27.0) if r <= progress)
            before = seen.setdefault(rung, [])
            keep = not before or value >= np.percentile(before, 100 * 2 / 3)
            before.append(value)
            assert event["decision"] == ("STOP" if done or not keep else "CONTINUE")
    assert len(seen[1.0]) == 6


def decisions(swept: Swept) -> list[tuple]:
    """What the sweep did, without times and trial ids."""
    fields = ("event", "index", "config_key", "point", "runs", "epoch", "progress", "values", "decision", "stop_reason")
    return [tuple(str(event.get(name)) for name in fields) for event in swept.journal if event["event"] != "begin"]


def assert_same_curves(a: Swept, b: Swept) -> None:
    for kind in ("steps", "epochs"):
        drop = ["time"] if kind == "epochs" else []
        pd.testing.assert_frame_equal(a.table(kind).drop(columns=drop), b.table(kind).drop(columns=drop))


def test_model_based_search_with_lanes_diverging_configs_and_quiet(tmp_path):
    """Optuna + ASHA, stacked, two lanes a device; one arm explodes before its first rung."""
    swept = sweep(
        tmp_path, "lanes", "demo", "--trials", "8", "--lanes", "2", "--engine", "stacked", "--quiet",
        "--space", "explode_at=5,1e9", "--seed", "3", "--covariates", "all",
    )  # fmt: skip
    assert (swept.code, swept.out, swept.err) == (0, "", "")
    assert_consistent(swept)
    runs = swept.runs
    exploding = runs[runs["hyper.explode_at"] == 5]
    assert len(exploding)
    assert set(exploding.stop_reason) == {"diverged"}
    assert (exploding.step == 5).all()
    assert "diverged" not in set(runs[runs["hyper.explode_at"] != 5].stop_reason)
    assert set(runs.seed) >= {30_000, 30_001}
    assert set(runs.engine) == {"stacked"}
    assert runs.lanes.max() <= 2
    assert len(list((swept.folder / "covariates").iterdir()))


def test_population_based_training(tmp_path):
    swept = sweep(
        tmp_path, "pbt", "grid", "--scheduler", "pbt", "--searcher", "random", "--trials", "4", "--engine", "serial",
        "--set", "epochs=10", "--space", "width=3,8", "--space", "lr=1e-4..0.3:log",
    )  # fmt: skip
    assert swept.code == 0, swept.err + swept.log
    assert_consistent(swept)
    assert_only_what_was_promised(swept.out)
    runs = swept.runs.set_index("run_key")
    copies = runs[runs.parent_run_key.notna()]
    assert len(copies)
    for _, row in copies.iterrows():
        parent = runs.loc[row.parent_run_key]
        assert row["program.width"] == parent["program.width"], "never another net than the parent's"
        assert row.seed == parent.seed
        assert row.parent_epoch <= parent.epoch
        assert 1e-4 <= row["hyper.lr"] <= 0.3
    assert (copies["hyper.lr"] != runs.loc[copies.parent_run_key]["hyper.lr"].to_numpy()).any()
    ends = swept.events("end")
    assert sum(event["stop_reason"] == "finished" for event in ends) == 4
    assert len(swept.events("proposed")) == len(ends) == 4 + len(copies) // 2
    assert len([e for e in swept.events("decision") if e["decision"] == "EXPLOIT"]) == len(copies) // 2
    # by runs: a copy that is exploited again may come to be the same config once more, as other runs
    reported = [
        (run["run_key"], event["epoch"]) for event in swept.events("report") for run in event["per_seed"].values()
    ]
    assert len(reported) == len(set(reported)), "a pause repeats no report"


# --- more pairs and flags ---


@pytest.mark.heavy
def test_the_same_command_twice_is_the_same_sweep(tmp_path, undisturbed):
    again = sweep(tmp_path, "again", *UNDISTURBED)
    assert decisions(again) == decisions(undisturbed)
    assert_same_curves(again, undisturbed)
    other = sweep(tmp_path, "other", *UNDISTURBED, "--seed", "1")
    assert not set(other.runs.run_key) & set(undisturbed.runs.run_key)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("searcher", "scheduler"),
    [("optuna", "asha"), ("hyperopt", "median"), ("qmc", "none"), ("random", "median"), ("optuna", "pbt")],
)
def test_proposals_and_decisions_repeat(tmp_path, searcher, scheduler):
    arguments = (
        "demo", "--trials", "8", "--searcher", searcher, "--scheduler", scheduler, "--engine", "serial",
        "--max-concurrent", "1",
    )  # fmt: skip
    first, second = (sweep(tmp_path, name, *arguments) for name in ("first", "second"))
    for swept in (first, second):
        assert swept.code == 0, swept.err
        assert_consistent(swept)
    assert decisions(first) == decisions(second)
    assert_same_curves(first, second)


@pytest.mark.heavy
def test_lanes_off_is_serial(tmp_path):
    swept = sweep(tmp_path, "off", "grid", "--lanes", "off")
    assert_consistent(swept)
    assert set(swept.runs.engine) == {"serial"}


@pytest.mark.heavy
def test_a_time_budget_ends_the_sweep_and_resume_goes_on(tmp_path):
    arguments = ("grid", "--set", "epochs=1000", "--engine", "serial", "--max-concurrent", "1")
    swept = sweep(tmp_path, "short", *arguments, "--time-budget", "8")
    assert swept.code == 0, swept.err
    assert swept.journal[-1]["reason"] == "time budget"
    assert "cancelled" in set(swept.runs.stop_reason)
    assert_only_what_was_promised(swept.out)
