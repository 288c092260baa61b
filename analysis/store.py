"""Reads what a sweep left on disk (docs/storage.md), while it runs or after.

Curves are read through `pyarrow.dataset` with column projection and row filters, so that a figure of eight configs out
of 10,000 runs touches eight configs' rows. Nothing is cached between calls: a running sweep may be read again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from analysis.errors import UserError, unknown
from tuning import mirror

T = TypeVar("T")
P = ParamSpec("P")
ATTEMPTS = 10
ENDED = ("finished", "stopped", "diverged", "oom", "crashed", "cancelled")
"""Stop reasons; a run that has none of them is `running` or `pending`."""

_STANDARD: dict[str, Any] = {
    "sweep": "",
    "family": "",
    "label": "",
    "config_key": "",
    "run_key": "",
    "seed": 0,
    "stop_reason": "running",
    "config_stop_reason": "running",
    "rung": float("nan"),
    "epoch": 0,
    "step": 0,
    "epochs_total": 0,
    "engine": "",
    "lanes": 1,
    "device": "",
    "device_seconds": float("nan"),
    "started_at": pd.NaT,
    "ended_at": pd.NaT,
    "error": None,
}
"""Columns that every reader may count on -> the value where runs.parquet does not have them yet."""


COSTS: dict[str, dict[str, str]] = {
    "device_seconds": {"unit": "s", "mode": "min", "doc": "device time of one run, amortised over the lanes"},
}
"""Metrics that are columns of runs.parquet themselves, whatever the family."""

_NEEDED = ("run_key", "config_key", "seed")
"""Columns without which no row is a run's."""


def _reading(read: Callable[P, T]) -> Callable[P, T]:
    """Reads again where a part file, listed a moment before, was merged into a larger one (a sweep that runs)."""

    @wraps(read)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):
                return read(*args, **kwargs)
        return read(*args, **kwargs)

    return again


@dataclass(frozen=True)
class Sweep:
    """One sweep's folder, and the frozen command in its sweep.json. Where the sweep is in object storage, `storage` is
    its URL and `folder` this machine's copy."""

    folder: Path
    info: dict[str, Any]
    storage: str = ""

    def publish(self, files: Iterable[Path]) -> None:
        """Makes files that were written below `folder` part of the sweep for everybody."""
        if self.storage:
            try:
                mirror.publish(self.storage, self.folder.name, files)
            except mirror.StorageError as error:
                raise UserError(str(error)) from error

    # --- what was asked ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.name)

    @property
    def family(self) -> str:
        return str(self.info.get("family", ""))

    @property
    def metric(self) -> str:
        """The summary key that the sweep optimised."""
        return str(self.info.get("metric") or self.info.get("headline") or "")

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that the sweep optimised; the first is `metric`."""
        return (self.metric, *(str(name) for name in self.info.get("others") or ()))

    @property
    def axes(self) -> list[dict[str, Any]]:
        """The space, one plain dict an axis (`Space.to_plain`)."""
        return list(self.info.get("space") or [])

    @property
    def search_seeds(self) -> list[int]:
        """Seeds every config was given."""
        seeds = self.info.get("seeds", [])
        return list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]

    def unit(self, metric: str) -> str:
        return str(self._metric(metric).get("unit", ""))

    def mode(self, metric: str | None = None) -> str:
        """ "max", "min", or "none" where the metric has no better direction."""
        metric = metric or self.metric
        declared = self._metric(metric).get("mode")
        if declared in ("max", "min"):
            return declared
        if metric in (self.metric, self.info.get("headline")):
            return str(self.info.get("mode", "none"))
        return "none"

    def _metric(self, metric: str) -> dict[str, Any]:
        return (self.info.get("metrics") or {}).get(metric) or COSTS.get(metric, {})

    # --- runs -------------------------------------------------------------------------------------------------------

    @property
    def run_columns(self) -> list[str]:
        """Columns that runs.parquet has now (empty while it does not exist)."""
        path = self.folder / "runs.parquet"
        try:
            return list(pq.read_schema(path).names) if path.exists() else []
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error

    def runs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """One row a run. Standard columns are always there; `columns` adds others (None: all of them).

        Raises:
            UserError: runs.parquet cannot be read.
        """
        path = self.folder / "runs.parquet"
        if not path.exists():
            return pd.DataFrame({name: pd.Series(dtype=object) for name in _STANDARD})
        try:
            with path.open("rb") as file:  # one open file: the sweep may replace it between two opens
                parquet = pq.ParquetFile(file)
                _check_columns(path, parquet.schema_arrow)
                have = parquet.schema_arrow.names
                wanted = None if columns is None else [c for c in have if c in _STANDARD or c in columns]
                frame = parquet.read(columns=wanted).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
        for name in _NEEDED:
            if frame[name].isna().any():
                raise UserError(f"{path} has rows without {name}: it is not what a sweep wrote")
        for name, default in _STANDARD.items():
            if name not in frame:
                frame[name] = default
        unnamed = frame["label"].isna() | (frame["label"] == "")
        frame["label"] = frame["label"].where(~unnamed, frame["config_key"])
        frame["seed"] = frame["seed"].astype("int64")
        return frame

    def field(self, name: str, columns: Iterable[str] | None = None) -> str:
        """The runs column a user means by `lr`: itself, `axis.lr`, `hyper.lr`, `program.lr`, or the one axis `*.lr`.

        Raises:
            UserError: there is no such column; the nearest names are told.
        """
        columns = list(columns if columns is not None else self.run_columns)
        for candidate in (name, f"axis.{name}", f"hyper.{name}", f"program.{name}"):
            if candidate in columns:
                return candidate
        nested = [c for c in columns if c.startswith("axis.") and c.endswith("." + name)]
        if len(nested) == 1:
            return nested[0]
        known = [c.split(".", 1)[1] for c in columns if c.split(".", 1)[0] in ("axis", "hyper", "program")]
        raise unknown("field", name, dict.fromkeys([*known, "label", "seed", "device", "engine"]))

    def axis_columns(self, runs: pd.DataFrame) -> list[str]:
        """`axis.*` columns in the space's order."""
        order = [f"axis.{axis['name']}" for axis in self.axes]
        rest = [c for c in runs.columns if c.startswith("axis.") and c not in order]
        return [c for c in order if c in runs.columns] + rest

    def of_search(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Of rows with a `run_key`, those whose runs took part in choosing."""
        if "phase" not in self.run_columns:
            return rows
        runs = self.runs(["phase"])
        return rows[~rows["run_key"].isin(runs["run_key"][runs["phase"] == "confirm"])]

    # --- curves -----------------------------------------------------------------------------------------------------

    def epochs(
        self,
        metrics: Sequence[str] | None = None,
        configs: Iterable[str] | None = None,
        epochs: Iterable[int] | None = None,
    ) -> pd.DataFrame:
        """One row a (run, epoch), the last written of each, sorted.

        Args:
            metrics: columns to read (None: all).
            configs: config keys to read (None: all).
            epochs: only these epochs, counted from 1 (None: all).
        """
        keys = ["run_key", "config_key", "seed", "epoch", "task", "step"]
        wanted = None if metrics is None else [*keys, *metrics]
        where = _both(_among("config_key", configs), _among("epoch", epochs))
        return self._table("epochs", wanted, where, ["run_key", "epoch"])

    def steps(
        self,
        metrics: Sequence[str] | None = None,
        runs: Iterable[str] | None = None,
        between: tuple[int, int] | None = None,
    ) -> pd.DataFrame:
        """One row a (run, step), the last written of each, sorted; `between` is inclusive."""
        wanted = None if metrics is None else ["run_key", "step", *metrics]
        where = _among("run_key", runs)
        if between is not None:
            where = _both(where, (pc.field("step") >= between[0]) & (pc.field("step") <= between[1]))
        return self._table("steps", wanted, where, ["run_key", "step"])

    def covariates(self, names: Iterable[str] | None = None, runs: Iterable[str] | None = None) -> pd.DataFrame:
        """One row a (run, epoch, covariate): `shape` and row-major `values`."""
        where = _both(_among("name", names), _among("run_key", runs))
        return self._table("covariates", None, where, ["run_key", "epoch", "name"])

    @_reading
    def covariate_names(self) -> list[str]:
        """Names of the covariates that were recorded (none: an empty list)."""
        data = self._dataset("covariates")
        if data is None:
            return []
        names: set[str] = set()
        for batch in data.to_batches(columns=["name"]):
            names.update(pc.unique(batch["name"]).to_pylist())
        return sorted(names)

    @_reading
    def metrics_of(self, table: str) -> list[str]:
        """Metric columns of `epochs` or `steps`, as far as written."""
        data = self._dataset(table)
        keys = {"run_key", "config_key", "seed", "epoch", "task", "step", "time"}
        return [] if data is None else [name for name in data.schema.names if name not in keys]

    def _dataset(self, table: str) -> ds.Dataset | None:
        files = sorted(str(path) for path in (self.folder / table).glob("*.parquet") if path.name[0] not in "._")
        if not files:
            return None
        try:
            schemas = [pq.read_schema(file).remove_metadata() for file in files]
            schema = pa.unify_schemas(schemas, promote_options="permissive")
        except FileNotFoundError:
            raise  # merged into a larger one since it was listed: `_reading` looks again
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / table} cannot be read: {first_line(error)}") from error
        return ds.dataset(files, schema=schema, format="parquet")

    @_reading
    def _table(
        self, table: str, columns: list[str] | None, where: pc.Expression | None, key: list[str]
    ) -> pd.DataFrame:
        data = self._dataset(table)
        if data is None:
            return pd.DataFrame({name: pd.Series(dtype="float64") for name in columns or key})
        for name in columns or []:
            if name not in data.schema.names and name not in ("task", "step"):
                raise unknown(f"metric in {self.name}/{table}", name, self.metrics_of(table))
        present = None if columns is None else [c for c in dict.fromkeys(columns) if c in data.schema.names]
        try:
            frame = data.to_table(columns=present, filter=where).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / table} cannot be read: {first_line(error)}") from error
        # Stable sort: of rows written twice by a resumed run, the later file's stays.
        frame = frame.drop_duplicates(key, keep="last").sort_values(key, kind="stable")
        return frame.reset_index(drop=True)

    # --- the journal of events --------------------------------------------------------------------------------------

    def events(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Lines of journal.jsonl in the order they happened; a line still being written ends the reading."""
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    return
                if kind is None or event.get("event") == kind:
                    yield event

    @cached_property
    def schedule(self) -> dict[str, int]:
        """`steps_per_epoch`, `epochs`, `epochs_per_task` of the sweep's base program, where sweep.json has them."""
        return {name: int(value) for name, value in (self.info.get("schedule") or {}).items()}


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _check_columns(path: Path, schema: pa.Schema) -> None:
    """The columns that every reader counts on are of their types, or `UserError`."""
    for name in _NEEDED:
        if name not in schema.names:
            raise UserError(f"{path} has no column {name}: it is not what a sweep wrote")
    for name, default in _STANDARD.items():
        if name not in schema.names or not isinstance(default, (str, int, float)):
            continue
        kind = schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not pa.types.is_null(kind) and not (text if isinstance(default, str) else number):
            raise UserError(f"{path} holds {name} as {kind}: it is not what a sweep wrote")


def _among(column: str, values: Iterable[Any] | None) -> pc.Expression | None:
    return None if values is None else pc.field(column).isin(list(values))


def _both(left: pc.Expression | None, right: pc.Expression | None) -> pc.Expression | None:
    if left is None or right is None:
        return right if left is None else left
    return left & right


def open_sweep(storage: Path | str, name: str, curves: Iterable[str] = mirror.CURVES) -> Sweep:
    """The sweep `name` under `storage`, a folder or the URL of object storage.

    Args:
        curves: tables to bring here from object storage.

    Raises:
        UserError: there is no such folder, or its sweep.json is missing or malformed.
    """
    if mirror.is_url(storage):
        return _fetch_sweep(str(storage), name, curves)
    storage = Path(storage)
    if not storage.is_dir():
        raise UserError(f"no folder {storage}: give --storage the folder that holds the sweeps")
    folder = storage / name
    # A name such as `../x` or `` would read (and later write) outside the storage.
    if name in ("", ".", "..") or Path(name).name != name or not (folder / "sweep.json").is_file():
        raise unknown("sweep", name, sweep_names(storage), f" under {storage}")
    return Sweep(folder, _info(folder))


def _fetch_sweep(storage: str, name: str, curves: Iterable[str]) -> Sweep:
    try:
        if not name or Path(name).name != name:
            raise FileNotFoundError
        folder = mirror.fetch(storage, name, curves)
    except FileNotFoundError:
        raise unknown("sweep", name, sweep_names(storage), f" under {storage}") from None
    except mirror.StorageError as error:
        raise UserError(str(error)) from error
    return Sweep(folder, _info(folder), storage)


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    try:
        info = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(info, dict):
        raise UserError(f"{path} holds no JSON object")
    for name, kind in (("metrics", dict), ("space", list), ("schedule", dict), ("metric", str), ("scheduler", dict)):
        if info.get(name) is not None and not isinstance(info[name], kind):
            raise UserError(f"{path} is damaged: {name} is {str(info[name])[:60]!r}")
    return info


def sweep_names(storage: Path | str) -> list[str]:
    """Names of the sweeps under `storage`."""
    if mirror.is_url(storage):
        try:
            return mirror.names(storage)
        except mirror.StorageError as error:
            raise UserError(str(error)) from error
    return sorted(path.parent.name for path in Path(storage).glob("*/sweep.json"))
