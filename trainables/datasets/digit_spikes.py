"""The bundled 8x8 digits as spikes: a column at a time, brighter pixels spike earlier and on more units.

Encoder: pixel (row r, column j) of brightness I (0..16) belongs to the eight units 8 r + k, k = 0..7. Unit 8 r + k
spikes once in the 40 ms of column j if I > 2 k, at 40 j + 36 (1 - I / 16) ms. So a digit is up to 320 ms of 64 units:
which units says how bright, when says both where and how bright.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainables.datasets.digits import load_digits
from trainables.datasets.spikes import Events

COLUMN_MS, LATENCY_MS, LEVELS = 40.0, 36.0, 8


def encode_digit(image: np.ndarray) -> Events:
    """One image [8, 8] of 0..16 as events in order of time: (seconds float32, units uint16)."""
    rows, columns = image.shape
    bright = image.astype(np.float64)
    level = np.arange(LEVELS)
    spikes = bright[:, :, None] > 2 * level
    time = COLUMN_MS * np.arange(columns)[None, :, None] + LATENCY_MS * (1 - bright[:, :, None] / 16)
    unit = LEVELS * np.arange(rows)[:, None, None] + level
    times = np.broadcast_to(time, spikes.shape)[spikes]
    units = np.broadcast_to(unit, spikes.shape)[spikes]
    order = np.lexsort((units, times))
    return (times[order] / 1000).astype(np.float32), units[order].astype(np.uint16)


def load_digit_events(cache_dir: Path | None = None) -> tuple[list[Events], np.ndarray, np.ndarray]:
    """Events, labels int64 and part int64 of all 1,797 digits: every fifth in published order is a test digit (360)."""
    bundle = load_digits(cache_dir)
    events = [encode_digit(image) for image in bundle["images"]]
    part = (np.arange(len(events)) % 5 == 0).astype(np.int64)
    return events, bundle["labels"].astype(np.int64), part
