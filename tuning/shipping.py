"""Logs of a sweep in object storage: what a process writes to a file of its machine goes there piece by piece."""

from __future__ import annotations

import logging
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

from tuning.storage import StorageError, Store, cache_dir

SHIP_SECONDS = 10.0
log = logging.getLogger(__name__)


class LogShipper:
    """Sends the new bytes of a growing file to `logs/<label>-<time>/<n>.txt` until it is closed.

    Args:
        path: the file; need not exist yet.
        store: of the sweep.
        label: whose log it is.
    """

    def __init__(self, path: Path, store: Store, label: str):
        self._path, self._store = path, store
        safe = label.replace(":", "").replace("@", "-").replace("/", "-")
        self._folder = f"logs/{safe}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        self._offset = path.stat().st_size if path.exists() else 0
        self._pieces = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log shipper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the rest."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SHIP_SECONDS):
            self._ship()
        self._ship()

    def _ship(self) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        if not data:
            return
        try:
            self._store.write(f"{self._folder}/{self._pieces + 1:06d}.txt", data)
        except StorageError as error:
            log.warning("%s", error)
            return
        self._offset += len(data)
        self._pieces += 1


def send_log(store: Store, label: str) -> str:
    """A log file of this machine for a host to write to; what it holds goes to the sweep's storage until the process
    ends (all but the last SHIP_SECONDS of one that is killed)."""
    folder = cache_dir() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / "log.txt"
    LogShipper(path, store, label)
    return str(path)
