"""The runs table: one row a run, folded from the journal, written to runs.parquet (docs/storage.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from tuning.curves import metadata, parquet
from tuning.journal import Event
from tuning.storage import Store, as_store

FIXED = {
    "sweep": pa.string(),
    "family": pa.string(),
    "label": pa.string(),
    "algorithm": pa.string(),
    "config_key": pa.string(),
    "run_key": pa.string(),
    "seed": pa.int32(),
    "parent_run_key": pa.string(),
    "parent_epoch": pa.int32(),
    "trial": pa.string(),
    "phase": pa.string(),
    "stop_reason": pa.string(),
    "config_stop_reason": pa.string(),
    "rung": pa.int32(),
    "epoch": pa.int32(),
    "step": pa.int64(),
    "epochs_total": pa.int32(),
    "engine": pa.string(),
    "lanes": pa.int32(),
    "device": pa.string(),
    "device_seconds": pa.float64(),
    "started_at": pa.timestamp("ms", tz="UTC"),
    "ended_at": pa.timestamp("ms", tz="UTC"),
    "error": pa.string(),
}


class RunTable:
    """Rows by run key. `apply` every event of the journal, in order; `write` when you like.

    Args:
        name, family: of the sweep.
        plain: sweep.json.
    """

    def __init__(self, plain: Mapping[str, Any]):
        self._plain = plain
        self._modes = {name: metric["mode"] for name, metric in plain["metrics"].items()}
        self.rows: dict[str, dict[str, Any]] = {}
        self.runs_of: dict[str, list[str]] = {}  # trial -> run keys
        self.of_config: dict[str, list[dict[str, Any]]] = {}  # config key -> its rows

    def apply(self, event: Event) -> None:
        kind = event["event"]
        if kind == "proposed":
            self._propose(event)
        elif kind == "resumed":
            self.runs_of[event["trial"]] = self.runs_of.get(event["replaces"], [])
            for key in self.runs_of[event["trial"]]:
                row = self.rows[key]
                row.update(trial=event["trial"], config_stop_reason="running", ended_at=None)
                if row["stop_reason"] == "cancelled":
                    row["stop_reason"] = "running"
        elif kind == "retry":
            for key in self.runs_of.get(event["trial"], ()):
                fresh = {"stop_reason": "pending", "config_stop_reason": "pending"}
                self.rows[key].update(**fresh, ended_at=None, error=None, rung=None)
        elif kind == "report":
            self._report(event)
        elif kind == "end":
            self._end(event)
        elif kind == "finish":
            for row in self.rows.values():
                if row["config_stop_reason"] in ("pending", "running"):
                    row.update(config_stop_reason="cancelled", ended_at=datetime.fromisoformat(event["time"]))
                    if row["stop_reason"] in ("pending", "running"):
                        row["stop_reason"] = "cancelled"

    def _propose(self, event: Event) -> None:
        keys = []
        rows = self.of_config.setdefault(event["config_key"], [])
        for seed, key in event["runs"].items():
            keys.append(key)
            if key in self.rows:  # proposed once more (PBT): it begins anew
                rows.remove(self.rows[key])
            parent, born = event.get("parent", {}).get(seed, (None, None))
            self.rows[key] = {
                "sweep": self._plain["name"],
                "family": self._plain["family"],
                "label": event["label"],
                "algorithm": event["algorithm"],
                "config_key": event["config_key"],
                "run_key": key,
                "seed": int(seed),
                "parent_run_key": parent,
                "parent_epoch": born,
                "trial": event["trial"],
                "phase": event.get("phase", "search"),  # journals from before there were others say nothing
                "stop_reason": "pending",
                "config_stop_reason": "pending",
                "epoch": 0,
                "step": 0,
                "epochs_total": event["epochs"],
                "device_seconds": 0.0,
                "started_at": datetime.fromisoformat(event["time"]),
                **{f"axis.{name}": _flat(value) for name, value in event["point"].items()},
                **{f"program.{name}": _flat(value) for name, value in event["program"].items()},
                **{f"hyper.{name}": _flat(value) for name, value in event["hyper"].items()},
            }
            rows.append(self.rows[key])
        self.runs_of[event["trial"]] = keys

    def _report(self, event: Event) -> None:
        for seed in event["per_seed"].values():
            row = self.rows[seed["run_key"]]
            row.update(
                epoch=seed["epoch"],
                step=seed["step"],
                device_seconds=seed["device_seconds"],
                engine=event["engine"],
                lanes=event["lanes"],
                device=event["device"],
                stop_reason="running" if seed["status"] == "training" else seed["status"],
                config_stop_reason="running",
            )
            for name, value in seed["values"].items():
                row[f"final.{name}"] = value
                mode, best = self._modes[name], f"best.{name}"
                if mode != "none" and math.isfinite(value):
                    row[best] = (max if mode == "max" else min)(value, row.get(best, value))

    def _end(self, event: Event) -> None:
        for key in self.runs_of.get(event["trial"], ()):
            row = self.rows[key]
            row["config_stop_reason"] = event["stop_reason"]
            row["ended_at"] = datetime.fromisoformat(event["time"])
            row["error"] = event.get("error")
            if row["stop_reason"] in ("pending", "running"):
                row["stop_reason"] = event["stop_reason"]
            if event["stop_reason"] == "stopped":
                row["rung"] = event["epoch"]

    def to_arrow(self) -> pa.Table:
        """All rows; a column of the space's that mixes numbers and text is text."""
        rows = list(self.rows.values())
        names = list(dict.fromkeys(name for row in rows for name in row if name not in FIXED))
        names.sort(key=lambda name: ("axis.", "program.", "hyper.", "final.", "best.").index(name.split(".")[0] + "."))
        arrays = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in FIXED.items()}
        for name in names:
            arrays[name] = _column([row.get(name) for row in rows])
        return pa.table(arrays)

    def write(self, place: Store | Path) -> None:
        """runs.parquet, in the sweep's folder."""
        plain = self._plain
        schema_metadata = metadata(
            plain["name"],
            plain["family"],
            plain["metrics"],
            headline=plain["headline"],
            metric=plain["metric"],
            mode=plain["mode"],
        )
        as_store(place).write("runs.parquet", parquet(self.to_arrow().replace_schema_metadata(schema_metadata)))


def _flat(value: Any) -> Any:
    """Tuples as text `1-3-1`; the rest as it is."""
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.array(values)


def load_plain(folder: Path) -> dict[str, Any]:
    """The sweep.json of a sweep's folder."""
    return json.loads((folder / "sweep.json").read_text())
