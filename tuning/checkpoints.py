"""Checkpoints of runs: safetensors for the state, JSON for what goes with it; nothing in them can execute.

`<folder>/<run_key>/<step>.safetensors` and `<step>.json` (schema version, SHA-256 of the tensors file, the run's curves
so far, SHA-256 of all that). The JSON is written last and names the checksums, so that a pair is whole or does not
count. Two pairs are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from tuning.storage import StorageError, Store, as_store

SCHEMA_VERSION = 2
UNCHECKED = 1
"""The version before: its JSON had no checksum of its own."""
KEPT = 2
SEPARATOR = "::"
log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of a sweep's runs, in one place shared by all hosts."""

    def __init__(self, place: Store | Path):
        self._store = as_store(place)

    def save(self, run_key: str, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write atomically: tensors, then the JSON that vouches for them; then drop all but the newest KEPT pairs."""
        # a safetensors file keeps neither the order, which a compiled step asks for, nor what is empty: the JSON does
        flat = dict(flatten(state))
        data = _serialized({name: tensor.contiguous().cpu() for name, tensor in flat.items() if tensor is not None})
        plain = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "names": list(flat),
            "extra": dict(extra),
        }
        plain["check"] = _checksum(plain)
        self._store.write(f"{run_key}/{step:012d}.safetensors", data)
        self._store.write(f"{run_key}/{step:012d}.json", json.dumps(plain).encode())
        for old in self._steps(run_key)[:-KEPT]:
            self._store.remove(f"{run_key}/{old:012d}.json")
            self._store.remove(f"{run_key}/{old:012d}.safetensors")

    def load(self, run_key: str, at_most: int | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state, extra) of the newest whole checkpoint, or None. A torn one is passed over, with a warning.

        at_most: prefer the newest that is not past this step.
        """
        import safetensors

        steps = self._steps(run_key)
        if at_most is not None:
            steps.sort(key=lambda step: step if step <= at_most else -step)
        for step in reversed(steps):
            name = f"{run_key}/{step:012d}"
            try:
                return self._read(name)
            except StorageError:
                raise  # it is there, but cannot be had now
            except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
                why = " ".join(str(error).split())
                log.warning("checkpoint %s is unusable (%s): falling back to the one before", name, why)
        return None

    def copy(self, donor: str, step: int, run_key: str) -> bool:
        """Make another run's checkpoint of that step the first of `run_key`, at no cost of its own so far.

        Returns whether there was one; a damaged one counts as none, whoever loads it will say so.
        """
        name = f"{donor}/{step:012d}"
        if step not in self._steps(donor):
            return False
        try:
            data, plain = self._whole(name)
        except StorageError:
            raise
        except (OSError, ValueError, RecursionError):
            return False
        plain["extra"]["device_seconds"] = 0.0
        plain["check"] = _checksum(plain)
        self._store.write(f"{run_key}/{step:012d}.safetensors", data)
        self._store.write(f"{run_key}/{step:012d}.json", json.dumps(plain).encode())
        return True

    def discard(self, run_key: str) -> None:
        """Remove a run's checkpoints."""
        self._store.clear(run_key)

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, extra) of a pair. Raises what `_whole` raises, and what reading tensors raises."""
        import safetensors.torch

        data, plain = self._whole(name)
        return unflatten(safetensors.torch.load(data), plain.get("names")), plain["extra"]

    def _whole(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """A pair as it was written, its JSON without the checksum. Raises ValueError, or what reading raises, where it
        is damaged."""
        plain = json.loads(self._store.read(f"{name}.json"))
        if not isinstance(plain, dict):
            raise ValueError("its JSON is not what a checkpoint holds")
        version = plain.get("schema_version")
        if type(version) is not int or version not in (UNCHECKED, SCHEMA_VERSION):
            raise ValueError(f"schema version {version}, this is {SCHEMA_VERSION}")
        if version != UNCHECKED and plain.pop("check", None) != _checksum(plain):
            raise ValueError("its JSON does not match its checksum")
        data = self._store.read(f"{name}.safetensors")
        if hashlib.sha256(data).hexdigest() != plain.get("sha256"):
            raise ValueError("the tensors do not match their checksum")
        names = plain.get("names", [])
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not named or not isinstance(plain.get("extra"), dict):
            raise ValueError("its JSON is not what a checkpoint holds")
        plain["schema_version"] = SCHEMA_VERSION
        return data, plain

    def _steps(self, run_key: str) -> list[int]:
        names = [key.rpartition("/")[2] for key in self._store.names(run_key)]
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())


def _serialized(tensors: dict[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file, by way of a file: made in memory they hold Python up for as long as they are
    copied (38 ms for 36 MB), and with it the thread that feeds the device."""
    import safetensors.torch  # the driver, which only discards, goes without torch

    with tempfile.TemporaryDirectory(prefix="lanewise-") as folder:
        path = Path(folder, "state")
        try:
            safetensors.torch.save_file(tensors, path)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: {error}") from error  # a full disk
        return path.read_bytes()


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def flatten(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor | None]]:
    """Nested dict of tensors -> (path joined by SEPARATOR, tensor) pairs in its order. A dict that holds nothing is a
    path that ends with SEPARATOR, and None."""
    for name, value in state.items():
        if SEPARATOR in name:
            raise ValueError(f"a state's names must not contain '{SEPARATOR}': {prefix}{name}")
        if not isinstance(value, Mapping):
            yield f"{prefix}{name}", value
        elif value:
            yield from flatten(value, f"{prefix}{name}{SEPARATOR}")
        else:
            yield f"{prefix}{name}{SEPARATOR}", None


def unflatten(tensors: Mapping[str, torch.Tensor], names: Sequence[str] | None = None) -> dict[str, Any]:
    """The inverse of `flatten`, in the order of its names; without them (older checkpoints have none) in that of the
    tensors. Raises ValueError where the two do not name the same."""
    names = list(tensors) if names is None else names
    if {name for name in names if not name.endswith(SEPARATOR)} != tensors.keys():
        raise ValueError("its names are not those of its tensors")
    state: dict[str, Any] = {}
    for path in names:
        *parents, name = path.split(SEPARATOR)
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if name:
            inner[name] = tensors[path]
    return state
