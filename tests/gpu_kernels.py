"""What tests of Triton kernels share: a capture that is replayed, the interpreter that takes CPU tensors, nets
and whole steps with operators taken on the CPU for once."""

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
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from lanes.graphs import warm_up
from lanes.probe import make_engine
from tests.families import arrays_of, build_case
from trainables.ci_vit import model
from trainables.draws import counter
from trainables.family import BadValue, hyper_tensors

ROOT = Path(__file__).resolve().parent.parent


def assert_near(found: Tensor, expected: Tensor, limit: float, name: str = "") -> None:
    """No value is off by more than `limit` times the largest."""
    assert found.shape == expected.shape, name
    torch.testing.assert_close(
        found, expected, rtol=0, atol=limit * float(expected.abs().max()), msg=lambda text: f"{name}: {text}"
    )


def assert_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch, module: str, gpu_kernel: Callable) -> None:
    """`gpu_kernel` imports `module`, which imports Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(BadValue, match="needs triton"):
        gpu_kernel()


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


def assert_net_is_the_same(precision: str, gate: str, monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    """ci_vit's logits, gradients and what is watched are the same where `gate`, of its model, takes the operators."""
    family, program, hyper = build_case("ci_vit", "vanilla", precision=precision)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    row = {name: values[0] for name, values in family.order(program, arrays, 0, 0).items()}
    batch = family.batch(program, arrays, row)
    params = family.init(program, hyper_tensors(program, hyper, "cpu"), counter(0))["params"]

    def loss(params, watch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits, seen = model.forward(program, params, batch["images"], watch)
        return F.cross_entropy(logits, batch["labels"]), (logits, seen)

    watch = ("fired", "activity", "entropy")
    assert not getattr(model, gate)(program, torch.device("cpu"))
    slopes, (logits, seen) = grad(loss, has_aux=True)(params, watch)
    monkeypatch.setattr(model, gate, lambda program, device: True)
    found, (fused_logits, fused_seen) = grad(loss, has_aux=True)(params, watch)
    limit = 1e-11 if precision == "float64" else 3e-2  # bf16: eight bits, through every block
    torch.testing.assert_close(fused_logits, logits, rtol=limit, atol=limit)
    assert fused_seen.keys() == seen.keys()
    if precision == "float64":
        assert torch.equal(fused_seen["fired"], seen["fired"].int())
    torch.testing.assert_close(fused_seen["activity"], seen["activity"].to(logits.dtype), rtol=limit, atol=limit)
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=limit * max(1e-3, float(slope.abs().max())))
    unwatched, (_, nothing) = grad(loss, has_aux=True)(params, ())
    assert not nothing
    assert all(torch.equal(unwatched[name], slope) for name, slope in found.items())
