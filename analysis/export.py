"""A sweep's runs and curves in other layouts: the ci_vit notebook's folders of pickles, CSV, or tidy Parquet."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.compare import plain
from analysis.errors import UserError
from analysis.store import Sweep, open_sweep
from analysis.writing import aside

Layout = Literal["folders", "csv", "parquet"]
LAYOUTS: tuple[Layout, ...] = ("folders", "csv", "parquet")
AT_ONCE = 200
"""Runs whose step curves are held in memory together."""


def export(
    storage: Path | str, name: str, layout: Layout = "folders", out: Path | str = ".", force: bool = False
) -> pd.DataFrame:
    """Writes a sweep to `out/<name>/` and returns one row a file or folder written.

    "folders": `<out>/<name>/<alg_hparams>/seed_<i>/<metric>.pkl`, each a plain list of floats: training metrics a step,
        test metrics an epoch. `<alg_hparams>` reads like the notebook's `Vanilla_lr_1e-1`.
    "csv", "parquet": `runs`, `epochs` and `steps` tables, curves with the config's label beside its keys; Parquet keeps
        units and directions in its schema metadata.

    Raises:
        UserError: unknown layout, nothing to export, `out` cannot be written, or files are there already and `force`
            was not given. Nothing is written then.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no layout '{layout}': there is {', '.join(LAYOUTS)}")
    sweep = open_sweep(storage, name)
    runs = sweep.runs()
    if not len(runs):
        raise UserError(f"{name} has no runs to export yet")
    target = Path(out) / name
    if target.resolve() == sweep.folder.resolve():
        raise UserError(f"{target} is the sweep itself: give another --out")
    if target.exists() and not force:
        raise UserError(f"{target} exists: give another --out, or --force to write over it")
    with aside(target) as folder:
        written = _folders(sweep, runs, folder) if layout == "folders" else _tables(sweep, runs, folder, layout)
    return pd.DataFrame([{"path": str(target / path), **facts} for path, facts in written])


# --- the notebook's folders -----------------------------------------------------------------------------------------


def _folders(sweep: Sweep, runs: pd.DataFrame, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    names = folder_names(sweep, runs)
    written = []
    for part, epochs, steps in _curves(sweep, runs):
        per_step = [c for c in steps.columns if c not in ("run_key", "step")]
        per_epoch = [c for c in _metrics(epochs) if c not in per_step]
        by_step = dict(iter(steps.groupby("run_key", sort=False)))
        by_epoch = dict(iter(epochs.groupby("run_key", sort=False)))
        for run in part.to_dict("records"):
            place = folder / names[run["config_key"]] / f"seed_{run['seed']}"
            place.mkdir(parents=True)
            for tables, metrics in ((by_step, per_step), (by_epoch, per_epoch)):
                rows = tables.get(run["run_key"])
                if rows is None:
                    continue
                for metric in metrics:
                    with (place / f"{_safe(metric)}.pkl").open("wb") as file:
                        pickle.dump([float(v) for v in rows[metric]], file, protocol=4)
            written.append(
                (
                    str(place.relative_to(folder)),
                    {"label": run["label"], "seed": run["seed"], "files": sum(1 for _ in place.iterdir())},
                )
            )
    return written


def folder_names(sweep: Sweep, runs: pd.DataFrame) -> dict[str, str]:
    """Config key -> `<alg_hparams>`: the algorithm, then each varied number as name and value; unique."""
    axes = sweep.axis_columns(runs)
    named: dict[str, str] = {}
    for run in runs.drop_duplicates("config_key").to_dict("records"):
        words, numbers = [], []
        for axis in axes:
            value = run[axis]
            if value is None or (isinstance(value, float) and math.isnan(value)):
                continue
            if isinstance(value, str):
                words.append(value)
            else:
                numbers.append(f"{axis.rsplit('.', 1)[-1]}_{short_number(float(value))}")
        algorithm = run.get("program.algorithm")
        if isinstance(algorithm, str) and algorithm and algorithm not in words:
            words.insert(0, algorithm)
        words = [word[:1].upper() + word[1:] for word in words]
        named[str(run["config_key"])] = _safe("_".join([*words, *numbers]) or str(run["label"]))
    counts = pd.Series(named).value_counts()
    return {key: name if counts[name] == 1 else f"{name}_{key}" for key, name in named.items()}


def short_number(value: float) -> str:
    """As the notebook writes numbers in folder names: 0.1 -> 1e-1, 0.0001 -> 1e-4, 0.84 -> 0.84, 3 -> 3."""
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    exponent = math.floor(math.log10(abs(value)))
    mantissa = value / 10**exponent
    if abs(mantissa - round(mantissa)) < 1e-9 and abs(value) < 1 and (abs(round(mantissa)) == 1 or exponent < -2):
        return f"{round(mantissa)}e{exponent}"
    return plain(value)


def _safe(name: str) -> str:
    """A file name of letters, digits and `_.+=-` only, never hidden."""
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "_", name).lstrip(".") or "_"


# --- tables ---------------------------------------------------------------------------------------------------------


def _tables(sweep: Sweep, runs: pd.DataFrame, folder: Path, layout: str) -> list[tuple[str, dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    writers = {name: _Writer(folder / f"{name}.{layout}", layout, sweep) for name in ("runs", "epochs", "steps")}
    writers["runs"].write(runs)
    for part, epochs, steps in _curves(sweep, runs):
        about = part[["run_key", "label"]]
        writers["epochs"].write(epochs.merge(about, on="run_key"))
        about = part[["run_key", "config_key", "seed", "label"]]
        writers["steps"].write(steps.merge(about, on="run_key"))
    for writer in writers.values():
        writer.close()
    return [(w.path.name, {"rows": w.rows}) for w in writers.values() if w.rows]


class _Writer:
    """Appends data frames to one CSV or Parquet file."""

    def __init__(self, path: Path, layout: str, sweep: Sweep):
        self.path, self.layout, self.rows = path, layout, 0
        self._parquet: pq.ParquetWriter | None = None
        about: Mapping[str, Any] = {
            key: sweep.info.get(key) for key in ("name", "family", "metrics", "headline", "mode")
        }
        self._metadata = {b"lanewise": json.dumps({"schema_version": 1, **about}).encode()}

    def write(self, frame: pd.DataFrame) -> None:
        if not len(frame):
            return
        if self.layout == "csv":
            frame.to_csv(self.path, mode="a", header=self.rows == 0, index=False)
        else:
            table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(self._metadata)
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self.path, table.schema)
            self._parquet.write_table(table.cast(self._parquet.schema))
        self.rows += len(frame)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()


def _curves(sweep: Sweep, runs: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """Runs in parts, with the epoch and step curves of each part."""
    for start in range(0, len(runs), AT_ONCE):
        part = runs.iloc[start : start + AT_ONCE]
        keys = set(part["run_key"])
        epochs = sweep.epochs(configs=part["config_key"].unique())
        if "run_key" in epochs:
            epochs = epochs[epochs["run_key"].isin(keys)]
        yield part, epochs, sweep.steps(runs=part["run_key"])


def _metrics(epochs: pd.DataFrame) -> list[str]:
    return [c for c in epochs.columns if c not in ("run_key", "config_key", "seed", "epoch", "task", "step", "time")]
