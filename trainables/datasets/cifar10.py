"""CIFAR-10: 50,000 + 10,000 colour images of 32x32 in ten classes (Krizhevsky 2009).

Read from the official python batches, in a folder or downloaded once, or from Parquet shards with the columns `image`
(an encoded image file) and `label`.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainables.datasets.cache import cached, fetch
from trainables.datasets.pickles import read_pickle
from trainables.family import BadValue

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
HASH = "md5:c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
WHAT = "CIFAR-10"

Arrays = dict[str, np.ndarray]


def load_cifar10(data_dir: Path | None, cache_dir: Path) -> Arrays:
    """The whole set, decoded once under `cache_dir` and memory-mapped.

    Looks in `data_dir/cifar10` and in `data_dir` for Parquet shards (`train-*.parquet`, `test-*.parquet`), for the
    official batch files (also inside `cifar-10-batches-py/`), and for `cifar-10-python.tar.gz`; else downloads the
    last.

    Returns:
        train_images uint8 [50000, 32, 32, 3] and test_images uint8 [10000, 32, 32, 3], values 0..255, RGB; train_labels
        uint8 [50000], test_labels uint8 [10000].

    Raises:
        BadValue: a file is missing, truncated or not what it should be; the message names it.
    """
    for base in (data_dir / "cifar10", data_dir) if data_dir is not None else ():
        shards = sorted(base.glob("train-*.parquet")) + sorted(base.glob("test-*.parquet"))
        if shards:
            return cached(cache_dir, "cifar10-parquet", shards, partial(from_shards, shards))
        for folder in (base / FOLDER, base):
            paths = [folder / name for name in (*TRAIN_BATCHES, TEST_BATCH)]
            if any(path.is_file() for path in paths):
                return cached(cache_dir, "cifar10-batches", _all_there(paths), partial(from_batches, paths))
        if (base / ARCHIVE).is_file():
            return _from_archive_cached(base / ARCHIVE, cache_dir)
    return _from_archive_cached(fetch(cache_dir, URL, HASH, WHAT), cache_dir)


def _from_archive_cached(archive: Path, cache_dir: Path) -> Arrays:
    return cached(cache_dir, "cifar10-archive", [archive], lambda: from_archive(archive))


def _all_there(paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise BadValue(f"{WHAT}: {path} does not exist, though other batches lie beside it")
    return list(paths)


# --- the official python batches ------------------------------------------------------------------------------------


def from_batches(paths: Sequence[Path], images: int = 10_000) -> Arrays:
    """Arrays of the five training batch files and the test batch, in that order, each of `images` images."""
    parts = []
    for path in paths:
        with path.open("rb") as file:
            parts.append(_batch(file, path, images))
    return _join(parts)


def from_archive(archive: Path, images: int = 10_000) -> Arrays:
    """Arrays of `cifar-10-python.tar.gz`, read without unpacking it."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            files = {name: io.BytesIO(_member(tar, archive, name)) for name in (*TRAIN_BATCHES, TEST_BATCH)}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadValue(f"{WHAT}: {archive} cannot be read ({error}): download it again") from error
    return _join([_batch(file, f"{archive}:{name}", images) for name, file in files.items()])


def _member(tar: tarfile.TarFile, archive: Path, name: str) -> bytes:
    try:
        file = tar.extractfile(f"{FOLDER}/{name}")
    except KeyError:
        file = None
    if file is None:
        raise BadValue(f"{WHAT}: {archive} holds no {FOLDER}/{name}: it is another archive")
    return file.read()


def _batch(file: IO[bytes], path: Path | str, images: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = _fields(read_pickle(file, path, WHAT), path)
    if pixels.shape != (images, 3072) or pixels.dtype != np.uint8:
        raise BadValue(f"{WHAT}: {path} holds {pixels.dtype} {pixels.shape}, not uint8 ({images}, 3072)")
    _check_labels(labels, images, path)
    return pixels.reshape(images, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.uint8)


def _fields(content: Any, path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    plain = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()} if type(content) is dict else {}
    if not isinstance(plain.get("data"), np.ndarray) or not isinstance(plain.get("labels"), list):
        raise BadValue(f"{WHAT}: {path} is no CIFAR-10 batch: it lacks the fields data and labels")
    return plain["data"], np.array(plain["labels"])


def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Arrays:
    """The last part is the test set."""
    return {
        "train_images": np.concatenate([images for images, _ in parts[:-1]]),
        "train_labels": np.concatenate([labels for _, labels in parts[:-1]]),
        "test_images": np.ascontiguousarray(parts[-1][0]),
        "test_labels": parts[-1][1],
    }


def _check_labels(labels: np.ndarray, images: int, path: Path | str) -> None:
    if labels.shape != (images,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise BadValue(f"{WHAT}: the labels of {path} are not {images} whole numbers from 0 to 9")


# --- Parquet shards -------------------------------------------------------------------------------------------------


def from_shards(shards: Sequence[Path], train: int = 50_000, test: int = 10_000) -> Arrays:
    """Arrays of shards named `train-*` and `test-*`, each split in the order of its file names."""
    arrays: Arrays = {}
    for split, expected in (("train", train), ("test", test)):
        files = sorted(path for path in shards if path.name.startswith(f"{split}-"))
        parts = [_shard(path) for path in files]
        rows = sum(len(labels) for _, labels in parts)
        if rows != expected:
            where = files[0].parent if files else shards[0].parent
            raise BadValue(f"{WHAT}: the {split}-*.parquet files in {where} hold {rows} images, not {expected}")
        arrays[f"{split}_images"] = np.concatenate([images for images, _ in parts])
        arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in parts])
    return arrays


def _shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    except (pyarrow.ArrowException, OSError) as error:
        raise BadValue(f"{WHAT}: {path} cannot be read ({' '.join(str(error).split())}): download it again") from error
    encoded = table.column("image").to_pylist()
    images = np.empty((len(encoded), 32, 32, 3), np.uint8)
    for row, content in enumerate(encoded):
        images[row] = _decode(content, path, row)
    labels = table.column("label").to_numpy()
    _check_labels(labels, len(encoded), path)
    return images, labels.astype(np.uint8)


def _decode(content: Any, path: Path, row: int) -> np.ndarray:
    from PIL import Image

    if isinstance(content, dict):  # the layout of hosted copies: {"bytes": ..., "path": ...}
        content = content.get("bytes")
    try:
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, TypeError, SyntaxError) as error:
        raise BadValue(f"{WHAT}: image {row} of {path} cannot be decoded ({error})") from error
    if image.shape != (32, 32, 3):
        raise BadValue(f"{WHAT}: image {row} of {path} has the size {image.shape[1]}x{image.shape[0]}, not 32x32")
    return image
