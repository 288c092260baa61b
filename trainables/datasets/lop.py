"""Continual ImageNet as published with "Loss of plasticity in deep continual learning" (Dohare et al. 2024).

shibhansh/loss-of-plasticity, `lop/imagenet/`: `classes/0.npy` .. `classes/999.npy`, each [700, 3, 32, 32]: 600 training
images, then 100 test images of one class. Whole-number images are stored as uint8 0..255; others as they are (float32).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, find_files
from trainables.family import BadValue

CLASSES, TRAIN, TEST = 1000, 600, 100
WHAT = "lop's Continual ImageNet"


def load_lop(
    data_dir: Path | None, cache_dir: Path, train: int = TRAIN, test: int = TEST, classes: int = CLASSES
) -> dict[str, np.ndarray]:
    """The first `train` of each class's 600 training and the first `test` of its 100 test images.

    Returns `train_images` and `test_images`, uint8 or float32 [classes, train or test, 32, 32, 3], memory-mapped.
    Raises `BadValue` naming a file that is missing, truncated or of another shape or type than the first.
    """
    paths = find_files(data_dir, "lop", [f"classes/{label}.npy" for label in range(classes)], WHAT)

    def build() -> dict[str, np.ndarray]:
        dtype = _open(paths[0]).dtype
        kind = np.uint8 if dtype == np.uint8 else np.float32
        trains = np.empty((classes, train, 32, 32, 3), kind)
        tests = np.empty((classes, test, 32, 32, 3), kind)
        for label, path in enumerate(paths):
            images = _open(path)
            if images.dtype != dtype:
                raise BadValue(f"{WHAT}: {path} holds {images.dtype}, {paths[0].name} holds {dtype}")
            images = images.transpose(0, 2, 3, 1)
            if not np.isfinite(images).all():
                raise BadValue(f"{WHAT}: {path} holds values that are not finite")
            trains[label], tests[label] = images[:train], images[TRAIN : TRAIN + test]
        return {"train_images": trains, "test_images": tests}

    return cached(cache_dir, f"lop-{classes}-{train}-{test}", paths, build)


def _open(path: Path) -> np.ndarray:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadValue(f"{WHAT}: {path} is truncated or not a .npy array: fetch it again") from error
    if not isinstance(images, np.ndarray):
        raise BadValue(f"{WHAT}: {path} is an archive, not one .npy array: fetch it again")
    if images.shape != (TRAIN + TEST, 3, 32, 32):
        raise BadValue(f"{WHAT}: {path} should hold images [700, 3, 32, 32], found {list(images.shape)}")
    if images.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise BadValue(f"{WHAT}: {path} should hold uint8 or floating-point images, found {images.dtype}")
    return images
