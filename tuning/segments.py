"""The journal in object storage, which cannot append: numbered segments, each written once, its entries on it by then.

`<sweep>/journal/<first>-<last>.jsonl` holds the entries of those numbers, counted from 0. Every entry is a segment of
its own when it counts; every MERGE of them are put together as one more object before the small ones go, so that a
reader always finds every entry: it takes the longest segment at each number and starts again when one vanished.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tuning.journal import Event, Journal
from tuning.storage import Bucket, StorageError

MERGE = 256
READERS = 16
ATTEMPTS = 5
HELD = "report"
"""Its decision follows at once, before anybody could act on it: both travel as one segment."""
_NAME = re.compile(r"(\d{10})-(\d{10})\.jsonl")
log = logging.getLogger(__name__)


class SegmentJournal(Journal):
    """Like `tuning.journal.Journal`, but what counts is in the bucket; `path` is this machine's copy of it.

    Args:
        store: of the sweep.
        path: a file; made anew from the bucket.
        may_write: raises when another driver has taken the sweep over (`tuning.lease`).
    """

    def __init__(self, store: Bucket, path: Path, may_write: Callable[[], None] = lambda: None):
        path.unlink(missing_ok=True)
        self._next = fetch(store, path)
        super().__init__(path)
        self._store, self._may_write = store, may_write
        self._held: list[bytes] = []
        self._small: list[tuple[str, bytes]] = []
        self._merging = ThreadPoolExecutor(1, "merge")

    @property
    def _place(self) -> str:
        return f"{self._store}/journal"

    def _append(self, event: Event, line: bytes) -> None:
        self._held.append(line)
        if event["event"] != HELD:
            self._send()

    def _send(self) -> None:
        if not self._held:
            return
        self._may_write()
        data, first = b"".join(self._held), self._next
        name = _name(first, first + len(self._held) - 1)
        self._store.write(f"journal/{name}", data)
        self._next += len(self._held)
        self._held = []
        super()._append({}, data)
        self._small.append((name, data))
        if len(self._small) >= MERGE:
            self._merging.submit(_merge, self._store, self._small)
            self._small = []

    def close(self) -> None:
        with self._lock:
            self._send()
        self._merging.shutdown(wait=True)
        super().close()


def fetch(store: Bucket, path: Path) -> int:
    """Append to this machine's copy what the bucket has beyond it. Returns the number of entries it then holds."""
    have = path.read_bytes().count(b"\n") if path.exists() else 0
    data, after = read_from(store, have)
    if data:
        with open(path, "ab") as file:
            file.write(data)
    return after


def read_from(store: Bucket, first: int) -> tuple[bytes, int]:
    """(the lines of all entries from number `first` on, the number after the last)."""
    for _ in range(ATTEMPTS):
        chain = _chain(store.names("journal"), first)
        try:
            with ThreadPoolExecutor(READERS) as pool:
                parts = list(pool.map(lambda name: store.read(f"journal/{name}"), (name for _, name in chain)))
        except FileNotFoundError:
            continue  # merged since it was listed
        lines: list[bytes] = []
        for (begins, _), data in zip(chain, parts, strict=True):
            lines += data.splitlines(keepends=True)[first + len(lines) - begins :]
        return b"".join(lines), first + len(lines)
    raise StorageError(f"{store.url}/journal changes faster than it can be read")


def _chain(keys: list[str], first: int) -> list[tuple[int, str]]:
    """Segments that hold every entry from `first` on, as far as there is no gap: (number of its first entry, name)."""
    segments = []
    for key in keys:
        if match := _NAME.fullmatch(key.rpartition("/")[2]):
            segments.append((int(match[1]), int(match[2]), match[0]))
    chain, wanted = [], first
    for begins, ends, name in sorted(segments, key=lambda segment: (segment[0], -segment[1])):
        if begins <= wanted <= ends:
            chain.append((begins, name))
            wanted = ends + 1
    return chain


def _merge(store: Bucket, small: list[tuple[str, bytes]]) -> None:
    (first, _), (last, _) = small[0], small[-1]
    try:
        store.write(f"journal/{first.split('-')[0]}-{last.split('-')[1]}", b"".join(data for _, data in small))
        for name, _ in small:
            store.remove(f"journal/{name}")
    except Exception as error:  # small segments that stay are as good, only more to list
        log.warning("journal segments %s to %s could not be merged: %s", first, last, error)


def _name(first: int, last: int) -> str:
    return f"{first:010d}-{last:010d}.jsonl"
