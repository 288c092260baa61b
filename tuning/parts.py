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

    @property
    def many(self) -> int:
        return self.last - self.first + 1


class Parts:
    """What one writer has written of one table.

    Args:
        folder: of the table.
        writer: a name no other writer has or had.
        write: (table, path) writes a file that is whole once it has its name.
    """

    def __init__(self, folder: Path, writer: str, write: Callable[[pa.Table, Path], None]):
        self._folder, self._writer, self._write = folder, writer, write
        self._number = 0
        self._parts: list[Part] = []

    def add(self, table: pa.Table) -> None:
        """Write one more part; merge where there are enough of a size."""
        self._folder.mkdir(exist_ok=True)
        self._number += 1
        path = self._folder / f"{self._writer}-{self._number:06d}.parquet"
        self._write(table, path)
        self._parts.append(Part(self._writer, self._number, self._number, path))
        while self._merge():
            pass

    def _merge(self) -> bool:
        newest = self._parts[-MERGE:]
        sizes = {part.many for part in newest}
        if len(newest) < MERGE or len(sizes) > 1 or sum(p.path.stat().st_size for p in newest) > MOST_BYTES:
            return False
        first, last = newest[0].first, newest[-1].last
        path = self._folder / f"{self._writer}-{first:06d}-{last:06d}.parquet"
        tables = [pq.read_table(part.path) for part in newest]
        merged = pa.concat_tables(tables, promote_options="permissive")  # a later part may have more columns
        self._write(merged.replace_schema_metadata(tables[-1].schema.metadata), path)
        for part in newest:
            part.path.unlink(missing_ok=True)
        self._parts[-MERGE:] = [Part(self._writer, first, last, path)]
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
