"""The same figures to hover over and zoom into: plotly, as pages that load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.compare import plain
from analysis.curves import Curves
from analysis.figures import COLOURS, is_log

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 13},
    "margin": {"l": 70, "r": 30, "t": 50, "b": 60},
    "colorway": list(COLOURS),
}


def write_page(figures: Mapping[str, go.Figure], path: Path, title: str) -> Path:
    """One self-contained page with every figure (about 5 MB: plotly's script is inside, once)."""
    parts = []
    for index, (caption, figure) in enumerate(figures.items()):
        body = figure.to_html(full_html=False, include_plotlyjs=index == 0, config={"displaylogo": False})
        parts.append(f"<h2>{escape(caption)}</h2>\n{body}")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>body{{font-family:Helvetica,Arial,sans-serif;margin:24px}}"
        f"h2{{font-size:16px}}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def curves(data: Curves, labels: Mapping[str, str]) -> go.Figure:
    """Mean over seeds with a band of one standard deviation; a click in the legend hides both."""
    figure = go.Figure(layout=LAYOUT)
    for index, (key, label) in enumerate(labels.items()):
        rows = data.table[data.table["config_key"] == key]
        colour = COLOURS[index % len(COLOURS)]
        band_x = np.concatenate([rows["x"], rows["x"][::-1]])
        band_y = np.concatenate([rows["high"], rows["low"][::-1]])
        figure.add_scatter(
            x=band_x,
            y=band_y,
            fill="toself",
            mode="lines",
            fillcolor=_faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=key,
        )
        figure.add_scatter(
            x=rows["x"],
            y=rows["mean"],
            name=escape(label),
            legendgroup=key,
            mode="lines",
            line={"color": colour, "dash": DASHES[index % len(DASHES)]},
            customdata=np.stack([rows["sd"].fillna(0), rows["n"]], axis=-1),
            hovertemplate="%{y:.4f} ± %{customdata[0]:.4f} (n=%{customdata[1]})",
        )
    figure.update_layout(xaxis_title=data.x_label, yaxis_title=data.metric, hovermode="x unified")
    return figure


def hyper_vs_result(table: pd.DataFrame, axes: Sequence[str], metric: str) -> go.Figure:
    """Configs' means with 95% intervals over one axis, chosen in a menu."""
    axes = [axis for axis in axes if table[axis].nunique() > 1] or list(axes[:1])
    rows = table[table["mean"].notna()]
    figure = go.Figure(layout=LAYOUT)
    half = (rows["high"] - rows["mean"]).where(np.isfinite(rows["high"]))
    text = [escape(str(label)) for label in rows["label"]]
    symbols = ["circle" if judged else "circle-open" for judged in rows["judged"]]
    for index, axis in enumerate(axes):
        x = rows[axis] if pd.api.types.is_numeric_dtype(rows[axis]) else rows[axis].map(plain)
        figure.add_scatter(
            x=x,
            y=rows["mean"],
            mode="markers",
            visible=index == 0,
            error_y={"array": half, "thickness": 1},
            marker={"size": 8, "color": COLOURS[0], "symbol": symbols},
            text=text,
            hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
            name=escape(axis),
        )
    buttons = [
        {
            "label": escape(axis.removeprefix("axis.")),
            "method": "update",
            "args": [
                {"visible": [other == axis for other in axes]},
                {"xaxis.title.text": escape(axis.removeprefix("axis.")), "xaxis.type": _scale(table[axis])},
            ],
        }
        for axis in axes
    ]
    figure.update_layout(yaxis_title=metric, xaxis={"title": escape(axes[0][5:]), "type": _scale(table[axes[0]])})
    if len(axes) > 1:
        figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "y": 1.15, "xanchor": "left"}])
    return figure


def parallel_coordinates(table: pd.DataFrame, axes: Sequence[str], metric: str, mode: str = "max") -> go.Figure:
    """Drag along an axis to keep the configs that pass there."""
    rows = table[table["mean"].notna()]
    dimensions: list[dict[str, Any]] = []
    for axis in axes:
        values = rows[axis]
        label = escape(axis.removeprefix("axis."))
        if pd.api.types.is_numeric_dtype(values):
            log = is_log(values)
            known = values.astype(float).map(np.log10) if log else values.astype(float)
            dimension = {"label": f"log10 {label}" if log else label, "values": known}
            if known.isna().any():
                dimension |= _with_none(known)
            dimensions.append(dimension)
        else:
            codes, names = pd.factorize(values.map(lambda value: plain(value) or "none"))
            texts = [escape(name) for name in names]
            dimensions.append({"label": label, "values": codes, "tickvals": list(range(len(names))), "ticktext": texts})
    dimensions.append({"label": metric, "values": rows["mean"]})
    line = {"color": rows["mean"], "colorscale": "Cividis", "reversescale": mode == "min", "showscale": True}
    return go.Figure(go.Parcoords(dimensions=dimensions, line=line), layout=LAYOUT)


def _with_none(values: pd.Series) -> dict[str, Any]:
    """Values and ticks of an axis that some configs do not have: they pass below its foot. (A line with a gap anywhere
    would not be drawn at all.)"""
    low, high = values.min(), values.max()
    span = (high - low) or 1.0
    ticks = [low - 0.15 * span, *np.linspace(low, high, 5)]
    return {
        "values": values.fillna(ticks[0]),
        "tickvals": ticks,
        "ticktext": ["none", *(f"{tick:.3g}" for tick in ticks[1:])],
        "range": [ticks[0] - 0.05 * span, high],
    }


def heat_map(cells: pd.DataFrame, rows: str, columns: str, mode: str = "max") -> go.Figure:
    """Mean over seeds of each pair of values."""
    mean = cells.pivot(index="row", columns="column", values="mean")
    sd = cells.pivot(index="row", columns="column", values="sd")
    figure = go.Figure(
        go.Heatmap(
            z=mean.to_numpy(dtype=float),
            x=[plain(v) for v in mean.columns],
            y=[plain(v) for v in mean.index],
            customdata=sd.to_numpy(dtype=float),
            colorscale="Cividis",
            reversescale=mode == "min",
            hovertemplate=f"{escape(columns)}=%{{x}}, {escape(rows)}=%{{y}}"
            "<br>%{z:.4f} ± %{customdata:.4f}<extra></extra>",
        ),
        layout=LAYOUT,
    )
    figure.update_layout(xaxis={"title": columns, "type": "category"}, yaxis={"title": rows, "type": "category"})
    return figure


def importance(effects: pd.DataFrame) -> go.Figure:
    """Share of the variance between configs that each axis explains by itself."""
    rows = effects.iloc[::-1]
    error = {"type": "data", "array": rows["high"] - rows["share"], "arrayminus": rows["share"] - rows["low"]}
    bar = go.Bar(x=rows["share"], y=rows["axis"].map(escape), orientation="h", error_x=error, marker_color=COLOURS[0])
    figure = go.Figure(bar, layout=LAYOUT)
    return figure.update_layout(xaxis={"title": "share of the variance (ranks)", "range": [0, 1]})


def rung_diagram(table: pd.DataFrame, rungs: Sequence[int], metric: str) -> go.Figure:
    """How far each config came, by how it ended."""
    rows = table.sort_values(["epoch", "mean"], kind="stable").reset_index(drop=True)
    figure = go.Figure(layout=LAYOUT)
    for index, (reason, group) in enumerate(rows.groupby("stop_reason")):
        figure.add_scatter(
            x=group["epoch"],
            y=group.index,
            mode="markers",
            name=f"{reason} ({len(group)})",
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8, "color": COLOURS[index % len(COLOURS)]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": group["epoch"] * 0,
                "arrayminus": group["epoch"],
                "width": 0,
            },
            text=[f"{escape(str(r['label']))}: {metric} {r['mean']:.4g}" for r in group.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
        )
    for rung in rungs:
        figure.add_vline(x=rung, line_dash="dash", line_color="#9A9A9A")
    return figure.update_layout(xaxis_title="epochs trained", yaxis={"title": "configs", "showticklabels": False})


def pareto(points: pd.DataFrame, metric: str, others: Sequence[str]) -> go.Figure:
    """Result against each other objective; the configs that nothing beats in all of them are marked."""
    front = points[points["front"]]
    figure = make_subplots(1, len(others), shared_yaxes=True).update_layout(LAYOUT)
    for column, other in enumerate(others, 1):
        for data, name, colour, how in (
            (points, "configs", "#9A9A9A", "markers"),
            (front.sort_values(other), "front", COLOURS[0], "lines+markers" if len(others) == 1 else "markers"),
        ):
            figure.add_scatter(
                x=data[other],
                y=data[metric],
                name=name,
                mode=how,
                showlegend=column == 1,
                marker={"color": colour, "size": 8},
                text=[escape(str(label)) for label in data["label"]],
                hovertemplate=f"%{{text}}<br>{escape(metric)} %{{y:.4g}}, {escape(other)} %{{x:.3g}}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_xaxes(title=other, type="log" if is_log(points[other]) else "linear", row=1, col=column)
    return figure.update_yaxes(title=metric, row=1, col=1)


def _scale(values: pd.Series) -> str:
    if not pd.api.types.is_numeric_dtype(values):
        return "category"
    return "log" if is_log(values) else "linear"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
