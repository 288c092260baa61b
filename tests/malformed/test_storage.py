"""Damaged files of a sweep: sweep.json, journal, Parquet, checkpoints, data. One line and exit code 2 each; checkpoints
fall back to the one before."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import random
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import analysis.cli
import tuning.sync
from tests.malformed.refusals import Tally, nothing_runs  # noqa: F401  # a fixture
from tests.sweep_factory import Arm, write_sweep
from tests.toy_sweeps import Swept
from tests.toys.sweeps import SWEEPS
from tuning.checkpoints import CheckpointStore
from tuning.cli import main

JUNK = [b"", b"\n", b"{", b"[]", b"null", b"1e999", b'"text"', b"\xff\xfe\x00\x01" * 9, b"[" * 100_000, b"{}", b"\x00"]
WRONG = [None, 5, -1.5, "x", [], [1, [2]], {}, {"a": {}}, True, float("nan")]


@pytest.fixture
def mine(tmp_path, undisturbed) -> Path:
    """A copy of a finished sweep."""
    storage = tmp_path / "sweeps"
    shutil.copytree(undisturbed.folder, storage / "whole", ignore=shutil.ignore_patterns("ray"))
    plain = json.loads((storage / "whole" / "sweep.json").read_text())
    (storage / "whole" / "sweep.json").write_text(
        json.dumps({**plain, "tracking_uri": f"sqlite:///{storage / 'mlflow.db'}"})
    )
    return storage / "whole"


def resume(folder: Path) -> partial:
    return partial(main, SWEEPS, ["--resume", folder.name, "--storage", str(folder.parent), "--quiet"])


def deliver(folder: Path) -> partial:
    return partial(tuning.sync.main_exit, [folder.name, "--storage", str(folder.parent)])


@pytest.mark.usefixtures("nothing_runs")
def test_sweep_json(mine):
    tally, path, rng = Tally(), mine / "sweep.json", random.Random(1)
    whole = path.read_bytes()
    plain = json.loads(whole)
    needed = (
        "name family sweep space base seed seeds trials searcher scheduler metric covariates engine lanes tracking_uri"
    )
    cases = {f"junk {junk[:9]!r}": junk for junk in JUNK}
    cases |= {f"cut at {at}": whole[:at] for at in (1, len(whole) // 3, len(whole) - 2)}
    for name in needed.split():
        cases[f"without {name}"] = json.dumps({k: v for k, v in plain.items() if k != name}).encode()
        for value in rng.sample(WRONG, 3):
            if type(value) is not type(plain[name]) and not (name == "trials" and value is None):
                cases[f"{name} = {value!r}"] = json.dumps({**plain, name: value}).encode()
    for change in (
        {"family": "no.such"}, {"family": "../x"}, {"metric": "accuracy"}, {"searcher": "magic"}, {"engine": "warp"},
        {"lanes": "many"}, {"seeds": 0}, {"trials": 0}, {"name": "../../x"}, {"name": "other"}, {"seed": -1},
        {"scheduler": {"name": "hyperband"}}, {"base": {"nope": 1}}, {"base": {"width": "wide"}}, {"covariates": [1]},
        {"space": [{"kind": "choice"}]}, {"space": [{"kind": "magic", "name": "x"}]}, {"space": [1]}, {"space": [{}]},
        {"space": [{"kind": "choice", "name": "lr", "values": []}]}, {"tracking_uri": "nope://x"},
        {"space": [{"kind": "choice", "name": "nope", "values": [1, 2]}]},
        {"space": [{"kind": "range", "name": "lr", "low": 2, "high": 1, "log": False, "integer": False}]},
        {"space": [{"kind": "range", "name": "lr", "low": "a", "high": "b", "log": False, "integer": False}]},
    ):  # fmt: skip
        cases[f"{change}"] = json.dumps({**plain, **change}).encode()
    for what, data in cases.items():
        path.write_bytes(data)
        tally.refuses(f"--resume, sweep.json {what}", resume(mine), mine.parent)
    tally.check(85)


@pytest.mark.usefixtures("nothing_runs")
def test_journal(mine):
    tally, path, rng = Tally(), mine / "journal.jsonl", random.Random(2)
    lines = path.read_bytes().splitlines(keepends=True)
    cases: dict[str, list[bytes]] = {}
    for junk in JUNK[1:]:
        at = rng.randrange(1, len(lines))
        cases[f"line {at} {junk[:9]!r}"] = [*lines[:at], junk.rstrip(b"\n") + b"\n", *lines[at:]]
    events = [json.loads(line) for line in lines]
    for kind, fields in {
        "proposed": "index trial config_key label point program hyper runs epochs time",
        "report": "trial config_key epoch progress values per_seed done time",
        "decision": "trial config_key epoch decision",
        "end": "trial config_key stop_reason epoch",
    }.items():
        number = next(i for i, event in enumerate(events) if event["event"] == kind)
        for name in fields.split():
            for value in ("(gone)", *rng.sample(WRONG, 2)):
                event = copy.deepcopy(events[number])
                if type(value) is type(event[name]) or (isinstance(value, float) and isinstance(event[name], int)):
                    continue
                event.pop(name) if value == "(gone)" else event.update({name: value})
                cases[f"{kind} with {name} {value!r}"] = [
                    *lines[:number], json.dumps(event).encode() + b"\n", *lines[number + 1 :]
                ]  # fmt: skip
    known = next(event for event in events if event["event"] == "report")
    for kind in ("report", "decision", "end"):
        event = {**known, "event": kind, "trial": "nobody", "decision": "STOP", "stop_reason": "stopped"}
        cases[f"{kind} of nobody"] = [*lines, json.dumps(event).encode() + b"\n"]
    for what, damaged in cases.items():
        path.write_bytes(b"".join(damaged))
        tally.refuses(f"--resume, journal {what}", resume(mine), mine.parent)
        if tally.tried % 8 == 0:
            tally.refuses(f"tuning.sync, journal {what}", deliver(mine), mine.parent)
    tally.check(70)


def test_delivery(mine, tmp_path):
    """`python -m tuning.sync`"""
    tally = Tally()
    for name in ("", ".", "..", "../sweeps/whole", "nothing", "/etc", "a/b", "whole/", "\x00", "é", "a" * 300):
        tally.refuses(f"sync {name!r}", partial(tuning.sync.main_exit, [name, "--storage", str(mine.parent)]), tmp_path)
    path = mine / "sweep.json"
    for junk in JUNK:
        path.write_bytes(junk)
        tally.refuses(f"sync with sweep.json {junk[:9]!r}", deliver(mine), tmp_path)
    tally.check(20)


# --- what analysis reads ---

COMMANDS = (
    ["report", "--tracking-uri", "none"],
    ["compare"],
    ["journal", "--tracking-uri", "none"],
    ["doctor"],
    ["replay"],
)


def read(folder: Path, command: list[str]) -> partial:
    arguments = [command[0], folder.name, *command[1:], "--storage", str(folder.parent)]
    return partial(analysis.cli.app, arguments)


@pytest.fixture
def written(tmp_path) -> Path:
    arms = [
        Arm("a", 0.9, {"lr": 0.1}, {"width": 3}, {"lr": 0.1}),
        Arm("b", 0.8, {"lr": 0.2}, {"width": 3}, {"lr": 0.2}),
    ]
    write_sweep(tmp_path / "sweeps", arms)
    (folder,) = [path.parent for path in (tmp_path / "sweeps").glob("*/sweep.json")]
    return folder


def test_parquet(written):
    tally, rng = Tally(), random.Random(3)
    runs = written / "runs.parquet"
    epochs = next((written / "epochs").glob("*.parquet"))
    for path in (runs, epochs):
        whole = path.read_bytes()
        damages = {
            "empty": b"", "text": b"not parquet", "cut": whole[: len(whole) // 2], "tail": whole[-50:],
            "magic only": b"PAR1PAR1", "noise": rng.randbytes(500),
            "footer": whole[:-20] + rng.randbytes(12) + whole[-8:],
            "middle": whole[:8] + rng.randbytes(len(whole) // 2) + whole[8 + len(whole) // 2 :],
        }  # fmt: skip
        for what, data in damages.items():
            path.write_bytes(data)
            for command in COMMANDS:
                if path is runs or command[0] in ("report", "replay"):
                    tally.refuses(f"{command[0]}, {path.parent.name} {what}", read(written, command), written)
        path.write_bytes(whole)
    table = pq.read_table(runs)
    for what, other in {
        "seed text": table.set_column(table.schema.get_field_index("seed"), "seed", pa.array(["x"] * len(table))),
        "epoch text": table.set_column(table.schema.get_field_index("epoch"), "epoch", pa.array(["x"] * len(table))),
        "no run_key": table.drop_columns(["run_key"]),
        "no config_key": table.drop_columns(["config_key"]),
        "another table": pa.table({"a": [1, 2]}),
        "seeds missing": table.set_column(
            table.schema.get_field_index("seed"), "seed", pa.nulls(len(table), pa.int32())
        ),
    }.items():
        pq.write_table(other, runs)
        for command in COMMANDS:
            tally.refuses(f"{command[0]}, runs.parquet with {what}", read(written, command), written)
    tally.check(75)


def test_sweep_json_for_analysis(written):
    tally, path = Tally(), written / "sweep.json"
    plain = json.loads(path.read_text())
    cases = {f"{junk[:9]!r}": junk for junk in JUNK if junk != b"{}"}
    for name in ("metrics", "space", "schedule", "metric", "scheduler"):
        for value in (5, "x", [3]):
            if type(value) is not type(plain.get(name)):
                cases[f"{name} = {value!r}"] = json.dumps({**plain, name: value}).encode()
    for what, data in cases.items():
        path.write_bytes(data)
        for command in COMMANDS[:3]:
            tally.refuses(f"{command[0]}, sweep.json {what}", read(written, command), written)
    for name in ("", "..", "nothing", "../x", "\x00", "a/b"):
        for command in COMMANDS[:2]:
            arguments = [command[0], name, *command[1:], "--storage", str(written.parent)]
            tally.refuses(f"{command[0]} {name!r}", partial(analysis.cli.app, arguments), written)
    tally.check(70)


# --- checkpoints ---


def test_checkpoints_fall_back(tmp_path, caplog):
    """120 damages of the newest pair: each is passed over with a warning, none raises, none is believed."""
    rng, store = random.Random(4), CheckpointStore(tmp_path)
    for step in (5, 10):
        store.save("run", step, {"w": torch.full((3, 2), step / 7)}, {"step": step, "epochs": {"loss": [0.25] * step}})
    before = store.load("run", at_most=5)
    newest = {end: tmp_path / "run" / f"{10:012d}.{end}" for end in ("json", "safetensors")}
    whole = {end: path.read_bytes() for end, path in newest.items()}
    plain = json.loads(whole["json"])
    damages: list[tuple[str, bytes | None]] = []
    for end, data in whole.items():
        for _ in range(20):
            at = rng.randrange(len(data))
            damages.append((end, data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]))
            damages.append((end, data[:at]))
        damages += [(end, junk) for junk in JUNK] + [(end, None), (end, rng.randbytes(len(data)))]
    for name in plain:
        damages += [("json", json.dumps({**plain, name: value}).encode()) for value in WRONG if value != plain[name]]
    for end, data in damages:
        newest[end].unlink() if data is None else newest[end].write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = store.load("run")
        if end == "json" and data is None:
            assert loaded is not None
        else:
            warned = [record for record in caplog.records if "falling back" in record.message]
            assert len(warned) == 1, (end, data)
            assert "\n" not in warned[0].message
        assert loaded is not None
        assert loaded[1] == before[1]
        assert torch.equal(loaded[0]["w"], before[0]["w"])
        newest[end].write_bytes(whole[end])
    assert len(damages) >= 120
    assert store.load("run")[1] == plain["extra"]


# --- data ---

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
MNIST = [f"{part}-{what}.gz" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
DATA = {
    ("ci_vit", "cifar10"): ["cifar10/train-0.parquet"],
    ("ci_vit", "tinyimagenet32"): ["tinyimagenet32/images.parquet"],
    ("ci_vit", "imagenet32"): [
        *(f"imagenet32/train_data_batch_{i}" for i in range(1, 11)),
        "imagenet32/val_data",
    ],
    ("ci_vit", "lop"): [f"lop/classes/{i}.npy" for i in range(1000)],
    ("vgg_decay", "cifar10"): [f"cifar10/cifar-10-batches-py/{name}" for name in (*BATCHES, "test_batch")],
    ("multi_neuron", "mnist"): [f"mnist/{name}" for name in MNIST],
    ("snn_delays", "fsdd"): ["fsdd/recordings.npz"],
    ("dln", "wikitext2"): ["text/wikitext2_valid.txt", "text/wikitext2_test.txt"],
}


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.usefixtures("nothing_runs")
def test_data_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LANEWISE_CACHE", str(tmp_path / "cache"))
    tally, rng = Tally(), random.Random(6)
    damages = {
        "empty": b"", "noise": rng.randbytes(700), "text": b"not that\n", "PAR1": b"PAR1PAR1",
        "gzip head": b"\x1f\x8b\x08\x00" + rng.randbytes(40), "zip head": b"PK\x03\x04" + rng.randbytes(60),
        "npy head": b"\x93NUMPY\x01\x00" + rng.randbytes(60),
        "a pickle": pickle.dumps({"data": [1], "labels": [2]}), "a pickle that runs": pickle.dumps(Evil()),
        "a cut pickle": pickle.dumps(list(range(99)))[:-9], "utf-16": "text".encode("utf-16") * 9,
    }  # fmt: skip
    for (family, data), names in DATA.items():
        sweeps = import_module(f"search_spaces.{family}").SWEEPS
        for what, content in {"missing": None, "a folder": "folder", **damages}.items():
            if family == "dln" and what in ("text", "noise"):
                continue
            folder = tmp_path / f"{family}-{data}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in names[:12]:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if content == "folder":
                    path.mkdir()
                elif content is not None:
                    path.write_bytes(content)
            for name in names[12:]:
                if isinstance(content, bytes):
                    (folder / name).hardlink_to(folder / names[0])
            arguments = ["--data", data, "--data-dir", str(folder), "--storage", str(tmp_path / "sweeps")]
            if data == "cifar10" and what in ("missing", "a folder"):
                continue  # it would be downloaded
            tally.refuses(f"{family} {data} {what}", partial(main, sweeps, arguments), tmp_path / "sweeps")
    assert not (tmp_path / "sweeps").exists()
    tally.check(85)


def test_the_copy_of_a_sweep_is_read(mine, undisturbed: Swept):
    """What the damages above are made of is a sweep that is accepted as it is."""
    assert pd.read_parquet(mine / "runs.parquet").equals(undisturbed.runs)
