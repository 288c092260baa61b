"""What tests of Triton kernels share: a capture that is replayed, the interpreter that takes CPU tensors, and whole
steps with operators taken on the CPU for once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lanes.graphs import warm_up
from lanes.probe import make_engine
from tests.families import arrays_of, build_case

ROOT = Path(__file__).resolve().parent.parent


def assert_replays(work: Callable[[], Sequence[Tensor]], changed: Tensor) -> None:
    """Captured in a CUDA graph and replayed after `changed` has other values, `work` gives what it gives then."""
    warm_up(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    changed.neg_()
    graph.replay()
    for found, expected in zip(captured, work(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def run_interpreted(code: str) -> None:
    """Run Python that calls kernels, in Triton's interpreter; skips where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here: the kernels are tested where it is installed")
    # read when the kernels are defined, so in a process of its own; interpreted, they take CPU tensors
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def assert_whole_steps_equal(case: str, take_operators: Callable[[], object], cache_dir: Path) -> None:
    """The compiled stack of ci_vit after `take_operators`, with an evaluation, is what the serial one was before."""
    family, program, hyper = build_case("ci_vit", case, depth=1)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    alone = make_engine("serial", 1, family, program, arrays, "cpu")
    alone.insert("me", hyper, 3)
    steps = alone.until_epoch_end()
    curves, after = alone.advance(steps), alone.evaluate(["me"])["me"]
    take_operators()
    many = make_engine("stacked, compiled", 2, family, program, arrays, "cpu")
    many.insert("other", hyper, 1)
    many.insert("me", hyper, 3)
    found, found_after = many.advance(steps), many.evaluate(["me"])["me"]
    for name, values in curves.items():
        np.testing.assert_allclose(found[name][:, 1], values[:, 0], rtol=1e-9, atol=1e-9, err_msg=name)
    assert found_after == pytest.approx(after, rel=1e-9, abs=1e-9)
