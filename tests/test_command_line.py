"""The command line: what it resolves, what it prints, and that a mistake is one line, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import tests.toys.regression as toy
from search_spaces.space import Arms, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps
from tests.toys.sweeps import SWEEPS
from trainables.family import BadValue, load_family
from tuning.cli import main, resolve
from tuning.sweep import SweepPlan
from tuning.values import parse_axis, parse_field, parse_like, replace_axis

FLAGS = {
    "data": None,
    "data_dir": None,
    "trials": None,
    "seeds": None,
    "seed": 0,
    "searcher": None,
    "scheduler": None,
    "metric": None,
    "covariates": None,
    "lanes": "auto",
    "engine": "auto",
    "settings": [],
    "dimensions": [],
    "name": None,
    "storage": Path("sweeps"),
    "tracking_uri": None,
    "address": "",
    "max_concurrent": 0,
    "time_budget": 0.0,
}


def plan_of(sweep: str | None = None, **flags) -> SweepPlan:
    return resolve(SWEEPS, sweep, **{**FLAGS, **flags})


def refused(arguments: list[str], storage: Path, capfd, sweeps: Sweeps = SWEEPS) -> str:
    """Run the command line, which must refuse; returns the one line it says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(sweeps, [*arguments, "--storage", str(storage)])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.strip()
    return err


MISTAKES = {
    "sweep": (["gird"], "did you mean grid"),
    "flag": (["grid", "--serchr", "grid"], "--serchr"),
    "searcher": (["grid", "--searcher", "annealing"], "annealing"),
    "scheduler": (["grid", "--scheduler", "hyperband"], "hyperband"),
    "engine": (["grid", "--engine", "warp"], "warp"),
    "metric": (["grid", "--metric", "accuracy"], "nothing tests.toys.regression can optimise"),
    "set-field": (["grid", "--set", "depth=3"], "no field 'depth'"),
    "set-form": (["grid", "--set", "width"], "should look like name=value"),
    "set-whole": (["grid", "--set", "width=3.5"], "should be a whole number"),
    "set-number": (["grid", "--set", "lr=fast"], "should be a number"),
    "set-invalid": (["grid", "--set", "optimizer=adam"], "is not sgd"),
    "set-preset": (["grid", "--set", "preset=L3"], "no preset 'L3'"),
    "space-field": (["grid", "--space", "depth=1,2"], "neither an axis of this sweep"),
    "space-empty": (["grid", "--space", "lr=0.3..0.1"], "empty range"),
    "space-nothing": (["grid", "--space", "lr="], "should look like name=value"),
    "space-log-zero": (["grid", "--space", "lr=0..1:log"], "above 0"),
    "space-not-a-number": (["grid", "--space", "optimizer=a..b"], "is not a number"),
    "space-bad-end": (["grid", "--space", "lr=low..1"], "should be a number"),
    "space-list": (["grid", "--space", "lr=0.1,x"], "should be a number"),
    "space-arm": (["named", "--space", "run=exp1,exp9"], "no arm 'exp9'"),
    "space-nan": (["grid", "--space", "lr=nan..1"], "finite number"),
    "grid-range": (["grid", "--space", "lr=0.1..0.3"], "a grid cannot enumerate the range lr"),
    "random-endless": (["grid", "--space", "lr=0.1..0.3", "--searcher", "random"], "--trials"),
    "seeds": (["grid", "--seeds", "0"], "--seeds 0 should be 1 or more"),
    "seeds-type": (["grid", "--seeds", "two"], "'--seeds'"),
    "trials": (["grid", "--trials", "0"], "--trials 0 should be 1 or more"),
    "seed": (["grid", "--seed", "-1"], "--seed -1"),
    "lanes": (["grid", "--lanes", "many"], "--lanes many"),
    "lanes-zero": (["grid", "--lanes", "0"], "--lanes 0"),
    "concurrent": (["grid", "--max-concurrent", "-2"], "--max-concurrent -2"),
    "budget": (["grid", "--time-budget", "-1"], "--time-budget -1"),
    "data-dir": (["grid", "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
    "name-path": (["grid", "--name", "../x"], "'../x'"),
    "name-hidden": (["grid", "--name", ".x"], "'.x'"),
    "name-slash": (["grid", "--name", "a/b"], "'a/b'"),
    "resume-path": (["grid", "--resume", "../x"], "'../x'"),
    "resume-unknown": (["grid", "--resume", "never"], "no sweep 'never'"),
    "confirm-none": (["grid", "--confirm", "0"], "--confirm 0 should be 1 or more"),
    "confirm-more-than-there-are": (["grid", "--confirm", "7"], "more configs than the sweep tries (6)"),
    "confirm-seeds-none": (["grid", "--confirm", "1", "--confirm-seeds", "0"], "--confirm-seeds 0 should be 1 or more"),
    "confirm-seeds-alone": (["grid", "--confirm-seeds", "3"], "say how many configs with --confirm"),
    "confirm-seeds-many": (["grid", "--confirm", "1", "--confirm-seeds", "5000"], "at most 4999 seeds"),
    "confirm-pbt": (["grid", "--confirm", "1", "--scheduler", "pbt"], "--confirm trains configs on further seeds"),
    "race-one-seed": (["grid", "--race", "--seeds", "1"], "give --seeds 2 or more"),
    "race-pbt": (["grid", "--race", "--scheduler", "pbt"], "choose another scheduler"),
    "race-seeds-few": (["grid", "--race", "--seeds", "3", "--race-seeds", "3"], "should be more than --seeds 3"),
    "race-seeds-alone": (["grid", "--race-seeds", "9"], "give --race too"),
    "race-two-metrics": (["grid", "--race", "--metric", "test_loss,device_seconds"], "one finishing line"),
    "margin-alone": (["grid", "--margin", "0.1"], "give --race too"),
    "margin-nothing": (["grid", "--race", "--margin", "0"], "--margin 0 should be above 0"),
    "margin-nan": (["grid", "--race", "--margin", "nan"], "--margin nan should be above 0"),
    "metric-in-list": (["grid", "--metric", "test_loss,hours"], "--metric hours is nothing"),
    "metric-empty": (["grid", "--metric", "test_loss,"], "nothing tests.toys.regression can optimise"),
    "metric-twice": (["grid", "--metric", "test_loss,test_loss"], "names test_loss twice"),
    "metrics-hyperopt": (["demo", "--metric", "test_loss,device_seconds", "--searcher", "hyperopt"], "one metric only"),
    "metrics-pbt": (["grid", "--metric", "test_loss,device_seconds", "--scheduler", "pbt"], "needs one metric"),
    "cost-asha": (["demo", "--metric", "device_seconds,test_loss"], "name another metric first"),
    "pbt-no-hyper": (["grid", "--scheduler", "pbt", "--set", "lr=0.1"], "nothing to perturb"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("LANEWISE_DATA", raising=False)
    arguments, told = MISTAKES[mistake]
    assert told in refused(arguments, tmp_path / "sweeps", capfd)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_needs_resume(tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    assert "--resume mine" in refused(["grid", "--name", "mine"], tmp_path, capfd)
    assert list((tmp_path / "mine").iterdir()) == []


def test_storage_that_cannot_be_a_folder(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["grid", "--name", "x"], tmp_path / "file" / "sweeps", capfd)
    assert (tmp_path / "file").read_text() == ""


def test_a_damaged_sweep_json_is_told(tmp_path, capfd):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "sweep.json").write_text('{"name": "to')
    assert "damaged" in refused(["--resume", "torn"], tmp_path, capfd)


def test_a_family_that_does_not_exist_is_told(tmp_path, capfd):
    sweeps = Sweeps("no_such_family", "a", (Sweep("a", "doc", "wish", Space((Choice("lr", (1.0,)),))),))
    assert "no_such_family" in refused([], tmp_path, capfd, sweeps)


def test_missing_data_is_told_before_anything_is_written(tmp_path, capfd, monkeypatch):
    def load(program, data_dir, cache_dir):
        if program.data == "far":
            raise BadValue(f"data set 'far' needs {data_dir / 'far.npy'}, which does not exist")
        return toy.load(program, data_dir, cache_dir)

    monkeypatch.setattr(toy, "FAMILY", replace(toy.FAMILY, load=load))
    arguments = ["grid", "--data", "far", "--data-dir", str(tmp_path)]
    assert "far.npy" in refused(arguments, tmp_path / "sweeps", capfd)
    assert list(tmp_path.iterdir()) == []


def test_as_a_process_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "tests.toys.tune_toy"]
    for arguments in (["grid", "--set", "width=x"], ["grid", "--nonsense"]):
        done = subprocess.run(
            [*command, *arguments, "--storage", str(tmp_path / "s")], capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- what flags mean ---


def test_flags_override_the_sweep_and_the_sweep_the_defaults():
    plan = plan_of()
    assert (plan.sweep, plan.searcher, plan.scheduler, plan.seeds, plan.budget) == ("demo", "optuna", "asha", 2, 12)
    plan = plan_of("grid", seeds=3, scheduler="median", trials=4, storage=Path("/tmp/x"))
    assert (plan.seeds, plan.scheduler, plan.budget, plan.searcher) == (3, "median", 4, "grid")
    assert plan.tracking_uri == "sqlite:////tmp/x/mlflow.db"
    assert plan_of("grid", trials=100).budget == 6, "a grid has no more configs than it has"
    assert plan_of("exp2").resolve(next(plan_of("exp2").space.grid())).hyper["lr"] == 0.01


def test_set_fixes_a_field_everywhere():
    plan = plan_of("demo", settings=["lr=0.25"], searcher="grid")
    assert plan.budget == 2
    assert {plan.resolve(point).hyper["lr"] for point in plan.space.grid()} == {0.25}
    plan = plan_of("named", settings=["lr=0.25"])
    assert plan.budget == 1, "arms that are now equal are one config"


def test_space_replaces_a_dimension_in_its_place():
    plan = plan_of("demo", dimensions=["lr=0.1,0.2,0.3"], searcher="grid")
    assert plan.budget == 6
    assert [axis.name for axis in plan.space.axes] == ["width", "lr"]
    plan = plan_of("grid", dimensions=["lr=1e-3..1:log", "width=2..9"], searcher="random", trials=5)
    lr, width = plan.space.axes
    assert lr == Range("lr", 1e-3, 1.0, log=True)
    assert width == Range("width", 2, 9, integer=True)


def test_data_sets_the_program_s_data():
    assert plan_of("grid", data="other").base["data"] == "other"


def test_values_take_the_type_of_their_field():
    family = load_family("tests.toys.regression")
    assert parse_field(family, "width", "4") == 4
    assert parse_field(family, "lr", "1e-3") == 1e-3
    assert parse_field(family, "optimizer", "sgd") == "sgd"
    assert parse_like("x", "no", True) is False
    assert parse_like("x", "3-4,5", (1,)) == (3, 4, 5)
    assert parse_like("x", "0.5,1e-3", (1.0,)) == (0.5, 1e-3)
    with pytest.raises(BadValue, match="true or false"):
        parse_like("x", "maybe", True)


def test_an_axis_given_by_the_user_keeps_field_and_condition_of_the_one_it_replaces():
    family = load_family("tests.toys.regression")
    space = Space((Choice("width", (3, 8)), Choice("rate", (0.1,), sets="lr", when={"width": (3,)})))
    axis = parse_axis(family, space, "rate=0.1..0.5")
    assert axis == Range("rate", 0.1, 0.5, sets="lr", when={"width": (3,)})
    arms = Space((Arms("run", {"a": {"lr": 0.1}, "b": {"lr": 0.2}}),))
    assert replace_axis(arms, parse_axis(family, arms, "run=b")).size() == 1
    assert replace_axis(arms, parse_axis(family, arms, "lr=1,2")).size() == 2, "arms that set only lr are one"


def test_plans_survive_json():
    later = {"confirm": 2, "confirm_seeds": 7, "race": None, "race_seeds": None, "margin": None}
    metric = "test_loss,device_seconds"
    plan = plan_of("demo", settings=["noise=0.5"], covariates="all", time_budget=9.0, metric=metric, later=later)
    assert (plan.objectives, plan.confirm, plan.confirm_seeds) == (("test_loss", "device_seconds"), 2, 7)
    again = SweepPlan.from_plain(plan.to_plain(), plan.storage)
    assert again == plan
    assert again.resolve(again.space.at({"width": 0.9, "lr": 0.5})) == plan.resolve(
        plan.space.at({"width": 0.9, "lr": 0.5})
    )


def test_what_a_named_sweep_asks_for_afterwards_and_flags_over_it():
    (sweep,) = [sweep for sweep in SWEEPS.sweeps if sweep.name == "grid"]
    asking = replace(SWEEPS, sweeps=(replace(sweep, confirm=2, race=True),), default="grid")
    plan = resolve(asking, None, **FLAGS)
    assert (plan.confirm, plan.race) == (2, True)
    assert plan.fresh_seeds() == [5_000, 5_001]
    assert not set(plan.fresh_seeds()) & set(plan.run_seeds(4_999))
    later = {"confirm": 3, "confirm_seeds": 4, "race": None, "race_seeds": 9, "margin": 0.1}
    plan = resolve(asking, None, **FLAGS, later=later)
    assert (plan.confirm, plan.race_seeds, plan.margin) == (3, 9, 0.1)
    assert len(plan.fresh_seeds()) == 4
    assert SweepPlan.from_plain(plan.to_plain(), plan.storage) == plan


def test_seeds_of_runs_are_paired_and_follow_the_sweep_s_seed():
    assert plan_of("grid").run_seeds() == [0, 1]
    assert plan_of("grid", seed=7, seeds=3).run_seeds() == [70_000, 70_001, 70_002]


# --- what is printed ---


def test_list_shows_every_sweep_with_its_counts(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(SWEEPS, ["--list"])
    out, err = capfd.readouterr()
    assert (stopped.value.code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["grid"][1:4] == ["6", "2", "54"], "six configs, two seeds, 9 epochs of 6 steps"
    assert rows["demo"][1] == "(default)"
    assert "exp1, exp2" in out


def test_plan_measures_and_writes_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LANEWISE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        main(SWEEPS, ["grid", "--plan", "--storage", str(tmp_path / "sweeps")])
    out, _ = capfd.readouterr()
    assert stopped.value.code == 0
    assert "6 configs x 2 seeds by grid" in out
    assert "54 steps a run" in out
    assert "serial" in out
    assert "device-hours" in out
    assert not (tmp_path / "sweeps").exists()


def test_help_tells_every_flag_and_its_default(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(SWEEPS, ["--help"])
    out, _ = capfd.readouterr()
    assert stopped.value.code == 0
    names = (
        "list plan data data-dir trials seeds seed searcher scheduler metric covariates lanes engine set space name "
        "storage tracking-uri address resume max-concurrent time-budget quiet confirm confirm-seeds race race-seeds "
        "margin"
    )
    for flag in names.split():
        assert f"--{flag}" in out
    assert "LANEWISE_DATA" in out


@pytest.mark.parametrize("family", ["ci_vit", "vgg_decay", "multi_neuron", "snn_delays", "dln"])
def test_all_covariates_of_every_family(family):
    plan = resolve(import_module(f"search_spaces.{family}").SWEEPS, None, **{**FLAGS, "covariates": "all"})
    known = load_family(family).covariates
    assert plan.covariates == (known or ("all",))
    if known:
        program, _ = plan.loaded.build(plan.reference.values)
        assert program.covariates == known
