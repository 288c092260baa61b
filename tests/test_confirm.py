"""What follows a search, through the real command line: races, confirmation on fresh seeds, and their resumption."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from mlflow import MlflowClient

from analysis.compare import compare
from analysis.confirmation import confirmed_table
from analysis.store import open_sweep
from analysis.summary import scores
from tests.sweep_factory import tree
from tests.test_command_line import refused
from tests.test_sweeps import assert_consistent
from tests.toy_sweeps import Process, Swept, sweep
from tuning.race import looks
from tuning.sweep import CONFIRMING

RACE = ("grid", "--seeds", "3", "--engine", "serial", "--race", "--race-seeds", "5", "--space", "lr=0.1,0.03,1e-6")
"""Two learning rates that cannot be told apart in five seeds, and one that learns nothing."""


def told_of(swept: Swept) -> list[tuple]:
    """What was decided after the search, without times."""
    fields = ("event", "look", "seeds", "alive", "beaten", "verdict", "chosen", "ties", "next")
    return [tuple(str(event.get(name)) for name in fields) for event in swept.journal if event["event"] in LATER]


LATER = ("race", "confirm")


def further(swept: Swept) -> set[tuple]:
    """Which runs were made after the search: phase, config, seed, final value."""
    runs = swept.runs[swept.runs.phase != "search"]
    return {(r.phase, r.config_key, r.seed, r["final.test_loss"]) for _, r in runs.iterrows()}


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> Swept:
    """A race, then the two best on fresh seeds."""
    return sweep(tmp_path_factory.mktemp("raced"), "raced", *RACE, "--confirm", "2", "--confirm-seeds", "4")


def test_a_race_gives_seeds_to_who_is_in_contention_and_confirming_takes_fresh_ones(raced):
    assert raced.code == 0, raced.err
    assert_consistent(raced)
    runs = raced.runs
    assert set(runs.phase) == {"search", "race", "confirm"}
    assert (runs.stop_reason == "finished").all()
    assert (runs.epoch == runs.epochs_total).all(), "to their full length"
    seeds = {phase: rows.groupby("config_key")["seed"].agg(set) for phase, rows in runs.groupby("phase")}
    assert all(each == {0, 1, 2} for each in seeds["search"])
    planned = looks(3, 5)
    assert [event["seeds"] for event in raced.events("race")] == list(planned)
    for event, before, until in zip(raced.events("race"), planned, planned[1:], strict=False):
        alive = {entry["config_key"] for entry in event["alive"]}
        got = {key for key, each in seeds["race"].items() if set(range(before, until)) <= each}
        assert got == alive, "further seeds go to those in contention and to nobody else"
    (chosen,) = raced.events("confirm")
    assert chosen["seeds"] == [CONFIRMING + i for i in range(4)]
    assert set(seeds["confirm"].index) == {entry["config_key"] for entry in chosen["chosen"]}
    assert all(each == set(chosen["seeds"]) for each in seeds["confirm"])
    means = runs[runs.phase != "confirm"].groupby("config_key")["final.test_loss"].mean()
    alive = [entry["config_key"] for entry in raced.events("race")[-1]["alive"]]
    assert [entry["config_key"] for entry in chosen["chosen"]] == means[alive].sort_values().index[:2].tolist()


def test_only_confirmed_figures_are_called_the_result(raced):
    lines = raced.out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith("result: on 4 fresh seeds")]
    (search,) = [i for i, line in enumerate(lines) if line.startswith("what was chosen by, in the search")]
    fresh = raced.runs[raced.runs.phase == "confirm"].groupby("label")["final.test_loss"].mean()
    used = raced.runs[raced.runs.phase != "confirm"].groupby("label")["final.test_loss"].mean()
    for line in lines[head + 2 : head + 4]:
        label, mean, _, seeds, before, flattery = line.split()
        assert (float(mean), int(seeds)) == (pytest.approx(fresh[label], abs=1e-4), 4)
        assert float(before) == pytest.approx(used[label], abs=1e-4)
        assert float(flattery) == pytest.approx(fresh[label] - used[label], abs=2e-4), "lower is better"
    below = "\n".join(lines[search:])
    for label, mean in used.items():
        assert re.search(rf"^{re.escape(label)} +{mean:.4f} ", below, re.M)
    assert any(line.startswith("race: ") for line in lines)


def test_report_journal_and_compare_say_the_same(raced):
    storage, name = raced.folder.parent, raced.folder.name
    opened = open_sweep(storage, name)
    table = confirmed_table(opened, scores(opened), scores(opened, phase="confirm"), "test_loss").set_index(
        "config_key"
    )
    order = [entry["config_key"] for entry in raced.events("confirm")[0]["chosen"]]
    assert list(table.index) == order
    found = compare(storage, [name])
    assert found.phase == "confirm"
    assert len(found.arms) == 2
    assert set(found.arms["n"]) == {4}
    assert sorted(found.arms["mean"]) == pytest.approx(sorted(table["mean"]))
    searched = compare(storage, [name], phase="search")
    assert len(searched.arms) == 3
    assert any("--phase confirm" in note for note in searched.notes)
    page = (raced.folder / "report" / "index.html").read_text()
    assert page.index("Result: test_loss") < page.index("What was chosen by, in the search: test_loss")
    assert "race: " in page


def test_mlflow_tells_phases_apart(raced):
    client = MlflowClient(f"sqlite:///{raced.folder.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name.startswith("tests.toys.regression")]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    phases = {run.data.tags["run_key"]: run.data.tags["phase"] for run in runs if run.data.tags["kind"] == "run"}
    assert phases == dict(zip(raced.runs.run_key, raced.runs.phase, strict=True))
    fresh = raced.runs[raced.runs.phase == "confirm"].groupby("config_key")["final.test_loss"]
    used = raced.runs[raced.runs.phase != "confirm"].groupby("config_key")["final.test_loss"]
    for run in runs:
        if run.data.tags["kind"] == "config":
            key, metrics = run.data.tags["config_key"], run.data.metrics
            assert metrics["final/test_loss"] == pytest.approx(used.mean()[key])
            assert metrics["seeds"] == used.size()[key]
            assert metrics.get("confirm/test_loss") == (
                pytest.approx(fresh.mean()[key]) if key in fresh.groups else None
            )
    (top,) = [run for run in runs if run.data.tags["kind"] == "sweep"]
    first = raced.events("confirm")[0]["chosen"][0]
    assert top.data.tags["result_config_key"] == first["config_key"]
    assert top.data.metrics["result/test_loss"] == pytest.approx(fresh.mean()[first["config_key"]])
    assert top.data.metrics["result/test_loss_sd"] == pytest.approx(fresh.std()[first["config_key"]])
    chosen_by = raced.runs[(raced.runs.phase != "confirm") & (raced.runs.stop_reason == "finished")]
    means = chosen_by.groupby("config_key")["final.test_loss"].mean()
    assert top.data.metrics["best/test_loss"] == pytest.approx(means.min())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--confirm", "0"), "--confirm 0 should be 1 or more"),
        (("--confirm", "4"), "more configs than the sweep tries (3)"),
        (("--race-seeds", "9"), "the race of 'raced' has begun"),
        (("--margin", "0.1"), "the race of 'raced' has begun"),
    ],
)
def test_what_cannot_be_asked_of_a_finished_sweep_is_one_line(raced, capfd, asked, told):
    before = contents(raced)
    assert told in refused(["--resume", "raced", *asked], raced.folder.parent, capfd)
    assert contents(raced) == before


def contents(swept: Swept) -> dict[str, bytes]:
    """Everything but the lock, which says who held it last."""
    return {name: data for name, data in tree(swept.folder).items() if name != "driver.lock"}


@pytest.mark.heavy
def test_killed_in_a_race_and_again_while_confirming_it_resumes_to_the_same(tmp_path, raced):
    arguments = (*RACE, "--confirm", "2", "--confirm-seeds", "4", "--max-concurrent", "1")
    first = Process(tmp_path, "raced", *arguments)
    first.when(lambda events: any(e["event"] == "end" and e["trial"] in of(events, "race") for e in events))
    first.kill()
    first.wait()
    second = Process(tmp_path, "raced", "--resume", "raced")
    second.when(lambda events: any(e["event"] == "proposed" and e["phase"] == "confirm" for e in events))
    second.kill()
    second.wait()
    resumed = sweep(tmp_path, "raced", "--resume", "raced")
    assert resumed.code == 0, resumed.err
    assert_consistent(resumed)
    assert told_of(resumed) == told_of(raced)
    assert further(resumed) == further(raced)
    keys = [key for event in resumed.events("proposed") for key in event["runs"].values()]
    assert len(keys) == len(set(keys)), "no run is proposed twice"


def of(events: list, phase: str) -> set[str]:
    return {event["trial"] for event in events if event["event"] == "proposed" and event["phase"] == phase}


@pytest.fixture(scope="module")
def once(tmp_path_factory, undisturbed) -> Swept:
    """A sweep that had finished, its best config confirmed on two seeds."""
    storage = tmp_path_factory.mktemp("once")
    folder = shutil.copytree(undisturbed.folder, storage / "whole")
    plain = json.loads((folder / "sweep.json").read_text())  # a record of its own: other tests read the first one's
    (folder / "sweep.json").write_text(json.dumps(plain | {"tracking_uri": f"sqlite:///{storage / 'mlflow.db'}"}))
    (folder / "tracking.json").unlink(missing_ok=True)
    return sweep(storage, "whole", "--resume", "whole", "--confirm", "1", "--confirm-seeds", "2")


def test_a_finished_sweep_can_be_confirmed_afterwards(once, undisturbed):
    assert once.code == 0, once.err
    assert "result: on 2 fresh seeds" in once.out
    before = undisturbed.runs
    finished = before[before.config_stop_reason == "finished"].groupby("config_key")["final.test_loss"].mean()
    confirmed = once.runs[once.runs.phase == "confirm"]
    assert set(confirmed.config_key) == {finished.idxmin()}
    assert list(confirmed.seed) == [CONFIRMING, CONFIRMING + 1]
    kept = once.runs[once.runs.phase == "search"].reset_index(drop=True)
    assert np.array_equal(kept["final.test_loss"], before["final.test_loss"]), "the search is as it was"
    told = [event for event in once.journal if event["event"] == "begin"]
    assert (told[-1]["confirm"], told[-1]["confirm_seeds"]) == (1, 2)


@pytest.mark.heavy
def test_more_of_it_repeats_nothing_and_the_journal_remembers_what_was_asked(once):
    confirmed = once.runs[once.runs.phase == "confirm"]
    again = sweep(once.folder.parent, "whole", "--resume", "whole", "--confirm-seeds", "3")
    assert again.code == 0, again.err
    more = again.runs[again.runs.phase == "confirm"]
    assert sorted(more.seed) == [CONFIRMING + i for i in range(3)]
    assert set(confirmed.run_key) < set(more.run_key)
    assert len(again.events("proposed")) == again.runs.config_key.nunique() + 2
