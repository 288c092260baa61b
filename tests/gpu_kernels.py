"""What tests of Triton kernels share: a capture that is replayed, and the interpreter that takes CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lanes.graphs import warm_up

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
