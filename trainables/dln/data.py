"""Windows of text and images: what is loaded, which of it each step reads, and the fixed held-out set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables import draws
from trainables.datasets.digits import load_digits
from trainables.datasets.text import load_text
from trainables.dln.program import Program
from trainables.family import Arrays, BadValue, dtype_of

_DRAWN = 1 << 23  # as many values as one uniform draw tells apart
_FINE = 4096


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """Text: "train", "held_out" (uint8 ids), "vocab", and "starts" of windows behind breaks. Images: "train",
    "held_out" uint8 [n, pixels]. Raises `BadValue`."""
    return (
        _load_images(program, data_dir, cache_dir)
        if program.task == "reconstruct"
        else _load_text(program, data_dir, cache_dir)
    )


def _load_text(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    text = load_text(program.data, data_dir, cache_dir, lower=program.lower)
    arrays = {"train": text["train"], "held_out": text["valid"], "vocab": text["vocab"]}
    needed = window_tokens(program) + (program.fixed_windows - 1 if program.windows == "fixed" else 0) * _stride(
        program
    )
    for part, least in (("train", needed), ("held_out", window_tokens(program))):
        if len(arrays[part]) < least:
            raise BadValue(
                f"data '{program.data}' has {len(arrays[part])} {part} tokens, fewer than the {least} that windows of "
                f"length {program.length} need: give a longer text or a smaller length"
            )
    if program.windows == "breaks":
        newline = int(np.flatnonzero(text["vocab"] == 10)[0])
        blank = (text["train"][:-1] == newline) & (text["train"][1:] == newline)
        starts = np.flatnonzero(blank) + 2
        starts = starts[starts <= len(text["train"]) - window_tokens(program)]
        if not len(starts):
            raise BadValue(f"data '{program.data}' has no blank line to start a window behind: set windows=random")
        arrays["starts"] = starts.astype(np.int64)
    return arrays


def _load_images(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    if program.data == "mnist":
        from trainables.datasets.mnist import load_mnist

        sets = load_mnist(data_dir, cache_dir)
        train, labels, held_out = sets["train_images"], sets["train_labels"], sets["test_images"]
    else:
        bundle = load_digits(cache_dir)
        cut = len(bundle["images"]) * 4 // 5
        train, labels, held_out = bundle["images"][:cut], bundle["labels"][:cut], bundle["images"][cut:]
    if program.without_digit >= 0:
        train = train[labels != program.without_digit]
    return {"train": train.reshape(len(train), -1), "held_out": held_out.reshape(len(held_out), -1)}


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """Starts of training windows, or image numbers, [S, B]: drawn with replacement, as in all of the originals."""
    device = arrays["train"].device
    shape = (program.steps_per_epoch, program.batch)
    key = draws.counter(seed, device), draws.counter(epoch, device)
    if program.task == "reconstruct":
        return {"train": draws.integers(*key, "order", len(arrays["train"]), shape)}
    if program.windows == "breaks":
        return {"train": arrays["starts"][draws.integers(*key, "order", len(arrays["starts"]), shape)]}
    if program.windows == "fixed":
        return {"train": _stride(program) * draws.integers(*key, "order", program.fixed_windows, shape)}
    places = len(arrays["train"]) - window_tokens(program) + 1
    if places <= _DRAWN:
        return {"train": draws.integers(*key, "order", places, shape)}
    coarse = draws.integers(*key, "order", places // _FINE, shape)  # the last part block is left out: < 1 in 2,000
    return {"train": coarse * _FINE + draws.integers(*key, "order/fine", _FINE, shape)}


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """The same held-out windows (end to end, or `eval_windows` of those, spread evenly) or images each time."""
    held_out = arrays["held_out"]
    if program.task == "reconstruct":
        places = torch.arange(len(held_out), device=held_out.device)
        chosen = places[: program.eval_windows] if program.eval_windows else places
    else:
        windows = (len(held_out) - window_tokens(program)) // _stride(program) + 1
        places = torch.arange(windows, device=held_out.device) * _stride(program)
        chosen = places
        if 0 < program.eval_windows < windows:
            spread = torch.arange(program.eval_windows, device=held_out.device) * windows // program.eval_windows
            chosen = places[spread]
    size = min(program.eval_batch, len(chosen))
    padding = torch.full((-len(chosen) % size,), -1, device=held_out.device)
    return {"held_out": torch.cat([chosen, padding]).reshape(-1, size)}


def batch(program: Program, arrays: Arrays, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step's windows: "tokens" int64 [B, (length + 1) * bytes_per_step] and "vocab"; or "images" [B, pixels] in
    [0, 1]. "real" marks what is not padding."""
    part = "held_out" if "held_out" in row else "train"
    places = row[part]
    start = places.clamp(min=0)
    if program.task == "reconstruct":
        brightest = 16 if program.data == "digits" else 255
        return {"images": arrays[part][start].to(dtype_of(program)) / brightest, "real": places >= 0}
    offsets = torch.arange(window_tokens(program), device=start.device)
    tokens = arrays[part][start[:, None] + offsets].to(torch.int64)
    return {"tokens": tokens, "vocab": arrays["vocab"], "real": places >= 0}


def window_tokens(program: Program) -> int:
    """Tokens that a window reads: its inputs, and the step after its last."""
    return (program.length + 1) * _group(program)


def _stride(program: Program) -> int:
    return program.length * _group(program)


def _group(program: Program) -> int:
    return program.bytes_per_step if program.task == "tdln" else 1
