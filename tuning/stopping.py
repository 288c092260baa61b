"""Why a sweep stops before its configs are done: Ctrl-C, its time budget, too many crashes, a storage that fails.

Tune asks `Stopping` between any two of its steps. Whatever the reason, what trains is checkpointed first, and configs
that had not ended have no end in the journal: --resume goes on with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper

from tuning.journal import Event

CRASHES = 5
"""So many configs that crash one after the other are no accident of one config: the sweep stops."""

log = logging.getLogger(__name__)


class Stopping(Stopper):
    """One for a sweep.

    Args:
        time_budget: seconds of search, 0 for no limit; measured by a clock that nobody can set.
        budget: configs the sweep will try.
    """

    def __init__(self, time_budget: float, budget: int, clock: Callable[[], float] = time.monotonic):
        self._time_budget, self._clock = time_budget, clock
        self._limit = max(1, min(CRASHES, budget))
        self._begun: float | None = None
        self._row = 0
        self._saved = False
        self.save: Callable[[], None] = lambda: None
        self.reason = ""  # "interrupted", "time budget", "too many crashes", "storage"
        self.detail = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it for a restore that is never used."""
        return {}

    def stop(self, reason: str, detail: str = "") -> None:
        """The first reason counts."""
        if not self.reason:
            self.reason, self.detail = reason, detail
            log.warning("the sweep stops: %s %s", reason, detail)

    def apply(self, event: Event) -> None:
        """Follow the journal of this session: count crashes in a row. `oom` says nothing of the next config."""
        if event["event"] != "end" or event["stop_reason"] == "oom":
            return
        self._row = self._row + 1 if event["stop_reason"] == "crashed" else 0
        if self._row >= self._limit:
            self.stop("too many crashes", f"{self._row} configs in a row crashed, the last with: {event['error']}")

    def stop_all(self) -> bool:
        """Tune's question. Before the first yes, everything that trains is checkpointed."""
        now = self._clock()
        self._begun = self._begun if self._begun is not None else now
        if self._time_budget and now - self._begun >= self._time_budget:
            self.stop("time budget")
        if self.reason and not self._saved:
            self._saved = True
            if self.reason != "storage":
                try:
                    self.save()
                except Exception as error:  # checkpoints are a minute old at most: worth a line, not a failure
                    log.warning("not everything could be checkpointed: %s", error)
        return bool(self.reason)
