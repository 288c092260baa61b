"""Figures for print: matplotlib, one function a figure, each from a table and never from disk.

Colours are Okabe & Ito's, told apart with any common colour blindness; lines also differ in dash and marker, so that a
black-and-white print loses nothing. Scales are cividis, even in lightness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from analysis.curves import Curves

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (3, 2)),
    "-",
    (0, (7, 2)),
    (0, (2, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SCALE = "cividis"
MUTED = "#9A9A9A"

P = ParamSpec("P")
R = TypeVar("R")

STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "savefig.bbox": "tight",
    "figure.dpi": 100,
}
DPI = 220
WIDTH = 6.6
"""Inches: the text width of an A4 page."""


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draws in this module's style, whatever the process has set."""

    @wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(STYLE):
            return function(*args, **kwargs)

    return drawn


@styled
def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG of print resolution."""
    figure.savefig(path, dpi=DPI)
    return path


def new_figure(width: float = WIDTH, height: float = 3.0, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure and its axes as a flat array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns)).ravel()


def short(text: str, length: int = 34) -> str:
    """`text`, cut in its middle where it is longer than a legend can hold."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return text[:half] + "…" + text[-half:]


@styled
def curves(data: Curves, labels: Mapping[str, str], unit: str = "") -> Figure:
    """Mean over seeds with a band of one standard deviation; a curve that ends early ends with an open marker.

    Args:
        labels: config key -> what to call it, in the legend's order.
    """
    figure, (ax,) = new_figure(height=3.2)
    longest = data.table["x"].max() if len(data.table) else 0
    for index, (key, label) in enumerate(labels.items()):
        rows = data.table[data.table["config_key"] == key]
        colour = COLOURS[index % len(COLOURS)]
        mark_every = max(1, len(rows) // 8)
        ax.fill_between(rows["x"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
        ax.plot(
            rows["x"],
            rows["mean"],
            color=colour,
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=(index % mark_every, mark_every),
            markersize=3.5,
            label=short(label),
        )
        if len(rows) and rows["x"].iloc[-1] < longest:
            ax.plot(rows["x"].iloc[-1], rows["mean"].iloc[-1], marker="o", markersize=7, color=colour, fillstyle="none")
    ax.set_xlabel(data.x_label)
    ax.set_ylabel(with_unit(data.metric, unit))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _zoom(ax, data.table)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3)
    seeds = sorted(set(data.table["n"])) if len(data.table) else []
    over = f"n = {seeds[-1]}" if seeds else "no curves yet"
    ax.set_title(f"mean over seeds ({over}), band: ± 1 standard deviation")
    return figure


@styled
def hyper_vs_result(table: pd.DataFrame, axes: Sequence[str], metric: str, unit: str = "", mode: str = "max") -> Figure:
    """One panel an axis: configs' means with 95% intervals over that axis's values, other axes by colour or jitter.

    Args:
        table: `summary.summarise`. Configs that were stopped or lost are open markers (not at their final epoch).
        axes: the `axis.*` columns to draw.
    """
    axes = [axis for axis in axes if table[axis].nunique() > 1][:9] or list(axes[:1])
    columns = min(3, max(1, len(axes)))
    rows = -(-max(1, len(axes)) // columns)
    figure, panels = new_figure(WIDTH if columns > 1 else 4.4, 2.7 * rows + 0.3, rows, columns)
    limits = _robust_limits(table["mean"].to_numpy(dtype=float), table["judged"].to_numpy(dtype=bool), mode)
    if limits is not None:
        limits = _with_best_interval(limits, table, mode)
    hue = _hue(table, axes)
    for panel, axis in zip(panels, axes, strict=False):
        # A line is honest only where nothing but this axis (and the colour) varies along it.
        joined = len([a for a in axes if a not in (axis, hue)]) == 0
        _panel(panel, table, axis, hue if hue != axis else None, limits, joined)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    panels[0].set_ylabel(with_unit(metric, unit))
    if hue is not None:
        handles, names = panels[[axis != hue for axis in axes].index(True)].get_legend_handles_labels()
        keep = dict(zip(names, handles, strict=True))
        figure.legend(keep.values(), keep.keys(), loc="outside lower center", ncols=min(4, len(keep)))
    return figure


def _panel(
    ax: Axes, table: pd.DataFrame, axis: str, hue: str | None, limits: tuple[float, float] | None, joined: bool
) -> None:
    rows = table[table[axis].notna() & table["mean"].notna()]
    numeric = pd.api.types.is_numeric_dtype(rows[axis])
    categories = [] if numeric else sorted(rows[axis].astype(str).unique())
    position = rows[axis].astype(float) if numeric else rows[axis].astype(str).map(categories.index).astype(float)
    log = numeric and is_log(rows[axis])
    groups = [(None, rows)] if hue is None else [(v, rows[rows[hue].astype(str) == v]) for v in _values(table, hue)]
    crowded = len(rows) > 4 * max(1, rows[axis].nunique()) * max(1, len(groups))
    for index, (value, group) in enumerate(groups):
        x = position.loc[group.index].to_numpy(dtype=float)
        order = np.argsort(x, kind="stable")
        group, x = group.iloc[order], x[order]
        if not log:
            x = x + (index - (len(groups) - 1) / 2) * 0.12 * (not numeric)
        y = group["mean"].to_numpy(dtype=float)
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index % len(MARKERS)]
        judged = group["judged"].to_numpy(dtype=bool)
        label = None if value is None else short(str(value), 20)
        if joined and numeric and not crowded and len(np.unique(x)) == len(x) and len(x) > 1:
            ax.plot(x[judged], y[judged], color=colour, linewidth=1, alpha=0.7, linestyle=DASHES[index % len(DASHES)])
        if not crowded:
            low, high = (group[side].to_numpy(dtype=float) for side in ("low", "high"))
            known = judged & np.isfinite(low)
            bars = np.abs(np.stack([y - low, high - y]))[:, known]
            ax.errorbar(x[known], y[known], yerr=bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
        size = 9 if crowded else 22
        ax.scatter(x[judged], y[judged], s=size, color=colour, marker=marker, label=label, zorder=3, linewidths=0)
        ax.scatter(x[~judged], y[~judged], s=size, facecolors="none", edgecolors=colour, marker=marker, linewidths=0.8)
        if limits is not None:
            _mark_off_scale(ax, x, y, limits, colour)
    if limits is not None:
        ax.set_ylim(*limits)
    ax.set_xlabel(axis.removeprefix("axis."))
    _x_scale(ax, rows[axis], log, categories)


def _x_scale(ax: Axes, values: pd.Series, log: bool, categories: Sequence[str]) -> None:
    if categories:
        ax.set_xticks(range(len(categories)), [short(c, 14) for c in categories])
        if sum(map(len, categories)) > 18:
            ax.tick_params(axis="x", labelrotation=35)
        ax.set_xlim(-0.5, len(categories) - 0.5)
        return
    if log:
        ax.set_xscale("log")
    points = sorted(values.astype(float).unique())
    if 1 < len(points) <= 9 and all(len(f"{p:g}") <= 6 for p in points):  # a grid's values, not a range's
        ax.set_xticks(points, [f"{p:g}" for p in points])
        ax.xaxis.set_minor_locator(NullLocator())
        if sum(len(f"{p:g}") for p in points) > 22:
            ax.tick_params(axis="x", labelrotation=45)
    elif log:
        ax.xaxis.set_minor_formatter(NullFormatter())


def is_log(values: pd.Series) -> bool:
    """Whether positive numbers span so much that only a log axis shows them: a factor of 20 or more."""
    numbers = values.dropna().astype(float)
    return bool(len(numbers) and numbers.min() > 0 and numbers.max() / numbers.min() >= 20)


def _hue(table: pd.DataFrame, axes: Sequence[str]) -> str | None:
    """The axis to show by colour: the categorical one with fewest values (2 to 8), where another axis remains."""
    if len(axes) < 2:
        return None
    fit = [a for a in axes if 2 <= table[a].nunique() <= 8 and table[a].notna().all()]
    words = [a for a in fit if not pd.api.types.is_numeric_dtype(table[a])]
    return min(words or fit, key=lambda a: table[a].nunique(), default=None)


def _values(table: pd.DataFrame, column: str) -> list[str]:
    values = table[column].dropna()
    ordered = sorted(values.unique()) if pd.api.types.is_numeric_dtype(values) else list(dict.fromkeys(values))
    return [str(v) for v in ordered]


def _robust_limits(y: np.ndarray, judged: np.ndarray, mode: str) -> tuple[float, float] | None:
    """Limits that show the good configs well; what lies far on the bad side, or was stopped early, goes to the edge.

    None: everything fits.
    """
    shown = y[judged & np.isfinite(y)]
    if len(shown) < 3:
        return None
    good = -shown if mode == "min" else shown
    best, middle = good.max(), float(np.median(good))
    worst_shown = max(good.min(), best - 8 * (best - middle)) if best > middle else good.min()
    everything = y[np.isfinite(y)] * (-1 if mode == "min" else 1)
    if everything.min() >= worst_shown and everything.max() <= best:
        return None
    pad = 0.06 * (best - worst_shown) or 0.01 * max(1.0, abs(best))
    low, high = worst_shown - 2 * pad, best + 2 * pad
    return (-high, -low) if mode == "min" else (low, high)


def _with_best_interval(limits: tuple[float, float], table: pd.DataFrame, mode: str) -> tuple[float, float]:
    """Limits that hold the best config's whole interval, unless it is more than twice as long as what else is shown."""
    best = table[table["judged"]].iloc[0]
    low, high = limits
    if not math.isfinite(best["high"]) or best["high"] - best["low"] > 2 * (high - low):
        return limits
    pad = 0.03 * (high - low)
    return (min(low, best["low"] - pad), high) if mode == "min" else (low, max(high, best["high"] + pad))


def _mark_off_scale(ax: Axes, x: np.ndarray, y: np.ndarray, limits: tuple[float, float], colour: str) -> None:
    span = limits[1] - limits[0]
    for off, edge, marker in (
        (y < limits[0], limits[0] + 0.02 * span, "v"),
        (y > limits[1], limits[1] - 0.02 * span, "^"),
    ):
        ax.scatter(
            x[off], np.full(off.sum(), edge), marker=marker, s=26, facecolors="none", edgecolors=colour, clip_on=False
        )


def _zoom(ax: Axes, table: pd.DataFrame) -> None:
    """Limits of a curve plot: the first eighth of the way may leave the frame, lest it flatten all the rest."""
    late = table[table["x"] >= table["x"].max() / 8]
    shown = late[["low", "high"]].to_numpy(dtype=float)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        bottom, top = shown.min(), shown.max()
        pad = 0.05 * (top - bottom) or 0.01 * max(1.0, abs(top))
        ax.set_ylim(bottom - pad, top + pad)


def with_unit(metric: str, unit: str) -> str:
    """An axis title: `test_acc (fraction)`."""
    return metric if unit in ("", "1") else f"{metric} ({unit})"


def rounded(value: float, spread: float | None = None) -> str:
    """A number with the digits that its spread lets through (two of the spread), four significant ones without."""
    if value is None or not math.isfinite(value):
        return "–"
    if spread is None or not math.isfinite(spread) or spread <= 0:
        return f"{value:.4g}"
    digits = 1 - math.floor(math.log10(spread))
    return f"{value:.{digits}f}" if 0 <= digits <= 8 else f"{value:.4g}"
