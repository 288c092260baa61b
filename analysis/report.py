"""One HTML page a sweep: what was asked, what came out, figures. Self-contained; nothing is fetched when it opens."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from analysis import figures
from analysis.curves import learning_curves
from analysis.errors import UserError
from analysis.store import ENDED, Sweep, open_sweep
from analysis.summary import scores, summarise

SHOWN = 20
"""Rows of the report's table; `table` and `export` give all."""

DRAWN = 6
"""Configs with a curve of their own."""


@dataclass(frozen=True)
class Picture:
    """A figure of the report: file stem, what it shows, and the figure."""

    stem: str
    caption: str
    figure: Figure


@dataclass
class Report:
    """What `write_report` made."""

    folder: Path
    table: pd.DataFrame
    files: list[Path] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / "index.html"


def write_report(
    storage: Path | str, name: str, metric: str | None = None, at: str = "final", curve: str | None = None
) -> Report:
    """Writes `<storage>/<name>/report/`: index.html and its figures as PNG. Works while the sweep runs.

    Raises:
        UserError: no such sweep or metric, or the folder cannot be written. Nothing is half-written then.
    """
    sweep = open_sweep(storage, name)
    runs = scores(sweep, metric, at)
    table = summarise(sweep, runs, metric)
    metric = metric or sweep.metric
    pictures = draw(sweep, table, metric, curve)
    with aside(sweep.folder / "report") as folder:
        for picture in pictures:
            figures.save(picture.figure, folder / f"{picture.stem}.png")
        page = _page(sweep, runs, table, metric, at, [(p, folder / f"{p.stem}.png") for p in pictures])
        (folder / "index.html").write_text(page, encoding="utf-8")
    target = sweep.folder / "report"
    return Report(target, table, [target / "index.html", *(target / f"{p.stem}.png" for p in pictures)])


def draw(sweep: Sweep, table: pd.DataFrame, metric: str, curve: str | None = None) -> list[Picture]:
    """The report's figures, as far as there is something to draw."""
    pictures: list[Picture] = []
    unit, mode = sweep.unit(metric), sweep.mode(metric)
    top = table[table["n"] > 0].head(DRAWN) if len(table) else table
    if len(top) and sweep.metrics_of("epochs"):
        data = learning_curves(sweep, top["config_key"], curve)
        labels = dict(zip(top["config_key"], top["label"], strict=True))
        caption = f"Learning curves of the {len(top)} best configs. An open circle: the curve ended early."
        pictures.append(Picture("curves", caption, figures.curves(data, labels, sweep.unit(data.metric))))
    axes = sweep.axis_columns(table)
    if len(table) and axes and table["mean"].notna().any():
        caption = (
            "Result against each axis of the space: mean over seeds with 95% interval. Open markers: stopped early, "
            "at their last value. Triangles at the edge: off the scale."
        )
        pictures.append(Picture("hyper", caption, figures.hyper_vs_result(table, axes, metric, unit, mode)))
    return pictures


def _page(
    sweep: Sweep, runs: pd.DataFrame, table: pd.DataFrame, metric: str, at: str, pictures: list[tuple[Picture, Path]]
) -> str:
    environment = Environment(loader=PackageLoader("analysis"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    images = [(p.caption, p.stem, base64.b64encode(path.read_bytes()).decode()) for p, path in pictures]
    return environment.get_template("report.html").render(
        title=f"{sweep.family} · {sweep.name}",
        doc=sweep.info.get("doc", ""),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=facts(sweep, runs),
        metric=metric,
        unit=sweep.unit(metric),
        better={"max": "higher is better", "min": "lower is better"}.get(sweep.mode(metric), "no direction"),
        at=at,
        running=int((~runs["stop_reason"].isin(ENDED)).sum()),
        rows=[_row(row) for row in table.head(SHOWN).to_dict("records")],
        axes=[axis.removeprefix("axis.") for axis in sweep.axis_columns(table)],
        hidden=max(0, len(table) - SHOWN),
        images=images,
    )


def _row(row: Mapping[Any, Any]) -> dict[str, Any]:
    sd = row["sd"]
    interval = (
        f"{figures.rounded(row['low'], sd)} … {figures.rounded(row['high'], sd)}" if np.isfinite(row["low"]) else "–"
    )
    return {
        "label": row["label"],
        "mean": figures.rounded(row["mean"], sd),
        "sd": figures.rounded(sd, sd),
        "interval": interval,
        "n": row["n"],
        "reason": _reason(row),
        "mixed": row["stop_reasons"] if ", " in row["stop_reasons"] else "",
        "epochs": f"{row['epoch']} / {row['epochs_total']}",
        "time": duration(row["device_seconds"]),
        "device": row["device"],
        "judged": row["judged"],
        "axes": [_cell(value) for name, value in row.items() if name.startswith("axis.")],
    }


def _reason(row: Mapping[Any, Any]) -> str:
    if row["stop_reason"] == "stopped" and pd.notna(row["rung"]):
        return f"stopped at epoch {int(row['rung'])}"
    return str(row["stop_reason"])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would use: `48 s`, `3.1 min`, `2.4 h`."""
    if not np.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def facts(sweep: Sweep, runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What was asked and what it took, as (name, text)."""
    info = sweep.info
    reasons = runs["stop_reason"].value_counts()
    scheduler = info.get("scheduler") or {}
    grace, factor = scheduler.get("grace"), scheduler.get("reduction_factor")
    rule = str(scheduler.get("name", "none")) + (f" (grace {grace}, factor {factor})" if grace else "")
    git = info.get("git") or {}
    lines = [
        ("sweep", f"{info.get('sweep', sweep.name)} of {sweep.family}"),
        ("configs × seeds", f"{runs['config_key'].nunique()} × {runs['seed'].nunique()}"),
        ("searcher, scheduler", f"{info.get('searcher', '')}, {rule}"),
        ("runs", ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none yet"),
        ("device time", duration(float(runs["device_seconds"].sum()))),
        ("devices", ", ".join(sorted({str(d) for d in runs["device"] if d})) or "–"),
        ("started", str(info.get("started_at", ""))),
        ("command", " ".join(map(str, info.get("command") or []))),
        ("commit", f"{git.get('commit') or '–'}{' (with uncommitted changes)' if git.get('dirty') else ''}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items())),
    ]
    return [(name, text) for name, text in lines if text.strip()]


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder to write into; its files move into `target`, each at once, when the block ends without an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield folder
        target.mkdir(exist_ok=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                goal = target / path.relative_to(folder)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
