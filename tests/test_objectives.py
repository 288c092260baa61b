"""Several objectives: what searchers are told, what a resumed sweep plays again, and the front a user reads."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from mlflow import MlflowClient

from analysis.objectives import tradeoff
from analysis.store import open_sweep
from analysis.summary import scores
from search_spaces.space import Choice, Range, Space
from tests.test_command_line import plan_of
from tests.test_sweeps import assert_consistent
from tests.toy_sweeps import Process, sweep
from tuning.followup import Followup
from tuning.journal import read
from tuning.objectives import front
from tuning.resume import replay
from tuning.schedulers import make_scheduler
from tuning.searchers import FAIL, PRUNED, OptunaSource, make_source, tell_end

SPACE = Space((Range("lr", 0.0, 1.0), Choice("width", (3, 8))))
BOTH = ("test_loss", "device_seconds")


def test_optuna_is_told_every_objective_of_who_finished_and_none_of_who_did_not():
    source = OptunaSource(SPACE, ["min", "min"], 0, startup=5)
    for trial in ("done", "stopped", "diverged", "costless"):
        source.ask(trial)
    source.report("done", 1.0, 0.9)
    tell_end(
        source, "done", {"progress": 9, "test_loss": 0.3, "device_seconds": 2.0, "stop_reason": "finished"}, False, BOTH
    )
    tell_end(source, "stopped", {"progress": 1, "test_loss": 0.9, "device_seconds": 0.5}, False, BOTH)
    tell_end(source, "diverged", {"progress": 1, "test_loss": math.nan, "stop_reason": "diverged"}, False, BOTH)
    tell_end(source, "costless", {"progress": 9, "test_loss": 0.3, "stop_reason": "finished"}, False, BOTH)
    study = source._search._ot_study
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert study.trials[0].values == [0.3, 2.0]
    assert [t.values for t in study.trials[1:]] == [None, None, None]


def test_optuna_learns_a_front_of_two_objectives():
    """Minimising |x - 0.2| and |x - 0.4|, every x between them is on the front; random draws are there in 20%."""
    plan = plan_of("grid", metric="test_loss,device_seconds", searcher="optuna", trials=100)
    source = make_source(plan.__class__(**{**vars_of(plan), "space": Space((Range("lr", 0.0, 1.0),))}))
    points = []
    for i in range(60):
        x = source.ask(f"t{i}")["lr"]
        points.append(x)
        if i % 10 == 9:
            source.tell(f"t{i}", FAIL if i % 20 == 9 else PRUNED, None)
        else:
            source.tell(f"t{i}", "complete", abs(x - 0.2), [abs(x - 0.4)])
    inside = (np.array(points) > 0.2) & (np.array(points) < 0.4)
    assert inside[-30:].mean() > 0.4


def vars_of(plan) -> dict:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_two_objectives_end_to_end(tmp_path, killed):
    """Proposals after a kill are those that the journal's values lead to, device times among them."""
    arguments = (
        "demo", "--metric", "test_loss,device_seconds", "--scheduler", "none", "--trials", "9", "--engine", "serial",
        "--max-concurrent", "1", "--confirm", "1",
    )  # fmt: skip
    process = Process(tmp_path, "both", *arguments)
    if killed:
        process.when(lambda events: sum(event["event"] == "end" for event in events) >= 6)
        process.kill()
    swept = process.wait()
    if killed:
        swept = sweep(tmp_path, "both", "--resume", "both")
    assert swept.code == 0, swept.err
    assert_consistent(swept)
    assert "the searcher now proposes" not in swept.log
    runs = swept.runs[swept.runs.phase == "search"]
    means = runs.groupby("config_key").agg(loss=("final.test_loss", "mean"), cost=("device_seconds", "mean"))
    for event in swept.events("report"):
        seconds = [seed["device_seconds"] for seed in event["per_seed"].values()]
        assert event["values"]["device_seconds"] == pytest.approx(sum(seconds) / len(seconds))
    points = {key: (row.loss, row.cost) for key, row in means.iterrows()}
    best = [
        key for key, a in points.items() if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points.values())
    ]
    assert sorted(front(points, ["min", "min"])) == sorted(best)

    # the terminal
    (head,) = [i for i, line in enumerate(swept.out.splitlines()) if line.startswith("Pareto front: ")]
    shown = swept.out.splitlines()[head + 2 : head + 2 + len(best)]
    labels = dict(zip(swept.runs.config_key, swept.runs.label, strict=True))
    assert sorted(re.split(r"\s{2,}", line)[0] for line in shown) == sorted(labels[key] for key in best)
    # the winner of the first metric is on the front, and is what is confirmed
    (chosen,) = swept.events("confirm")
    assert [entry["config_key"] for entry in chosen["chosen"]] == [means.loss.idxmin()]
    # the report and its figure
    opened = open_sweep(tmp_path, "both")
    table = tradeoff(opened, scores(opened), "test_loss")
    assert set(table["config_key"][table["front"]]) == set(best)
    page = (swept.folder / "report" / "index.html").read_text()
    assert "<h2>Pareto front</h2>" in page
    assert (swept.folder / "report" / "pareto.png").is_file()
    assert "Pareto front of test_loss (min), device_seconds (min)" in page
    # MLflow
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    configs = client.search_runs(experiments, "tags.kind = 'config'")
    assert {c.data.tags["config_key"] for c in configs if c.data.tags["pareto"] == "true"} == set(best)
    for config in configs:
        assert config.data.metrics["device_seconds"] == pytest.approx(means.cost[config.data.tags["config_key"]])

    # a fresh searcher, played the journal, stands where this one did: its next proposal needs no luck
    plan = opened_plan(swept.folder)
    played = [make_source(plan), make_source(plan)]
    pasts = [replay(plan, swept.folder / "journal.jsonl", source, make_scheduler(plan)) for source in played]
    assert played[0].ask("next") == played[1].ask("next")
    assert not pasts[0].unfinished
    assert not Followup(plan, {}, print, [event for event, _ in read(swept.folder / "journal.jsonl")]).look


def opened_plan(folder):
    from tuning.sweep import SweepPlan

    return SweepPlan.load(folder)
