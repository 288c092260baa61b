"""Arrays, splits and batches.

A set without a validation split of its own gives up part of its training set, the same part for every run: balanced
over classes, chosen by a fixed hash. The test set is read after the last epoch only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables import draws
from trainables.datasets.digit_spikes import load_digit_events
from trainables.datasets.fsdd import fsdd_files
from trainables.datasets.gsc import load_gsc
from trainables.datasets.spikes import load_event_files, shd_files, ssc_files, stack_frames
from trainables.family import Arrays, BadValue, dtype_of
from trainables.snn_delays.program import SETS, Program, split_sizes


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """`x` [samples, frames, inputs] (event counts uint8, or decibels float16), `length`, `label` and the three splits'
    sample numbers: `train`, `valid`, `test`."""
    found = _decode(program, data_dir, cache_dir)
    part, label = np.asarray(found["part"]), np.asarray(found["label"])
    train, own_valid, test = (np.flatnonzero(part == i) for i in range(3))
    if not SETS[program.data][1]:
        own_valid, test = np.zeros(0, np.int64), own_valid
    published = SETS[program.data][:3]
    sizes = (len(train), len(own_valid), len(test))
    if sizes != published and not program.train_examples:
        raise BadValue(
            f"{program.data} has {'/'.join(map(str, sizes))} training/validation/test samples here, the published set "
            f"{'/'.join(map(str, published))}: set train_examples to train on a part of it"
        )
    train, valid = choose_splits(program, train, own_valid, test, label)
    return {
        "x": found["x"],
        "length": found["length"],
        "label": found["label"],
        "train": train,
        "valid": valid,
        "test": test,
    }


def _decode(program: Program, data_dir: Path | None, cache_dir: Path) -> Mapping[str, np.ndarray]:
    channels, classes = SETS[program.data][4], SETS[program.data][3]
    if program.data == "digits":
        events, label, part = load_digit_events(cache_dir)
        frames = stack_frames(events, program.dt_ms, channels, program.bins, program.max_ms, "digits")
        return {**frames, "label": label, "part": part}
    if program.data == "gsc":
        return load_gsc(data_dir, cache_dir, bins=program.bins, window=program.window, dt_ms=program.dt_ms)
    if program.data == "shd":
        files = shd_files(data_dir, cache_dir)
    elif program.data == "ssc":
        files = ssc_files(data_dir)
    else:
        files = fsdd_files(data_dir, cache_dir, "speaker" if program.data == "fsdd_speaker" else "recording")
    return load_event_files(
        cache_dir,
        program.data,
        files,
        dt_ms=program.dt_ms,
        bins=program.bins,
        max_ms=program.max_ms,
        channels=channels,
        classes=classes,
    )


def choose_splits(
    program: Program, train: np.ndarray, own_valid: np.ndarray, test: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers to train on and to select on."""
    count, held = split_sizes(program)
    ranked = train[_spread_over_classes(label[train])]
    if program.selection == "test":
        valid = test
    elif len(own_valid):
        valid = own_valid
    else:
        held = min(held, int(len(train) * program.valid_fraction))
        valid, ranked = ranked[:held], ranked[held:]
    if len(ranked) < count:
        raise BadValue(
            f"train_examples = {count}, but {program.data} leaves {len(ranked)} training samples here: take fewer"
        )
    return np.sort(ranked[:count]), np.sort(valid)


def _spread_over_classes(label: np.ndarray) -> np.ndarray:
    """An order of the samples whose every beginning is balanced over classes; a fixed hash decides within a class."""
    zero = draws.counter(0)
    shuffled = draws.permutation(zero, zero, "snn_delays/splits", len(label)).numpy()
    share = np.empty(len(label))
    for value in np.unique(label):
        members = shuffled[label[shuffled] == value]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(share, kind="stable")


# --- batches ----------------------------------------------------------------------------------------------------------


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """A fresh permutation of the training samples each epoch, [steps, batch]; the last row is filled up with -1."""
    samples = arrays["train"]
    shuffled = draws.permutation(
        draws.counter(seed, samples.device), draws.counter(epoch, samples.device), "order", len(samples)
    )
    return {"index": _rows(samples[shuffled], program.batch)}


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, dict[str, Tensor]]:
    """{"valid": the validation samples}; after the last epoch the test samples beside them, as "test"."""
    sets = {"valid": arrays["valid"]}
    if epoch + 1 == program.epochs and program.selection != "test":
        sets["test"] = arrays["test"]
    return {name: {"index": _rows(samples, program.batch)} for name, samples in sets.items()}


def _rows(samples: Tensor, size: int) -> Tensor:
    filler = torch.full((-len(samples) % size,), -1, dtype=samples.dtype, device=samples.device)
    return torch.cat([samples, filler]).reshape(-1, size)


def batch(program: Program, arrays: Arrays, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """{frames [B, T, F], length, label, real [B]}."""
    index = row["index"]
    known = index.clamp(min=0)
    return {
        "frames": arrays["x"][known].to(dtype_of(program)),
        "length": arrays["length"][known],
        "label": arrays["label"][known],
        "real": index >= 0,
    }
