"""The Free Spoken Digit Dataset (3,000 clips at 8 kHz, 6 speakers, 10 digits, CC BY-SA 4.0) as 700-channel spikes.

`recordings.npz` holds `audio` int16 (all clips end to end), `length`, `label`, `speaker`, `index` (one a clip) and
`speakers` (names). The encoder stands in for SHD's cochlea model (Cramer et al. 2022), in the same layout:

1. the clip, scaled to a peak of 1; power spectrum of 32 ms Hann windows every 2 ms, zero-padded to 1,024 points;
2. 700 triangular filters, even on the mel scale from 60 to 3,900 Hz, each of unit sum; each channel in dB;
3. drive = (dB - (loudest channel and time of the clip - 45)) / 45, cut to 0..1;
4. a non-leaky integrate-and-fire unit a channel, at most 150 spikes/s: phase += 150 * drive * 2 ms, a spike whenever
   the phase passes a whole number, starting from the fractional part of 0.618... * channel so that neighbours do not
   fire together.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from trainables.datasets.cache import find_files, note_read
from trainables.datasets.spikes import Events, write_events
from trainables.family import BadValue

RATE, CHANNELS = 8000, 700
HOP, WINDOW, POINTS = 16, 256, 1024
LOW_HZ, HIGH_HZ = 60.0, 3900.0
RANGE_DB, MAX_RATE = 45.0, 150.0
TEST_RECORDINGS = 5
FIELDS = ("audio", "length", "label", "speaker", "index", "speakers")


def mel(hertz: np.ndarray | float) -> np.ndarray | float:
    return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)


def filters() -> np.ndarray:
    """Triangles over the spectrum's bins, each of unit sum, float64 [700, 513]."""
    edges = 700.0 * (10 ** (np.linspace(mel(LOW_HZ), mel(HIGH_HZ), CHANNELS + 2) / 2595.0) - 1)
    bins = np.fft.rfftfreq(POINTS, 1 / RATE)
    # no triangle narrower than a bin: low ones would miss every bin
    half = np.maximum(np.diff(edges), bins[1])
    rising = 1 - (edges[1:-1, None] - bins) / half[:-1, None]
    falling = 1 - (bins - edges[1:-1, None]) / half[1:, None]
    bank = np.clip(np.minimum(rising, falling), 0, None)
    return bank / bank.sum(1, keepdims=True)


def encode_clip(audio: np.ndarray, bank: np.ndarray) -> Events:
    """One clip (int16 at 8 kHz) as events in order of time: (seconds float32, units uint16)."""
    signal = audio.astype(np.float64)
    signal = np.pad(signal / max(np.abs(signal).max(), 1.0), WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW), POINTS)) ** 2
    loudness = 10 * np.log10(power @ bank.T + 1e-10)
    drive = np.clip((loudness - loudness.max() + RANGE_DB) / RANGE_DB, 0, 1)
    start = np.modf(0.6180339887498949 * np.arange(CHANNELS))[0]
    phase = start + np.cumsum(MAX_RATE * HOP / RATE * drive, axis=0)
    fired = np.floor(phase) > np.floor(np.vstack([start[None], phase[:-1]]))
    step, unit = np.nonzero(fired)  # at most MAX_RATE * HOP / RATE < 1 spike a step and unit
    return (step * HOP / RATE).astype(np.float32), unit.astype(np.uint16)


def fsdd_files(data_dir: Path | None, cache_dir: Path, holdout: str) -> list[Path]:
    """`fsdd_train.h5` and `fsdd_test.h5` in SHD's layout, encoded once.

    Args:
        holdout: "recording": recordings 0-4 of each speaker and digit are the test set (the data set's own rule);
            "speaker": the last speaker is.
    """
    (source,) = find_files(data_dir, "fsdd", ["recordings.npz"], "FSDD (recordings.npz)")
    note_read([source])
    stat = source.stat()
    folder = cache_dir / f"fsdd-{holdout}-{stat.st_size}-{stat.st_mtime_ns}"
    paths = [folder / "fsdd_train.h5", folder / "fsdd_test.h5"]
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            half_made = Path(scratch) / "made"
            half_made.mkdir()
            encode_recordings(source, half_made, holdout)
            try:
                os.rename(half_made, folder)
            except OSError:
                if not folder.is_dir():  # not lost to another process: a real failure
                    raise
    return paths


def _columns(source: Path) -> dict[str, np.ndarray]:
    try:
        bundle = np.load(source, allow_pickle=False)
        if not isinstance(bundle, np.lib.npyio.NpzFile):
            raise ValueError("one array")
        with bundle:
            missing = [name for name in FIELDS if name not in bundle]
            if missing:
                raise BadValue(f"{source} lacks {', '.join(missing)}: it should hold {', '.join(FIELDS)}")
            return {name: bundle[name] for name in FIELDS}
    except BadValue:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadValue(f"{source} is truncated or not a .npz file ({type(error).__name__}): fetch it again") from error


def encode_recordings(source: Path, folder: Path, holdout: str) -> None:
    """Write `fsdd_train.h5` and `fsdd_test.h5` into `folder`."""
    columns = _columns(source)
    ends = np.cumsum(columns["length"].astype(np.int64))
    if len(ends) == 0 or ends[-1] != len(columns["audio"]):
        raise BadValue(f"{source}: the lengths do not add up to the audio's {len(columns['audio'])} samples")
    if holdout == "speaker":
        test = columns["speaker"] == columns["speaker"].max()
    else:
        test = columns["index"] < TEST_RECORDINGS
    bank = filters()
    for name, chosen in (("train", ~test), ("test", test)):
        clips = np.flatnonzero(chosen)
        events = (encode_clip(columns["audio"][ends[i] - columns["length"][i] : ends[i]], bank) for i in clips)
        extra = {
            "speaker": columns["speaker"][clips],
            "recording": columns["index"][clips],
            "meta_info_speakers": np.array([str(s).encode() for s in columns["speakers"]]),
        }
        write_events(folder / f"fsdd_{name}.h5", events, columns["label"][clips], extra)
