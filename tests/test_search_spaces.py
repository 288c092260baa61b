"""Spaces as data: counting, conditions, labels, changes by the user, JSON and back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from search_spaces.space import Arms, Choice, Range, Space, compact, union
from search_spaces.sweeps import Sweep, Sweeps
from trainables.family import BadValue

CONDITIONAL = Space(
    (
        Choice("method", ("plain", "decay", "reset")),
        Choice("lr", (0.1, 0.01)),
        Choice("decay", (1e-3, 1e-4, 1e-5), sets="l2", when={"method": ("decay",)}),
        Choice("rate", (1, 2), when={"method": ("reset",)}),
        Choice("late", (True, False), when={"method": ("reset",), "rate": (2,)}),
    )
)
EVERYTHING = Space(
    (
        Arms("net", {"small": {"width": 3, "shape": (1, 2)}, "big": {"width": 8, "shape": (3,)}}, run_names=True),
        Choice("kernel", ((1, 3), (3, 3)), sets="size"),
        Range("lr", 1e-4, 0.3, log=True, when={"net": ("big",)}),
        Range("depth", 1, 4, integer=True),
    )
)


def test_grid_counts_nested_loops_with_conditions():
    # plain: 2; decay: 2 x 3; reset: 2 x (rate 1: 1, rate 2: 2)
    points = list(CONDITIONAL.grid())
    assert CONDITIONAL.size() == len(points) == 2 + 2 * 3 + 2 * (1 + 2)
    assert points[0] == {"method": "plain", "lr": 0.1}
    assert points[2] == {"method": "decay", "lr": 0.1, "decay": 1e-3}, "the first axis is the slowest"
    assert points[-1] == {"method": "reset", "lr": 0.01, "rate": 2, "late": False}
    assert len({json.dumps(point) for point in points}) == len(points)


def test_assignments_hold_active_axes_only_and_name_the_field():
    point = {"method": "decay", "lr": 0.1, "decay": 1e-4, "rate": 2}
    assert CONDITIONAL.assignments(point) == {"method": "decay", "lr": 0.1, "l2": 1e-4}
    assert CONDITIONAL.label(point) == "method=decay lr=0.1 decay=0.0001"
    assert EVERYTHING.assignments({"net": "small", "kernel": (1, 3), "depth": 2}) == {
        "width": 3,
        "shape": (1, 2),
        "size": (1, 3),
        "depth": 2,
    }
    assert EVERYTHING.label({"net": "small", "kernel": (1, 3), "depth": 2}) == "small kernel=1-3 depth=2"


def test_a_later_axis_overrides_an_earlier_one():
    space = Space((Arms("net", {"a": {"lr": 0.5, "width": 3}}), Choice("lr", (0.1,))))
    assert space.assignments({"net": "a", "lr": 0.1}) == {"lr": 0.1, "width": 3}


@pytest.mark.parametrize("space", [CONDITIONAL, EVERYTHING], ids=["conditional", "everything"])
def test_plain_and_back(space):
    plain = json.loads(json.dumps(space.to_plain()))
    assert Space.from_plain(plain) == space


def test_plain_refuses_an_unknown_kind():
    with pytest.raises(BadValue, match="unknown kind 'spiral'"):
        Space.from_plain([{"name": "x", "kind": "spiral"}])


def test_at_reaches_every_value_evenly():
    axis = Choice("x", ("a", "b", "c"))
    counts = dict.fromkeys(axis.values, 0)
    for u in np.linspace(0, 1, 300, endpoint=False):
        counts[Space((axis,)).at({"x": float(u)})["x"]] += 1
    assert counts == {"a": 100, "b": 100, "c": 100}


def test_ranges_are_even_in_their_own_scale_and_reach_both_ends():
    log = Range("lr", 1e-4, 1.0, log=True)
    assert log.at(0.0) == pytest.approx(1e-4)
    assert log.at(0.5) == pytest.approx(1e-2)
    whole = Range("n", 1, 4, integer=True)
    drawn = [whole.at(u) for u in np.linspace(0, 1, 400, endpoint=False)]
    assert {n: drawn.count(n) for n in (1, 2, 3, 4)} == {1: 100, 2: 100, 3: 100, 4: 100}
    wide = Range("n", 1, 64, log=True, integer=True)
    values = [wide.at(u) for u in np.linspace(0, 1, 10_000, endpoint=False)]
    assert min(values) == 1
    assert max(values) == 64
    assert values.count(1) == pytest.approx(10_000 * math.log(2) / math.log(65), abs=2), "log-even, floor of the draw"


def test_union_gives_each_part_its_own_axes_and_fields():
    a = Space((Choice("lr", (0.1, 0.01)), Choice("l2", (1e-3,), when={"lr": (0.1,)})))
    b = Space((Choice("lr", (1.0, 2.0, 3.0)),))
    both = union({"a": (a, {"method": "decay"}), "b": (b, {"method": "plain"})}, name="method")
    assert both.size() == a.size() + b.size() == 5
    assert [both.assignments(p) for p in both.grid()] == [
        {"method": "decay", "lr": 0.1, "l2": 1e-3},
        {"method": "decay", "lr": 0.01},
        *({"method": "plain", "lr": lr} for lr in (1.0, 2.0, 3.0)),
    ]
    assert both.label(next(both.grid())) == "a lr=0.1 l2=0.001"
    assert Space.from_plain(both.to_plain()) == both


def test_without_drops_axes_and_merges_equal_arms():
    space = Space((Arms("net", {"a": {"width": 3, "lr": 0.1}, "b": {"width": 3, "lr": 0.2}}), Choice("l2", (1.0, 2.0))))
    assert space.without("l2").size() == 2
    fixed = space.without("lr")
    assert [axis.values for axis in fixed.axes] == [("a",), (1.0, 2.0)]
    with pytest.raises(BadValue, match="other axes of this sweep depend on it"):
        CONDITIONAL.without("method")


def test_replaced_keeps_the_place_and_only_keeps_the_point():
    replaced = CONDITIONAL.replaced(Choice("lr", (1.0,)))
    assert [axis.name for axis in replaced.axes] == [axis.name for axis in CONDITIONAL.axes]
    assert replaced.size() == 1 + 3 + 3
    point = {"net": "big", "kernel": (3, 3), "lr": 0.01, "depth": 4}
    single = EVERYTHING.only(point)
    assert single.size() == 1
    assert single.assignments(next(single.grid())) == EVERYTHING.assignments(point)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Choice("x", ()), "no values"),
        (lambda: Choice("x", (1, 1)), "twice"),
        (lambda: Range("x", 2, 1), "empty range"),
        (lambda: Range("x", 1, 1), "empty range"),
        (lambda: Range("x", 0, 1, log=True), "above 0"),
        (lambda: Range("x", 0, math.inf), "empty range"),
        (lambda: Arms("x", {}), "no arms"),
        (lambda: Space((Choice("x", (1,)), Choice("x", (2,)))), "two axes named 'x'"),
        (lambda: Space((Choice("x", (1,), when={"y": (1,)}), Choice("y", (1,)))), "does not stand before it"),
        (lambda: CONDITIONAL["nothing"], "no axis 'nothing'"),
        (lambda: next(EVERYTHING.grid()), "a grid cannot enumerate the range lr"),
    ],
)
def test_a_mistake_in_a_space_is_told(make, told):
    with pytest.raises(BadValue, match=told):
        make()


def test_compact_values():
    assert [compact(v) for v in (0.001, 1e-5, (1, 3), True, "relu", 0.123456)] == [
        "0.001",
        "1e-05",
        "1-3",
        "True",
        "relu",
        "0.1235",
    ]


def test_sweeps_are_found_by_name_and_by_a_notebook_s_run_name():
    named = Sweep("runs", "doc", "notebook", Space((Arms("run", {"exp1": {"lr": 1.0}, "exp2": {}}, run_names=True),)))
    sweeps = Sweeps("toy", "runs", (named, Sweep("other", "doc", "wish", CONDITIONAL)))
    assert sweeps.find(None) is named
    assert sweeps.find("other").configs == 14
    single = sweeps.find("exp1")
    assert (single.name, single.configs) == ("exp1", 1)
    with pytest.raises(BadValue, match="did you mean other"):
        sweeps.find("othr")
    with pytest.raises(BadValue, match="does not exist"):
        Sweeps("toy", "missing", (named,))
    with pytest.raises(BadValue, match="twice: runs"):
        Sweeps("toy", "runs", (named, named))
