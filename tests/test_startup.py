"""What each process loads before it does anything: a short sweep must not spend its time on imports."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lanes.placement import Placement, Slot
from trainables.family import Family, Late, Schedule, load_family

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"torch", "safetensors"}
STATISTICS = {"scipy", "sklearn", "matplotlib", "plotly"}
SEARCHERS = {"optuna", "hyperopt"}
FRAMES = {"pandas", "pyarrow"}  # ray.tune imports both itself


@pytest.mark.parametrize(
    ("process", "code", "unwanted"),
    [
        (
            "the command line, until a plan is resolved and its data read",
            "from search_spaces.ci_vit import SWEEPS\n"
            "import tuning.cli, tuning.runner, pathlib, tempfile\n"
            "from trainables.family import load_family\n"
            "family = load_family(SWEEPS.family)\n"
            "program, _ = family.build(SWEEPS.find('demo').base)\n"
            "family.schedule(program)\n"
            "family.load(program, None, pathlib.Path(CACHE))",
            {"ray", "mlflow", *TRAINING, *STATISTICS, *SEARCHERS, *FRAMES},
        ),
        (
            "the driver of a random or grid search",
            "import tuning.recorder, tuning.resume, tuning.searchers, tuning.trial, tuning.ramp, lanes.pool",
            {"mlflow", *TRAINING, *STATISTICS, *SEARCHERS},
        ),
        ("a trial", "import tuning.trial", {"mlflow", *TRAINING, *STATISTICS, *SEARCHERS}),
        (
            "the pool, with the settings it hands on to hosts",
            "import lanes.pool, tuning.runner",
            {"ray.tune", "mlflow", *TRAINING, *STATISTICS, *SEARCHERS, *FRAMES},
        ),
        (
            "MLflow's recorder, before MLflow",
            "import tuning.sync, tuning.tracking",
            {"ray", *TRAINING, *STATISTICS, *SEARCHERS, "pandas"},
        ),
        ("the report", "import analysis.report", {"ray", "mlflow", "sklearn", *TRAINING, *SEARCHERS}),
    ],
    ids=lambda value: value.replace(" ", "_")[:20] if isinstance(value, str) and "\n" not in value else "",
)
def test_a_process_loads_what_it_needs(process, code, unwanted, cache_dir):
    load_family("ci_vit").load(load_family("ci_vit").build({})[0], None, cache_dir)  # decoded once a node
    done = subprocess.run(
        [sys.executable, "-c", f"CACHE = {str(cache_dir)!r}\n{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert unwanted & set(done.stdout.split()) == set(), process


def _family(**functions) -> Family:
    plain = {name: Late("math", "hypot") for name in ("init", "order", "batch", "step", "test_order", "evaluate")}
    return Family(
        "x", int, int, {}, "y", load=lambda *_: {}, schedule=lambda _: Schedule(1, 1, 1), **{**plain, **functions}
    )


def test_a_late_function_is_found_when_it_is_asked_for():
    import math

    family = _family(step=Late("nowhere.at_all", "step"), inspect=Late("math", "floor"))
    assert family.init is math.hypot
    assert family.inspect is math.floor
    assert family.__dict__["init"] is math.hypot  # from now on a plain attribute
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        family.step  # noqa: B018
    with pytest.raises(AttributeError, match="a family has no stepp"):
        family.stepp  # noqa: B018
    assert pickle.loads(pickle.dumps(Late("math", "floor"))).found() is math.floor


def test_an_idle_core_is_used_but_a_gpu_compiles_a_program_only_for_much_work():
    for kind, expected in (("cpu", {"a", "b"}), ("cuda", {"a"})):
        placement = Placement()
        for node in "ab":
            placement.add(Slot(node, node, kind, 0))
        placed = [placement.place(f"token{i}", "program", 1) for i in range(2)]
        assert {slot.node for slot in filter(None, placed)} == expected
