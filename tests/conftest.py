"""Shared set-up: one thread (bitwise repeatable sums), one folder for decoded data."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, where this machine has one."""
    path = os.environ.get("LANEWISE_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip(
            "no real data here: set LANEWISE_DATA to a folder with cifar10/, tinyimagenet32/, mnist/, text/, fsdd/"
        )
    return Path(path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A whole sweep of the toy family, as a user runs it; tests of what a sweep leaves behind share it."""
    from tests.toy_sweeps import UNDISTURBED, sweep

    return sweep(tmp_path_factory.mktemp("undisturbed"), "whole", *UNDISTURBED)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, and what to do with it."""
    if os.geteuid():
        pytest.skip("not root: a small file system cannot be mounted")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this container forbids mounts: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)
