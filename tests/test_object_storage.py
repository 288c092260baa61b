"""Sweeps in object storage, against moto's S3 server as a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from analysis.compare import compare
from analysis.journal import add_note, write_journal
from analysis.summary import list_sweeps
from tests.objects import BUCKET, SECRET, ObjectStorage, environment, object_storage
from tests.test_interruption import (
    assert_finished_ones_were_left_alone,
    assert_resumed_as_if_undisturbed,
    ended,
)
from tests.toy_sweeps import ROOT, UNDISTURBED, Process, Swept
from trainables.family import BadValue
from tuning import lease, mirror, segments
from tuning.ground import StorageFailed
from tuning.journal import Journal, read
from tuning.lease import Lease
from tuning.segments import SegmentJournal, read_from
from tuning.storage import Bucket, Folder, StorageError, as_store, cache_dir, open_storage

URL = f"s3://{BUCKET}/some/where"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ObjectStorage]:
    folder = tmp_path_factory.mktemp("objects")
    with object_storage(folder) as made, environment({**made.environment, "LANEWISE_CACHE": str(folder / "cache")}):
        yield made


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return Folder(tmp_path)
    request.getfixturevalue("server")
    return Bucket(f"s3://{BUCKET}/{tmp_path.name}")


# --- the two kinds of storage ---


def test_both_kinds_do_the_same(store):
    assert store.names("a") == []
    store.write("a/one", b"1")
    store.write("a/two", b"2")
    store.write("a/two", b"22")
    store.write("a/b/three", b"")
    assert store.read("a/two") == b"22"
    assert store.read("a/b/three") == b""
    assert store.names("a") == ["a/one", "a/two"]
    assert store.at("a").names() == ["one", "two"]
    store.remove("a/one")
    store.remove("a/one")
    assert store.names("a") == ["a/two"]
    store.clear("a")
    store.clear("a")
    assert store.names("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/two")


def test_what_a_user_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage("sweeps") == Folder(tmp_path / "sweeps")
    assert open_storage("s3://bucket/a/b/") == Bucket("s3://bucket/a/b")
    assert as_store(tmp_path) == Folder(tmp_path)
    assert mirror.is_url("s3:/bucket/a")
    assert not mirror.is_url("/mnt/s3")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ftp://host/x", "sweeps go to a folder, or to s3://BUCKET/PREFIX"),
        ("s3://key:hidden-one@bucket/x", "leave keys and options out of the URL"),
        ("s3://bucket/x?secret_key=hidden-one", "leave keys and options out of the URL"),
        ("s3://", "should look like s3://BUCKET/PREFIX"),
        ("s3://bucket//x", "should look like s3://BUCKET/PREFIX"),
    ],
)
def test_a_url_that_is_none_is_one_line(text, told):
    with pytest.raises(StorageError, match=told) as error:
        open_storage(text)
    assert "hidden-one" not in str(error.value)
    assert "\n" not in str(error.value)


def test_storage_that_is_away_is_waited_for(server):
    bucket = Bucket(URL).at("away")
    server.pause()
    threading.Timer(1.0, server.go_on).start()
    bucket.write("late", b"but there")
    assert bucket.read("late") == b"but there"


def test_what_will_not_pass_is_told_at_once(server):
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x cannot be used: .*NO_SUCH_BUCKET"):
        Bucket("s3://no-such-bucket/x").check()


# --- the journal in segments ---


def numbers(store: Bucket, tmp_path) -> list[int]:
    path = tmp_path / "copy.jsonl"
    segments.fetch(store, path)
    return [event["number"] for event, _ in read(path)]


def test_an_entry_counts_when_it_is_in_the_bucket(server, tmp_path):
    store = Bucket(URL).at("counts")
    journal = SegmentJournal(store, tmp_path / "journal.jsonl")
    journal.write("proposed", number=0)
    assert numbers(store, tmp_path) == [0]
    journal.write("report", number=1)  # travels with its decision, which follows at once
    journal.write("decision", number=2)
    assert numbers(store, tmp_path) == [0, 1, 2]
    assert [key.rpartition("/")[2] for key in store.names("journal")] == [
        "0000000000-0000000000.jsonl",
        "0000000001-0000000002.jsonl",
    ]
    journal.write("report", number=3)
    journal.close()
    assert numbers(store, tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "journal.jsonl").read_bytes() == (tmp_path / "copy.jsonl").read_bytes()


def test_another_machine_goes_on_where_the_last_segment_ended(server, tmp_path):
    store = Bucket(URL).at("goes-on")
    first = SegmentJournal(store, tmp_path / "a.jsonl")
    for number in range(5):
        first.write("end", number=number)
    # killed here; a report whose decision never came does not count
    first.write("report", number=-1)
    second = SegmentJournal(store, tmp_path / "b.jsonl")
    second.write("end", number=5)
    second.close()
    assert numbers(store, tmp_path) == [0, 1, 2, 3, 4, 5]


def test_segments_are_merged_and_a_reader_in_the_middle_misses_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "MERGE", 8)
    store = Bucket(URL).at("merged")
    journal = SegmentJournal(store, tmp_path / "journal.jsonl")
    seen = []
    for number in range(40):
        journal.write("end", number=number)
        seen = numbers(store, tmp_path)
        assert seen == list(range(number + 1))
    journal.close()
    data, after = read_from(store, 0)
    assert after == 40
    assert data == (tmp_path / "journal.jsonl").read_bytes()
    assert len(store.names("journal")) == 5
    data, after = read_from(store, 13)
    assert [json.loads(line)["number"] for line in data.splitlines()] == list(range(13, 40))


def test_a_merge_that_was_cut_short_changes_nothing(server, tmp_path):
    store = Bucket(URL).at("cut-short")
    lines = [json.dumps({"number": number}).encode() + b"\n" for number in range(6)]
    for number, line in enumerate(lines):
        store.write(f"journal/{segments._name(number, number)}", line)
    store.write(f"journal/{segments._name(0, 3)}", b"".join(lines[:4]))
    store.remove(f"journal/{segments._name(1, 1)}")
    assert read_from(store, 0) == (b"".join(lines), 6)
    assert read_from(store, 2) == (b"".join(lines[2:]), 6)


def test_the_journal_of_a_folder_is_as_before(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("report", number=0)
    assert [event["number"] for event, _ in read(tmp_path / "journal.jsonl")] == [0]


# --- one driver ---


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1.0)
    monkeypatch.setattr(lease, "STALE_SECONDS", 4.0)


def test_a_second_driver_is_refused_while_the_first_is_alive(server, quick):
    store = Bucket(URL).at("two-drivers")
    first = Lease(store)
    first.take()
    with pytest.raises(BadValue, match="is being written by another driver, process"):
        Lease(store).take()
    first.check()
    first.release()
    assert store.names("driver") == []
    second = Lease(store)
    second.take()
    second.release()


def test_a_driver_that_died_here_is_replaced_at_once_and_one_elsewhere_after_a_wait(server, quick, capsys):
    store = Bucket(URL).at("dead-drivers")
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = {**json.loads(Lease(store)._content), "pid": gone.pid}
    store.write("driver/000003-x.json", json.dumps(here).encode())
    next_one = Lease(store)
    next_one.take()
    next_one.release()
    assert capsys.readouterr().err == ""
    store = Bucket(URL).at("dead-elsewhere")
    store.write("driver/000007-x.json", json.dumps({**here, "host": "elsewhere"}).encode())
    late = Lease(store)
    late.take()
    assert "did not say that it ended" in capsys.readouterr().err
    assert [key for key in store.names("driver") if "/000008-" in key]
    late.release()


def test_a_driver_that_was_replaced_writes_no_more(server, tmp_path, quick):
    store = Bucket(URL).at("replaced")
    old = Lease(store)
    old.take()
    journal = SegmentJournal(store, tmp_path / "journal.jsonl", old.check)
    journal.write("begin", number=0)
    store.write("driver/000002-later.json", b"{}")
    old._renewed -= 3600  # it was suspended for an hour
    with pytest.raises(StorageFailed, match="another driver has taken over"):
        journal.write("end", number=1)
    assert numbers(store, tmp_path) == [0]
    old.release()


# --- whole sweeps ---


class BucketSweep(Process):
    """A tune command on a machine of its own: nothing of another one's but the bucket."""

    def __init__(self, server: ObjectStorage, machine, name: str, *arguments: str, prefix: str = URL):
        cache = machine / "cache"
        super().__init__(prefix, name, *arguments, environment={**server.environment, "LANEWISE_CACHE": str(cache)})
        self._server, self._prefix = server, prefix

    def events(self) -> list:
        lines, _ = read_from(Bucket(f"{self._prefix}/{self.name}"), 0)
        return [json.loads(line) for line in lines.splitlines()]

    def wait(self, seconds: float = 240) -> Swept:
        swept = super().wait(seconds)
        try:
            folder = mirror.fetch(self._prefix, self.name)
        except FileNotFoundError:
            return swept
        prefix = self._prefix.partition(f"{BUCKET}/")[2]
        logs = sorted(self._server.names(f"{prefix}/{self.name}/logs/"))
        (folder / "log.txt").write_bytes(b"".join(map(self._server.read, logs)))
        return Swept(folder, swept.code, swept.out, swept.err)


@pytest.mark.heavy
def test_killed_and_resumed_on_another_machine_with_nothing_but_the_bucket(server, tmp_path, undisturbed):
    first, second = tmp_path / "first", tmp_path / "second"
    process = BucketSweep(server, first, "killed", *UNDISTURBED)
    process.when(ended(2))
    process.kill()
    process.wait()
    assert process.left() == []
    shutil.rmtree(first)  # the machine is gone
    assert server.names("some/where/killed/driver/")
    resumed = BucketSweep(server, second, "killed", "--resume", "killed").wait()
    assert_finished_ones_were_left_alone(resumed)
    assert_resumed_as_if_undisturbed(resumed, undisturbed)
    assert not server.names("some/where/killed/driver/")
    assert not server.names("some/where/killed/checkpoints/"), "checkpoints of ended configs go"
    assert (second / "cache").is_dir()
    assert_readable(server, "killed")
    for key in server.names():
        assert SECRET.encode() not in server.read(key), key


def assert_readable(server: ObjectStorage, name: str) -> None:
    """The reading functions and MLflow's recorder take the bucket's URL, and put what they write into the bucket."""
    assert f"some/where/{name}/report/index.html" in server.names()
    assert list(list_sweeps(URL)["name"]) == [name]
    assert len(compare(URL, [name], at="epoch=1").arms) == 6
    add_note(URL, name, "seen from another machine")
    shutil.rmtree(cache_dir())  # this machine's copy may go at any time
    journal = write_journal(URL, name).read_bytes()
    assert b"seen from another machine" in journal
    assert server.read(f"some/where/{name}/journal.md") == journal
    command = [sys.executable, "-m", "tuning.sync", name, "--storage", URL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{name}: delivered, " in done.stdout


def test_a_name_that_is_taken_and_a_bucket_that_is_not_there_are_one_line(server, tmp_path, undisturbed):
    Bucket(URL).at("taken").write("sweep.json", b"{}")
    before = server.names()
    for name, prefix, told in (
        ("taken", URL, f"the sweep 'taken' already exists in {URL}: continue it with --resume taken"),
        ("new", "s3://no-such-bucket/x", "--storage s3://no-such-bucket/x cannot be used: "),
    ):
        refused = BucketSweep(server, tmp_path / name, name, *UNDISTURBED, prefix=prefix)
        out, err = refused._process.communicate(timeout=60)
        assert (refused._process.returncode, out) == (2, "")
        assert err.startswith(told)
        assert len(err.splitlines()) == 1
    assert server.names() == before


@pytest.mark.parametrize("module", ["analysis", "tuning.sync"])
def test_a_sweep_that_is_not_in_the_bucket_is_one_line(server, module):
    command = [sys.executable, "-m", module, *(["report"] if module == "analysis" else []), "nothing", "--storage", URL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nothing" in done.stderr
