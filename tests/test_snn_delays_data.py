"""Event files, audio and their encoders, on small files that the tests write in the sets' own formats."""

from __future__ import annotations

import dataclasses
import math

import h5py
import numpy as np
import pytest
from scipy.io import wavfile
from scipy.signal import resample_poly

from lanes.engine import put
from trainables.datasets import fsdd, gsc
from trainables.datasets.digit_spikes import encode_digit
from trainables.datasets.spikes import frames_of, read_events, write_events
from trainables.family import BadValue
from trainables.snn_delays import data
from trainables.snn_delays.data import load, order
from trainables.snn_delays.program import Program, schedule, split_sizes


def random_events(rng, count: int, seconds: float, dtype=np.float32):
    times = np.sort(rng.uniform(0.003, seconds, count)).astype(dtype)
    return times, rng.integers(0, 700, count).astype(np.uint16)


def frames_one_event_at_a_time(times, units, dt):
    """spikingjelly's rule (datasets/shd.py, fixed duration): the last frame takes every event that is left."""
    t = 1000 * times
    t = t - t[0]
    frames = np.zeros((math.ceil(t[-1] / dt), 700))
    for when, unit in zip(t, units, strict=True):
        frames[min(int(when // dt), len(frames) - 1), unit] += 1
    return frames


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dt", [5, 10])
def test_frames_are_spikingjelly_s_fixed_duration_frames(dtype, dt):
    rng = np.random.default_rng(0)
    for _ in range(20):
        times, units = random_events(rng, 400, rng.uniform(0.05, 1.4), dtype)
        units = units % 30 * 23
        expected = frames_one_event_at_a_time(times, units, dt)
        assert expected.max() >= 2  # counts, not flags
        np.testing.assert_array_equal(frames_of(times, units, dt, 700, 1), expected)


@pytest.mark.parametrize("bins", [2, 3, 5])
def test_bins_sum_neighbouring_channels_and_drop_the_remainder(bins):
    times, units = random_events(np.random.default_rng(1), 500, 0.5)
    whole = frames_of(times, units, 10.0, 700, 1)
    expected = np.stack([whole[:, bins * i : bins * (i + 1)].sum(1) for i in range(700 // bins)], axis=1)
    np.testing.assert_array_equal(frames_of(times, units, 10.0, 700, bins), expected)


def write_shd(folder, train=30, test=10):
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        samples = [random_events(rng, 50, rng.uniform(0.2, 0.6)) for _ in range(count)]
        write_events(folder / f"shd_{name}.h5", samples, np.arange(count) % 20)


def test_shd_files_become_padded_frames_and_disjoint_splits(tmp_path):
    write_shd(tmp_path / "data" / "shd")
    program = Program(data="shd", train_examples=20, valid_fraction=0.2)
    arrays = load(program, tmp_path / "data", tmp_path / "cache")
    assert arrays["x"].dtype == np.uint8
    assert arrays["x"].shape == (40, arrays["length"].max(), 700)
    assert (len(arrays["train"]), len(arrays["valid"]), len(arrays["test"])) == (20, 6, 10)
    together = np.concatenate([arrays["train"], arrays["valid"], arrays["test"]])
    assert len(set(together)) == 36
    assert arrays["x"].sum(dtype=np.int64) == 40 * 50
    for i in (0, 17, 39):
        assert arrays["x"][i, arrays["length"][i] :].sum() == 0
    cut = load(dataclasses.replace(program, max_ms=150.0), tmp_path / "data", tmp_path / "cache")
    assert cut["x"].shape[1] == 15
    assert cut["length"].max() == 15


def test_a_set_of_another_size_is_refused_with_the_way_out(tmp_path):
    write_shd(tmp_path / "shd")
    with pytest.raises(BadValue, match=r"30/0/10 .*8156/0/2264: set train_examples"):
        load(Program(data="shd"), tmp_path, tmp_path / "cache")


def test_selecting_on_the_test_set_is_the_original_s_protocol(tmp_path):
    write_shd(tmp_path / "shd")
    arrays = load(Program(data="shd", train_examples=30, selection="test"), tmp_path, tmp_path / "cache")
    np.testing.assert_array_equal(arrays["valid"], arrays["test"])
    assert len(arrays["train"]) == 30


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.__delitem__("labels"), "not an SHD-layout HDF5 file"),
        (lambda f: f["labels"].__setitem__(3, 99), "label 99, but there are 20 classes"),
        (lambda f: f["spikes/units"].__setitem__(1, np.array([700] * 50, np.uint16)), "sample 1 has unit 700"),
        (lambda f: f["spikes/units"].__setitem__(2, np.array([1], np.uint16)), "sample 2 has 50 times but 1 units"),
    ],
)
def test_malformed_event_files_are_named(tmp_path, spoil, message):
    write_shd(tmp_path / "shd")
    path = tmp_path / "shd" / "shd_train.h5"
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(BadValue, match=message) as error:
        read_events(path, 700, 20)
    assert "shd_train.h5" in str(error.value)


def test_schedules_follow_the_published_sizes():
    assert schedule(Program(data="shd", selection="test")).steps_per_epoch == 255
    assert schedule(Program(data="ssc")).steps_per_epoch == 2359
    assert schedule(Program(data="fsdd", selection="test")).steps_per_epoch == 85
    assert schedule(Program(data="fsdd_speaker", selection="test")).steps_per_epoch == 79
    assert split_sizes(Program(data="shd")) == (7341, 815)


def test_validation_split_is_balanced_and_the_same_for_any_training_size(cache_dir):
    full = load(Program(), None, cache_dir)
    part = load(Program(train_examples=200), None, cache_dir)
    np.testing.assert_array_equal(full["valid"], part["valid"])
    assert set(part["train"]) < set(full["train"])
    shares = np.bincount(full["label"][full["valid"]], minlength=10)
    assert shares.min() >= 13
    assert shares.max() <= 16
    assert np.bincount(full["label"][part["train"]]).min() >= 17


def test_an_epoch_visits_every_training_sample_once_and_fills_up_the_last_batch(cache_dir):
    program = Program(train_examples=100, batch=32, epochs=3)
    arrays = put(load(program, None, cache_dir), "cpu")
    first, second = (order(program, arrays, 0, epoch)["index"] for epoch in (0, 1))
    assert first.shape == (4, 32)
    assert (first == -1).sum() == 28
    assert sorted(first[first >= 0].tolist()) == arrays["train"].tolist()
    assert not first.equal(second)
    assert not first.equal(order(program, arrays, 1, 0)["index"])
    rows = [data.test_order(program, arrays, 0, epoch) for epoch in range(3)]
    assert [list(sets) for sets in rows] == [["valid"], ["valid"], ["valid", "test"]]
    last = rows[2]["test"]["index"]
    assert sorted(last[last >= 0].tolist()) == arrays["test"].tolist()


def test_digit_encoder_by_hand():
    image = np.zeros((8, 8), np.uint8)
    image[2, 0], image[5, 3] = 16, 5
    times, units = encode_digit(image)
    bright, dim = units < 24, units >= 40
    assert units[bright].tolist() == [16, 17, 18, 19, 20, 21, 22, 23]
    np.testing.assert_allclose(times[bright], 0.0)
    assert units[dim].tolist() == [40, 41, 42]  # 5 > 0, 2, 4
    np.testing.assert_allclose(times[dim], (3 * 40 + 36 * (1 - 5 / 16)) / 1000, rtol=1e-6)


# --- speech commands --------------------------------------------------------------------------------------------------


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (12000 * np.sin(2 * np.pi * hertz * t)).astype(np.int16)


def test_gsc_folders_become_log_mel_frames_by_the_set_s_own_lists(tmp_path):
    root = tmp_path / "gsc"
    for word, hertz in (("yes", 500.0), ("no", 2000.0)):
        (root / word).mkdir(parents=True)
        for i, seconds in enumerate((1.0, 0.6, 1.0)):
            wavfile.write(root / word / f"a{i}_nohash_0.wav", 16000, tone(hertz, seconds, 16000))
        wavfile.write(root / word / "other.wav", 16000, tone(hertz, 1.0, 16000))
    (root / "validation_list.txt").write_text("yes/a1_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("no/a2_nohash_0.wav\n")
    arrays = load(Program(data="gsc", bins=10, train_examples=4), tmp_path, tmp_path / "cache")
    assert arrays["x"].shape == (6, 101, 70)
    assert (len(arrays["train"]), len(arrays["valid"]), len(arrays["test"])) == (4, 1, 1)
    assert {gsc.WORDS[i] for i in arrays["label"][arrays["valid"]]} == {"yes"}
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 72)[1:-1] / 2595) - 1)
    for i in arrays["train"]:
        hertz = {"yes": 500.0, "no": 2000.0}[gsc.WORDS[arrays["label"][i]]]
        loudest = arrays["x"][i, 30].astype(float).argmax()
        assert abs(loudest - np.abs(centres - hertz).argmin()) <= 1


def test_log_mel_by_plain_sums():
    audio = np.random.default_rng(3).normal(size=16000) * 0.1
    window, hop, frame = 128, 80, 7
    mels = gsc.mel_filters(6, window)
    low = np.pad(resample_poly(audio, 1, 2), window // 2, mode="reflect")[hop * frame : hop * frame + window]
    n = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    power = np.array([abs((low * hann * np.exp(-2j * np.pi * k * n / window)).sum()) ** 2 for k in range(65)])
    np.testing.assert_allclose(gsc.log_mel(audio, mels, window, hop)[frame], 10 * np.log10(mels @ power), rtol=1e-9)


def test_a_wav_file_of_another_rate_is_named(tmp_path):
    wavfile.write(tmp_path / "x.wav", 8000, tone(300.0, 0.1, 8000))
    with pytest.raises(BadValue, match=r"x\.wav should be mono at 16000 Hz; it has 8000 Hz"):
        gsc.read_wav(tmp_path / "x.wav")


# --- spoken digits ----------------------------------------------------------------------------------------------------


def write_recordings(path, speakers=2, digits=3, takes=7):
    clips, columns = [], {"label": [], "speaker": [], "index": []}
    for speaker in range(speakers):
        for digit in range(digits):
            for take in range(takes):
                clips.append(tone(300.0 * (digit + 1), 0.1 + 0.01 * take, 8000))
                for name, value in (("label", digit), ("speaker", speaker), ("index", take)):
                    columns[name].append(value)
    np.savez(
        path,
        audio=np.concatenate(clips),
        length=np.array([len(clip) for clip in clips], np.int32),
        speakers=np.array([f"s{i}" for i in range(speakers)]),
        **{name: np.array(values, np.uint8) for name, values in columns.items()},
    )


def test_spoken_digits_become_an_shd_file_whose_spikes_are_where_the_tone_is(tmp_path):
    (tmp_path / "fsdd").mkdir()
    write_recordings(tmp_path / "fsdd" / "recordings.npz")
    train, test = fsdd.fsdd_files(tmp_path, tmp_path / "cache", "recording")
    events, labels = read_events(train, 700, 10)
    assert len(events) == 2 * 3 * 2  # recordings 5 and 6
    assert len(read_events(test, 700, 10)[1]) == 2 * 3 * 5
    edges = 700 * (10 ** (np.linspace(fsdd.mel(60.0), fsdd.mel(3900.0), 702) / 2595) - 1)
    for (times, units), label in zip(events, labels, strict=True):
        assert np.all(np.diff(times.astype(float)) >= 0)
        middle = edges[1 + int(np.median(units))]
        assert abs(middle - 300.0 * (label + 1)) < 40
        assert np.bincount(units).max() <= 150 * 0.2
    with h5py.File(train) as file:
        assert set(file["extra"]) == {"speaker", "recording", "meta_info_speakers"}
    held = fsdd.fsdd_files(tmp_path, tmp_path / "cache", "speaker")
    with h5py.File(held[1]) as file:
        assert set(file["extra/speaker"][:]) == {1}


def test_recordings_that_do_not_add_up_are_refused(tmp_path):
    (tmp_path / "fsdd").mkdir()
    np.savez(
        tmp_path / "fsdd" / "recordings.npz",
        audio=np.zeros(10, np.int16),
        length=np.array([4, 4]),
        label=np.zeros(2),
        speaker=np.zeros(2),
        index=np.zeros(2),
        speakers=np.array(["a"]),
    )
    with pytest.raises(BadValue, match="do not add up to the audio's 10 samples"):
        fsdd.fsdd_files(tmp_path, tmp_path / "cache", "recording")


@pytest.mark.heavy
def test_real_spoken_digits(data_dir, tmp_path):
    arrays = load(Program(data="fsdd", bins=5, max_ms=1000.0), data_dir, tmp_path)
    assert arrays["x"].shape == (3000, 100, 140)
    assert (len(arrays["train"]), len(arrays["valid"]), len(arrays["test"])) == (2430, 270, 300)
    rate = arrays["x"].sum(dtype=np.int64) / arrays["length"].sum() / 700 * 100
    assert 3 < rate < 60  # spikes a second and channel
