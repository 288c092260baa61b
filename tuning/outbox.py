"""What MLflow is to be told, collected by run: a call costs it milliseconds however little is in it, so that a run is
sent when it has ended or its news is some seconds old, and not a call a point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LIVE_SECONDS = 10.0
"""How old the news of a run that goes on may grow before it is sent."""
LONGEST_PARAM, LONGEST_TAG = 6000, 8000
Which = tuple[str, str]
"""A run by kind and key: `tuning.tracked_runs` knows MLflow's id of it."""
Values = Mapping[str, float] | Mapping[str, float | None]
Point = tuple[str, float, int, int]
"""Name, value, time in ms, step."""
Pair = tuple[str, str]


@dataclass
class Letter:
    """What is to be told of one run; `status` with the time of it in ms."""

    metrics: list[Point] = field(default_factory=list)
    params: list[Pair] = field(default_factory=list)
    tags: list[Pair] = field(default_factory=list)
    status: tuple[str, int] | None = None

    @property
    def of_ended(self) -> bool:
        return self.status is not None and self.status[0] != "RUNNING"

    def calls(self) -> Iterator[tuple[list[Point], list[Pair], list[Pair]]]:
        """Metrics, params, tags, as much as MLflow takes in a call: 1000 metrics, 100 params, 100 tags, 1000 in all."""
        # a config that was proposed again has its params twice: MLflow takes each name once a call
        metrics, params, tags = self.metrics, list(dict(self.params).items()), list(dict(self.tags).items())
        while metrics or params or tags:
            yield metrics[:700], params[:100], tags[:100]
            metrics, params, tags = metrics[700:], params[100:], tags[100:]


class Outbox:
    """Letters not sent yet.

    Args:
        held: what `held` gave to be kept, in this process's life or one before.
        clock: seconds.
    """

    def __init__(self, held: Iterable[Mapping[str, Any]] = (), clock: Callable[[], float] = time.monotonic):
        self._letters: dict[Which, Letter] = {}
        self._since: dict[Which, float] = {}
        self._clock = clock
        for kept in held:
            letter = self._open((kept["kind"], kept["key"]))
            letter.metrics = [tuple(point) for point in kept["metrics"]]
            letter.params = [tuple(pair) for pair in kept["params"]]
            letter.tags = [tuple(pair) for pair in kept["tags"]]
            letter.status = tuple(kept["status"]) if kept["status"] else None

    def metrics(self, which: Which, values: Values, at: int, step: int) -> None:
        """Points of curves; what is not a finite number is none."""
        for name, number in values.items():
            if number is not None and math.isfinite(number):
                self._open(which).metrics.append((name, float(number), at, int(step)))

    def params(self, which: Which, params: Iterable[tuple[str, Any]]) -> None:
        self._open(which).params += [(name, str(value)[:LONGEST_PARAM]) for name, value in params]

    def tags(self, which: Which, tags: Iterable[tuple[str, str]]) -> None:
        self._open(which).tags += [(name, str(text)[:LONGEST_TAG]) for name, text in tags]

    def status(self, which: Which, status: str, at: int) -> None:
        self._open(which).status = status, at

    def due(self, patient: bool) -> list[Which]:
        """Runs to send now: all, or of the patient those that have ended and those whose news is old."""
        old = self._clock() - LIVE_SECONDS
        return [
            which
            for which, letter in self._letters.items()
            if not patient or letter.of_ended or self._since[which] <= old
        ]

    def points(self, runs: Iterable[Which]) -> int:
        """How many points of curves these runs' letters hold."""
        return sum(len(self._letters[which].metrics) for which in runs)

    def letter(self, which: Which) -> Letter:
        """What is to be told of a run. It stays here until it is dropped."""
        return self._letters[which]

    def drop(self, runs: Iterable[Which]) -> None:
        """These runs' letters have arrived."""
        for which in runs:
            del self._letters[which], self._since[which]

    def held(self) -> list[dict[str, Any]]:
        """All letters, to be kept as JSON."""
        return [{"kind": kind, "key": key, **asdict(letter)} for (kind, key), letter in self._letters.items()]

    def _open(self, which: Which) -> Letter:
        self._since.setdefault(which, self._clock())
        return self._letters.setdefault(which, Letter())
