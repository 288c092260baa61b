"""Tiny ImageNet at 32x32 as one Parquet file: 200 classes x (500 training + 50 validation) JPEG images.

`images.parquet` with the columns `jpeg` (bytes), `label` (0..199) and `split` ("train" or "val"). A stand-in for
ImageNet-32 in the Continual-ImageNet protocol; figures of the 1,000-class original do not carry over.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from trainables.datasets.by_class import ByClass
from trainables.datasets.cache import cached, find_files
from trainables.family import BadValue

CLASSES, SIDE = 200, 32
WHAT = "Tiny ImageNet 32x32"


def load_tinyimagenet32(
    data_dir: Path | None, cache_dir: Path, train: int = 500, test: int = 50
) -> dict[str, np.ndarray]:
    """The first `train` training and `test` validation images of each class, in file order.

    Returns `train_images` and `test_images`, uint8 [200, train or test, 32, 32, 3], memory-mapped. Raises `BadValue`
    naming the file, and the row where there is one, if it is missing, truncated or holds anything else.
    """
    (path,) = find_files(data_dir, "tinyimagenet32", ["images.parquet"], WHAT)
    return cached(cache_dir, f"tinyimagenet32-{train}-{test}", [path], lambda: _read(path, train, test))


def _read(path: Path, train: int, test: int) -> dict[str, np.ndarray]:
    filed = {"train": ByClass(CLASSES, train, (SIDE, SIDE, 3)), "val": ByClass(CLASSES, test, (SIDE, SIDE, 3))}
    try:
        with pq.ParquetFile(path) as table:
            missing = {"jpeg", "label", "split"} - set(table.schema_arrow.names)
            if missing:
                raise BadValue(f"{WHAT}: {path} has no column '{min(missing)}'")
            first = 0
            for rows in table.iter_batches(batch_size=4096, columns=["jpeg", "label", "split"]):
                _file(path, first, rows, filed)
                first += rows.num_rows
    except (pa.ArrowException, OSError) as error:
        raise BadValue(f"{WHAT}: {path} is truncated or not a Parquet file: fetch it again") from error
    return {
        "train_images": filed["train"].full(f"{WHAT} (train)", path),
        "test_images": filed["val"].full(f"{WHAT} (val)", path),
    }


def _file(path: Path, first: int, rows: pa.RecordBatch, filed: dict[str, ByClass]) -> None:
    labels = np.asarray(rows.column("label").to_pylist())
    splits = np.asarray(rows.column("split").to_pylist())
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise BadValue(f"{WHAT}: {path} has a label outside 0..{CLASSES - 1} in rows {first} to {first + len(labels)}")
    if not np.isin(splits, list(filed)).all():
        raise BadValue(f"{WHAT}: {path} has a split that is neither train nor val in rows {first} and after")
    encoded = rows.column("jpeg")
    for split, target in filed.items():
        members = np.flatnonzero(splits == split)
        wanted, places = target.places(labels[members])
        for row, place in zip(members[wanted], places, strict=True):
            target.images[labels[row], place] = _decode(path, first + int(row), encoded[int(row)].as_py())


def _decode(path: Path, row: int, content: bytes | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise BadValue(f"{WHAT}: row {row} of {path} is not a whole JPEG image") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise BadValue(f"{WHAT}: row {row} of {path} is {pixels.shape[1]}x{pixels.shape[0]}, not {SIDE}x{SIDE}")
    return pixels
