"""The law of lanes, for every family, method and engine, in float64 on the CPU.

1. a lane equals the serial engine's run of the same config and seed;
2. it does not change with lane count, slot, or neighbours that come and go;
3. a lane that turns NaN is alone in it;
4. snapshot, restore, continue equals never having stopped, bit for bit;
5. what is per lane (clipping, loss, moments) is per lane: covered by 1 with neighbours of other hypers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lanes.engine import Arrival, autocast
from lanes.serial import SerialEngine
from lanes.stacked import TAKEN_TOGETHER, StackedEngine
from lanes.states import leaves, tree_map
from tests.families import CASES, arrays_of, build_case
from trainables.draws import counter
from trainables.family import Late, dtype_of, hyper_tensors
from tuning.checkpoints import CheckpointStore

STEPS = 50
TOLERANCE = 1e-9


def run(engine, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Advance to `steps`, evaluating at each epoch's end. {lane: {metric: curve}}."""
    curves: dict[str, dict[str, list]] = {key: {} for key in engine.lanes}
    done = 0
    while done < steps:
        chunk = min(engine.until_epoch_end(), steps - done)
        for name, values in engine.advance(chunk).items():
            for column, key in enumerate(engine.lanes):
                curves[key].setdefault(name, []).extend(values[:, column])
        done += chunk
        ended = [key for key, lane in engine.lanes.items() if lane.step % engine.schedule.steps_per_epoch == 0]
        for key, metrics in (engine.evaluate(ended) if ended else {}).items():
            for name, value in metrics.items():
                curves[key].setdefault(name, []).append(value)
    return {key: {name: np.array(v) for name, v in by_name.items()} for key, by_name in curves.items()}


def neighbours(hyper, count: int) -> list:
    """Hypers around `hyper`: every non-zero field scaled a little differently for each lane."""
    scaled = []
    for i in range(count):
        factor = 1.0 + 0.01 * (i + 1)
        changes = {
            f.name: getattr(hyper, f.name) * factor
            for f in dataclasses.fields(hyper)
            if 0 < abs(getattr(hyper, f.name)) < 0.5
        }
        scaled.append(dataclasses.replace(hyper, **changes))
    return scaled


def assert_same_state(a, b, tolerance: float) -> None:
    def check(x, y):
        if x.dtype.is_floating_point or x.dtype.is_complex:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(x, y)
        return x

    tree_map(check, a, b)


def shape_of(tree) -> list:
    """Names, as deep as they go, in their order: a compiled step takes states of one shape only."""
    return [(name, shape_of(inner)) for name, inner in tree.items()] if isinstance(tree, dict) else []


def steps_for(family, program) -> int:
    return min(STEPS, family.schedule(program).steps)


NAMED = [f"{family.rsplit('.', 1)[-1]}-{case}" for family, case in CASES]


@pytest.fixture(params=CASES, ids=NAMED)
def case(request, cache_dir):
    family, program, hyper = build_case(*request.param)
    return family, program, hyper, arrays_of(family, program, cache_dir)


def test_lane_equals_serial_beside_any_neighbours(case):
    family, program, hyper, arrays = case
    steps = steps_for(family, program)
    alone = SerialEngine(family, program, arrays)
    alone.insert("me", hyper, 3)
    stack = StackedEngine(family, program, arrays)
    for i, other in enumerate(neighbours(hyper, 2)):
        stack.insert(f"n{i}", other, i)
    stack.insert("me", hyper, 3)
    assert_same_state(alone.state("me"), stack.state("me"), 0.0)
    first = steps // 2
    expected, actual = run(alone, first), run(stack, first)
    stack.remove(["n0"])
    stack.insert("late", neighbours(hyper, 3)[2], 9)
    expected_rest, actual_rest = run(alone, steps - first), run(stack, steps - first)
    for one, other in ((expected, actual), (expected_rest, actual_rest)):
        for name, curve in one["me"].items():
            np.testing.assert_allclose(other["me"][name], curve, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    assert_same_state(alone.state("me"), stack.state("me"), TOLERANCE)


@pytest.mark.parametrize(("name", "method"), CASES, ids=NAMED)
def test_what_a_bf16_step_returns_has_the_dtypes_it_had(name, method, cache_dir):
    family, program, hyper = build_case(name, method, precision="bf16")
    arrays, device = arrays_of(family, program, cache_dir), torch.device("cpu")
    hypers = hyper_tensors(program, hyper, device)
    state = family.init(program, hypers, counter(3))
    batch, tested = (
        family.batch(program, arrays, {name: rows[0] for name, rows in order.items()})
        for order in (family.order(program, arrays, 3, 0), one_set(family.test_order(program, arrays, 3, 0)))
    )
    with autocast(program, device):
        after, metrics = family.step(program, state, hypers, batch)
        with torch.no_grad():
            sums = family.evaluate(program, after, hypers, tested)
            covariates = family.inspect(program, after, hypers)
    assert tree_map(lambda tensor: tensor.dtype, after) == tree_map(lambda tensor: tensor.dtype, state)
    dtypes = {name: value.dtype for name, value in {**metrics, **sums, **covariates}.items()}
    assert not {torch.bfloat16, torch.float16} & {*dtypes.values()}, dtypes


def one_set(order: dict) -> dict[str, torch.Tensor]:
    """The first set of an evaluation that may be of several."""
    first = next(iter(order.values()))
    return first if isinstance(first, dict) else order


@pytest.mark.parametrize(("name", "method"), CASES, ids=NAMED)
def test_evaluation_in_bf16_equals_serial(name, method, cache_dir):
    """Autocast reaches what a step does through its gradient, and an evaluation otherwise. Products carry 8 bits."""
    family, program, hyper = build_case(name, method, precision="bf16")
    arrays = arrays_of(family, program, cache_dir)
    found = []
    for engine in (SerialEngine(family, program, arrays), StackedEngine(family, program, arrays)):
        engine.insert("me", hyper, 3)
        engine.insert("other", hyper, 4)
        engine.advance(1)
        found.append(engine.evaluate(["me"])["me"])
    assert found[0].keys() == found[1].keys()
    for metric, value in found[0].items():
        limit = 0.05 if "loss" in metric else 0.2
        np.testing.assert_allclose(found[1][metric], value, rtol=limit, atol=limit, err_msg=metric)


def test_a_step_that_is_imported_late_is_compiled_as_a_whole(cache_dir):
    """An import would break the graph: two were compiled of the step where the first one to train was compiled."""
    from torch._dynamo.utils import counters

    family, program, hyper = build_case("tests.toys.regression", "plain")
    arrays = arrays_of(family, program, cache_dir)
    late = {name: Late(family.step.__module__, name) for name in ("init", "step", "batch", "evaluate")}
    engine = StackedEngine(dataclasses.replace(family, **late), program, arrays, compiled=True)
    engine.insert("me", hyper, 3)
    counters.clear()
    engine.advance(engine.until_epoch_end())
    engine.evaluate(["me"])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("engine_class", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_restored_lane_continues_bit_for_bit(case, engine_class, tmp_path):
    """From disk, the first lane of its engine: nothing but the checkpoint says what a state is made of."""
    family, program, hyper, arrays = case
    steps = steps_for(family, program)
    engine = engine_class(family, program, arrays)
    engine.insert("me", hyper, 5)
    cut = max(1, (2 * steps) // 5)
    run(engine, cut)
    # as a snapshot lies: products of what lies otherwise round otherwise, though not on every processor
    assert all(tensor.is_contiguous() for tensor in leaves(engine._states))
    CheckpointStore(tmp_path).save("me", cut, engine.state("me"), {})
    expected = run(engine, steps - cut)
    found = CheckpointStore(tmp_path).load("me")
    assert found is not None
    again = engine_class(family, program, arrays)
    again.insert("me", hyper, 5, state=found[0])
    assert shape_of(again.state("me")) == shape_of(engine.state("me"))
    actual = run(again, steps - cut)
    for name, curve in expected["me"].items():
        np.testing.assert_array_equal(actual["me"][name], curve, err_msg=name)
    assert_same_state(engine.state("me"), again.state("me"), 0.0)


@pytest.mark.parametrize("engine_class", [SerialEngine, StackedEngine], ids=["serial", "stacked"])
def test_lanes_that_come_and_go_together_are_each_their_own(engine_class, cache_dir):
    family, program, hyper = build_case("tests.toys.regression", "noisy")
    engine = engine_class(family, program, arrays_of(family, program, cache_dir))
    keys = [f"lane{i}" for i in range(TAKEN_TOGETHER + 3)]
    engine.insert_all([Arrival(key, hyper, i) for i, key in enumerate(keys)])
    engine.advance(2)
    taken, one_by_one = engine.states(keys[1:]), {key: engine.state(key) for key in keys[1:]}
    engine.advance(2)
    assert list(taken) == keys[1:]
    for key in keys[1:]:
        assert_same_state(taken[key], one_by_one[key], 0.0)
    with pytest.raises(ValueError, match="lane lane0 is already here"):
        engine.insert_all([Arrival("new", hyper, 50), Arrival("lane0", hyper, 51)])
    with pytest.raises(ValueError, match="lane new is already here"):
        engine.insert_all([Arrival("new", hyper, 50), Arrival("new", hyper, 51)])


def test_poisoned_lane_leaves_neighbours_alone(case):
    family, program, hyper, arrays = case
    steps = min(12, steps_for(family, program))
    clean, poisoned = (StackedEngine(family, program, arrays) for _ in range(2))
    for engine in (clean, poisoned):
        engine.insert("me", hyper, 1)
        engine.insert("bad", hyper, 2)
    state = poisoned.state("bad")
    state["params"] = tree_map(lambda t: torch.full_like(t, torch.nan), state["params"])
    poisoned.remove(["bad"])
    poisoned.insert("bad", hyper, 2, state=state)
    expected, actual = run(clean, steps), run(poisoned, steps)
    for name, curve in expected["me"].items():
        np.testing.assert_array_equal(actual["me"][name], curve, err_msg=name)
    assert_same_state(clean.state("me"), poisoned.state("me"), 0.0)


def test_states_hold_seed_step_and_the_program_s_dtype(case):
    family, program, hyper, arrays = case
    engine = SerialEngine(family, program, arrays)
    engine.insert("me", hyper, 7)
    run(engine, 2)
    state = engine.state("me")
    assert int(state["seed"]) == 7
    assert int(state["step"]) == 2
    dtypes = set()
    tree_map(lambda t: dtypes.add(t.dtype), state["params"])
    assert dtype_of(program) in dtypes


def test_every_metric_is_declared(case):
    family, program, hyper, arrays = case
    engine = SerialEngine(family, program, arrays)
    engine.insert("me", hyper, 0)
    curves = run(engine, engine.schedule.steps_per_epoch)["me"]
    assert curves.keys() <= family.metrics.keys()
    assert all(np.isfinite(curve).all() for curve in curves.values())  # or lanes are equal by having none
    per_epoch = {name: np.array([curve.mean()]) for name, curve in curves.items()}
    summary = family.summarize(program, per_epoch)
    assert family.headline in summary
    assert summary.keys() <= family.metrics.keys()
    assert family.metrics[family.headline].mode in ("max", "min")
