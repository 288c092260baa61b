"""Images and text for the multi-neuron nets: what is loaded, in which order it is read, and how a batch looks.

Arrays are `train*` and `held_out*`; a row that holds "held_out" reads the latter. Index -1 pads a short last batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables import draws
from trainables.datasets.digits import load_digits
from trainables.datasets.mnist import load_mnist
from trainables.family import Arrays, BadValue, dtype_of
from trainables.multi_neuron.program import Program, schedule
from trainables.multi_neuron.sets import IMAGE_SETS

# --- loading --------------------------------------------------------------------------------------------------------


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """uint8 arrays: train_images [n, side, side], train_labels [n] and the same of held_out; or token ids
    train [n], held_out [m]."""
    if program.model == "transformer":
        return _load_text(program, data_dir, cache_dir)
    images = IMAGE_SETS[program.data]
    if program.data == "digits":
        digits = load_digits(cache_dir)
        cut = sum(images.train)
        parts = {
            "train_images": digits["images"][:cut],
            "train_labels": digits["labels"][:cut],
            "test_images": digits["images"][cut:],
            "test_labels": digits["labels"][cut:],
        }
    else:
        parts = load_mnist(data_dir, cache_dir)
    if program.evaluate_on == "test":
        held_out = {"held_out_images": parts["test_images"], "held_out_labels": parts["test_labels"]}
        end = sum(images.train)
    else:
        end = sum(images.train) - sum(images.valid)
        held_out = {"held_out_images": parts["train_images"][end:], "held_out_labels": parts["train_labels"][end:]}
    end = program.examples or end
    return {"train_images": parts["train_images"][:end], "train_labels": parts["train_labels"][:end], **held_out}


def _load_text(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    from trainables.datasets.text import load_text  # only where text is asked for

    text = load_text(program.data, data_dir, cache_dir)
    if program.evaluate_on not in text:
        raise BadValue(f"the text {program.data} has no {program.evaluate_on} part: use evaluate_on=valid")
    parts = {"train": text["train"], "held_out": text[program.evaluate_on]}
    for name, part in parts.items():
        if len(part) <= program.sequence:
            raise BadValue(
                f"the {name} part of text {program.data} has {len(part)} bytes, too few for one window of "
                f"sequence = {program.sequence} and its next byte: make sequence smaller"
            )
    return parts


# --- order ----------------------------------------------------------------------------------------------------------


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """What the steps of one epoch read: {"index": int64 [S, batch]} of images, or of starts of windows.

    Images come in a fresh permutation each epoch (repeated with new ones where an epoch is longer), text in windows at
    random places. Epochs of training are numbered over all tasks without the Fisher epochs, so that EWC changes no
    order.
    """
    plan = schedule(program)
    steps, need = plan.steps_per_epoch, plan.steps_per_epoch * program.batch
    if program.model == "transformer":
        device = arrays["train"].device
        places = arrays["train"].shape[0] - program.sequence
        start = draws.integers(
            draws.counter(seed, device), draws.counter(epoch, device), "windows", places, (steps, program.batch)
        )
        return {"index": start}
    task, within = divmod(epoch, plan.epochs_per_task)
    labels = arrays["train_labels"]
    pool = _task_pool(program, labels, task)
    purpose, number = ("order", task * program.epochs + within) if within < program.epochs else ("fisher", task)
    if program.tasks == 1 and not program.epoch_steps:
        return {"index": _padded(pool[_permutation(pool, seed, number, purpose)], steps, program.batch)}
    passes = [
        pool[_permutation(pool, seed, number, f"{purpose}/{k}")] for k in range(-(-need // max(1, pool.shape[0])))
    ]
    return {"index": torch.cat(passes)[:need].reshape(steps, program.batch)}


def _task_pool(program: Program, labels: Tensor, task: int) -> Tensor:
    """Indices of the images that a task trains on."""
    if program.tasks == 1:
        return torch.arange(labels.shape[0], device=labels.device)
    width = 10 // program.tasks
    low = 0 if program.union else task * width
    return ((labels >= low) & (labels < (task + 1) * width)).nonzero().squeeze(1)


def _permutation(pool: Tensor, seed: int, number: int, purpose: str) -> Tensor:
    return draws.permutation(
        draws.counter(seed, pool.device), draws.counter(number, pool.device), purpose, pool.shape[0]
    )


def _padded(index: Tensor, rows: int, width: int) -> Tensor:
    missing = rows * width - index.shape[0]
    return torch.cat([index, index.new_full((missing,), -1)]).reshape(rows, width)


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """The same for every lane and epoch: {"held_out": int64 [T, eval_batch]}, all images, or evenly spaced windows."""
    if program.model == "transformer":
        held_out = arrays["held_out"]
        most = (held_out.shape[0] - 1) // program.sequence
        windows = min(program.eval_windows or most, most)
        number = torch.arange(windows, device=held_out.device)
        index = torch.div(number * most, windows, rounding_mode="floor") * program.sequence
    else:
        labels = arrays["held_out_labels"]
        index = torch.arange(labels.shape[0], device=labels.device)
    width = min(program.eval_batch, index.shape[0])
    return {"held_out": _padded(index, -(-index.shape[0] // width), width)}


# --- batches --------------------------------------------------------------------------------------------------------


def batch(program: Program, arrays: Arrays, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step's examples.

    Returns:
        x: images [B, side, side], normalised, in the program's dtype; or token ids int64 [B, sequence].
        y: int64 labels [B], or the next token ids [B, sequence]. real: bool [B], False where padded.
    """
    source, index = ("held_out", row["held_out"]) if "held_out" in row else ("train", row["index"])
    real, index = index >= 0, index.clamp(min=0)
    if program.model == "transformer":
        offsets = torch.arange(program.sequence + 1, device=index.device)
        window = arrays[source][index.unsqueeze(-1) + offsets].to(torch.int64)
        return {"x": window[..., :-1], "y": window[..., 1:], "real": real}
    images = IMAGE_SETS[program.data]
    pixels = arrays[f"{source}_images"][index].to(dtype_of(program)) / images.white
    return {
        "x": (pixels - images.mean) / images.std,
        "y": arrays[f"{source}_labels"][index].to(torch.int64),
        "real": real,
    }
