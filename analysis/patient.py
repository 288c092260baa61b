"""What the doctor's checks look at, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd

from analysis.store import Sweep
from analysis.summary import complete, pivot, scores, summarise

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Card:
    """One check's outcome."""

    status: Status
    check: str
    evidence: str
    advice: str = ""


@dataclass(frozen=True)
class Patient:
    """What the checks look at, each part read once.

    Args:
        controls: a sweep of the same kind without pruning.
    """

    sweep: Sweep
    metric: str
    controls: Sweep | None = None

    @cached_property
    def runs(self) -> pd.DataFrame:
        return scores(self.sweep, self.metric)

    @cached_property
    def table(self) -> pd.DataFrame:
        return summarise(self.sweep, self.runs, self.metric)

    @cached_property
    def judged(self) -> pd.DataFrame:
        """Configs that may be compared, best first."""
        return self.table[self.table["judged"]] if len(self.table) else self.table

    @cached_property
    def matrix(self) -> pd.DataFrame:
        """Judged scores, configs x seeds, higher is better, without gaps."""
        sign = -1.0 if self.sweep.mode(self.metric) == "min" else 1.0
        return sign * complete(pivot(self.runs))
