"""The data sets of ci_vit: published layouts read whole, damaged files named, nothing in a pickle run."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainables.datasets.imagenet32 import load_imagenet32, read_batch
from trainables.datasets.lop import load_lop
from trainables.datasets.tinyimagenet32 import load_tinyimagenet32
from trainables.family import BadValue, load_family

# --- ImageNet-32 ----------------------------------------------------------------------------------------------------


def write_imagenet32(folder, per_class: int = 3, per_class_val: int = 1):
    """Ten training files and one of validation in the published format. Returns {file name: (data, labels from 1)}."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    labels = rng.permutation(np.repeat(np.arange(1, 1001), per_class))
    data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    parts = {}
    for i, rows in enumerate(np.array_split(np.arange(len(labels)), 10), start=1):
        parts[f"train_data_batch_{i}"] = data[rows], labels[rows]
    val = rng.permutation(np.repeat(np.arange(1, 1001), per_class_val))
    parts["val_data"] = rng.integers(0, 256, (len(val), 3072), dtype=np.uint8), val
    for name, (images, numbers) in parts.items():
        content = {"data": images, "labels": [int(n) for n in numbers], "mean": images.mean(0)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=3))
    return parts


def test_imagenet32_keeps_the_first_images_of_each_class_in_file_order(tmp_path):
    parts = write_imagenet32(tmp_path / "imagenet32")
    arrays = load_imagenet32(tmp_path, tmp_path / "cache", train=2, test=1)
    assert arrays["train_images"].shape == (1000, 2, 32, 32, 3)
    assert arrays["test_images"].shape == (1000, 1, 32, 32, 3)
    data = np.concatenate([parts[f"train_data_batch_{i}"][0] for i in range(1, 11)])
    labels = np.concatenate([parts[f"train_data_batch_{i}"][1] for i in range(1, 11)])
    for label in (0, 417, 999):
        rows = data[labels == label + 1][:2]
        for row, image in zip(rows, arrays["train_images"][label], strict=True):
            red, green, blue = row.reshape(3, 32, 32)
            np.testing.assert_array_equal(image, np.stack([red, green, blue], axis=-1))
    val, val_labels = parts["val_data"]
    expected = val[val_labels == 6][0].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(arrays["test_images"][5, 0], expected)


def test_imagenet32_runs_through_the_family(tmp_path):
    write_imagenet32(tmp_path, per_class=3, per_class_val=1)
    family = load_family("ci_vit")
    program, _ = family.build({"data": "imagenet32", "train_per_class": 3, "test_per_class": 1, "batch": 2})
    arrays = family.load(program, tmp_path, tmp_path / "cache")
    assert arrays["train_images"].shape == (3000, 32, 32, 3)
    assert family.schedule(program).tasks == 500


class Runs:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    path = tmp_path / "train_data_batch_1"
    content = {"data": np.zeros((1, 3072), np.uint8), "labels": [1], "extra": Runs(trace)}
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(BadValue, match=r"train_data_batch_1 asks for .*mkdir"):
        read_batch(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_arrays_pass_in_every_protocol(tmp_path, protocol):
    path = tmp_path / "val_data"
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    path.write_bytes(pickle.dumps({"data": data, "labels": [1, 1000]}, protocol=protocol))
    images, labels = read_batch(path)
    np.testing.assert_array_equal(images, data.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(labels, [0, 999])


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({**GOOD, "data": np.zeros((2, 3071), np.uint8)}, r"uint8 images \[N, 3072\], found uint8 \[2, 3071\]"),
        ({**GOOD, "data": np.zeros((2, 3072), np.float32)}, "found float32"),
        ({**GOOD, "labels": [1]}, "2 images but labels of shape"),
        ({**GOOD, "labels": [0, 1]}, "whole numbers from 1 to 1000"),
        ({**GOOD, "labels": [1, 1001]}, "whole numbers from 1 to 1000"),
        ({**GOOD, "labels": [1.5, 2.0]}, "whole numbers from 1 to 1000"),
        ([1, 2], "dict with 'data' and 'labels'"),
    ],
)
def test_a_wrong_imagenet32_file_is_named(tmp_path, content, complaint):
    path = tmp_path / "train_data_batch_7"
    path.write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(BadValue, match=complaint) as caught:
        read_batch(path)
    assert str(path) in str(caught.value)


def test_a_truncated_imagenet32_file_is_named_and_leaves_no_cache(tmp_path):
    write_imagenet32(tmp_path / "imagenet32")
    path = tmp_path / "imagenet32" / "train_data_batch_4"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BadValue, match="train_data_batch_4 is truncated"):
        load_imagenet32(tmp_path, tmp_path / "cache", train=2, test=1)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_too_few_images_and_missing_files_are_told(tmp_path):
    write_imagenet32(tmp_path / "imagenet32")
    with pytest.raises(BadValue, match="3 images of class 0, 4 are needed"):
        load_imagenet32(tmp_path, tmp_path / "cache", train=4, test=1)
    (tmp_path / "imagenet32" / "val_data").unlink()
    with pytest.raises(BadValue, match="val_data does not exist"):
        load_imagenet32(tmp_path, tmp_path / "cache")
    with pytest.raises(BadValue, match="--data-dir"):
        load_imagenet32(None, tmp_path / "cache")


# --- lop ------------------------------------------------------------------------------------------------------------


def write_lop(folder, classes: int = 3, dtype=np.uint8) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    (folder / "classes").mkdir(parents=True)
    written = [rng.integers(0, 256, (700, 3, 32, 32)).astype(dtype) for _ in range(classes)]
    for label, images in enumerate(written):
        np.save(folder / "classes" / f"{label}.npy", images)
    return written


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_lop_splits_each_class_after_600(tmp_path, dtype):
    written = write_lop(tmp_path / "lop", dtype=dtype)
    arrays = load_lop(tmp_path, tmp_path / "cache", classes=3)
    assert arrays["train_images"].dtype == dtype
    for label, images in enumerate(written):
        np.testing.assert_array_equal(arrays["train_images"][label], images[:600].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(arrays["test_images"][label], images[600:].transpose(0, 2, 3, 1))


def test_a_wrong_lop_file_is_named(tmp_path):
    write_lop(tmp_path / "lop")
    path = tmp_path / "lop" / "classes" / "1.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadValue, match=r"1\.npy is truncated"):
        load_lop(tmp_path, tmp_path / "cache", classes=3)
    np.save(path, np.zeros((699, 3, 32, 32), np.uint8))
    with pytest.raises(BadValue, match=r"1\.npy should hold images \[700, 3, 32, 32\], found \[699"):
        load_lop(tmp_path, tmp_path / "cache", classes=3)
    np.save(path, np.zeros((700, 3, 32, 32), np.float32))
    with pytest.raises(BadValue, match=r"1\.npy holds float32, 0\.npy holds uint8"):
        load_lop(tmp_path, tmp_path / "cache", classes=3)
    np.save(path, np.array([{}] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(BadValue, match=r"1\.npy is truncated or not"):
        load_lop(tmp_path, tmp_path / "cache", classes=3)
    with pytest.raises(BadValue, match=r"3\.npy does not exist"):
        load_lop(tmp_path, tmp_path / "cache", classes=4)


# --- Tiny ImageNet --------------------------------------------------------------------------------------------------


def jpeg(colour: tuple[int, int, int], side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tiny_rows() -> dict[str, list]:
    """Two training and one validation image of each class, shuffled; an image's colour tells its class."""
    order = np.random.default_rng(2).permutation(200 * 3)
    labels = [int(i) % 200 for i in order]
    splits = ["val" if i >= 400 else "train" for i in order]
    return {"jpeg": [jpeg((label, 255 - label, 60)) for label in labels], "label": labels, "split": splits}


def write_tiny(folder, rows: dict[str, list]):
    folder.mkdir(parents=True, exist_ok=True)
    label = pa.array(rows["label"], pa.int16())
    table = pa.table({"jpeg": pa.array(rows["jpeg"], pa.binary()), "label": label, "split": rows["split"]})
    pq.write_table(table, folder / "images.parquet")
    return folder / "images.parquet"


def test_tinyimagenet32_files_images_by_class(tmp_path):
    write_tiny(tmp_path / "tinyimagenet32", tiny_rows())
    arrays = load_tinyimagenet32(tmp_path, tmp_path / "cache", train=2, test=1)
    assert arrays["train_images"].shape == (200, 2, 32, 32, 3)
    assert arrays["test_images"].shape == (200, 1, 32, 32, 3)
    for images in arrays.values():
        red = images[..., 0].mean((-1, -2)).round()
        assert np.abs(red - np.arange(200)[:, None]).max() <= 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows["label"].__setitem__(7, 200), r"label outside 0\.\.199"),
        (lambda rows: rows["split"].__setitem__(7, "test"), "neither train nor val"),
        (lambda rows: rows["jpeg"].__setitem__(7, rows["jpeg"][7][:300]), "row 7 of"),
        (lambda rows: rows["jpeg"].__setitem__(7, jpeg((0, 0, 0), 31)), "row 7 .* is 31x31, not 32x32"),
        (lambda rows: [column.pop() for column in rows.values()], "are needed"),
    ],
)
def test_a_wrong_tinyimagenet32_row_is_named(tmp_path, change, complaint):
    rows = tiny_rows()
    change(rows)
    path = write_tiny(tmp_path, rows)
    with pytest.raises(BadValue, match=complaint) as caught:
        load_tinyimagenet32(tmp_path, tmp_path / "cache", train=2, test=1)
    assert str(path) in str(caught.value)


def test_a_truncated_or_foreign_parquet_file_is_named(tmp_path):
    path = write_tiny(tmp_path, tiny_rows())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadValue, match=r"images\.parquet is truncated"):
        load_tinyimagenet32(tmp_path, tmp_path / "cache", train=2, test=1)
    pq.write_table(pa.table({"jpeg": [b""], "label": [0]}), path)
    with pytest.raises(BadValue, match="no column 'split'"):
        load_tinyimagenet32(tmp_path, tmp_path / "cache", train=2, test=1)


def test_the_real_tinyimagenet32(data_dir, tmp_path):
    arrays = load_tinyimagenet32(data_dir, tmp_path, train=3, test=2)
    assert arrays["train_images"].shape == (200, 3, 32, 32, 3)
    assert 90 < arrays["train_images"].mean() < 140
    assert len({image.tobytes() for image in arrays["train_images"].reshape(600, -1)}) > 590
