"""Checkpoints of runs: safetensors for the state, JSON for what goes with it; nothing in them can execute.

`<folder>/<run_key>/<step>.safetensors` and `<step>.json` (schema version, SHA-256 of the tensors file, the run's curves
so far, SHA-256 of all that). The JSON is written last and names the checksums, so that a pair is whole or does not
count. Two pairs are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from trainables.files import write_atomically

SCHEMA_VERSION = 2
UNCHECKED = 1
"""The version before: its JSON had no checksum of its own."""
KEPT = 2
SEPARATOR = "::"
log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of a sweep's runs, under one folder shared by all hosts."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, run_key: str, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write atomically: tensors, then the JSON that vouches for them; then drop all but the newest KEPT pairs."""
        folder = self._folder / run_key
        # not its parents: where the sweep's own folder has vanished, nothing may be made in its place
        self._folder.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in flatten(state)}
        data = safetensors.torch.save(tensors)
        plain = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "extra": dict(extra),
        }
        plain["check"] = _checksum(plain)
        write_atomically(folder / f"{step:012d}.safetensors", data)
        write_atomically(folder / f"{step:012d}.json", json.dumps(plain).encode())
        for old in self._steps(folder)[:-KEPT]:
            (folder / f"{old:012d}.json").unlink(missing_ok=True)
            (folder / f"{old:012d}.safetensors").unlink(missing_ok=True)

    def load(self, run_key: str, at_most: int | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state, extra) of the newest whole checkpoint, or None. A torn one is passed over, with a warning.

        at_most: prefer the newest that is not past this step.
        """
        folder = self._folder / run_key
        steps = self._steps(folder)
        if at_most is not None:
            steps.sort(key=lambda step: step if step <= at_most else -step)
        for step in reversed(steps):
            path = folder / f"{step:012d}.json"
            try:
                return _read(path)
            except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
                why = " ".join(str(error).split())
                log.warning("checkpoint %s is unusable (%s): falling back to the one before", path, why)
        return None

    def discard(self, run_key: str) -> None:
        """Remove a run's checkpoints."""
        shutil.rmtree(self._folder / run_key, ignore_errors=True)

    @staticmethod
    def _steps(folder: Path) -> list[int]:
        return sorted(int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdecimal())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, extra) of the pair whose JSON this is. Raises ValueError, or what reading raises, where it is damaged."""
    plain = json.loads(path.read_bytes())
    if not isinstance(plain, dict):
        raise ValueError("its JSON is not what a checkpoint holds")
    version = plain.get("schema_version")
    if type(version) is not int or version not in (UNCHECKED, SCHEMA_VERSION):
        raise ValueError(f"schema version {version}, this is {SCHEMA_VERSION}")
    if version != UNCHECKED and plain.pop("check", None) != _checksum(plain):
        raise ValueError("its JSON does not match its checksum")
    data = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != plain.get("sha256"):
        raise ValueError("the tensors do not match their checksum")
    if not isinstance(plain.get("extra"), dict):
        raise ValueError("its JSON is not what a checkpoint holds")
    return unflatten(safetensors.torch.load(data)), plain["extra"]


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def flatten(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Nested dict of tensors -> (path joined by SEPARATOR, tensor) pairs."""
    for name, value in state.items():
        if SEPARATOR in name:
            raise ValueError(f"a state's names must not contain '{SEPARATOR}': {prefix}{name}")
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}{SEPARATOR}")
        else:
            yield f"{prefix}{name}", value


def unflatten(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    state: dict[str, Any] = {}
    for path, tensor in tensors.items():
        *parents, name = path.split(SEPARATOR)
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = tensor
    return state
