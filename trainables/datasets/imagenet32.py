"""ImageNet downsampled to 32x32 (Chrabaszcz, Loshchilov & Hutter 2017): the published pickles, read without trust.

`train_data_batch_1` .. `_10` and `val_data` from https://image-net.org/download-images.php (an account is needed). Each
holds a dict: `data` uint8 [N, 3072], channels first, and `labels`, N whole numbers from 1 to 1000.
"""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from trainables.datasets.by_class import ByClass
from trainables.datasets.cache import cached, find_files
from trainables.family import BadValue

CLASSES, SIDE = 1000, 32
TRAIN_FILES = [f"train_data_batch_{i}" for i in range(1, 11)]
WHAT = "ImageNet-32"


def load_imagenet32(data_dir: Path | None, cache_dir: Path, train: int = 600, test: int = 50) -> dict[str, np.ndarray]:
    """The first `train` training and `test` validation images of each class, in file order.

    Returns `train_images` and `test_images`, uint8 [1000, train or test, 32, 32, 3], memory-mapped. Raises `BadValue`
    naming a file that is missing, truncated, of another shape, or more than arrays in plain containers.
    """
    paths = find_files(data_dir, "imagenet32", [*TRAIN_FILES, "val_data"], WHAT)
    return cached(
        cache_dir,
        f"imagenet32-{train}-{test}",
        paths,
        lambda: {"train_images": _read(paths[:-1], train), "test_images": _read(paths[-1:], test)},
    )


def _read(paths: list[Path], kept: int) -> np.ndarray:
    filed = ByClass(CLASSES, kept, (SIDE, SIDE, 3))
    for path in paths:
        images, labels = read_batch(path)
        filed.add(images, labels)
    return filed.full(WHAT, paths[-1])


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One published file: images uint8 [N, 32, 32, 3] and zero-based labels int64 [N]."""
    content = unpickle(path)
    if not isinstance(content, dict) or "data" not in content or "labels" not in content:
        raise BadValue(f"{WHAT}: {path} does not hold a dict with 'data' and 'labels'")
    data, labels = content["data"], np.asarray(content["labels"])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * SIDE * SIDE,):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise BadValue(f"{WHAT}: {path} should hold uint8 images [N, {3 * SIDE * SIDE}], found {found}")
    if labels.shape != (len(data),):
        raise BadValue(f"{WHAT}: {path} holds {len(data)} images but labels of shape {list(labels.shape)}")
    if labels.dtype.kind not in "iu" or (len(labels) and not (labels.min() >= 1 and labels.max() <= CLASSES)):
        raise BadValue(f"{WHAT}: {path} has labels that are not whole numbers from 1 to {CLASSES}")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64) - 1


def unpickle(path: Path) -> Any:
    """A pickle's content if it is numpy arrays, numbers and text in plain containers; `BadValue` otherwise."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except _Refused as refused:
        raise BadValue(
            f"{WHAT}: {path} asks for {refused}, which is neither an array nor a plain container: not the published "
            "file, nothing of it was run"
        ) from refused
    except Exception as error:  # a damaged pickle can fail in any way its opcodes can
        raise BadValue(
            f"{WHAT}: {path} is truncated or not a pickle ({type(error).__name__}): download it again"
        ) from error


class _Refused(Exception):
    """A pickle named something that is not on the list."""


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 2 era pickles rebuild bytes with."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode(..., {encoding!r})")
    return codecs.latin_1_encode(text)[0]


def _empty_array(subtype: type, shape: tuple, code: bytes) -> np.ndarray:
    """numpy's `_reconstruct` for plain arrays: an empty array, whose state the pickle then sets."""
    if subtype is not np.ndarray:
        raise _Refused(f"an array of {subtype!r}")
    return np.empty((0,), np.int8)


def _array_from_buffer(buffer: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """What protocol 5 rebuilds contiguous arrays with."""
    if order not in ("C", "F"):
        raise _Refused(f"an array in the order {order!r}")
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="C" if order == "C" else "F")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None
