"""Images on the device, the order they are read in, and the batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables import draws
from trainables.datasets.cifar10 import load_cifar10
from trainables.datasets.digits import load_digits
from trainables.family import Arrays, Schedule
from trainables.vgg_decay.program import DATA_SETS, Program, asked, side_of, sizes, steps_per_epoch

TEST, VALIDATION, TRAIN = 0, 1, 2
"""Where an evaluation batch comes from."""


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> Mapping[str, np.ndarray]:
    """train_images uint8 [n, H, W, C], train_labels uint8 [n], test_images, test_labels."""
    arrays = load_cifar10(data_dir, cache_dir) if program.data == "cifar10" else _digits(side_of(program), cache_dir)
    train, test = sizes(program)
    counts = {"train": train + program.holdout, "test": test}
    return {name: array[: counts[name.split("_")[0]]] for name, array in arrays.items()}


def _digits(side: int, cache_dir: Path | None) -> dict[str, np.ndarray]:
    """The bundled 8x8 digits, every pixel repeated side / 8 times in both directions."""
    bundle, train = load_digits(cache_dir), DATA_SETS["digits"].train
    images = bundle["images"].repeat(side // 8, 1).repeat(side // 8, 2)[..., None]
    labels = bundle["labels"]
    return {
        "train_images": images[:train],
        "train_labels": labels[:train],
        "test_images": images[train:],
        "test_labels": labels[train:],
    }


def schedule(program: Program) -> Schedule:
    return Schedule(steps_per_epoch(program), program.epochs, program.epochs)


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """Each epoch a new permutation of the training images. index [S, batch]; -1 fills up a short last batch."""
    device = arrays["train_labels"].device
    count = sizes(program)[0]
    index = draws.permutation(draws.counter(seed, device), draws.counter(epoch, device), "order", count)
    steps = steps_per_epoch(program)
    return {"index": _rows(index[: steps * program.batch], program.batch)}


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """Test images, then held-out ones, then (covariate train) the training images. index [T, eval_batch], part [T]."""
    device = arrays["test_labels"].device
    train, test = sizes(program)
    ranges = [(TEST, 0, test), (VALIDATION, train, train + program.holdout)]
    if asked(program, "train"):
        ranges.append((TRAIN, 0, train))
    index, part = [], []
    for code, first, last in ranges:
        if last > first:
            rows = _rows(torch.arange(first, last, device=device), program.eval_batch)
            index.append(rows)
            part.append(torch.full((len(rows),), code, device=device))
    return {"index": torch.cat(index), "part": torch.cat(part)}


def _rows(index: Tensor, size: int) -> Tensor:
    padding = index.new_full((-len(index) % size,), -1)
    return torch.cat([index, padding]).reshape(-1, size)


def batch(program: Program, arrays: Arrays, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """images: stored integers [N, C, H, W]; labels int64 [N]; real bool [N]; part, in an evaluation batch."""
    index = row["index"].clamp(min=0)
    if "part" not in row:
        images, labels = arrays["train_images"][index], arrays["train_labels"][index]
    else:
        images, labels = _evaluated(program, arrays, index, row["part"])
    data = {"images": images.movedim(-1, 1), "labels": labels.long(), "real": row["index"] >= 0}
    return data | {"part": row["part"]} if "part" in row else data


def _evaluated(program: Program, arrays: Arrays, index: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    last = len(arrays["test_labels"]) - 1
    images, labels = arrays["test_images"][index.clamp(max=last)], arrays["test_labels"][index.clamp(max=last)]
    if not program.holdout and not asked(program, "train"):
        return images, labels
    index = index.clamp(max=len(arrays["train_labels"]) - 1)
    is_test = part == TEST
    return (
        torch.where(is_test, images, arrays["train_images"][index]),
        torch.where(is_test, labels, arrays["train_labels"][index]),
    )
