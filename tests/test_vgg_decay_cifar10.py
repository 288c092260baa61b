"""CIFAR-10 in its published formats, and every way a file can be wrong."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from trainables.datasets import cifar10
from trainables.datasets.pickles import read_pickle
from trainables.family import BadValue

SMALL = 4


def batch_content(rng, count=SMALL):
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [int(x) for x in rng.integers(0, 10, count)],
        b"data": rng.integers(0, 256, (count, 3072)).astype(np.uint8),
        b"filenames": [b"a.png"] * count,
    }


@pytest.fixture
def batches(tmp_path):
    """Six small batch files, pickled as the official ones are (protocol 2). Returns (paths, contents)."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in (*cifar10.TRAIN_BATCHES, cifar10.TEST_BATCH)]
    contents = [batch_content(rng) for _ in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(pickle.dumps(content, protocol=2))
    return paths, contents


def assert_is(arrays, contents):
    assert arrays["train_images"].shape == (5 * SMALL, 32, 32, 3)
    assert arrays["test_images"].shape == (SMALL, 32, 32, 3)
    assert arrays["train_images"].dtype == arrays["train_labels"].dtype == np.uint8
    # row-major planes: first 1024 values are red, the next green, the last blue
    data = contents[2][b"data"][1]
    assert np.array_equal(
        arrays["train_images"][2 * SMALL + 1, 5, 7], data[[5 * 32 + 7, 1024 + 5 * 32 + 7, 2055 + 160]]
    )
    assert arrays["test_labels"].tolist() == contents[-1][b"labels"]


def test_batches(batches):
    paths, contents = batches
    assert_is(cifar10.from_batches(paths, SMALL), contents)


def test_archive_is_read_without_unpacking(batches, tmp_path):
    paths, contents = batches
    archive = tmp_path / cifar10.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        for path in paths:
            tar.add(path, f"{cifar10.FOLDER}/{path.name}")
    assert_is(cifar10.from_archive(archive, SMALL), contents)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(BadValue, match=r"cifar-10-python\.tar\.gz.*download it again"):
        cifar10.from_archive(archive, SMALL)


def test_truncated_batch_is_named(batches):
    paths, _ = batches
    paths[3].write_bytes(paths[3].read_bytes()[:700])
    with pytest.raises(BadValue, match=r"data_batch_4 cannot be read"):
        cifar10.from_batches(paths, SMALL)


def test_batch_of_another_size_is_named(batches):
    paths, _ = batches
    with pytest.raises(BadValue, match=r"data_batch_1 holds uint8 \(4, 3072\), not uint8 \(5, 3072\)"):
        cifar10.from_batches(paths, 5)


@pytest.mark.parametrize(
    "content", [[1, 2], {b"data": 3}, {b"data": np.zeros((4, 3072), np.uint8), b"labels": [11] * 4}]
)
def test_wrong_content_is_named(batches, content):
    paths, _ = batches
    paths[0].write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(BadValue, match="data_batch_1"):
        cifar10.from_batches(paths, SMALL)


def test_missing_batch_is_named(batches, tmp_path):
    paths, _ = batches
    paths[5].unlink()
    with pytest.raises(BadValue, match=r"test_batch does not exist"):
        cifar10.load_cifar10(tmp_path, tmp_path / "cache")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/evil",)


def test_a_pickle_runs_nothing():
    with pytest.raises(BadValue, match=r"posix\.mkdir|nt\.mkdir"):
        read_pickle(io.BytesIO(pickle.dumps(Evil())), "evil.pkl", "a set")
    with pytest.raises(BadValue, match="codec"):
        read_pickle(io.BytesIO(b"c_codecs\nencode\n(Vabc\nVrot13\ntR."), "evil.pkl", "a set")


def write_shard(path, count, size=(32, 32), seed=0):
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rng = np.random.default_rng(seed)
    images, encoded = rng.integers(0, 256, (count, *size, 3)).astype(np.uint8), []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    labels = rng.integers(0, 10, count).astype(np.uint8)
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), path)
    return images, labels


def test_shards(tmp_path):
    files = [tmp_path / f"train-0000{i}-of-00002.parquet" for i in range(2)] + [tmp_path / "test-0-of-1.parquet"]
    written = [write_shard(path, 3 + i, seed=i) for i, path in enumerate(files)]
    arrays = cifar10.from_shards(files, train=7, test=5)
    assert np.array_equal(arrays["train_images"], np.concatenate([written[0][0], written[1][0]]))
    assert np.array_equal(arrays["test_labels"], written[2][1])
    with pytest.raises(BadValue, match=r"train-\*\.parquet .* hold 7 images, not 50000"):
        cifar10.load_cifar10(tmp_path, tmp_path / "cache")
    files[1].write_bytes(files[1].read_bytes()[:-40])
    with pytest.raises(BadValue, match="train-00001-of-00002"):
        cifar10.from_shards(files, train=7, test=5)
    write_shard(files[1], 4, size=(16, 32))
    with pytest.raises(BadValue, match=r"image 0 of .*train-00001.* size 32x16"):
        cifar10.from_shards(files, train=7, test=5)


@pytest.mark.heavy
def test_the_whole_set(data_dir, cache_dir):
    """The per-channel means and deviations that are published for the training images, and ten classes of 5,000."""
    arrays = cifar10.load_cifar10(data_dir, cache_dir)
    assert arrays["train_images"].shape == (50_000, 32, 32, 3)
    assert arrays["test_images"].shape == (10_000, 32, 32, 3)
    assert np.bincount(arrays["train_labels"]).tolist() == [5000] * 10
    assert np.bincount(arrays["test_labels"]).tolist() == [1000] * 10
    mean = arrays["train_images"].mean((0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert arrays["train_labels"][:5].tolist() == [6, 9, 9, 4, 1]
