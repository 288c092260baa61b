"""The data sets that the task stream is cut from. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainables.ci_vit.program import Program
from trainables.datasets.by_class import first_of_each


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """`train_images` and `test_images`, [classes * images of each class, side, side, channels], class after class.

    Of each class the first images in file order. uint8, or float32 where the set is published so.
    """
    return {
        name: images.reshape(-1, *images.shape[2:])
        for name, images in _READERS[program.data](program, data_dir, cache_dir).items()
    }


# each as [classes, images of each class, side, side, channels]; readers are imported for the set that is asked for


def _digits(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.digits import load_digits

    bundle = load_digits(cache_dir)
    wanted = program.set.most_train + program.test  # the rarest digit has 174 images: 140 to learn, 34 to test
    images = first_of_each(bundle["images"][..., None], bundle["labels"], program.set.classes, wanted)
    return {"train_images": images[:, : program.train], "test_images": images[:, program.set.most_train :]}


def _imagenet32(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.imagenet32 import load_imagenet32

    return load_imagenet32(data_dir, cache_dir, program.train, program.test)


def _lop(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.lop import load_lop

    return load_lop(data_dir, cache_dir, program.train, program.test)


def _tinyimagenet32(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.tinyimagenet32 import load_tinyimagenet32

    return load_tinyimagenet32(data_dir, cache_dir, program.train, program.test)


def _cifar10(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.cifar10 import load_cifar10

    flat, classes = load_cifar10(data_dir, cache_dir), program.set.classes
    return {
        "train_images": first_of_each(flat["train_images"], flat["train_labels"], classes, program.train),
        "test_images": first_of_each(flat["test_images"], flat["test_labels"], classes, program.test),
    }


_READERS = {
    "digits": _digits,
    "imagenet32": _imagenet32,
    "lop": _lop,
    "tinyimagenet32": _tinyimagenet32,
    "cifar10": _cifar10,
}
