"""What MLflow is to be told, collected by run: a call costs it milliseconds however little is in it, so that a run is
sent when it has ended or its news is some seconds old, and not a call a point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LIVE_SECONDS = 10.0
"""How old the news of a run that goes on may grow before it is sent."""
PARAM_LETTERS, TAG_LETTERS = 6000, 8000
Which = tuple[str, str]
"""A run by kind and key: `tuning.tracked_runs` knows MLflow's id of it."""
Values = Mapping[str, float] | Mapping[str, float | None]


@dataclass
class Letter:
    """What is to be told of one run: (name, value, time in ms, step), (name, text), and (status, time in ms)."""

    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)
    status: tuple[str, int] | None = None

    @property
    def of_ended(self) -> bool:
        return self.status is not None and self.status[0] != "RUNNING"


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
            letter = self._letter((kept["kind"], kept["key"]))
            letter.metrics = [tuple(point) for point in kept["metrics"]]
            letter.params = [tuple(pair) for pair in kept["params"]]
            letter.tags = [tuple(pair) for pair in kept["tags"]]
            letter.status = tuple(kept["status"]) if kept["status"] else None

    def metrics(
        self, which: Which, values: Mapping[str, float | None] | Mapping[str, float], at: int, step: int
    ) -> None:
        """Points of curves; what is not a finite number is none."""
        for name, number in values.items():
            if number is not None and math.isfinite(number):
                self._letter(which).metrics.append((name, float(number), at, int(step)))

    def params(self, which: Which, params: Iterable[tuple[str, Any]]) -> None:
        self._letter(which).params += [(name, str(value)[:PARAM_LETTERS]) for name, value in params]

    def tags(self, which: Which, tags: Iterable[tuple[str, str]]) -> None:
        self._letter(which).tags += [(name, str(text)[:TAG_LETTERS]) for name, text in tags]

    def status(self, which: Which, status: str, at: int) -> None:
        self._letter(which).status = status, at

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

    def send(self, client: Any, which: Which, run_id: str) -> None:
        """One run's letter, by an `MlflowClient`. It stays here until it is dropped."""
        from mlflow.entities import Metric, Param, RunTag

        letter = self._letters[which]
        metrics = [Metric(*point) for point in letter.metrics]
        # a config that was proposed again has its params twice: MLflow takes each name once a call
        params = [Param(*pair) for pair in dict(letter.params).items()]
        tags = [RunTag(*pair) for pair in dict(letter.tags).items()]
        for metric_part, param_part, tag_part in _calls(metrics, params, tags):
            client.log_batch(run_id, metrics=metric_part, params=param_part, tags=tag_part)
        if letter.status is not None:
            set_status(client, run_id, *letter.status)

    def drop(self, runs: Iterable[Which]) -> None:
        """These runs' letters have arrived."""
        for which in runs:
            del self._letters[which], self._since[which]

    def held(self) -> list[dict[str, Any]]:
        """All letters, to be kept as JSON."""
        return [{"kind": kind, "key": key, **asdict(letter)} for (kind, key), letter in self._letters.items()]

    def _letter(self, which: Which) -> Letter:
        self._since.setdefault(which, self._clock())
        return self._letters.setdefault(which, Letter())


def set_status(client: Any, run_id: str, status: str, at: int | None) -> None:
    """A run's status in MLflow; what has ended has a time of that (ms)."""
    if status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, status, at)


def _calls(metrics: list, params: list, tags: list) -> Iterable[tuple[list, list, list]]:
    """MLflow's limits: 1000 metrics, 100 params, 100 tags and 1000 entities together, a call."""
    while metrics or params or tags:
        yield metrics[:700], params[:100], tags[:100]
        metrics, params, tags = metrics[700:], params[100:], tags[100:]
