"""Checkpoints of runs: safetensors for the state, JSON for what goes with it; nothing in them can execute.

`<folder>/<run_key>/<step>.safetensors` and `<step>.json` (schema version, SHA-256 of the tensors file, the run's curves
so far). The JSON is written last and names the checksum, so that a pair is whole or does not count. Two pairs are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from tuning.storage import StorageError, Store, as_store

SCHEMA_VERSION = 1
KEPT = 2
SEPARATOR = "::"
log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of a sweep's runs, in one place shared by all hosts."""

    def __init__(self, place: Store | Path):
        self._store = as_store(place)

    def save(self, run_key: str, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write atomically: tensors, then the JSON that vouches for them; then drop all but the newest KEPT pairs."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in flatten(state)}
        data = safetensors.torch.save(tensors)
        plain = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "extra": dict(extra),
        }
        self._store.write(f"{run_key}/{step:012d}.safetensors", data)
        self._store.write(f"{run_key}/{step:012d}.json", json.dumps(plain).encode())
        for old in self._steps(run_key)[:-KEPT]:
            self._store.remove(f"{run_key}/{old:012d}.json")
            self._store.remove(f"{run_key}/{old:012d}.safetensors")

    def load(self, run_key: str, at_most: int | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state, extra) of the newest whole checkpoint, or None. A torn one is passed over, with a warning.

        at_most: prefer the newest that is not past this step.
        """
        steps = self._steps(run_key)
        if at_most is not None:
            steps.sort(key=lambda step: step if step <= at_most else -step)
        for step in reversed(steps):
            name = f"{run_key}/{step:012d}"
            try:
                plain = json.loads(self._store.read(f"{name}.json"))
                if plain["schema_version"] != SCHEMA_VERSION:
                    raise ValueError(f"schema version {plain['schema_version']}, this is {SCHEMA_VERSION}")
                data = self._store.read(f"{name}.safetensors")
                if hashlib.sha256(data).hexdigest() != plain["sha256"]:
                    raise ValueError("the tensors do not match their checksum")
                return unflatten(safetensors.torch.load(data)), plain["extra"]
            except StorageError:
                raise  # it is there, but cannot be had now
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                log.warning("checkpoint %s is unusable (%s): falling back to the one before", name, error)
        return None

    def discard(self, run_key: str) -> None:
        """Remove a run's checkpoints."""
        self._store.clear(run_key)

    def _steps(self, run_key: str) -> list[int]:
        names = [key.rpartition("/")[2] for key in self._store.names(run_key)]
        return sorted(int(name[: -len(".json")]) for name in names if name.endswith(".json"))


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
