"""The law of lanes on a GPU: `make test-gpu`.

float32: sums are made in another order under vmap, in compiled kernels and in other tile shapes, so that trajectories
agree to about steps x 1e-6 relative before training amplifies it; we compare losses over the first 20 steps at 2e-3.
bf16: products carry 8 bits (4e-3); losses over the first 20 steps are compared at 5e-2. What must be exact is exact:
initial states, draws, data order, and a snapshot continued in the same engine.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from lanes.engine import Arrival
from lanes.probe import make_engine
from lanes.serial import SerialEngine
from lanes.states import tree_map
from tests.families import CASES, arrays_of, build_case
from tests.test_lanes import assert_same_state, neighbours, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# compiling takes most of a minute a case: by default one case a family, all with LANEWISE_GPU_CASES=all
FIRST: dict[str, tuple[str, str]] = {}
for _family, _case in CASES:
    FIRST.setdefault(_family, (_family, _case))
# and one of a further kind of net
FURTHER = [("multi_neuron", "continual")]
CHOSEN = CASES if os.environ.get("LANEWISE_GPU_CASES") == "all" else [*FIRST.values(), *FURTHER]
# The cases' nets are too narrow for the families' own kernels, or for all of their tiles; and at the rate .1 a loss
# after 20 steps of vgg_decay's case moves by .3 when the first weights move by 2^-9 (in float64), at .01 by .04.
SUITED: dict[str, dict] = {"ci_vit": {"hidden": 48}, "vgg_decay": {"widths": (32, 64), "lr": 0.01}}
TOLERANCE = {"float32": 2e-3, "bf16": 5e-2}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """As hosts set them, and without algorithms that add up in an order of their own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda case: f"{case[0].rsplit('.', 1)[-1]}-{case[1]}")
def chosen(request):
    return request.param


@pytest.mark.parametrize("engine", ["stacked, compiled", "branched"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_lane_on_gpu_equals_serial(chosen, engine, precision, cache_dir):
    family, program, hyper = build_case(*chosen, precision=precision, **SUITED.get(chosen[0], {}))
    arrays = arrays_of(family, program, cache_dir, "cuda")
    steps = min(20, family.schedule(program).steps)
    alone = SerialEngine(family, program, arrays, "cuda")
    alone.insert("me", hyper, 3)
    many = make_engine(engine, 3, family, program, arrays, "cuda")
    for i, other in enumerate(neighbours(hyper, 2)):
        many.insert(f"n{i}", other, i)
    many.insert("me", hyper, 3)
    assert_same_state(alone.state("me"), many.state("me"), 0.0)
    first = steps // 2
    expected, actual = run(alone, first), run(many, first)
    many.remove(["n0"])
    late = Arrival("late", neighbours(hyper, 3)[2], 9)
    many.prepare(late)  # as beside the training of the others
    many.insert_all([late])
    fresh = SerialEngine(family, program, arrays, "cuda")
    fresh.insert("late", late.hyper, 9)
    assert_same_state(fresh.state("late"), many.state("late"), 0.0)
    snapshot = many.state("me")
    rest_expected, rest_actual = run(alone, steps - first), run(many, steps - first)
    limit = TOLERANCE[precision]
    for one, other in ((expected, actual), (rest_expected, rest_actual)):
        for name, curve in one["me"].items():
            if "loss" in name:
                np.testing.assert_allclose(other["me"][name], curve, rtol=limit, atol=limit, err_msg=name)
    again = make_engine(engine, 3, family, program, arrays, "cuda")
    for i, other in enumerate(neighbours(hyper, 2)):
        again.insert(f"n{i}", other, i)
    again.insert("me", hyper, 3, state=snapshot)
    continued = run_lane(again, "me", steps - first)
    for name, curve in rest_actual["me"].items():
        np.testing.assert_array_equal(continued[name], curve, err_msg=name)


def run_lane(engine, key: str, steps: int) -> dict[str, np.ndarray]:
    """`run`, where neighbours are in another phase: chunks end at whichever epoch ends first."""
    return run(engine, steps)[key]


def test_first_states_are_one_graph(chosen, cache_dir):
    family, program, hyper = build_case(*chosen)
    arrays = arrays_of(family, program, cache_dir, "cuda")
    plain = make_engine("serial", 1, family, program, arrays, "cuda")
    graphed = make_engine("stacked, compiled", 2, family, program, arrays, "cuda")
    for engine in (plain, graphed):
        engine.insert("one", hyper, 3)
        engine.insert("another", hyper, 4)
    assert graphed.in_graphs, "made call by call it takes milliseconds a lane"
    for key in graphed.lanes:
        assert_same_state(graphed.state(key), plain.state(key), tolerance=0.0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_poisoned_lanes_leave_the_one_between_them_alone_on_gpu(chosen, precision, cache_dir):
    family, program, hyper = build_case(*chosen, precision=precision, **SUITED.get(chosen[0], {}))
    arrays = arrays_of(family, program, cache_dir, "cuda")
    clean, poisoned = (make_engine("stacked, compiled", 4, family, program, arrays, "cuda") for _ in range(2))
    for engine in (clean, poisoned):
        for seed, key in enumerate(("before", "me", "after")):
            engine.insert(key, hyper, seed)
    for seed, key in ((0, "before"), (2, "after")):
        state = poisoned.state(key)
        state["params"] = tree_map(lambda t: torch.full_like(t, torch.nan), state["params"])
        poisoned.remove([key])
        poisoned.insert(key, hyper, seed, state=state)
    steps = min(8, family.schedule(program).steps)
    expected, actual = run(clean, steps), run(poisoned, steps)
    for name, curve in expected["me"].items():
        np.testing.assert_array_equal(actual["me"][name], curve, err_msg=name)
