"""Part files of a table, merged as they get many: 10,000 configs leave dozens of files, not tens of thousands.

A writer's parts are numbered, `<writer>-<n>.parquet`. Every MERGE parts of one size become one,
`<writer>-<first>-<last>.parquet`, as in a log-structured merge tree: a row is written again once for each power of
MERGE. The merged file has its name before the small ones go, so that a reader finds every row at any time, some of
them twice, and starts again where a file vanished under its hands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuning.storage import Store

MERGE = 16
MOST_BYTES = 64 * 2**20
"""No larger files than about this, compressed, are made by merging."""
_NAME = re.compile(r"(?P<writer>.*?)-?(?P<first>\d{6})(?:-(?P<last>\d{6}))?\.parquet")


@dataclass(frozen=True, order=True)
class Part:
    """A part file: numbers `first` to `last` of its writer's."""

    writer: str
    first: int
    last: int
    path: Path


@dataclass(frozen=True)
class _Written:
    """A part of this writer's: numbers, key in the store, bytes."""

    first: int
    last: int
    key: str
    size: int


class Parts:
    """What one writer has written of one table.

    Args:
        store: of the sweep.
        kind: the table's folder in it.
        writer: a name no other writer has or had.
        parquet: a table as a file's bytes.
    """

    def __init__(self, store: Store, kind: str, writer: str, parquet: Callable[[pa.Table], bytes]):
        self._store, self._name, self._parquet = store, f"{kind}/{writer}", parquet
        self._number = 0
        self._parts: list[_Written] = []

    def add(self, table: pa.Table) -> None:
        """Write one more part; merge where there are enough of a size."""
        self._number += 1
        self._parts.append(self._write(table, self._number, self._number))
        while self._merge():
            pass

    def _write(self, table: pa.Table, first: int, last: int) -> _Written:
        numbers = f"{first:06d}" if first == last else f"{first:06d}-{last:06d}"
        data = self._parquet(table)
        key = f"{self._name}-{numbers}.parquet"
        self._store.write(key, data)
        return _Written(first, last, key, len(data))

    def _merge(self) -> bool:
        newest = self._parts[-MERGE:]
        alike = len({part.last - part.first for part in newest}) == 1
        if len(newest) < MERGE or not alike or sum(part.size for part in newest) > MOST_BYTES:
            return False
        tables = [pq.read_table(pa.BufferReader(self._store.read(part.key))) for part in newest]
        merged = pa.concat_tables(tables, promote_options="permissive")  # a later part may have more columns
        merged = merged.replace_schema_metadata(tables[-1].schema.metadata)
        self._parts[-MERGE:] = [self._write(merged, newest[0].first, newest[-1].last)]
        for part in newest:
            self._store.remove(part.key)
        return True


def parts_in(folder: Path) -> list[Part]:
    """The part files of a table, by writer and number; none where there is no folder."""
    return sorted(part_of(path) for path in folder.glob("*.parquet") if path.name[0] not in "._")


def part_of(path: Path) -> Part:
    """What a file's name says. A name of another kind is a writer's only part."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return Part(path.name, 1, 1, path)
    return Part(match["writer"], int(match["first"]), int(match["last"] or match["first"]), path)


def not_merged(parts: Iterable[Part]) -> list[Part]:
    """Without those whose rows are all in another: a writer that was killed while it merged left both."""
    widest: dict[str, Part] = {}
    kept = []
    for part in sorted(parts, key=lambda part: (part.writer, part.first, -part.last)):
        if part.writer in widest and part.last <= widest[part.writer].last:
            continue
        widest[part.writer] = part
        kept.append(part)
    return kept
