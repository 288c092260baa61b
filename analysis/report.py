"""One HTML page a sweep: what was asked, what came out, figures. Self-contained; nothing is fetched when it opens."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from PIL import Image

from analysis import figures, interactive
from analysis.confirmation import confirmed_table, flattery, ties
from analysis.doctor import cards_of
from analysis.journal import speed, told
from analysis.plotting import KINDS, Subject
from analysis.store import ENDED, Sweep, open_sweep
from analysis.summary import scores
from analysis.writing import aside

SHOWN = 20
"""Rows of the report's table; `table` and `export` give all."""


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
    """Writes `<storage>/<name>/report/`: index.html, its figures as PNG, and interactive.html. Works while it runs.

    Raises:
        UserError: no such sweep or metric, or the folder cannot be written. Nothing is half-written then.
    """
    sweep = open_sweep(storage, name)
    subject = Subject(sweep, metric or sweep.metric, at, curve)
    kinds = {stem: kind for stem, kind in KINDS.items() if kind.able(subject)}
    with aside(sweep.folder / "report") as folder:
        for stem, kind in kinds.items():
            figures.save(kind.still(subject), folder / f"{stem}.png")
        if kinds:
            live = {kind.caption: kind.live(subject) for kind in kinds.values()}
            interactive.write_page(live, folder / "interactive.html", f"{sweep.family} · {sweep.name}")
        page = _page(subject, {kind.caption: folder / f"{stem}.png" for stem, kind in kinds.items()})
        (folder / "index.html").write_text(page, encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
    target = sweep.folder / "report"
    sweep.publish(target / file for file in names)
    return Report(target, subject.table, [target / file for file in names])


def _page(subject: Subject, pictures: Mapping[str, Path]) -> str:
    sweep, runs, table, metric = subject.sweep, subject.runs, subject.table, subject.metric
    environment = Environment(loader=PackageLoader("analysis"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    images = [
        (text, path.name, _shown_width(path), base64.b64encode(path.read_bytes()).decode())
        for text, path in pictures.items()
    ]
    axes = _unsaid(table.head(SHOWN), sweep.axis_columns(table))
    cards = sorted(cards_of(sweep, metric), key=lambda card: ("FAIL", "WARN", "PASS").index(card.status))
    confirmed = scores(sweep, metric, subject.at, phase="confirm")
    return environment.get_template("report.html").render(
        title=f"{sweep.family} · {sweep.name}",
        doc=sweep.info.get("doc", ""),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=facts(sweep, runs),
        metric=metric,
        unit=sweep.unit(metric),
        better={"max": "higher is better", "min": "lower is better"}.get(sweep.mode(metric), "no direction"),
        at=subject.at,
        running=int((~runs["stop_reason"].isin(ENDED)).sum()),
        rows=[_row(row, axes) for row in table.head(SHOWN).to_dict("records")],
        axes=[axis.removeprefix("axis.") for axis in axes],
        hidden=max(0, len(table) - SHOWN),
        confirmed=[_confirmed(row) for row in confirmed_table(sweep, runs, confirmed, metric).to_dict("records")],
        ties=ties(sweep),
        front=_front(subject),
        objectives=[metric, *subject.others],
        observed=[*told(sweep, runs, metric), *speed(runs)],
        cards=cards,
        images=images,
    )


def _shown_width(picture: Path) -> int:
    """CSS pixels: letters of all figures come out equally large, a little larger than in print."""
    with Image.open(picture) as image:
        return round(image.width / figures.DPI * 144)


def _unsaid(table: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """Axes whose values the configs' labels do not say already."""
    return [
        axis
        for axis in axes
        if not all(_cell(value) in str(label) for label, value in zip(table["label"], table[axis], strict=True))
    ]


def _confirmed(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of the report's first table."""
    sd = row["sd"]
    known = np.isfinite(row["low"])
    return {
        "label": row["label"],
        "mean": figures.rounded(row["mean"], sd),
        "sd": figures.rounded(sd, sd),
        "interval": f"{figures.rounded(row['low'], sd)} … {figures.rounded(row['high'], sd)}" if known else "–",
        "n": row["n"],
        "search": figures.rounded(row["search"], sd),
        "search_n": row["search_n"],
        "flattery": flattery(row),
    }


def _front(subject: Subject) -> list[dict[str, Any]]:
    """The configs that nothing beats, where the sweep optimised several objectives."""
    if len(subject.sweep.objectives) < 2:
        return []
    front = subject.points[subject.points["front"]]
    names = [subject.metric, *subject.others]
    return [
        {"label": row["label"], "values": [f"{row[name]:.4g}" for name in names]} for row in front.to_dict("records")
    ]


def _row(row: Mapping[Any, Any], axes: Sequence[str]) -> dict[str, Any]:
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
        "axes": [_cell(row[axis]) for axis in axes],
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
    rule = str(scheduler.get("name", "none")) + (f" (grace {grace}, factor {factor})" if factor else "")
    git = info.get("git") or {}
    lines = [
        ("sweep", f"{info.get('sweep', sweep.name)} of {sweep.family}"),
        ("optimised", ", ".join(f"{name} ({sweep.mode(name)})" for name in sweep.objectives)),
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
