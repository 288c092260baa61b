"""Decode a data set once a node: arrays as .npy files under a folder named by the sources' fingerprint, memory-mapped.

Several processes of a node may ask at once: one builds, or downloads, and the others wait for it. What is built is
renamed into place, so that a reader sees a whole set or none; where the file system has no locks, the loser of a race
throws its copy away.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from trainables.family import BadValue
from trainables.files import write_atomically

_watchers: list[set[Path]] = []


@contextlib.contextmanager
def files_read() -> Iterator[set[Path]]:
    """Collects the source files that loaders use meanwhile (those already decoded too)."""
    found: set[Path] = set()
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers.remove(found)


def note_read(paths: Sequence[Path]) -> None:
    """A loader's word that what it returns is made of these files."""
    for found in _watchers:
        found.update(path.resolve() for path in paths)


def cached(
    cache_dir: Path, name: str, sources: Sequence[Path], build: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `build` makes of `sources`, memory-mapped read-only.

    Args:
        cache_dir: the node's cache folder.
        name: data set and decoding variant; change it when `build` changes what it makes.
        sources: the files read; their paths, sizes and modification times name the cached copy.
        build: decodes. It raises `BadValue` naming the file at fault; then nothing is left behind.
    """
    note_read(sources)
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    folder = cache_dir / f"{name}-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with _alone(cache_dir, folder.name):
            if not folder.is_dir():
                _build(folder, build)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _build(folder: Path, build: Callable[[], Mapping[str, np.ndarray]]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for key, array in build().items():
            write_atomically(scratch / f"{key}.npy", partial(np.save, arr=array))
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # not lost to another process: a real failure
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _alone(cache_dir: Path, name: str) -> Iterator[None]:
    """One process of this node at a time; a process that dies lets the next one in."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache_dir / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: made twice, and as good
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def find_files(data_dir: Path | None, folder: str, names: Sequence[str], what: str) -> list[Path]:
    """The named files in `data_dir/folder` or in `data_dir` itself; `BadValue` says which one is missing and where."""
    if data_dir is None:
        raise BadValue(f"{what} is not downloaded by itself: give its folder with --data-dir or LANEWISE_DATA")
    for base in (data_dir / folder, data_dir):
        paths = [base / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    missing = next(name for name in names if not (data_dir / folder / name).is_file())
    raise BadValue(f"{what}: {data_dir / folder / missing} does not exist (nor {data_dir / missing})")


def fetch(cache_dir: Path, url: str, known_hash: str, what: str) -> Path:
    """Download a published file once, checked against its hash ("md5:..." or "sha256:..."). `BadValue` if it fails."""
    import pooch

    try:
        with _alone(cache_dir, f"download-{hashlib.sha256(url.encode()).hexdigest()[:12]}"):
            return Path(pooch.retrieve(url, known_hash, path=cache_dir / "downloads", progressbar=False))
    except Exception as error:  # requests, OS and hash errors alike: the user needs the address and the way around
        raise BadValue(
            f"{what} could not be downloaded from {url} ({type(error).__name__}): put the file in a folder and give "
            "it with --data-dir"
        ) from error
