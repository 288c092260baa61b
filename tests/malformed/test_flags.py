"""Flags, spaces, names and tracking URIs that mean nothing: refused in one line, before anything is written."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

import tuning.runner
from search_spaces.sweeps import Sweeps
from tests.malformed.refusals import Tally, nothing_runs  # noqa: F401  # a fixture
from tests.toy_sweeps import ROOT
from tests.toys.sweeps import SWEEPS
from trainables.family import load_family
from tuning.cli import main

FAMILIES = ("ci_vit", "vgg_decay", "snn_delays", "multi_neuron", "dln")
NOT_NUMBERS = [
    "x",
    "",
    " ",
    "1.5",
    "--",
    "1e3",
    "nan",
    "inf",
    "0x10",
    "1 2",
    "1,2",
    "²",
    "one",
    "None",
    "1_",
    "٣x",
    "\x00",
]
WHOLE = {"--trials": 1, "--seeds": 1, "--seed": 0, "--max-concurrent": 0}
ODD = "\x00\n\r\t/\\ '\"*?<>|:;&$`(){}[]#%é漢🙂\u202e\u200b"
pytestmark = pytest.mark.usefixtures("nothing_runs")


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """refuse(arguments...): the toy's tune script must refuse them, without a look at the data."""
    tally = Tally()
    monkeypatch.setattr("tuning.cli.check_data", lambda plan: set())

    def run(*arguments: str, sweeps: Sweeps = SWEEPS) -> None:
        storage = str(tmp_path / "sweeps")
        tally.refuses(repr(arguments), partial(main, sweeps, [*arguments, "--storage", storage]), tmp_path)

    run.tally = tally  # type: ignore[attr-defined]
    return run


def test_numbers(refuse):
    for flag, low in WHOLE.items():
        for value in [*NOT_NUMBERS, str(low - 1), "-99999999999999999999"]:
            refuse("grid", flag, value)
    for value in ["x", "", " ", "nan", "-1", "-inf", "inf", "1,5", "²", "\x00", "5s"]:
        refuse("grid", "--time-budget", value)
    for value in ["", " ", "0", "-1", "1.5", "AUTO", "many", "²", "٣", "1e3", "off,auto", "9" * 30, "\x00"]:
        refuse("grid", "--lanes", value)
    refuse("grid", "--seed", "200000")
    refuse("grid", "--searcher", "random", "--trials", "9" * 25)
    refuse("grid", "--seeds", "9" * 25)
    refuse("grid", "--max-concurrent", "9" * 25)
    refuse.tally.check(80)


def test_choices(refuse):
    for flag in ("--searcher", "--scheduler", "--engine", "--metric"):
        for value in ["", " ", "GRID", "asha ", "none,none", "0", "../x", "\x00", "é", "a" * 500]:
            refuse("grid", flag, value)
    for value in ["x", "all,none", "weight_norm2", "\x00", "a" * 500]:
        refuse("grid", "--covariates", value)
    for value in ["gird", "", " ", "grid grid", "../grid", "GRID", "\x00", "-", "a" * 500]:
        refuse(value)
    for arguments in (["grid", "extra"], ["--nope"], ["--"], ["-x"], ["--trials"], ["--set"], ["--plan", "--lst"]):
        refuse(*arguments, "--bogus") if arguments in (["--"],) else refuse(*arguments)
    refuse.tally.check(60)


SETTINGS = ["", "=", "lr", "lr=", "=1", "lr==1", "lr=x", "lr=1,2", "lr=nan", "lr=inf", "lr=-inf", "lr=1e999", "lr=0x1",
            "lr=--1", "lr=1 2", "lr=\x00", "width=1.5", "width=", "width=x", "width=1e3", "width=nan", "width=²",
            "width=" + "9" * 5000, "nope=1", "LR=1", " =1", "optimizer=adam", "optimizer=", "preset=L3", "preset=",
            "data=", "batch=x", "epochs=1.0", "epochs=True", "precision=float8", "precision=", "precision=int64",
            "width=0", "width=-3", "batch=0", "batch=-1", "epochs=0", "epochs=-5", "batch=33"]  # fmt: skip


def test_settings(refuse):
    for text in SETTINGS:
        refuse("grid", "--set", text)
    refuse.tally.check(40)


SPACES = ["", "=", "lr", "lr=", "=1,2", "nope=1,2", "lr=..", "lr=1..", "lr=..1", "lr=1..1", "lr=2..1", "lr=1..2..3",
          "lr=1..2:lin", "lr=1..2:log:log", "lr=0..1:log", "lr=-1..1:log", "lr=nan..1", "lr=1..nan", "lr=0..inf",
          "lr=-inf..0", "lr=1,,2", "lr=,", "lr=1,1", "lr=1,nan", "lr=inf,1", "lr=a,b", "lr=1..b", "lr=[1,2]", "lr=1;2",
          "width=1.5,2", "width=1..2.5", "width=3,3", "width=x..y", "width=2..1", "width=²,3", "optimizer=a..b",
          "optimizer=sgd,adam", "optimizer=sgd,sgd", "data=1..2", "lr=1e999..2", "lr=0.1,0.2:log", "lr=\x00,1",
          "width=0,3", "width=-3..3", "epochs=0,9", "precision=float64,float9"]  # fmt: skip


def test_spaces(refuse):
    for text in SPACES:
        refuse("grid", "--space", text)
        refuse("demo", "--searcher", "random", "--trials", "3", "--space", text)
    for text in ["run=", "run=exp9", "run=exp1,exp9", "run=exp1,exp1", "run=1..2", "run=exp1,"]:
        refuse("named", "--space", text)
    refuse("grid", "--space", "lr=0.1..0.3")
    refuse("grid", "--space", "lr=0.1..0.3", "--searcher", "random")
    refuse.tally.check(95)


def test_names_stay_in_the_storage(refuse):
    rng = random.Random(5)
    names = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", ".x", "-", "a" * 101, "a\n", "a\x00b", "~", "a b", "é"]
    names += ["".join(rng.choice(ODD + "abc.") for _ in range(rng.randint(1, 12))) + rng.choice(ODD) for _ in range(25)]
    for name in names:
        refuse("grid", "--name", name)
        refuse("--resume", name)
    refuse.tally.check(80)


URIS = ["", " ", "x", "mlflow", "localhost:5000", "127.0.0.1:5000", "http://", "https://", "http:///x", "http//x:5000",
        "htp://x", "ftp://x/y", "http://host:port", "http://host:99999", "http://host:-1", "http://[::1", "sqlite:",
        "sqlite://", "sqlite:/x.db", "sqlite:///", "sqlite://host/x.db", "postgres", "postgresql", "postgresql:",
        "postgresql:/", "postgresql://", "postgresql+nope://h/d", "oracle://h/d", "mongodb://h/d", "redis://h",
        "file:///tmp/mlruns", "./mlruns", "/tmp/mlruns", "http://a b", "http://h\n", "\x00", "javascript:alert(1)",
        "http://h:5000:5000", "uc://x", "mysql://"]  # fmt: skip


def test_tracking_uris(refuse, tmp_path):
    for uri in URIS:
        refuse("grid", "--tracking-uri", uri)
    refuse("grid", "--tracking-uri", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    refuse("grid", "--tracking-uri", f"sqlite:///{tmp_path}")
    refuse.tally.check(40)


def test_folders(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.cli.write_sweep_json", tuning.runner.write_sweep_json)
    (tmp_path / "file").write_text("")
    for value in ["/nowhere/at/all", str(tmp_path / "file"), "\x00", "a" * 5000]:
        refuse("grid", "--data-dir", value)
    tally = refuse.tally
    for value in [str(tmp_path / "file"), str(tmp_path / "file" / "x"), "/proc/x", "\x00", "/" + "a" * 300]:
        tally.refuses(
            f"--storage {value[:40]}", partial(main, SWEEPS, ["grid", "--name", "x", "--storage", value]), tmp_path
        )
    for address in ["ray://head:10001"]:
        refuse("grid", "--address", address)
    tally.check(10)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_far_outside_raise_nothing(family, refuse):
    """Zero, below zero and far too many may mean something to a program, or be refused in one line."""
    sweeps = import_module(f"search_spaces.{family}").SWEEPS
    loaded = load_family(family)
    for name, field in (loaded.program_fields | loaded.hyper_fields).items():
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            for value in ("0", "-1"):
                refuse("--set", f"{name}={value}", sweeps=sweeps)
    tally = refuse.tally
    tally.wrong = [line for line in tally.wrong if "it was accepted" not in line]
    tally.check(60)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_every_family(family, refuse):
    """What no program can mean: zero of what is counted, numbers that are none, names nobody knows."""
    sweeps = import_module(f"search_spaces.{family}").SWEEPS
    loaded = load_family(family)
    for name, field in (loaded.program_fields | loaded.hyper_fields).items():
        kind = field.default
        if isinstance(kind, bool):
            bad = ["maybe", "2", ""]
        elif isinstance(kind, int):
            bad = ["x", "1.5", "nan", ""]
        elif isinstance(kind, float):
            bad = ["x", "nan", "1,2"]
        elif isinstance(kind, str):
            bad = ["no-such-thing", ""] if (family, name) != ("dln", "data") else [""]  # there it is a file's path
        else:
            bad = ["x,y"] if kind and not isinstance(kind[0], str) else []
        for value in bad:
            refuse("--set", f"{name}={value}", sweeps=sweeps)
    refuse.tally.check(20)


def test_as_processes(tmp_path):
    """A handful as a user starts them: what the interpreter itself prints on the way out counts too."""
    command = [sys.executable, "-m", "tests.toys.tune_toy"]
    for arguments in (["grid", "--set", "width=x"], ["grid", "--tracking-uri", "nope"], ["--resume", "../x"]):
        done = subprocess.run(
            [*command, *arguments, "--storage", str(tmp_path / "s")], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(Path(tmp_path).iterdir()) == []
