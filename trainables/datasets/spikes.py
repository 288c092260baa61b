"""Spike events in the layout of the Spiking Heidelberg Digits, and the frames that nets read.

One HDF5 file a split (Cramer et al. 2022, zenkelab.org/datasets): `spikes/times` (seconds, one variable-length array a
sample), `spikes/units` (channel of each event), `labels`. Events become frames as spikingjelly's
`_integrate_events_by_fixed_duration` does it: time from the sample's first event in ms, ceil(last / dt) frames, COUNTS
of events, the last frame taking what is left; then `bins` neighbouring channels are summed (a remainder is dropped).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, fetch, find_files
from trainables.family import BadValue

SHD_URL = "https://zenkelab.org/datasets/"
SHD_FILES = {
    "shd_train.h5": "md5:f3252aeb598ac776c1b526422d90eecb",
    "shd_test.h5": "md5:1503a5064faa34311c398fb0a1ed0a6f",
}
"""Checksums of the published .zip files."""
SSC_FILES = ("ssc_train.h5", "ssc_valid.h5", "ssc_test.h5")

Events = tuple[np.ndarray, np.ndarray]
"""(times in seconds, units) of one sample, in order of time."""


def frames_of(times: np.ndarray, units: np.ndarray, dt_ms: float, channels: int, bins: int) -> np.ndarray:
    """Counts of one sample, int64 [frames, channels // bins]. `times` keep their own dtype, as in the original."""
    if not len(times):
        return np.zeros((1, channels // bins), np.int64)
    elapsed = 1000 * times
    elapsed = elapsed - elapsed[0]
    count = max(math.ceil(elapsed[-1] / dt_ms), 1)
    frame = np.clip((elapsed // dt_ms).astype(np.int64), 0, count - 1)
    inputs = channels // bins
    unit = units.astype(np.int64) // bins
    kept = unit < inputs
    flat = np.bincount(frame[kept] * inputs + unit[kept], minlength=count * inputs)
    return flat.reshape(count, inputs)


def stack_frames(
    samples: Sequence[Events], dt_ms: float, channels: int, bins: int, max_ms: float, where: str
) -> dict[str, np.ndarray]:
    """All samples zero-padded to the longest.

    Returns:
        `x` uint8 [samples, frames, channels // bins] and `length` int32 [samples], each sample's own frames.
    """
    limit = math.ceil(max_ms / dt_ms) if max_ms else None
    counts = [frames_of(times, units, dt_ms, channels, bins)[:limit] for times, units in samples]
    length = np.array([len(count) for count in counts], np.int32)
    x = np.zeros((len(counts), int(length.max()), channels // bins), np.uint8)
    for i, count in enumerate(counts):
        if count.size and count.max() > 255:
            raise BadValue(
                f"{where}: sample {i} has {count.max()} events in one frame, above 255: take a smaller dt_ms"
            )
        x[i, : len(count)] = count
    return {"x": x, "length": length}


def read_events(path: Path, channels: int, classes: int) -> tuple[list[Events], np.ndarray]:
    """Samples and labels (int64) of one file; `BadValue` says what in it is malformed."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            times, units = file["spikes/times"][:], file["spikes/units"][:]
            labels = np.asarray(file["labels"][:]).astype(np.int64)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise BadValue(
            f"{path} is not an SHD-layout HDF5 file (spikes/times, spikes/units, labels): {error}"
        ) from error
    if not len(times) == len(units) == len(labels):
        raise BadValue(f"{path} has {len(times)} time, {len(units)} unit and {len(labels)} label entries: not one set")
    for i, (time, unit) in enumerate(zip(times, units, strict=True)):
        if len(time) != len(unit):
            raise BadValue(f"{path}: sample {i} has {len(time)} times but {len(unit)} units")
        if len(unit) and int(unit.max()) >= channels:
            raise BadValue(f"{path}: sample {i} has unit {int(unit.max())}, but there are {channels} channels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise BadValue(f"{path} has label {labels.max()}, but there are {classes} classes")
    return list(zip(times, units, strict=True)), labels


def write_events(
    path: Path, samples: Iterable[Events], labels: np.ndarray, extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write samples in SHD's layout: float16 seconds, uint16 units, uint16 labels, further columns under `extra/`."""
    import h5py

    samples = list(samples)
    with h5py.File(path, "w") as file:
        group = file.create_group("spikes")
        for name, column, dtype in (("times", 0, np.float16), ("units", 1, np.uint16)):
            data = group.create_dataset(name, (len(samples),), dtype=h5py.vlen_dtype(dtype))
            for i, sample in enumerate(samples):
                data[i] = sample[column].astype(dtype)
        file.create_dataset("labels", data=np.asarray(labels, np.uint16))
        for name, values in (extra or {}).items():
            file.create_dataset(f"extra/{name}", data=values)


def load_event_files(
    cache_dir: Path,
    name: str,
    files: Sequence[Path],
    *,
    dt_ms: float,
    bins: int,
    max_ms: float,
    channels: int,
    classes: int,
) -> dict[str, np.ndarray]:
    """Frames of several splits, one after another, decoded once.

    Returns:
        `x` uint8 [samples, frames, channels // bins], `length` int32, `label` int64, `part` int64 (number of the file).
    """

    def build() -> dict[str, np.ndarray]:
        samples, labels, part = [], [], []
        for number, path in enumerate(files):
            events, label = read_events(path, channels, classes)
            samples += events
            labels.append(label)
            part.append(np.full(len(label), number, np.int64))
        arrays = stack_frames(samples, dt_ms, channels, bins, max_ms, str(files[0].parent))
        return {**arrays, "label": np.concatenate(labels), "part": np.concatenate(part)}

    return cached(cache_dir, f"{name}-dt{dt_ms:g}-bins{bins}-max{max_ms:g}", files, build)


def shd_files(data_dir: Path | None, cache_dir: Path) -> list[Path]:
    """The two files of SHD, from `data_dir`/shd or `data_dir`, or downloaded."""
    if data_dir is not None:
        return find_files(data_dir, "shd", list(SHD_FILES), "SHD")
    folder = cache_dir / "downloads" / "shd"
    for name, checksum in SHD_FILES.items():
        if not (folder / name).is_file():
            archive = fetch(cache_dir, f"{SHD_URL}{name}.zip", checksum, "SHD")
            with zipfile.ZipFile(archive) as opened:
                opened.extract(name, folder)
    return [folder / name for name in SHD_FILES]


def ssc_files(data_dir: Path | None) -> list[Path]:
    """The three files of the Spiking Speech Commands, from `data_dir`/ssc or `data_dir`."""
    return find_files(data_dir, "ssc", SSC_FILES, "SSC (zenkelab.org/datasets, ssc_train/valid/test.h5)")
