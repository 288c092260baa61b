"""What stands between a stack and its storage: rows that were recorded are not recorded again, and a storage that fails
is told apart from a program that fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # trial processes import this module and no torch
    import numpy as np

    from lanes.writer import Checkpoints, Recorder
    from trainables.family import State


class StorageLost(Exception):
    """The sweep's folder cannot be written: no fault of any program's. The sweep stops; --resume goes on."""


class OnceRecorder:
    """A recorder that leaves out what it was given before.

    A run that goes back to its newest checkpoint within one host (out of memory) trains some steps twice, with equal
    results: their rows are passed on the first time only.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._steps: dict[str, int] = {}  # run key -> the last step passed on
        self._epochs: dict[str, int] = {}
        self._covariates: dict[str, int] = {}

    def steps(self, run_key: str, first_step: int, curves: Mapping[str, np.ndarray]) -> None:
        known = self._steps.get(run_key, 0) + 1 - first_step
        count = len(next(iter(curves.values())))
        if known >= count:
            return
        if known > 0:
            curves = {name: values[known:] for name, values in curves.items()}
            first_step += known
            count -= known
        self._recorder.steps(run_key, first_step, curves)
        self._steps[run_key] = first_step + count - 1

    def epoch(self, run_key: str, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        if row["epoch"] > self._epochs.get(run_key, 0):
            self._recorder.epoch(run_key, row, values)
            self._epochs[run_key] = row["epoch"]

    def covariates(self, run_key: str, epoch: int, values: Mapping[str, np.ndarray]) -> None:
        if epoch > self._covariates.get(run_key, 0):
            self._recorder.covariates(run_key, epoch, values)
            self._covariates[run_key] = epoch

    def flush(self, force: bool = False) -> None:
        try:
            self._recorder.flush(force)
        except OSError as error:
            raise StorageLost(f"curves could not be written: {error}") from error


class StoredCheckpoints:
    """Checkpoints whose storage may fail."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def save(self, run_key: str, step: int, state: State, extra: Mapping[str, Any]) -> None:
        try:
            self._checkpoints.save(run_key, step, state, extra)
        except OSError as error:
            raise StorageLost(f"a checkpoint could not be written: {error}") from error

    def load(self, run_key: str, at_most: int | None = None) -> tuple[State, dict[str, Any]] | None:
        return self._checkpoints.load(run_key, at_most)
