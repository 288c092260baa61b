"""Full-resolution curves to Parquet, in part files readable as soon as they have their name (docs/storage.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.parts import Parts
from tuning.storage import Store, as_store

SCHEMA_VERSION = 1
FLUSH_SECONDS = 5.0
FLUSH_ROWS = 200_000


def metadata(sweep: str, family: str, metrics: Mapping[str, Any], **more: Any) -> dict[bytes, bytes]:
    """The `lanewise` entry of a file's schema metadata: what the numbers are and in which units."""
    plain = {"schema_version": SCHEMA_VERSION, "sweep": sweep, "family": family, "metrics": dict(metrics), **more}
    return {b"lanewise": json.dumps(plain).encode()}


def parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


class CurveWriter:
    """Collects rows of steps, epochs and covariates and writes them as part files.

    Args:
        place: the sweep's folder.
        writer: a name no other writer of this sweep has or had; part files are named after it (`tuning.parts`).
        schema_metadata: from `metadata`.
    """

    def __init__(self, place: Store | Path, writer: str, schema_metadata: Mapping[bytes, bytes]):
        self._metadata = dict(schema_metadata)
        store, kinds = as_store(place), ("steps", "epochs", "covariates")
        self._parts = {kind: Parts(store, kind, writer, parquet) for kind in kinds}
        self._steps: list[tuple[str, int, dict[str, np.ndarray]]] = []
        self._epochs: list[dict[str, Any]] = []
        self._covariates: list[dict[str, Any]] = []
        self._rows = 0
        self._flushed = time.monotonic()

    def steps(self, run_key: str, first_step: int, curves: Mapping[str, np.ndarray]) -> None:
        """Training metrics of consecutive steps, {metric: [n]}, the first of them being `first_step` (from 1)."""
        self._steps.append((run_key, first_step, dict(curves)))
        self._rows += len(next(iter(curves.values())))

    def epoch(self, run_key: str, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """One epoch of one run. row: config_key, seed, epoch (from 1), task (from 0), step."""
        self._epochs.append({"run_key": run_key, **row, "time": datetime.now(UTC), **values})
        self._rows += 1

    def covariates(self, run_key: str, epoch: int, values: Mapping[str, np.ndarray]) -> None:
        """Small arrays of any shape, one row each."""
        for name, array in values.items():
            flat = np.asarray(array, dtype=np.float32)
            self._covariates.append(
                {
                    "run_key": run_key,
                    "epoch": epoch,
                    "name": name,
                    "shape": list(flat.shape),
                    "values": flat.ravel().tolist(),
                }
            )
            self._rows += flat.size

    def flush(self, force: bool = False) -> None:
        """Write what has been collected, if it is time, or much, or `force`."""
        due = time.monotonic() - self._flushed > FLUSH_SECONDS or self._rows > FLUSH_ROWS
        if not (force or due) or not self._rows:
            return
        for kind, table in (
            ("steps", self._steps_table()),
            ("epochs", self._epochs_table()),
            ("covariates", self._covariates_table()),
        ):
            if table is not None:
                self._parts[kind].add(table.replace_schema_metadata(self._metadata))
        self._steps, self._epochs, self._covariates = [], [], []
        self._rows, self._flushed = 0, time.monotonic()

    def _steps_table(self) -> pa.Table | None:
        if not self._steps:
            return None
        names = sorted({name for _, _, curves in self._steps for name in curves})
        lengths = [len(next(iter(curves.values()))) for _, _, curves in self._steps]
        keys = np.repeat(np.array([key for key, _, _ in self._steps], dtype=object), lengths)
        steps = np.concatenate(
            [np.arange(first, first + n) for (_, first, _), n in zip(self._steps, lengths, strict=True)]
        )
        columns: dict[str, Any] = {"run_key": pa.array(keys, pa.string()), "step": pa.array(steps, pa.int64())}
        for name in names:
            parts = [
                curves.get(name, np.full(n, np.nan)) for (_, _, curves), n in zip(self._steps, lengths, strict=True)
            ]
            columns[name] = pa.array(np.concatenate(parts).astype(np.float32), pa.float32())
        return pa.table(columns)

    def _epochs_table(self) -> pa.Table | None:
        if not self._epochs:
            return None
        fixed = {
            "run_key": pa.string(),
            "config_key": pa.string(),
            "seed": pa.int32(),
            "epoch": pa.int32(),
            "task": pa.int32(),
            "step": pa.int64(),
            "time": pa.timestamp("ms", tz="UTC"),
        }
        metrics = sorted({name for row in self._epochs for name in row} - fixed.keys())
        schema = pa.schema([*fixed.items(), *((name, pa.float64()) for name in metrics)])
        return pa.Table.from_pylist(self._epochs, schema=schema)

    def _covariates_table(self) -> pa.Table | None:
        if not self._covariates:
            return None
        schema = pa.schema(
            [
                ("run_key", pa.string()),
                ("epoch", pa.int32()),
                ("name", pa.string()),
                ("shape", pa.list_(pa.int32())),
                ("values", pa.list_(pa.float32())),
            ]
        )
        return pa.Table.from_pylist(self._covariates, schema=schema)
