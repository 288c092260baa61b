"""Decode a data set once a node: arrays as .npy files under a folder named by the sources' fingerprint, memory-mapped.

Several processes may ask at once: each builds in a folder of its own and renames it into place, so that a reader sees a
whole set or none, and the loser of a race throws its copy away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainables.family import BadValue


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
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    folder = cache_dir / f"{name}-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir))
        try:
            for key, array in build().items():
                np.save(scratch / f"{key}.npy", array)
            try:
                os.rename(scratch, folder)
            except OSError:
                if not folder.is_dir():  # not lost to another process: a real failure
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


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
        return Path(pooch.retrieve(url, known_hash, path=cache_dir / "downloads", progressbar=False))
    except Exception as error:  # requests, OS and hash errors alike: the user needs the address and the way around
        raise BadValue(
            f"{what} could not be downloaded from {url} ({type(error).__name__}): put the file in a folder and give "
            "it with --data-dir"
        ) from error
