"""Nothing pickled that came from outside is executed: by reading every module, and by watching the interpreter.

Outside are data sets, checkpoints and whatever lies in a sweep's folder. Ray's own messages between its processes are
not meant.
"""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.toy_sweeps import ROOT

ROOMS = ("search_spaces", "trainables", "lanes", "tuning", "analysis")
RESTRICTED = {"trainables/datasets/imagenet32.py", "trainables/datasets/pickles.py"}
"""May import `pickle`: for a subclass of Unpickler whose `find_class` admits arrays and containers."""
WRITES = {"analysis/export.py"}
"""May import `pickle` to write the notebooks' own layout."""
FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    ("torch", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("yaml", "full_load"), ("torch.jit", "load"), ("pickle", "load"), ("pickle", "loads"), ("np", "fromregex"),
}  # fmt: skip


def offences(tree: ast.AST, restricted: bool) -> list[str]:
    """What a module may not have in it."""
    found = []
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not restricted:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{where} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{where} calls {node.func.id}")
        if isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func.value)
            if (name, node.func.attr) in FORBIDDEN_METHODS:
                found.append(f"{where} calls {name}.{node.func.attr}")
            if name == "pickle" and node.func.attr == "Unpickler":
                found.append(f"{where} makes an ordinary Unpickler")
        for keyword in node.keywords:
            allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("allow_pickle", "unsafe") and not allowed:
                found.append(f"{where} sets {keyword.arg}")
            if keyword.arg == "weights_only" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value):
                found.append(f"{where} sets {keyword.arg}")
    return found


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + sorted(ROOT.glob("*.py"))


def test_no_module_unpickles_or_evaluates():
    found = {}
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        if told := offences(ast.parse(path.read_text()), name in RESTRICTED | WRITES):
            found[name] = told
    assert not found
    assert len(modules()) > 100


@pytest.mark.parametrize("name", sorted(RESTRICTED))
def test_those_that_may_use_a_subclass_that_admits_little(name):
    tree = ast.parse((ROOT / name).read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    unpicklers = [node for node in classes if any("Unpickler" in ast.unparse(base) for base in node.bases)]
    assert unpicklers
    for node in unpicklers:
        assert "find_class" in {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        assert "super()" not in ast.unparse(node), "the ordinary find_class finds anything"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "torch.load(path)", "np.load(path, allow_pickle=True)", "eval(text)",
        "yaml.load(file)", "pd.read_pickle(path)", "np.load(path, allow_pickle=flag)", "pickle.Unpickler(file).load()",
        "torch.load(path, weights_only=False)",
    ],
)  # fmt: skip
def test_this_test_sees(line):
    assert offences(ast.parse(line), restricted=False)


class Evil:
    """What a pickle can hold: a call."""

    def __reduce__(self):
        return print, ("it ran",)


def test_the_interpreter_is_asked_for_nothing(tmp_path, undisturbed):
    """A process that reads everything a sweep and a data folder can hold, under an audit hook that ends it the moment
    an ordinary unpickler looks something up: with the real files, and with pickles in their places."""
    folder = tmp_path / "data"
    (folder / "imagenet32").mkdir(parents=True)
    (folder / "batches").mkdir()
    image = {"data": np.zeros((4, 3072), np.uint8), "labels": [1, 2, 3, 4]}
    (folder / "imagenet32" / "good").write_bytes(pickle.dumps(image, protocol=2))
    (folder / "imagenet32" / "evil").write_bytes(pickle.dumps({**image, "x": Evil()}))
    (folder / "evil.npy").write_bytes(pickle.dumps(Evil()))
    np.save(folder / "object.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(folder / "object.npz", audio=np.array([Evil()], dtype=object))
    script = textwrap.dedent(
        """
        import contextlib, io, os, sys
        from pathlib import Path

        import torch
        from analysis.store import open_sweep
        from trainables.datasets import fsdd, imagenet32, lop, pickles
        from trainables.family import BadValue
        from tuning.checkpoints import CheckpointStore
        from tuning.journal_check import checked
        from tuning.sweep import SweepPlan

        def watch(event, args):
            if event == "pickle.find_class":
                os.write(1, f"an unpickler looked up {args}".encode())
                os._exit(9)

        sys.addaudithook(watch)
        data, sweep, scratch = map(Path, sys.argv[1:])
        images, labels = imagenet32.read_batch(data / "imagenet32" / "good")
        assert images.shape == (4, 32, 32, 3)
        readers = [
            lambda path: imagenet32.unpickle(path),
            lambda path: pickles.read_pickle(io.BytesIO(path.read_bytes()), path, "it"),
            lop._open,
            fsdd._columns,
        ]
        refused = 0
        for reader in readers:
            for path in (data / "imagenet32" / "evil", data / "evil.npy", data / "object.npy", data / "object.npz"):
                try:
                    reader(path)
                except BadValue:
                    refused += 1
        assert refused == 16, refused
        SweepPlan.load(sweep)
        checked(sweep / "journal.jsonl")
        opened = open_sweep(sweep.parent, sweep.name)
        assert len(opened.runs()) and len(opened.epochs())
        scratch.mkdir()
        store = CheckpointStore(scratch)
        store.save("run", 1, {"w": torch.ones(2)}, {"step": 1})
        store.save("run", 2, {"w": torch.ones(2)}, {"step": 2})
        for end in ("json", "safetensors"):
            (scratch / "run" / f"{2:012d}.{end}").write_bytes((data / "imagenet32" / "evil").read_bytes())
            assert store.load("run")[1] == {"step": 1}
        print("read everything")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(undisturbed.folder), str(tmp_path / "checkpoints")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "read everything\n"
