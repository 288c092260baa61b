"""MNIST in its published format: four gzipped idx files (LeCun, Cortes & Burges 1998, CC BY-SA 3.0).

An idx file is a big-endian header (two zero bytes, the element type, the number of dimensions, one uint32 a dimension)
followed by the elements in row-major order; type 0x08 is uint8.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, find_files
from trainables.family import BadValue

FILES = {
    "train_images": ("train-images-idx3-ubyte.gz", (60000, 28, 28)),
    "train_labels": ("train-labels-idx1-ubyte.gz", (60000,)),
    "test_images": ("t10k-images-idx3-ubyte.gz", (10000, 28, 28)),
    "test_labels": ("t10k-labels-idx1-ubyte.gz", (10000,)),
}


def load_mnist(data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """MNIST, memory-mapped.

    Args:
        data_dir: folder that holds the four files, or holds them in `mnist/`.
        cache_dir: where the decoded arrays go.

    Returns:
        train_images uint8 [60000, 28, 28] and test_images uint8 [10000, 28, 28] (0 background .. 255 ink),
        train_labels uint8 [60000], test_labels uint8 [10000], in the published order.

    Raises:
        BadValue: a file is missing, is no gzipped idx file of bytes, or has not MNIST's shape. The file is named.
    """
    paths = find_files(data_dir, "mnist", [name for name, _ in FILES.values()], "MNIST")

    def build() -> dict[str, np.ndarray]:
        arrays = {key: read_idx(path, shape) for (key, (_, shape)), path in zip(FILES.items(), paths, strict=True)}
        for key, path in zip(FILES, paths, strict=True):
            if key.endswith("labels") and arrays[key].max() > 9:
                raise BadValue(f"{path} has a label above 9: it is not MNIST; download it again")
        return arrays

    return cached(cache_dir, "mnist", paths, build)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of a gzipped idx file that must have `shape`; `BadValue` names the file and what is wrong."""
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise BadValue(f"{path} cannot be read as gzip ({error}): download it again") from error
    header = 4 + 4 * len(shape)
    if len(data) < header or data[:4] != bytes((0, 0, 0x08, len(shape))):
        raise BadValue(
            f"{path} does not start like an idx file of {len(shape)}-dimensional bytes (found {data[:4].hex()}, "
            f"expected 0000080{len(shape)}): download it again"
        )
    found = struct.unpack(f">{len(shape)}I", data[4:header])
    if found != shape:
        raise BadValue(f"{path} says its shape is {found}, but MNIST's is {shape}: is it another data set?")
    elements = int(np.prod(shape))
    if len(data) - header != elements:
        raise BadValue(f"{path} holds {len(data) - header} elements instead of {elements}: download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
