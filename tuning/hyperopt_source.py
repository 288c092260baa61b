"""HyperOpt's TPE over a plain space: Tune's HyperOptSearch, the space as a tree of hp expressions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from search_spaces.space import Axis, Point, Range, Space, is_ordered
from trainables.family import BadValue


class HyperOptSource:
    """Tune's HyperOptSearch over nested hp.choice spaces. HyperOpt knows no pruned trials: they count by their last
    value, which is what its TPE ranks; failed ones are left out of the ranking."""

    def __init__(self, space: Space, mode: str, seed: int, startup: int):
        from ray.tune.search.hyperopt import HyperOptSearch

        self._space = space
        self._search = HyperOptSearch(
            hyperopt_space(space), metric="value", mode=mode, n_initial_points=startup, random_state_seed=seed
        )

    def ask(self, trial: str) -> Point | None:
        raw = _flatten(self._search.suggest(trial) or {})
        point: Point = {}
        for axis in self._space.axes:
            if self._space.is_active(axis, point):
                value = raw[axis.name]
                if isinstance(axis, Range):
                    inside = min(max(value, axis.low), axis.high)
                    point[axis.name] = int(inside) if axis.integer else float(inside)
                else:
                    order = sorted(axis.values) if is_ordered(axis) else axis.values
                    point[axis.name] = order[min(max(int(value), 0), len(order) - 1)]
        return point

    def report(self, trial: str, progress: float, value: float) -> None:
        pass

    def tell(self, trial: str, outcome: str, value: float | None, others: Sequence[float] = ()) -> None:
        if value is None or not math.isfinite(value):  # failed
            self._search.on_trial_complete(trial, error=True)
        else:
            self._search.on_trial_complete(trial, {"value": value})


def hyperopt_space(space: Space) -> dict[str, Any]:
    """The space as nested dicts of hp expressions: an axis that others depend on becomes an hp.choice of branches.

    An axis that depends on two axes of which neither depends on the other cannot stand in a tree: it is drawn always,
    and ignored where it is inactive.
    """
    from hyperopt import hp

    controlling = {other for axis in space.axes for other in axis.when}
    leaves = {axis.name: _hyperopt_leaf(hp, axis) for axis in space.axes if axis.name not in controlling}
    placed: set[str] = set()

    def branch(axes: Iterable[Axis], point: Point) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for axis in axes:
            if not space.is_active(axis, point):
                continue
            placed.add(axis.name)
            if axis.name not in controlling:
                tree[axis.name] = leaves[axis.name]
                continue
            if isinstance(axis, Range):
                raise BadValue(f"{axis.name} is a range: other axes cannot depend on it")
            below = [other for other in space.axes if axis.name in _ancestors(space, other)]
            order = sorted(axis.values) if is_ordered(axis) else axis.values
            options = [{axis.name: i, **branch(below, {**point, axis.name: value})} for i, value in enumerate(order)]
            path = "".join(f"{value}/" for value in point.values())
            tree[f"{axis.name}?"] = hp.choice(f"{path}{axis.name}", options)
        return tree

    tree = branch(space.axes, {})
    return tree | {name: leaf for name, leaf in leaves.items() if name not in placed}


def _ancestors(space: Space, axis: Axis) -> set[str]:
    found = set(axis.when)
    for other in axis.when:
        found |= _ancestors(space, space[other])
    return found


def _hyperopt_leaf(hp: Any, axis: Axis) -> Any:
    """Whole numbers are rounded draws from half below the first to half above the last, so that the two at the ends
    are as likely as the others; `ask` brings back what rounds to outside."""
    if isinstance(axis, Range):
        if axis.integer:
            if axis.log:
                return hp.qloguniform(axis.name, math.log(axis.low - 0.5), math.log(axis.high + 0.5), 1)
            return hp.quniform(axis.name, axis.low - 0.5, axis.high + 0.5, 1)
        if axis.log:
            return hp.loguniform(axis.name, math.log(axis.low), math.log(axis.high))
        return hp.uniform(axis.name, axis.low, axis.high)
    if is_ordered(axis):
        return hp.quniform(axis.name, -0.5, len(axis.values) - 0.5, 1) if len(axis.values) > 1 else 0
    return hp.choice(axis.name, list(range(len(axis.values))))


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(_flatten(value) if isinstance(value, Mapping) else {name: value})
    return flat
