"""A sixth family is three new files and no edit: the product, as it stands, lists it, tests it, and searches it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
ADDED = ROOT / "tests" / "toys" / "new_family"
NEW_FILES = {"trainables/toy/__init__.py", "search_spaces/toy.py", "tune_toy.py"}
COPIED = ("trainables", "lanes", "search_spaces", "tuning", "analysis", "tests")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the code with the three files added."""
    root = tmp_path_factory.mktemp("product")
    ignore = shutil.ignore_patterns("__pycache__", "new_family")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in NEW_FILES:
        assert not (root / name).exists()
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ADDED / name, root / name)
    return root


def python(tree: Path, *arguments: str, ray_temp: str = "") -> str:
    """Run Python in the tree on its code alone. Returns what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "LANEWISE_CACHE": str(tree / "cache"),
        "LANEWISE_RAY_TEMP": ray_temp,
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_files_are_all_there_is():
    found = {path.relative_to(ADDED).as_posix() for path in ADDED.rglob("*") if path.is_file()}
    assert {name for name in found if "__pycache__" not in name} == NEW_FILES


def test_the_command_line_lists_its_sweeps(tree):
    lines = python(tree, "tune_toy.py", "--list").splitlines()
    rates = next(line.split() for line in lines if line.startswith("rates"))
    assert rates[:5] == ["rates", "(default)", "2", "2", "12"]  # configs, seeds, steps a run
    assert any(line.startswith("range") for line in lines)


def test_the_conformance_suite_takes_it_in(tree):
    out = python(tree, "-m", "pytest", "tests/test_lanes.py", "-k", "toy and plain", "-p", "no:cacheprovider")
    assert "8 passed" in out, out


def test_a_sweep_of_it_runs_through_ray(tree):
    # Ray's sockets do not bear the long path of pytest's own folders
    with tempfile.TemporaryDirectory(prefix="lw", dir="/tmp") as ray_temp:
        out = python(tree, "tune_toy.py", "--name", "first", "--engine", "stacked", "--lanes", "4", ray_temp=ray_temp)
    assert "--resume first" in out
    folder = tree / "sweeps" / "first"
    runs = pq.read_table(folder / "runs.parquet").to_pandas()
    assert len(runs) == 4
    assert set(runs["family"]) == {"toy"}
    assert set(runs["stop_reason"]) == {"finished"}
    assert set(runs["step"]) == {12}
    assert runs["run_key"].nunique() == 4
    losses = runs.groupby("axis.lr")["final.test_loss"].mean()
    assert losses[0.1] < losses[0.001]  # 0.001 has hardly left where it began
    steps = pq.read_table(folder / "steps").to_pandas().drop_duplicates()  # Tune may bring a trial up twice
    assert len(steps) == 4 * 12
    assert len(steps.drop_duplicates(["run_key", "step"])) == 4 * 12
