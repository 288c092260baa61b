"""What comes after the search: the race's rounds, then the best configs on fresh seeds.

Both are decided from the journal alone (the runs table is its fold), and each decision is journalled before anything
runs by it, so that a resumed sweep decides the same and repeats nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from trainables.family import BadValue
from tuning import objectives, race
from tuning.journal import Event, read
from tuning.sweep import CONFIRMING, SweepPlan

ASKED = ("confirm", "confirm_seeds", "race", "race_seeds", "margin")
"""Fields of the plan that a resumed sweep may be asked anew; the journal's `begin` keeps them."""


def check(plan: SweepPlan, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be asked together: `BadValue`.

    Args:
        given: of `ASKED`, what the command line says (None: nothing).
    """
    for name, low in (("confirm", 1), ("confirm_seeds", 1), ("race_seeds", 1)):
        if given[name] is not None and given[name] < low:
            raise BadValue(f"--{name.replace('_', '-')} {given[name]} should be {low} or more")
    if given["confirm_seeds"] and not plan.confirm:
        raise BadValue("--confirm-seeds says on how many seeds to confirm: say how many configs with --confirm")
    for name in ("race_seeds", "margin"):
        if given[name] is not None and not plan.race:
            raise BadValue(f"--{name.replace('_', '-')} belongs to a race: give --race too")
    if (plan.confirm or plan.race) and plan.scheduler == "pbt":
        flag = "--confirm" if plan.confirm else "--race"
        raise BadValue(
            f"{flag} trains configs on further seeds from their beginning, and what --scheduler pbt finds has none: "
            "its hypers changed on the way; choose another scheduler"
        )
    if plan.confirm and plan.confirm > plan.budget:
        raise BadValue(f"--confirm {plan.confirm} is more configs than the sweep tries ({plan.budget})")
    if plan.confirm and max(plan.seeds, plan.race_seeds, plan.confirm_seeds) >= CONFIRMING:
        raise BadValue(
            f"a config can have at most {CONFIRMING - 1} seeds to be chosen by, and as many to be confirmed on"
        )
    if not plan.race:
        return
    if plan.seeds < 2:
        raise BadValue("--race compares configs seed by seed: give --seeds 2 or more to begin with")
    if plan.others:
        raise BadValue(f"--race has one finishing line: name one --metric instead of {','.join(plan.objectives)}")
    if most_seeds(plan) <= plan.seeds:
        raise BadValue(f"--race-seeds {plan.race_seeds} should be more than --seeds {plan.seeds}")
    if plan.margin is not None and not (math.isfinite(plan.margin) and plan.margin > 0):
        raise BadValue(f"--margin {plan.margin:g} should be above 0: the smallest difference that matters")


def most_seeds(plan: SweepPlan) -> int:
    """The maximum of seeds that a race gives a config."""
    return plan.race_seeds or race.MOST * plan.seeds


def ask_again(plan: SweepPlan, given: Mapping[str, Any]) -> SweepPlan:
    """The plan of a sweep that is resumed: what its last session was asked to do after the search, then what this one
    is."""
    asked: dict[str, Any] = {}
    begun = False
    for event, _ in read(Path(plan.folder) / "journal.jsonl"):
        if event["event"] == "begin":
            asked.update({name: event[name] for name in ASKED if name in event})
        begun = begun or event["event"] == "race"
    for name in ("race_seeds", "margin"):
        if begun and given[name] is not None and given[name] != asked.get(name):
            raise BadValue(
                f"--{name.replace('_', '-')} {given[name]:g}: the race of '{plan.name}' has begun, and its looks were "
                "planned beforehand; leave the flag out"
            )
    plan = replace(plan, **{**asked, **{name: value for name, value in given.items() if value is not None}})
    check(plan, given)
    return plan


class Followup:
    """Says what to run next once the search has nothing left to propose.

    Args:
        plan: the sweep.
        rows: the runs table's, by run key; read when something is to be decided.
        write: appends an event to the journal, tells everybody who follows it, and returns it.
        past: the journal so far.

    `look` and `confirmed` are the newest events of the race and of confirming, `left` whether more may come.
    """

    def __init__(
        self,
        plan: SweepPlan,
        rows: Mapping[str, Mapping[str, Any]],
        write: Callable[..., Event],
        past: Sequence[Event] = (),
    ):
        self._plan, self._rows, self._write = plan, rows, write
        self._proposals: dict[str, Event] = {}  # config key -> the search's proposal of it
        self.look: Event | None = None
        self.confirmed: Event | None = None
        self._queue: deque[Event] = deque()
        self.left = bool(plan.race or plan.confirm)
        for event in past:
            self.note(event)

    def note(self, event: Event) -> None:
        """Follow the journal."""
        if event["event"] == "proposed" and event.get("phase", "search") == "search":
            self._proposals.setdefault(event["config_key"], event)
        elif event["event"] == "race":
            self.look = event
        elif event["event"] == "confirm":
            self.confirmed = event

    def next(self, running: bool) -> Event | None:
        """The next proposal, without trial and index, or None: nothing to run now. `left` says whether there may be
        later, when what is running has ended."""
        if not self._queue and not running and self.left:
            self._decide()
        return self._queue.popleft() if self._queue else None

    def _decide(self) -> None:
        """Fill the queue with what is missing of the current round; where nothing is, go a step further."""
        while self._plan.race and (self.look is None or not self.look["verdict"]):
            if self.look is not None:
                alive, until = [entry["config_key"] for entry in self.look["alive"]], self.look["next"]
                self._enqueue(alive, self._plan.run_seeds(until), "race")
                if self._queue:
                    return
            self._take_look()
        if self._plan.confirm:
            self._choose()
            assert self.confirmed is not None
            chosen = [entry["config_key"] for entry in self.confirmed["chosen"]]
            self._enqueue(chosen, self.confirmed["seeds"], "confirm")
            if self._queue:
                return
        self.left = False

    def _enqueue(self, keys: Sequence[str], seeds: Sequence[int], phase: str) -> None:
        for key in keys:
            runs = {str(seed): self._plan.run_key(key, seed) for seed in seeds}
            new = {seed: run for seed, run in runs.items() if run not in self._rows}
            if new:
                self._queue.append({**self._proposals[key], "runs": new, "phase": phase})

    # --- the race ---

    def _take_look(self) -> None:
        plan, before = self._plan, self.look
        counts = race.looks(plan.seeds, most_seeds(plan))
        number = 0 if before is None else before["look"] + 1
        seeds = plan.run_seeds(counts[number])
        scores = objectives.judged(self._rows.values(), plan.metric, plan.objective.mode)
        whole = [key for key, runs in scores.items() if set(seeds) <= set(runs)]
        entered = list(whole) if before is None else [entry["config_key"] for entry in before["alive"]]
        started = len(whole) if before is None else before["started"]
        racing = [key for key in entered if key in whole]
        crashed = [key for key in entered if key not in whole]
        fields: dict[str, Any] = {"beaten": [], "alive": [], "verdict": "nothing to race"}
        if racing:
            sign = 1.0 if plan.objective.mode == "max" else -1.0
            matrix = sign * np.array([[scores[key][seed] for seed in seeds] for key in racing])
            indices = tuple(range(len(racing)))
            found = race.take_look(matrix, indices, started, counts, number, plan.margin)
            fields = {
                "beaten": [
                    self._named(racing[out.config]) | {"by": self._label(racing[out.by]), "p": out.p}
                    for out in found.beaten
                ],
                "alive": [self._named(racing[i]) | {"mean": float(sign * matrix[i].mean())} for i in found.alive],
                "verdict": found.verdict,
            }
        self._decided(
            "race",
            look=number,
            seeds=counts[number],
            started=started,
            most=counts[-1],
            margin=plan.margin,
            next=None if fields["verdict"] else counts[number + 1],
            crashed=[self._named(key) for key in crashed],
            **fields,
        )

    # --- confirming ---

    def _choose(self) -> None:
        """The k best by their mean over the seeds they were chosen by, whatever else they have been run on."""
        plan = self._plan
        points = objectives.means(self._rows.values(), plan.objectives, plan.modes)
        modes = [plan.modes[name] for name in plan.objectives]
        # who is still in the race has won it; its mean may lie below that of one with fewer seeds
        racing = [entry["config_key"] for entry in self.look["alive"]] if self.look else []
        first = {key: points[key] for key in racing if key in points}
        rest = {key: point for key, point in points.items() if key not in first}
        groups = list(chain(objectives.ranked(first, modes), objectives.ranked(rest, modes)))
        chosen, ties = choose(groups, plan.confirm)
        seeds = plan.fresh_seeds()
        known = self.confirmed
        if known and known["seeds"] == seeds and [entry["config_key"] for entry in known["chosen"]] == chosen:
            return
        self._decided(
            "confirm",
            k=plan.confirm,
            seeds=seeds,
            chosen=[
                self._named(key) | {"place": place, "values": dict(zip(plan.objectives, points[key], strict=True))}
                for place, key in enumerate(chosen, 1)
            ],
            ties=[self._named(key) for key in ties],
        )

    def _named(self, key: str) -> dict[str, Any]:
        return {"config_key": key, "label": self._label(key)}

    def _label(self, key: str) -> str:
        return str(self._proposals[key]["label"])

    def _decided(self, kind: str, **fields: Any) -> None:
        self.note(self._write(kind, **fields))


def choose(groups: Sequence[Sequence[str]], k: int) -> tuple[list[str], list[str]]:
    """The first k of groups of equals, and who was left out although equal to the last one taken."""
    flat = list(chain.from_iterable(groups))
    chosen = list(islice(flat, k))
    last = next((group for group in groups if chosen and chosen[-1] in group), ())
    return chosen, [key for key in last if key not in chosen]
