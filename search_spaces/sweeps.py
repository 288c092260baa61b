"""Named sweeps and the registry a tune script hands to the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from search_spaces.space import Arms, Point, Space
from trainables.family import BadValue

Kind = Literal["notebook", "original", "wish", "control", "product"]


@dataclass(frozen=True)
class Sweep:
    """A search that has a name: what to try, on how many seeds, and how.

    Args:
        name: what `python tune_x.py NAME` asks for.
        doc: one line: what it asks, and where it comes from.
        kind: "notebook" (written there), "original" (in the same researcher's configs), "wish" (an open TODO of
            theirs), "control" (an arm without which a number cannot be read), "product" (ours: demos, best ranges).
        space: what varies.
        base: fields that every config of the sweep fixes.
        seeds: runs per config.
        searcher, scheduler: as the command line's flags.
        trials: number of configs for searchers that are not a grid; None means the whole grid.
        metric: summary key to optimise, or several with commas; "" means the family's headline.
        confirm: how many of the best configs to run again on fresh seeds at the end; 0: none.
        race: give more seeds to the configs that may still be the best.
        covariates: what else to record, as the command line's --covariates.
    """

    name: str
    doc: str
    kind: Kind
    space: Space
    base: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    searcher: str = "grid"
    scheduler: str = "none"
    trials: int | None = None
    metric: str = ""
    covariates: tuple[str, ...] = ()
    confirm: int = 0
    race: bool = False

    @property
    def configs(self) -> int | None:
        """Number of configs: the grid's size, or `trials`."""
        return self.space.size() if self.searcher == "grid" and self.trials is None else self.trials

    def run_names(self) -> dict[str, Point]:
        """The notebook's own names of single runs in this sweep -> their points."""
        named = [axis for axis in self.space.axes if isinstance(axis, Arms) and axis.run_names]
        names: dict[str, Point] = {}
        if named:
            for point in self.space.grid():
                for axis in named:
                    if axis.name in point:
                        names.setdefault(point[axis.name], point)
        return names


@dataclass(frozen=True)
class Sweeps:
    """A family's sweeps. `default` is what the bare command runs: small and real, on data that needs no download."""

    family: str
    default: str
    sweeps: tuple[Sweep, ...]

    def __post_init__(self):
        names = [sweep.name for sweep in self.sweeps]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise BadValue(f"{self.family} names a sweep twice: {', '.join(sorted(twice))}")
        if self.default not in names:
            raise BadValue(f"{self.family}'s default sweep '{self.default}' does not exist")

    def find(self, name: str | None) -> Sweep:
        """A sweep by its name, or the single run a notebook calls so. Raises `BadValue` with the nearest names."""
        if name is None:
            name = self.default
        aliases: dict[str, tuple[Sweep, Point]] = {}
        for sweep in self.sweeps:
            if sweep.name == name:
                return sweep
            for alias, point in sweep.run_names().items():
                aliases.setdefault(alias, (sweep, point))
        if name in aliases:
            sweep, point = aliases[name]
            return replace(sweep, name=name, doc=f"one run of {sweep.name}: {sweep.doc}", space=sweep.space.only(point))
        near = difflib.get_close_matches(name, [s.name for s in self.sweeps] + list(aliases), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--list shows them all"
        raise BadValue(f"{self.family} has no sweep or run named '{name}': {hint}")
