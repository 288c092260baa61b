"""Figures of a whole search for print: heat map, parallel coordinates, importance, rung diagram, Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.compare import plain
from analysis.figures import (
    COLOURS,
    MARKERS,
    MUTED,
    SCALE,
    WIDTH,
    is_log,
    new_figure,
    rounded,
    short,
    styled,
    with_unit,
)
from analysis.store import COSTS

REASONS = ("finished", "stopped", "diverged", "oom", "crashed", "cancelled", "running", "pending")


@styled
def heat_map(cells: pd.DataFrame, rows: str, columns: str, metric: str, unit: str = "", mode: str = "max") -> Figure:
    """Mean over seeds of each pair of values, with its spread written in.

    Args:
        cells: what `compare.grid` returned, rows and columns in their order.
    """
    mean = cells.pivot(index="row", columns="column", values="mean")
    sd = cells.pivot(index="row", columns="column", values="sd")
    high, wide = mean.shape
    figure, (ax,) = new_figure(min(WIDTH, 1.8 + 0.85 * wide), 1.1 + 0.42 * high)
    ax.grid(False)
    values = mean.to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    # One broken corner must not flatten the rest: the scale begins at the lower (worse) tenth.
    low, top = (np.quantile(finite, 0.1), finite.max()) if mode != "min" else (finite.min(), np.quantile(finite, 0.9))
    norm = Normalize(low, top if top > low else low + 1e-9)
    image = ax.imshow(values, cmap=SCALE if mode != "min" else f"{SCALE}_r", norm=norm, aspect="auto")
    best = np.nanargmin(values) if mode == "min" else np.nanargmax(values)
    for index in np.ndindex(values.shape):
        if not np.isfinite(values[index]):
            continue
        deviation = float(sd.to_numpy(dtype=float)[index])
        text = rounded(float(values[index]), deviation) + (
            f"\n±{rounded(deviation, deviation)}" if deviation > 0 else ""
        )
        red, green, blue, _ = image.cmap(norm(values[index]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        weight = "bold" if np.ravel_multi_index(index, values.shape) == best else "normal"
        ax.text(
            index[1],
            index[0],
            text,
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if dark else "black",
            fontweight=weight,
        )
    ax.set_xticks(range(wide), [short(plain(v), 12) for v in mean.columns])
    ax.set_yticks(range(high), [short(plain(v), 16) for v in mean.index])
    ax.set_xlabel(columns)
    ax.set_ylabel(rows)
    bar = figure.colorbar(image, ax=ax, extend="min" if mode != "min" else "max")
    bar.set_label(with_unit(metric, unit))
    return figure


@styled
def parallel_coordinates(table: pd.DataFrame, axes: Sequence[str], metric: str, mode: str = "max") -> Figure:
    """A line a config through the values of every axis to its result; the better, the later drawn.

    An axis that a config does not have is passed below its foot.
    """
    rows = table[table["mean"].notna()].sort_values("mean", ascending=mode != "min")
    figure, (ax,) = new_figure(WIDTH, 3.0)
    ax.grid(False)
    values = rows["mean"].to_numpy(dtype=float)
    ranks = rows["mean"].rank(pct=True).to_numpy(dtype=float)
    columns = [*axes, "mean"]
    heights, ticks = zip(*(_scaled(rows[column]) for column in columns), strict=True)
    cmap = matplotlib.colormaps[SCALE if mode != "min" else f"{SCALE}_r"]
    good = 1 - ranks if mode == "min" else ranks
    for line, colour, rank in zip(np.stack(heights, 1), ranks, good, strict=True):
        top = rank > 0.9
        ax.plot(
            range(len(columns)),
            line,
            color=cmap(0.95 * colour),
            linewidth=1.6 if top else 0.7,
            alpha=1.0 if top else 0.45,
        )
    for x, labels in enumerate(ticks):
        ax.axvline(x, color="black", linewidth=0.8)
        for height, text in labels:
            ax.text(x + 0.02, height, short(text, 14), fontsize=7, va="center", bbox=_HALO)
    names = [short(c.removeprefix("axis."), 18) for c in axes] + [short(metric, 20)]
    crowded = sum(map(len, names)) > 70
    ax.set_xticks(range(len(columns)), names, rotation=15 * crowded, ha="right" if crowded else "center")
    ax.set_yticks([])
    ax.set_xlim(-0.1, len(columns) - 1 + 0.35)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    if len(values):
        scale = ScalarMappable(Normalize(0, 100), cmap)
        bar = figure.colorbar(scale, ax=ax, shrink=0.8)
        bar.set_label("rank of the config's mean (%)")
    ax.set_title(f"{len(rows)} configs; the best tenth in bold")
    return figure


LABEL_HEIGHT = 0.06
"""Of a number on an axis, as a share of the axis: two that are nearer to one another would overlap."""
_HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}


def _scaled(values: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in [0, 1] (-0.12 where there is no value) and labelled ticks."""
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(dtype=float)
        known = numbers[np.isfinite(numbers)]
        log = is_log(values)
        put = (lambda v: np.log(v)) if log else (lambda v: np.asarray(v, dtype=float))
        low, high = put(known.min()), put(known.max())
        span = (high - low) or 1.0
        heights = np.where(
            np.isfinite(numbers), (put(np.where(np.isfinite(numbers), numbers, known[0])) - low) / span, -0.12
        )
        ticks = list[tuple[float, str]]()
        for number in [known.min(), known.max(), *(sorted(set(known)) if len(set(known)) <= 6 else ())]:
            height = float((put(number) - low) / span)
            if all(abs(height - other) > LABEL_HEIGHT for other, _ in ticks):
                ticks.append((height, f"{number:.4g}"))
        return heights, ticks
    names = list(dict.fromkeys(str(v) for v in values.dropna()))
    place = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    heights = np.array([place.get(str(v), -0.12) if pd.notna(v) else -0.12 for v in values])
    return heights, [(height, name) for name, height in place.items()] if len(names) <= 12 else []


@styled
def importance(effects: pd.DataFrame, metric: str) -> Figure:
    """Share of the variance between configs that each axis explains by itself, with 90% bootstrap intervals."""
    effects = effects.head(15).iloc[::-1]
    figure, (ax,) = new_figure(4.6, 0.9 + 0.28 * max(1, len(effects)))
    y = np.arange(len(effects))
    share = effects["share"].to_numpy(dtype=float)
    bars = np.clip(np.stack([share - effects["low"], effects["high"] - share]), 0, None)
    ax.barh(y, share, color=COLOURS[0], height=0.6)
    ax.errorbar(share, y, xerr=bars, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
    ax.set_yticks(y, [short(str(name), 26) for name in effects["axis"]])
    ax.set_xlim(0, 1)
    ax.grid(False, axis="y")
    ax.set_xlabel(f"share of the variance of {short(metric, 24)} (ranks)")
    return figure


@styled
def rung_diagram(table: pd.DataFrame, rungs: Sequence[int], metric: str, unit: str = "") -> Figure:
    """How far each config came: a line a config, longest above; rungs as verticals with the number that passed."""
    rows = table.sort_values(["epoch", "mean"], kind="stable").reset_index(drop=True)
    figure, (ax,) = new_figure(WIDTH, min(6.0, 1.6 + 0.06 * len(rows)))
    values = rows["mean"].to_numpy(dtype=float)
    known = values[np.isfinite(values)]
    norm = Normalize(np.quantile(known, 0.1), known.max()) if len(known) else Normalize(0, 1)
    cmap = matplotlib.colormaps[SCALE]
    ax.hlines(range(len(rows)), 0, rows["epoch"], color=[cmap(norm(v)) for v in values], linewidth=1.4)
    reasons = [reason for reason in REASONS if (rows["stop_reason"] == reason).any()]
    for index, reason in enumerate(reasons):
        which = rows.index[rows["stop_reason"] == reason]
        face = "white" if reason != "finished" else COLOURS[6]
        ax.scatter(
            rows["epoch"].loc[which],
            which,
            marker=MARKERS[index % len(MARKERS)],
            s=14,
            facecolors=face,
            edgecolors="black",
            linewidths=0.7,
            label=f"{reason} ({len(which)})",
            zorder=3,
        )
    for rung in rungs:
        ax.axvline(rung, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
        passed = int((rows["epoch"] > rung).sum())
        ax.annotate(
            f"{passed} on", (rung, 1.0), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom"
        )
    ax.set_xlabel("epochs trained")
    ax.set_ylabel("configs")
    ax.set_yticks([])
    ax.grid(False)
    ax.set_xlim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4)
    figure.colorbar(ScalarMappable(norm, cmap), ax=ax).set_label(f"last value of {with_unit(metric, unit)}")
    return figure


@styled
def pareto(points: pd.DataFrame, metric: str, others: Sequence[str], units: Mapping[str, str]) -> Figure:
    """Result against each other objective; the configs that nothing beats in all objectives are marked and named, and
    joined where there are two objectives.

    Args:
        points: what `objectives.tradeoff` returned.
    """
    front = points[points["front"]]
    figure, axes = new_figure(5.0 if len(others) == 1 else WIDTH, 3.2, columns=len(others))
    for ax, other in zip(axes, others, strict=True):
        ax.scatter(points[other], points[metric], s=14, color=MUTED, linewidths=0, label="configs")
        if len(others) == 1:
            joined = front.sort_values(other)
            ax.plot(joined[other], joined[metric], color=COLOURS[0], linewidth=1.2)
        label = f"nothing beats {'both' if len(others) == 1 else 'all'}"
        ax.scatter(front[other], front[metric], s=26, color=COLOURS[0], marker="D", label=label, zorder=3)
        for row in front.head(5).to_dict("records"):
            ax.annotate(
                short(row["label"], 22),
                (row[other], row[metric]),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=7,
            )
        if is_log(points[other]):
            ax.set_xscale("log")
        ax.set_xlabel(with_unit(other, units[other]) + (" of a run" if other in COSTS else ""))
    axes[0].set_ylabel(with_unit(metric, units[metric]))
    axes[0].legend(loc="best")
    return figure
