"""Every kind of figure by its name, for print and to interact with: what `plot` and `report` draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis import figures, interactive, landscapes
from analysis.compare import grid
from analysis.curves import Curves, learning_curves
from analysis.errors import UserError
from analysis.importance import main_effects
from analysis.objectives import others_of, tradeoff
from analysis.store import Sweep, open_sweep
from analysis.summary import scores, summarise
from analysis.writing import aside

Format = Literal["png", "html", "both"]
DRAWN = 6
"""Configs with a curve of their own."""

MOST_CELLS = 12
"""Values a side of a heat map; an axis with more of them is cut into parts, as a range is."""


@dataclass(frozen=True)
class Subject:
    """What there is to draw, each part read once.

    Args:
        rows, columns: fields of the heat map (default: the two axes that matter most).
    """

    sweep: Sweep
    metric: str
    at: str = "final"
    curve: str | None = None
    rows: str | None = None
    columns: str | None = None
    top: int = DRAWN

    @cached_property
    def runs(self) -> pd.DataFrame:
        return scores(self.sweep, self.metric, self.at)

    @cached_property
    def table(self) -> pd.DataFrame:
        return summarise(self.sweep, self.runs, self.metric)

    @cached_property
    def judged(self) -> pd.DataFrame:
        return self.table[self.table["judged"]] if len(self.table) else self.table

    @cached_property
    def axes(self) -> list[str]:
        """Axes with two values or more."""
        return [a for a in self.sweep.axis_columns(self.table) if self.table[a].nunique() > 1]

    @cached_property
    def labels(self) -> dict[str, str]:
        """The best configs: key -> label."""
        best = self.table[self.table["n"] > 0].head(self.top)
        return dict(zip(best["config_key"], best["label"], strict=True))

    @cached_property
    def curves(self) -> Curves:
        return learning_curves(self.sweep, self.labels, self.curve)

    @cached_property
    def effects(self) -> pd.DataFrame:
        return main_effects(self.sweep, self.judged, self.metric)

    @cached_property
    def others(self) -> list[str]:
        return others_of(self.sweep, self.metric)

    @cached_property
    def points(self) -> pd.DataFrame:
        return tradeoff(self.sweep, self.runs, self.metric, self.at)

    @cached_property
    def rungs(self) -> list[int]:
        return [int(r) for r in (self.sweep.info.get("scheduler") or {}).get("rungs") or []]

    @cached_property
    def cells(self) -> pd.DataFrame:
        return _binned(
            grid(self.sweep.folder.parent, self.sweep.folder.name, *self.sides, self.metric, self.at), self.mode
        )

    @cached_property
    def sides(self) -> tuple[str, str]:
        """Fields of the heat map: as given, else the two axes that all judged configs have and that matter most."""
        if self.rows and self.columns:
            return self.rows, self.columns
        whole = [a.removeprefix("axis.") for a in self.axes if self.judged[a].notna().all()]
        ranked = [a for a in self.effects["axis"] if a in whole] + whole
        ranked = list(dict.fromkeys(ranked))
        if len(ranked) < 2:
            raise UserError(f"{self.sweep.name} has no two axes for a heat map: give --rows and --cols")
        return ranked[1], ranked[0]

    @property
    def mode(self) -> str:
        return self.sweep.mode(self.metric)

    @property
    def unit(self) -> str:
        return self.sweep.unit(self.metric)


def _binned(cells: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Cells of ranges gathered into at most eight parts a side, the best config of each.

    An axis is a range where most of its values were tried once.
    """
    configs = len(cells)
    for side in ("row", "column"):
        values = cells[side].nunique()
        if pd.api.types.is_numeric_dtype(cells[side]) and (values > MOST_CELLS or values > max(3, 0.5 * configs)):
            count = min(8, max(3, round(configs**0.5)))
            log = figures.is_log(cells[side])
            x = np.log(cells[side]) if log else cells[side].astype(float)
            parts = np.clip(((x - x.min()) / (x.max() - x.min()) * count).astype(int), 0, count - 1)
            centre = x.min() + (parts + 0.5) / count * (x.max() - x.min())
            cells = cells.assign(**{side: np.exp(centre) if log else centre})
            cells[side] = cells[side].map(lambda v: float(f"{v:.2g}"))
    cells = cells.sort_values("mean", ascending=mode == "min", kind="stable")
    return cells.drop_duplicates(["row", "column"]).sort_values(["row", "column"])


@dataclass(frozen=True)
class Kind:
    """A kind of figure: whether there is something to draw, how to draw it twice, and what it shows."""

    caption: str
    able: Callable[[Subject], bool]
    still: Callable[[Subject], Any]
    live: Callable[[Subject], Any]


KINDS: dict[str, Kind] = {
    "curves": Kind(
        "Learning curves of the best configs: mean over seeds, band ± 1 standard deviation. Open circle: ended early.",
        lambda s: bool(s.labels) and bool(s.sweep.metrics_of("epochs")),
        lambda s: figures.curves(s.curves, s.labels, s.sweep.unit(s.curves.metric)),
        lambda s: interactive.curves(s.curves, s.labels),
    ),
    "hyper": Kind(
        "Result against each axis of the space: mean over seeds with 95% interval. Open markers: stopped early, at "
        "their last value. Triangles at the edge: off the scale.",
        lambda s: len(s.axes) > 0 and bool(s.table["mean"].notna().any()),
        lambda s: figures.hyper_vs_result(s.table, s.axes, s.metric, s.unit, s.mode),
        lambda s: interactive.hyper_vs_result(s.table, s.axes, s.metric),
    ),
    "heatmap": Kind(
        "Mean over seeds of each pair of values, at its best setting of the other axes. Ranges are cut into parts.",
        lambda s: len([a for a in s.axes if s.judged[a].notna().all()]) > 1 and len(s.judged) > 3,
        lambda s: landscapes.heat_map(s.cells, *s.sides, s.metric, s.unit, s.mode),
        lambda s: interactive.heat_map(s.cells, *s.sides, s.mode),
    ),
    "importance": Kind(
        "What each axis explains of the variance between configs by itself, with 90% bootstrap intervals.",
        lambda s: len(s.axes) > 1 and len(s.judged) > 7 and len(s.effects) > 0,
        lambda s: landscapes.importance(s.effects, s.metric),
        lambda s: interactive.importance(s.effects),
    ),
    "parallel": Kind(
        "Every config through its values to its result.",
        lambda s: len(s.axes) > 1 and int(s.table["mean"].notna().sum()) > 7,
        lambda s: landscapes.parallel_coordinates(s.table, s.axes[:8], s.metric, s.mode),
        lambda s: interactive.parallel_coordinates(s.table, s.axes, s.metric, s.mode),
    ),
    "rungs": Kind(
        "How far each config came before the scheduler stopped it; dashed: rungs, with the number that went on.",
        lambda s: bool(s.rungs) and len(s.table) > 0,
        lambda s: landscapes.rung_diagram(s.table, s.rungs, s.metric, s.unit),
        lambda s: interactive.rung_diagram(s.table, s.rungs, s.metric),
    ),
    "pareto": Kind(
        "Result against the other objectives (device time of a run, where there is one objective only); nothing beats "
        "the marked configs in all of them.",
        lambda s: len(s.points) > 3 and all(s.points[name].nunique() > 1 for name in s.others),
        lambda s: landscapes.pareto(s.points, s.metric, s.others, {n: s.sweep.unit(n) for n in (s.metric, *s.others)}),
        lambda s: interactive.pareto(s.points, s.metric, s.others),
    ),
}


def plot(
    storage: Path | str,
    name: str,
    kinds: Sequence[str] = (),
    out: Path | str | None = None,
    form: Format = "both",
    **subject: Any,
) -> pd.DataFrame:
    """Writes figures as `<kind>.png` and `<kind>.html` into `out` (default `<storage>/<name>/plots`).

    Args:
        kinds: of `KINDS`; none: all that the sweep has data for.
        subject: `metric, at, curve, rows, columns, top` as `Subject`'s.

    Returns:
        One row a file: `kind, path`.

    Raises:
        UserError: an unknown kind or field, or nothing to draw. Nothing is written then.
    """
    sweep = open_sweep(storage, name)
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"no kind of figure '{kind}': there is {', '.join(KINDS)}")
    if form not in ("png", "html", "both"):
        raise UserError(f"--format {form} is none of png, html, both")
    drawn = Subject(sweep, subject.pop("metric", None) or sweep.metric, **subject)
    able = [kind for kind in (kinds or KINDS) if KINDS[kind].able(drawn) or (kind == "heatmap" and drawn.rows)]
    missing = [kind for kind in kinds if kind not in able]
    if missing or not able:
        raise UserError(f"{name} has no data for {', '.join(missing) or 'any figure'} yet")
    target = Path(out) if out is not None else sweep.folder / "plots"
    written = []
    with aside(target) as folder:
        for kind in able:
            if form in ("png", "both"):
                figures.save(KINDS[kind].still(drawn), folder / f"{kind}.png")
                written.append((kind, str(target / f"{kind}.png")))
            if form in ("html", "both"):
                page = {KINDS[kind].caption: KINDS[kind].live(drawn)}
                interactive.write_page(page, folder / f"{kind}.html", f"{sweep.name}: {kind}")
                written.append((kind, str(target / f"{kind}.html")))
    if out is None:
        sweep.publish(Path(path) for _, path in written)
    return pd.DataFrame(written, columns=["kind", "path"])
