"""The arrows between the rooms: who may import whom (docs/architecture.md). Imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("search_spaces", "trainables", "lanes", "tuning", "analysis")

MAY_USE = {
    "trainables": {"trainables"},
    "lanes": {"lanes", "trainables"},
    "search_spaces": {"search_spaces", "trainables"},
    "tuning": {"tuning", "search_spaces", "lanes", "trainables"},
    "analysis": {"analysis"},
}
"""Room -> rooms it may import."""

BESIDES = {"analysis": ("tuning.mirror",)}
"""Room -> single modules it may import as well: how to read sweeps that are in object storage."""

ONLY_IN = {
    "ray": ("lanes/pool.py", "tuning/"),
    "ray.tune": ("tuning/",),
    "mlflow": ("tuning/tracking.py", "tuning/mlflow_database.py", "analysis/mlflow_link.py"),
    "optuna": ("tuning/",),
    "hyperopt": ("tuning/",),
    "importlib": ("trainables/family.py",),
}
"""Outside package -> files or folders that may import it. importlib, because it could get round all the others."""

HARMLESS = ("importlib.resources", "importlib.metadata")


def modules_used(source: str) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or inside a function, or reaches as `ray.x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("ray", "importlib"):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name) and node.id == "__import__":
            yield "importlib"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the root) imports and must not, one line each."""
    room = path.split("/")[0]
    found = set()
    for used in modules_used(source):
        for other in ROOMS:
            besides = any(within(used, module) for module in BESIDES.get(room, ()))
            if within(used, other) and other not in MAY_USE[room] and not besides:
                found.add(f"{path} imports {used}: {room} may not use {other}")
        for package, allowed in ONLY_IN.items():
            harmless = any(within(used, name) for name in HARMLESS)
            if within(used, package) and not harmless and not path.startswith(allowed):
                found.add(f"{path} imports {used}: {package} belongs in {', '.join(allowed)}")
    return sorted(found)


def files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_every_room_is_looked_at():
    rooms = {path.relative_to(ROOT).parts[0] for path in files()}
    assert rooms == set(ROOMS)


def test_arrows_point_one_way():
    told = [line for path in files() for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainables/x/model.py", "import ray"),
        ("trainables/x/model.py", "def f():\n    from lanes.engine import put"),
        ("trainables/x/model.py", "import mlflow.pytorch as m"),
        ("trainables/x/model.py", "import importlib\nimportlib.import_module('ray')"),
        ("trainables/x/model.py", "import importlib.resources\nimportlib.import_module('ray')"),
        ("trainables/x/model.py", "__import__('ray')"),
        ("lanes/stack.py", "if True:\n    import ray.util"),
        ("lanes/pool.py", "from ray import tune"),
        ("lanes/pool.py", "import ray\nray.tune.Tuner"),
        ("lanes/probe.py", "from tuning.progress import clock"),
        ("lanes/probe.py", "from search_spaces import ci_vit"),
        ("search_spaces/x.py", "import optuna"),
        ("search_spaces/x.py", "import tuning.cli"),
        ("tuning/runner.py", "import mlflow"),
        ("tuning/runner.py", "from analysis.report import write_report"),
        ("analysis/store.py", "from trainables.family import Metric"),
        ("analysis/store.py", "from tuning import mirror, journal"),
        ("analysis/store.py", "from tuning.storage import Bucket"),
        ("analysis/store.py", "from mlflow.tracking import MlflowClient"),
        ("analysis/mlflow_link.py", "import ray"),
    ],
)
def test_a_wrong_arrow_is_seen(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lanes/pool.py", "import ray\nfrom lanes.job import Job\nray.get"),
        ("tuning/trial.py", "from ray import tune\nfrom lanes.job import Job"),
        ("tuning/tracking.py", "def f():\n    from mlflow import MlflowClient"),
        ("search_spaces/x.py", "from trainables.family import BadValue"),
        ("trainables/datasets/x.py", "from importlib import resources\nimport importlib.metadata"),
        ("analysis/store.py", "import pandas\nimport rays_of_light"),
        ("analysis/store.py", "from tuning import mirror"),
    ],
)
def test_a_right_arrow_is_not(path, source):
    assert not violations(path, source)


def test_tune_scripts_are_three_lines():
    scripts = sorted(ROOT.glob("tune_*.py"))
    assert scripts
    for script in scripts:
        family = script.stem.removeprefix("tune_")
        doc, *body = ast.parse(script.read_text()).body
        assert isinstance(doc, ast.Expr), script.name
        assert "\n".join(map(ast.unparse, body)) == (
            f"from search_spaces.{family} import SWEEPS\nfrom tuning.cli import main\n"
            "if __name__ == '__main__':\n    main(SWEEPS)"
        )
