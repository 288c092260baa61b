"""What a person sees while a sweep runs: one live line, then one table, then three lines."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tuning.journal import Event

QUIET_SECONDS = 15.0
"""Without a terminal, a line is printed this often instead of redrawn."""


class Progress:
    """The live line: done, running, pruned, best so far, time to finish.

    Args:
        console: where to draw; `None` draws nothing (--quiet).
        budget: configs the sweep will try.
        metric, mode: the objective.
    """

    def __init__(self, console: Console | None, budget: int, metric: str, mode: str):
        self._console = console
        self._budget, self._metric, self._mode = budget, metric, mode
        self._running: dict[str, float] = {}  # trial -> fraction of its length done
        self._copying: set[str] = set()
        self._later: set[str] = set()  # trials that came after the search: no part of "best so far"
        self._stage = ""
        self._ended: dict[str, int] = {}
        self._ended_before = 0  # in sessions before this one, which tell nothing of how long the rest takes
        self._best: dict[float, tuple[float, str]] = {}  # progress -> best value there, and whose
        self._labels: dict[str, str] = {}
        self._started = time.monotonic()
        self._first_work: float | None = None
        self._printed = self._started
        self._phase = "starting Ray"
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console is not None and self._console.is_terminal:
            self._live = Live(
                get_renderable=self.line,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,  # what libraries print meanwhile is the log's
                redirect_stderr=False,
            )
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exc)

    def phase(self, text: str) -> None:
        """What is going on when no config is: starting, writing the report."""
        self._phase = text
        self.draw()

    def say(self, text: str) -> None:
        """One line above the live one, for good."""
        if self._console is not None:
            self._console.print(Text(text), soft_wrap=True)

    def apply(self, event: Event) -> None:
        """Follow the journal."""
        trial = event.get("trial", "")
        if event["event"] == "begin":
            self._ended_before, self._first_work = sum(self._ended.values()), None
        elif event["event"] == "race":
            self._stage = f"race, {len(event['alive'])} left"
        elif event["event"] == "confirm":
            self._stage = "confirming"
        elif event["event"] in ("proposed", "resumed"):
            self._phase = ""
            if event.get("phase", "search") != "search":
                self._budget += 1
                self._later.add(trial)
            elif event.get("replaces") in self._later:
                self._later.add(trial)
            self._first_work = self._first_work or time.monotonic()
            self._labels[trial] = event.get("label") or self._labels.get(event.get("replaces", ""), "")
            if event["event"] == "resumed":
                self._running.pop(event["replaces"], None)
            self._running[trial] = 0.0
        elif event["event"] == "report":
            self._running[trial] = event["fraction"]
            value = event["values"].get(self._metric, math.nan)
            there = self._best.get(event["fraction"])
            if trial not in self._later and math.isfinite(value) and (there is None or self._better(value, there[0])):
                self._best[event["fraction"]] = (value, self._labels.get(trial, ""))
        elif event["event"] == "decision" and event["decision"] == "EXPLOIT":
            self._copying.add(trial)
        elif event["event"] == "retry":
            self._ended[event["stop_reason"]] -= 1
        elif event["event"] == "end" and trial in self._copying:
            self._copying.remove(trial)  # PBT: another config goes on in its place
        elif event["event"] == "end":
            self._running.pop(trial, None)
            reason = event["stop_reason"]
            self._ended[reason] = self._ended.get(reason, 0) + 1

    def draw(self) -> None:
        """Without a terminal: a plain line now and then."""
        now = time.monotonic()
        if self._console is not None and self._live is None and now - self._printed > QUIET_SECONDS:
            self._printed = now
            self._console.print(self.line(), soft_wrap=True)

    def _better(self, a: float, b: float) -> bool:
        return a > b if self._mode == "max" else a < b

    @property
    def ended(self) -> Mapping[str, int]:
        return self._ended

    def line(self) -> Text:
        done, elapsed = sum(self._ended.values()), time.monotonic() - self._started
        if self._phase:
            return Text(f"{self._phase} ... {clock(elapsed)}")
        parts = [self._stage] if self._stage else []
        parts += [
            f"{done}/{self._budget} done",
            f"{len(self._running)} running",
            f"{self._ended.get('stopped', 0)} pruned",
        ]
        for reason in ("diverged", "oom", "crashed"):
            if self._ended.get(reason):
                parts.append(f"{self._ended[reason]} {reason}")
        parts += [clock(elapsed), self._eta()]
        if self._best:  # last: a narrow terminal cuts the line, and a config's label is the least of it
            furthest = max(self._best)  # an early rung's value does not compare with a later one's
            value, label = self._best[furthest]
            where = "" if furthest >= 1 else f" at {furthest:.0%}"
            parts.append(f"best {self._metric} {value:.4f}{where} ({label})")
        return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")

    def _eta(self) -> str:
        done = sum(self._ended.values())
        here = done - self._ended_before
        if here <= 0 or self._first_work is None:
            return "time to finish: measuring"
        partly = sum(self._running.values()) * 0.5  # a running config may still be pruned
        rate = (here + partly) / (time.monotonic() - self._first_work)
        return f"{clock((self._budget - done - partly) / rate)} to finish"


def clock(seconds: float) -> str:
    """75 -> 1m15s, 4000 -> 1h06m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
