"""Every family there is, found the way the product finds them, and the cases the conformance suites run."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import torch

import trainables
from lanes.engine import put
from trainables.family import Family, load_family

FAMILIES = [
    *sorted(
        module.name
        for module in pkgutil.iter_modules(trainables.__path__)
        if module.ispkg and module.name != "datasets"
    ),
    "tests.toys.regression",
]
CASES = [(name, case) for name in FAMILIES for case in load_family(name).cases]


def build_case(family: str, case: str, **program) -> tuple[Family, object, object]:
    """The case's family, program (float64 unless told otherwise) and hyper."""
    loaded = load_family(family)
    chosen = loaded.cases[case]
    return (loaded, *loaded.build({**chosen.program, **chosen.hyper, "precision": "float64", **program}))


_ARRAYS: dict[tuple, dict[str, torch.Tensor]] = {}


def arrays_of(family: Family, program, cache_dir: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    key = (family.name, program, device)
    if key not in _ARRAYS:
        _ARRAYS[key] = put(family.load(program, None, cache_dir), device)
    return _ARRAYS[key]
