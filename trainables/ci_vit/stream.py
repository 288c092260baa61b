"""The task stream: pairs of classes, one task after another.

Continual ImageNet as in ajozefiak/CL-transformers (src/data/CI.py, src/experiments/CI_ViT_V1.py): the seed permutes the
classes and cuts them into families; task k tells the k-th class of one family from the k-th of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from trainables import draws
from trainables.ci_vit.program import Program, schedule
from trainables.family import Arrays, dtype_of

TEST_BATCH = 500


def task_classes(program: Program, seed: int, task: int) -> list[int]:
    """The classes of a zero-based task, in label order. Each pass over the classes permutes them anew."""
    along, place = divmod(task, program.tasks_per_pass)
    order = _class_order(program.set.classes, seed, along)
    return [order[family * program.tasks_per_pass + place] for family in range(program.classes)]


@functools.lru_cache(maxsize=1024)
def _class_order(classes: int, seed: int, along: int) -> list[int]:
    return draws.permutation(draws.counter(seed), draws.counter(along), "stream/classes", classes).tolist()


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """What each step of an epoch reads: {"train", "label": int64 [S, batch]}, and "pixels" where they are permuted."""
    plan, device = schedule(program), arrays["train_images"].device
    index, label = _of_task(program, seed, plan.task_of(epoch), program.train)
    shuffle = draws.permutation(draws.counter(seed), draws.counter(epoch), "stream/order", len(index))
    taken = shuffle[: plan.steps_per_epoch * program.batch]
    rows = {
        "train": index[taken].reshape(plan.steps_per_epoch, program.batch),
        "label": label[taken].reshape(plan.steps_per_epoch, program.batch),
    }
    return _with_pixels(program, seed, plan.task_of(epoch), rows, device)


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """The task's test images in batches: {"test", "label": int64 [T, n]}, the last batch padded with -1."""
    device, task = arrays["test_images"].device, schedule(program).task_of(epoch)
    index, label = _of_task(program, seed, task, program.test)
    size = min(TEST_BATCH, len(index))
    missing = -len(index) % size
    rows = {
        "test": torch.cat([index, index.new_full((missing,), -1)]).reshape(-1, size),
        "label": torch.cat([label, label.new_zeros(missing)]).reshape(-1, size),
    }
    return _with_pixels(program, seed, task, rows, device)


def batch(program: Program, arrays: Arrays, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One batch: images [batch, side, side, channels] in the program's dtype, labels, and which rows are real."""
    part = "train" if "train" in row else "test"
    index = row[part]
    stored = arrays[f"{part}_images"][index.clamp(min=0)]
    images = stored.to(dtype_of(program))
    if not stored.dtype.is_floating_point:
        images = images / program.set.scale
    if "pixels" in row:
        flat = images.reshape(images.shape[0], -1, images.shape[-1])
        images = flat[:, row["pixels"]].reshape(images.shape)
    return {"images": images, "labels": row["label"], "real": index >= 0}


@functools.lru_cache(maxsize=1024)  # asked for at every epoch of the task
def _of_task(program: Program, seed: int, task: int, kept: int) -> tuple[Tensor, Tensor]:
    """Rows of a task's images in an array of `kept` images a class, and their labels, class after class."""
    classes = torch.tensor(task_classes(program, seed, task))
    index = (classes[:, None] * kept + torch.arange(kept)).reshape(-1)
    return index, torch.arange(len(classes)).repeat_interleave(kept)


def _with_pixels(
    program: Program, seed: int, task: int, rows: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    if program.permuted:
        pixels = draws.permutation(
            draws.counter(seed), draws.counter(task), "stream/pixels", program.set.side * program.set.side
        )
        rows["pixels"] = pixels.expand(len(rows["label"]), -1)
    return {name: values.to(device) for name, values in rows.items()}
