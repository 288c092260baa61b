"""MNIST's idx files: what is read, and what is said when a file is missing or wrong."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from trainables.datasets.mnist import FILES, load_mnist, read_idx
from trainables.family import BadValue


def write_idx(path, array, magic=0x08):
    header = bytes((0, 0, magic, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def test_an_idx_file_is_read_in_row_major_order(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz", (2, 3, 4)), array)


def test_faults_name_the_file_and_the_fault(tmp_path):
    array = np.zeros((2, 3), np.uint8)
    path = tmp_path / "a.gz"
    write_idx(path, array)
    with pytest.raises(BadValue, match=r"a\.gz says its shape is \(2, 3\)"):
        read_idx(path, (2, 4))
    with pytest.raises(BadValue, match=r"a\.gz does not start like an idx file of 3-dimensional"):
        read_idx(path, (2, 3, 4))
    write_idx(path, array, magic=0x0D)
    with pytest.raises(BadValue, match="found 00000d02"):
        read_idx(path, (2, 3))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(BadValue, match="does not start"):
        read_idx(path, (2, 3))
    write_idx(path, array)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(BadValue, match="holds 5 elements instead of 6"):
        read_idx(path, (2, 3))
    path.write_bytes(b"not gzip at all")
    with pytest.raises(BadValue, match=r"a\.gz cannot be read as gzip"):
        read_idx(path, (2, 3))
    write_idx(path, array)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(BadValue, match=r"a\.gz cannot be read as gzip"):
        read_idx(path, (2, 3))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadValue, match="--data-dir"):
        load_mnist(None, tmp_path)
    (tmp_path / "mnist").mkdir()
    for name, _ in list(FILES.values())[:3]:
        (tmp_path / "mnist" / name).write_bytes(b"")
    with pytest.raises(BadValue, match="t10k-labels-idx1-ubyte"):
        load_mnist(tmp_path, tmp_path / "cache")


def test_the_published_files(data_dir, cache_dir):
    arrays = load_mnist(data_dir, cache_dir)
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, (_, shape) in FILES.items()}
    # counts of the ten digits in the published sets
    np.testing.assert_array_equal(
        np.bincount(arrays["train_labels"]), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    )
    np.testing.assert_array_equal(
        np.bincount(arrays["test_labels"]), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    )
    assert abs(arrays["train_images"].mean() / 255 - 0.1307) < 1e-4
