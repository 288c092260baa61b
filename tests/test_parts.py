"""Part files are merged as they get many; nothing is lost, and readers see all rows at any time."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuning.curves import parquet
from tuning.parts import MERGE, Parts, not_merged, part_of, parts_in
from tuning.storage import Folder


def table(number: int, **more) -> pa.Table:
    return pa.table({"run_key": ["r"], "step": [number], **more}).replace_schema_metadata({b"lanewise": b"{}"})


def written(folder, writer="w") -> Parts:
    return Parts(Folder(folder), "steps", writer, parquet)


def rows(folder) -> list[int]:
    return [step for part in not_merged(parts_in(folder)) for step in pq.read_table(part.path)["step"].to_pylist()]


def test_files_stay_few_and_rows_stay_in_order(tmp_path):
    parts = written(tmp_path)
    count = MERGE**2 + MERGE + 3
    for number in range(1, count + 1):
        parts.add(table(number))
    names = [part.path.name for part in parts_in(tmp_path / "steps")]
    assert len(names) == 1 + 1 + 3
    assert names[0] == f"w-000001-{MERGE**2:06d}.parquet"
    assert rows(tmp_path / "steps") == list(range(1, count + 1))
    assert pq.read_schema(tmp_path / "steps" / names[0]).metadata[b"lanewise"] == b"{}"


def test_a_column_that_came_later_is_empty_before(tmp_path):
    parts = written(tmp_path)
    for number in range(MERGE - 1):
        parts.add(table(number))
    parts.add(table(MERGE - 1, loss=[0.5]))
    (part,) = parts_in(tmp_path / "steps")
    assert pq.read_table(part.path)["loss"].to_pylist() == [None] * (MERGE - 1) + [0.5]


def test_what_a_killed_merge_left_is_read_once(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self, key):
        raise Killed

    parts = written(tmp_path)
    for number in range(1, MERGE):
        parts.add(table(number))
    monkeypatch.setattr(Folder, "remove", kill)
    with pytest.raises(Killed):
        parts.add(table(MERGE))
    assert len(parts_in(tmp_path / "steps")) == MERGE + 1
    assert rows(tmp_path / "steps") == list(range(1, MERGE + 1))


def test_writers_do_not_touch_each_other_s(tmp_path):
    one, two = written(tmp_path, "cpu0-1"), written(tmp_path, "cpu0-1-2")
    for number in range(MERGE):
        one.add(table(number))
        two.add(table(100 + number))
    assert sorted(rows(tmp_path / "steps")) == [*range(MERGE), *range(100, 100 + MERGE)]
    assert [part.writer for part in parts_in(tmp_path / "steps")] == ["cpu0-1", "cpu0-1-2"]


def test_names(tmp_path):
    assert (part_of(tmp_path / "a-b-000007.parquet").writer, part_of(tmp_path / "a-b-000007.parquet").last) == (
        "a-b",
        7,
    )
    merged = part_of(tmp_path / "20260101T000000000000-cpu0-10.0.0.1-77-000001-000016.parquet")
    assert (merged.writer, merged.first, merged.last) == ("20260101T000000000000-cpu0-10.0.0.1-77", 1, 16)
    assert part_of(tmp_path / "other.parquet").writer == "other.parquet"
