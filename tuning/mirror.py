"""Sweeps in object storage as folders of this machine, for whoever reads them: analysis, MLflow's recorder, a person.

`fetch` brings a sweep's folder up to date, `publish` puts what a reader made (a report, a journal entry) into the
bucket. Readers share one copy a machine, in the cache folder; it may be deleted at any time. The driver does not use
it. The only module of `tuning` that `analysis` may import.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tuning.segments import fetch as fetch_journal
from tuning.storage import Bucket, Folder, Storage, StorageError, here_for, is_url, open_storage

__all__ = ["CURVES", "StorageError", "fetch", "is_url", "names", "publish"]
CURVES = ("epochs", "steps", "covariates")
WHOLE = ("runs.parquet", "journal.md")
"""Files that are written again: fetched each time. Part files are written once."""
TRACKING = "tracking.json"
"""How far the delivery to a tracking server got: this machine's own, once it has one."""
READERS = 16
ATTEMPTS = 5


def names(storage: str | Path) -> list[str]:
    """Names of the sweeps below a bucket's URL."""
    bucket = _bucket(storage)
    return [name for name in bucket.folders() if bucket.exists(f"{name}/sweep.json")]


def fetch(storage: str | Path, name: str, curves: Iterable[str] = CURVES) -> Path:
    """This machine's folder of a sweep, as of now; `curves` says of which tables. Its parent stands for the storage.

    Raises `FileNotFoundError` where there is no such sweep, `StorageError` where the bucket cannot be used.
    """
    bucket = _bucket(storage)
    sweep, folder = bucket.at(name), here_for(bucket, "read") / name
    frozen = sweep.read("sweep.json")
    with _alone(folder):
        if not (folder / "sweep.json").is_file() or (folder / "sweep.json").read_bytes() != frozen:
            shutil.rmtree(folder, ignore_errors=True)  # of another sweep that had this name
        folder.mkdir(parents=True, exist_ok=True)
        here = Folder(folder)
        here.write("sweep.json", frozen)
        fetch_journal(sweep, folder / "journal.jsonl")
        _bring(sweep, here, [*WHOLE, *sweep.names("errors"), *([] if (folder / TRACKING).exists() else [TRACKING])])
        for kind in curves:
            _bring_parts(sweep, here, kind)
    return folder


def _bring(sweep: Bucket, here: Folder, keys: Iterable[str]) -> bool:
    """Copy files to this machine. Returns whether all of them were there."""

    def bring(key: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            here.write(key, sweep.read(key))
            return True
        return False

    with ThreadPoolExecutor(READERS) as pool:
        return all(list(pool.map(bring, keys)))


def _bring_parts(sweep: Bucket, here: Folder, kind: str) -> None:
    """A table's part files: those that are new, again where one was merged away meanwhile; then without the merged."""
    for _ in range(ATTEMPTS):
        keys = sweep.names(kind)
        if _bring(sweep, here, [key for key in keys if not (here.path / key).exists()]):
            break
    for key in set(here.names(kind)) - set(keys):
        here.remove(key)


def publish(storage: str | Path, name: str, files: Iterable[Path]) -> None:
    """Put files of this machine's folder of a sweep into the bucket."""
    bucket = _bucket(storage)
    folder = here_for(bucket, "read") / name
    for path in files:
        bucket.at(name).write(path.relative_to(folder).as_posix(), path.read_bytes())


def _bucket(storage: str | Path) -> Bucket:
    opened: Storage = open_storage(storage)
    assert isinstance(opened, Bucket), storage
    return opened


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time brings a sweep here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
