"""How many configs are in flight: one a core at first, two where the sweep is long enough."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.tune import Callback

SECOND_CONFIG_AFTER = 30.0
"""Seconds after a sweep's first result until a core gets a second config: that costs a process, which takes as long to
start as many short configs train, and saves the core's wait for the driver's decisions."""
log = logging.getLogger(__name__)


class Ramp(Callback):
    """The proposer's limit, lower while a sweep may still turn out to be short.

    Args:
        proposer: its `limit` is set and raised.
        first, most: configs in flight before and after the sweep has run for SECOND_CONFIG_AFTER.
    """

    def __init__(self, proposer: Any, first: int, most: int):
        self._proposer, self._most = proposer, most
        proposer.limit = min(first, most)
        self.first_result: float | None = None  # when, on the clock of time.monotonic

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never used."""
        return {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if self.first_result is None:
            self.first_result = time.monotonic()
        if time.monotonic() - self.first_result > SECOND_CONFIG_AFTER and self._proposer.limit < self._most:
            log.info("%d configs in flight from here on", self._most)
            self._proposer.limit = self._most
