"""MLflow's SQLite database, made whole or not at all.

MLflow builds a new database in some seventy steps, which take seconds, and does not make them one transaction: where
its process is killed in between, what is left opens for nobody any more (MLflow 3.17). So a new one is built where
nobody looks, and put in its place when it is complete.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from trainables.files import write_atomically
from tuning.locks import Taken, held
from tuning.uris import sqlite_path

LOOK_SECONDS = 0.2


def make_database(uri: str) -> None:
    """Make the database where `uri` names an SQLite file that is not there yet. A process that makes it already is
    waited for. Of everything else, a tracking server or another database, its owner takes care."""
    path = sqlite_file(uri)
    if path is None:
        return
    while not _there(path):
        try:
            with held(path.with_name(f".{path.name}.lock")):
                if not _there(path):
                    write_atomically(path, _new_database())
        except Taken:
            time.sleep(LOOK_SECONDS)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI; None of any other."""
    scheme, file = uri.partition(":")[0].partition("+")[0], sqlite_path(uri)
    return Path(file) if scheme == "sqlite" and file not in ("", ":memory:") else None


def _there(path: Path) -> bool:
    """A file of no bytes is one that MLflow was killed over before its first step."""
    return path.is_file() and path.stat().st_size > 0


def _new_database() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix="lanewise-mlflow-") as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
        return path.read_bytes()
