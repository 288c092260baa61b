"""Google Speech Commands v2 (Warden 2018), 35 words: folders of one-second wav files -> log-mel frames.

As github.com/Thvnvtos/CSNN-1D-Delays (data.py): pad or cut to 1 s at 16 kHz, down to 8 kHz, power spectrum (periodic
Hann window, reflected edges), mel filters (HTK scale, 0 to 4,000 Hz, triangles of height 1), 10 log10. The split is the
set's own `validation_list.txt` and `testing_list.txt`; only files with `_nohash_` in their name count, as in
torchaudio.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, find_files
from trainables.family import BadValue

RATE = 16000
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on
LISTS = ("validation_list.txt", "testing_list.txt")


def mel_filters(count: int, points: int, rate: int = RATE // 2) -> np.ndarray:
    """torchaudio's `melscale_fbanks(norm=None, mel_scale="htk")`, float64 [count, points // 2 + 1]."""
    frequencies = np.linspace(0, rate // 2, points // 2 + 1)
    top = 2595.0 * np.log10(1.0 + (rate / 2) / 700.0)
    edges = 700.0 * (10 ** (np.linspace(0.0, top, count + 2) / 2595.0) - 1)
    slopes = edges[:, None] - frequencies
    width = np.diff(edges)
    return np.clip(np.minimum(-slopes[:-2] / width[:-1, None], slopes[2:] / width[1:, None]), 0, None)


def log_mel(audio: np.ndarray, mels: np.ndarray, window: int, hop: int) -> np.ndarray:
    """One clip (float, 16 kHz) -> decibels, float64 [frames, mels]; 1 s gives 8000 // hop + 1 frames."""
    from scipy.signal import get_window, resample_poly

    clip = np.zeros(RATE)
    clip[: min(len(audio), RATE)] = audio[:RATE]
    low = np.pad(resample_poly(clip, 1, 2), window // 2, mode="reflect")
    pieces = np.lib.stride_tricks.sliding_window_view(low, window)[::hop]
    power = np.abs(np.fft.rfft(pieces * get_window("hann", window))) ** 2
    return 10 * np.log10(np.maximum(power @ mels.T, 1e-10))


def read_wav(path: Path) -> np.ndarray:
    """Mono audio in -1..1 at 16 kHz; `BadValue` names a file that is something else."""
    from scipy.io import wavfile

    try:
        rate, audio = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise BadValue(f"{path} is not a readable wav file: {error}") from error
    if rate != RATE or audio.ndim != 1:
        raise BadValue(f"{path} should be mono at {RATE} Hz; it has {rate} Hz and shape {audio.shape}")
    return audio / 32768.0 if audio.dtype == np.int16 else audio.astype(np.float64)


def load_gsc(data_dir: Path | None, cache_dir: Path, *, bins: int, window: int, dt_ms: float) -> dict[str, np.ndarray]:
    """All clips, decoded once.

    Returns:
        `x` float16 [clips, frames, 700 // bins] in dB, `length` int32, `label` int64, `part` int64 (0 training,
        1 validation, 2 test).
    """
    what = "Google Speech Commands v2 (speech_commands_v0.02.tar.gz, unpacked)"
    lists = find_files(data_dir, "gsc", LISTS, what)
    root = lists[0].parent

    def build() -> dict[str, np.ndarray]:
        held = [set(path.read_text().split()) for path in lists]
        names = [
            f"{word}/{path.name}"
            for word in WORDS
            for path in sorted((root / word).glob("*.wav"))
            if "_nohash_" in path.name
        ]
        if not names:
            raise BadValue(f"{root} has no folder of wav files for any of the 35 words")
        filters = mel_filters(700 // bins, window)
        hop = round(dt_ms * RATE / 2 / 1000)
        x = np.stack([log_mel(read_wav(root / name), filters, window, hop).astype(np.float16) for name in names])
        part = [1 if name in held[0] else 2 if name in held[1] else 0 for name in names]
        return {
            "x": x,
            "length": np.full(len(names), x.shape[1], np.int32),
            "label": np.array([WORDS.index(name.split("/")[0]) for name in names], np.int64),
            "part": np.array(part, np.int64),
        }

    return cached(cache_dir, f"gsc-dt{dt_ms:g}-bins{bins}-window{window}", lists, build)
