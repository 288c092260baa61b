"""Search spaces as plain data: axes that say which fields take which values, and when.

A space is a tuple of axes. A *point* is {axis name: value} for the axes that are active; an axis is active when every
condition in its `when` holds for the axes before it. A point becomes field values of the family's program and hyper by
`assignments`. Nothing here knows Ray Tune, Optuna or HyperOpt: `tuning.searchers` translates, in one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainables.family import BadValue

Point = dict[str, Any]
When = Mapping[str, tuple]


@dataclass(frozen=True)
class Choice:
    """One field, a few values. `name` must be unique in the space; `sets` is the field (default: the name)."""

    name: str
    values: tuple
    sets: str = ""
    when: When = field(default_factory=dict)

    def __post_init__(self):
        if not self.values:
            raise BadValue(f"{self.name} has no values to choose from")
        if len(set(self.values)) != len(self.values):
            raise BadValue(f"{self.name} lists a value twice: {', '.join(map(str, self.values))}")


@dataclass(frozen=True)
class Range:
    """One field, an interval, even or log-even; whole numbers only with `integer` (both ends included)."""

    name: str
    low: float
    high: float
    log: bool = False
    integer: bool = False
    sets: str = ""
    when: When = field(default_factory=dict)

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise BadValue(
                f"{self.name} = {self.low}..{self.high} is an empty range: the low end must be below the high"
            )
        if self.log and self.low <= 0:
            raise BadValue(f"{self.name} = {self.low}..{self.high}:log needs a low end above 0")

    def at(self, fraction: float) -> float | int:
        """The value at `fraction` in [0, 1) of the way, even in the axis's own scale."""
        if self.integer:
            if self.log:
                value = math.exp(_between(math.log(self.low), math.log(self.high + 1), fraction))
            else:
                value = _between(self.low, self.high + 1, fraction)
            return int(min(max(math.floor(value), self.low), self.high))
        if self.log:
            return math.exp(_between(math.log(self.low), math.log(self.high), fraction))
        return _between(self.low, self.high, fraction)


@dataclass(frozen=True)
class Arms:
    """Several fields at once under a label: what a notebook calls a net, a variant, or a run.

    With `run_names`, the labels are the notebook's own names of single runs, and `python tune_x.py LABEL` finds them.
    """

    name: str
    arms: Mapping[str, Mapping[str, Any]]
    when: When = field(default_factory=dict)
    run_names: bool = False

    def __post_init__(self):
        if not self.arms:
            raise BadValue(f"{self.name} has no arms to choose from")

    @property
    def values(self) -> tuple:
        return tuple(self.arms)


Axis = Choice | Range | Arms


def is_ordered(axis: Axis) -> bool:
    """Whether a choice is among numbers: then neighbours are alike, and a model may know it."""
    return isinstance(axis, Choice) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis.values
    )


def _between(low: float, high: float, fraction: float) -> float:
    return low + (high - low) * fraction


@dataclass(frozen=True)
class Space:
    """Axes in order; conditions look back, never ahead."""

    axes: tuple[Axis, ...] = ()

    def __post_init__(self):
        seen: set[str] = set()
        for axis in self.axes:
            if axis.name in seen:
                raise BadValue(f"the space has two axes named '{axis.name}'")
            for other in axis.when:
                if other not in seen:
                    raise BadValue(f"axis '{axis.name}' depends on '{other}', which does not stand before it")
            seen.add(axis.name)

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise BadValue(f"the space has no axis '{name}'; it has: {', '.join(axis.name for axis in self.axes)}")

    def __contains__(self, name: str) -> bool:
        return any(axis.name == name for axis in self.axes)

    def is_active(self, axis: Axis, point: Mapping[str, Any]) -> bool:
        return all(point.get(other) in allowed for other, allowed in axis.when.items())

    def active(self, point: Mapping[str, Any]) -> list[Axis]:
        return [axis for axis in self.axes if self.is_active(axis, point)]

    def corners(self) -> Iterator[Point]:
        """Points at which every value that an axis lists, and both ends of every range, is met once, the other axes
        at their first: what contradicts itself does so here."""
        first = {axis.name: 0.0 for axis in self.axes}
        yield self.at(first)
        for axis in self.axes:
            count = 2 if isinstance(axis, Range) else len(axis.values)
            last = math.nextafter(1.0, 0.0)
            for number in range(1, count):
                fraction = last if isinstance(axis, Range) else (number + 0.5) / count
                yield self.at({**first, axis.name: fraction})

    def grid(self) -> Iterator[Point]:
        """Every point, first axis slowest, exactly as nested loops over the notebook's lists would visit them."""
        for axis in self.axes:
            if isinstance(axis, Range):
                raise BadValue(
                    f"a grid cannot enumerate the range {axis.name} = {axis.low}..{axis.high}: give it values "
                    f"(--space {axis.name}=a,b,c) or another searcher (--searcher random)"
                )
        yield from self._grid({}, 0)

    def _grid(self, point: Point, depth: int) -> Iterator[Point]:
        if depth == len(self.axes):
            yield dict(point)
            return
        axis = self.axes[depth]
        if not self.is_active(axis, point):
            yield from self._grid(point, depth + 1)
            return
        for value in axis.values:  # type: ignore[union-attr]  # grid() refused ranges
            yield from self._grid({**point, axis.name: value}, depth + 1)

    def size(self) -> int | None:
        """Number of grid points, or None where a range makes it endless."""
        if any(isinstance(axis, Range) for axis in self.axes):
            return None
        return sum(1 for _ in self.grid())

    def at(self, fractions: Mapping[str, float]) -> Point:
        """The point at one fraction in [0, 1) an axis: how random and quasi-random searchers draw."""
        point: Point = {}
        for axis in self.axes:
            if self.is_active(axis, point):
                u = fractions[axis.name]
                point[axis.name] = axis.at(u) if isinstance(axis, Range) else axis.values[int(u * len(axis.values))]
        return point

    def assignments(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Field -> value for the axes active in `point`; a later axis overrides an earlier one."""
        fields: dict[str, Any] = {}
        for axis in self.active(point):
            if isinstance(axis, Arms):
                fields.update(axis.arms[point[axis.name]])
            else:
                fields[axis.sets or axis.name] = point[axis.name]
        return fields

    def label(self, point: Mapping[str, Any]) -> str:
        """A short readable name: run names and arm labels as they are, other axes as name=value."""
        parts = []
        for axis in self.active(point):
            value = point[axis.name]
            short = axis.name.rsplit(".", 1)[-1]
            parts.append(str(value) if isinstance(axis, Arms) else f"{short}={compact(value)}")
        return " ".join(parts)

    def replaced(self, axis: Axis) -> Space:
        """This space with the axis of the same name replaced in its place, or with a new one appended."""
        if axis.name not in self:
            return Space((*self.axes, axis))
        return Space(tuple(axis if old.name == axis.name else old for old in self.axes))

    def without(self, name: str) -> Space:
        """This space with a field fixed elsewhere: axes that set only it are gone, arms no longer set it, and arms
        that now say the same are one."""
        axes: list[Axis] = []
        for axis in self.axes:
            if isinstance(axis, Arms):
                arms: dict[str, dict[str, Any]] = {}
                for label, fields in axis.arms.items():
                    rest = {field: value for field, value in fields.items() if field != name}
                    if rest not in arms.values():
                        arms[label] = rest
                axes.append(Arms(axis.name, arms, axis.when, axis.run_names))
            elif (axis.sets or axis.name) != name:
                axes.append(axis)
            elif any(axis.name in other.when for other in self.axes):
                raise BadValue(f"{name} cannot be fixed: other axes of this sweep depend on it")
        return Space(tuple(axes))

    def only(self, point: Mapping[str, Any]) -> Space:
        """The space of this one point."""
        axes: list[Axis] = []
        for axis in self.active(point):
            if isinstance(axis, Arms):
                label = point[axis.name]
                axes.append(Arms(axis.name, {label: axis.arms[label]}, run_names=axis.run_names))
            else:
                axes.append(Choice(axis.name, (point[axis.name],), sets=axis.sets))
        return Space(tuple(axes))

    def to_plain(self) -> list[dict[str, Any]]:
        """JSON-ready description, one dict an axis, in order."""
        plain = []
        for axis in self.axes:
            entry: dict[str, Any] = {"name": axis.name}
            if isinstance(axis, Range):
                entry.update(kind="range", low=axis.low, high=axis.high, log=axis.log, integer=axis.integer)
            elif isinstance(axis, Arms):
                entry.update(kind="arms", arms={k: dict(v) for k, v in axis.arms.items()}, run_names=axis.run_names)
            else:
                entry.update(kind="choice", values=list(axis.values))
            if not isinstance(axis, Arms) and axis.sets:
                entry["sets"] = axis.sets
            if axis.when:
                entry["when"] = {k: list(v) for k, v in axis.when.items()}
            plain.append(entry)
        return plain

    @classmethod
    def from_plain(cls, plain: list[dict[str, Any]]) -> Space:
        """The inverse of `to_plain`."""
        axes: list[Axis] = []
        for entry in plain:
            when = {k: tuple(map(_frozen, v)) for k, v in entry.get("when", {}).items()}
            kind, name, sets = entry["kind"], entry["name"], entry.get("sets", "")
            if kind == "range":
                axes.append(Range(name, entry["low"], entry["high"], entry["log"], entry["integer"], sets, when))
            elif kind == "arms":
                arms = {k: {f: _frozen(x) for f, x in v.items()} for k, v in entry["arms"].items()}
                axes.append(Arms(name, arms, when, entry["run_names"]))
            elif kind == "choice":
                axes.append(Choice(name, tuple(map(_frozen, entry["values"])), sets, when))
            else:
                raise BadValue(f"axis '{name}' has the unknown kind '{kind}'")
        return cls(tuple(axes))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def compact(value: Any) -> str:
    """A value for labels: 0.001 -> 0.001, 1e-05 -> 1e-05, tuples joined by '-'."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "-".join(map(compact, value))
    return str(value)


def union(parts: Mapping[str, tuple[Space, Mapping[str, Any]]], name: str = "part") -> Space:
    """Several spaces as one: the first axis chooses the part, each part's axes exist only there.

    Args:
        parts: label -> (space, fields that the part fixes).
        name: name of the choosing axis; the parts' axes become `label.axis`.
    """
    axes: list[Axis] = [Arms(name, {label: dict(base) for label, (_, base) in parts.items()})]
    for label, (space, _) in parts.items():
        for axis in space.axes:
            when = {name: (label,), **{f"{label}.{other}": allowed for other, allowed in axis.when.items()}}
            renamed = f"{label}.{axis.name}"
            if isinstance(axis, Range):
                axes.append(Range(renamed, axis.low, axis.high, axis.log, axis.integer, axis.sets or axis.name, when))
            elif isinstance(axis, Arms):
                axes.append(Arms(renamed, axis.arms, when, axis.run_names))
            else:
                axes.append(Choice(renamed, axis.values, axis.sets or axis.name, when))
    return Space(tuple(axes))
