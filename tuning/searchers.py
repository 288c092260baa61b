"""Proposing configs: grid, random, quasi-random, Optuna and HyperOpt over the same plain spaces.

`Proposer` is the one searcher Ray Tune sees. It asks a source for points, resolves them, journals them, turns a
duplicate into one more seed of the config it repeats, and tells the source what became of each trial; when the search
is over it hands out what comes after it (`tuning.followup`). Sources that
learn are Tune's own OptunaSearch and HyperOptSearch; here they are told the truth: a trial that the scheduler stopped
is PRUNED with its intermediate values (never COMPLETE with an early one), a diverged or crashed one is FAIL.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray.tune.search import Searcher

from lanes.job import program_name
from search_spaces.space import Axis, Point, Range, Space, is_ordered
from tuning.followup import Followup
from tuning.hyperopt_source import HyperOptSource
from tuning.journal import Event, Journal
from tuning.sweep import Config, SweepPlan, thaw

PRUNED, FAIL, COMPLETE = "pruned", "fail", "complete"


class Source(Protocol):
    """Where points come from."""

    def ask(self, trial: str) -> Point | None:
        """The next point, or None when there are no more."""

    def report(self, trial: str, progress: float, value: float) -> None:
        """An intermediate value."""

    def tell(self, trial: str, outcome: str, value: float | None, others: Sequence[float] = ()) -> None:
        """How a trial ended: PRUNED, FAIL or COMPLETE, and its last value; `others` are the further objectives'."""


class Listed:
    """Points known beforehand: a grid in the notebook's order, or draws numbered 0, 1, 2, ... of a seeded sequence."""

    def __init__(self, points: Iterable[Point]):
        self._points = iter(points)

    def ask(self, trial: str) -> Point | None:
        return next(self._points, None)

    def report(self, trial: str, progress: float, value: float) -> None:
        pass

    def tell(self, trial: str, outcome: str, value: float | None, others: Sequence[float] = ()) -> None:
        pass


def random_points(space: Space, seed: int) -> Iterable[Point]:
    """Independent uniform draws (in each axis's own scale), without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield space.at({axis.name: float(u) for axis, u in zip(space.axes, rng.random(len(space.axes)), strict=True)})


def quasi_random_points(space: Space, seed: int) -> Iterable[Point]:
    """A scrambled Sobol sequence (Owen scrambling, scipy.stats.qmc): even coverage from the first points on."""
    from scipy.stats import qmc  # takes a second to import

    sobol = qmc.Sobol(max(1, len(space.axes)), scramble=True, rng=seed)
    while True:
        row = sobol.random(1)[0]
        yield space.at({axis.name: min(float(u), 1 - 2**-53) for axis, u in zip(space.axes, row, strict=False)})


class OptunaSource:
    """Tune's OptunaSearch over a define-by-run space, so that conditional axes exist only where they are active.

    One mode an objective. With several, TPE is Optuna's multi-objective one (Ozaki et al., JAIR 73, 2022); a study of
    several objectives takes no intermediate values, so that what a scheduler stops is to it a bad config, no more.
    """

    def __init__(self, space: Space, modes: Sequence[str], seed: int, startup: int):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        self._optuna = optuna
        self._space = space
        names, several = [f"value {i}" for i in range(len(modes))], len(modes) > 1
        metric: Any = names if several else names[0]
        self._search = OptunaSearch(
            self._define, metric=metric, mode=list(modes) if several else modes[0], sampler=sampler
        )
        self._several = several
        self._points: dict[str, Point] = {}
        self._reported: dict[str, int] = {}
        self._asking = ""

    def _define(self, trial: Any) -> None:
        point: Point = {}
        for axis in self._space.axes:
            if self._space.is_active(axis, point):
                point[axis.name] = self._suggest(trial, axis)
        self._points[self._asking] = point

    @staticmethod
    def _suggest(trial: Any, axis: Axis) -> Any:
        if isinstance(axis, Range):
            suggest = trial.suggest_int if axis.integer else trial.suggest_float
            return suggest(axis.name, axis.low, axis.high, log=axis.log)
        if is_ordered(axis):
            order = sorted(axis.values)
            return order[trial.suggest_int(axis.name, 0, len(order) - 1)]
        return axis.values[trial.suggest_categorical(axis.name, list(range(len(axis.values))))]

    def ask(self, trial: str) -> Point | None:
        self._asking = trial
        self._search.suggest(trial)
        return self._points.pop(trial)

    def _trial(self, trial: str) -> Any:
        return self._search._ot_trials[trial]

    def report(self, trial: str, progress: float, value: float) -> None:
        step = round(progress * 1000)
        if not self._several and math.isfinite(value) and self._reported.get(trial) != step:
            self._reported[trial] = step
            self._trial(trial).report(value, step)

    def tell(self, trial: str, outcome: str, value: float | None, others: Sequence[float] = ()) -> None:
        states = self._optuna.trial.TrialState
        state = {PRUNED: states.PRUNED, FAIL: states.FAIL, COMPLETE: states.COMPLETE}[outcome]
        study: Any = self._search._ot_study
        study.tell(self._trial(trial), [value, *others] if outcome == COMPLETE else None, state=state)


def make_source(plan: SweepPlan) -> Source:
    """The plan's searcher, seeded."""
    startup = max(4, min(10, plan.budget // 3))
    if plan.searcher == "grid":
        return Listed(plan.space.grid())
    if plan.searcher == "random":
        return Listed(random_points(plan.space, plan.seed))
    if plan.searcher == "qmc":
        return Listed(quasi_random_points(plan.space, plan.seed))
    if plan.searcher == "optuna":
        return OptunaSource(plan.space, list(plan.modes.values()), plan.seed, startup)
    return HyperOptSource(plan.space, plan.objective.mode, plan.seed, startup)


class Proposer(Searcher):
    """What Ray Tune asks for configs.

    Args:
        plan: the sweep.
        source: where points come from, in the state the journal left it in.
        journal: each proposal is written before it is handed out.
        proposed: how many the journal holds already.
        seeds_used: config key -> runs it has had, from the journal.
        unfinished: proposals to continue first, as journalled.
        on_resume: told (new trial id, the one it replaces) of each of them.
        followup: what to run when the search is over; None: nothing.
    """

    def __init__(
        self,
        plan: SweepPlan,
        source: Source,
        journal: Journal,
        on_event: Any,
        proposed: int = 0,
        seeds_used: Mapping[str, int] | None = None,
        unfinished: Iterable[Event] = (),
        on_resume: Callable[[str, str], None] = lambda trial, replaces: None,
        followup: Followup | None = None,
    ):
        super().__init__(metric=plan.metric, mode=plan.objective.mode)
        self._plan = plan
        self._source = source
        self._journal = journal
        self._on_event = on_event
        self._proposed = proposed
        self._seeds_used = dict(seeds_used or {})
        self._unfinished = deque(unfinished)
        self._exhausted = False
        self._on_resume = on_resume
        self._followup = followup
        self._names: dict[str, str] = {}  # trial id -> the id the source knows it by
        self._last: dict[str, tuple[float, float]] = {}  # trial id -> progress and value of its newest result
        self._live: set[str] = set()
        self.limit: float = math.inf  # of configs in flight; may be raised while the sweep runs

    @property
    def remaining(self) -> int:
        """What has not been handed out: configs, and one where more may follow the search."""
        ahead = int(self._followup is not None and self._followup.left)
        return len(self._unfinished) + (0 if self._exhausted else self._plan.budget - self._proposed) + ahead

    def suggest(self, trial_id: str) -> Any:
        if self.remaining and len(self._live) >= self.limit:
            return None
        suggested = self._next(trial_id)
        if isinstance(suggested, dict):
            self._live.add(trial_id)
        return suggested

    def _next(self, trial_id: str) -> Any:
        """A trial's config; None: ask again when something has ended; or FINISHED."""
        if self._unfinished:
            event = self._unfinished.popleft()
            if event["index"] >= 0 and not event.get("heard"):  # what PBT made is nothing the source knows
                self._names[trial_id] = event["trial_first"]
            self._on_resume(trial_id, event["trial"])
            self._on_event(
                self._journal.write("resumed", trial=trial_id, config_key=event["config_key"], replaces=event["trial"])
            )
            return _trial_config(event, self._plan.resolve(thaw(event["point"])), event["reported"])
        point = None
        if self._proposed < self._plan.budget and not self._exhausted:
            point = self._source.ask(trial_id)
            self._exhausted = point is None
        if point is None:
            return self._follow(trial_id)
        self._names[trial_id] = trial_id
        config = self._plan.resolve(point)
        used = self._seeds_used.get(config.key, 0)
        seeds = self._plan.run_seeds() if not used else self._plan.run_seeds(1, first=used)
        self._seeds_used[config.key] = used + len(seeds)
        event = self._journal.write(
            "proposed",
            index=self._proposed,
            phase="search",
            trial=trial_id,
            config_key=config.key,
            label=config.label,
            algorithm=config.algorithm,
            point=config.point,
            values=config.values,
            program=config.program,
            hyper=config.hyper,
            runs={str(seed): self._plan.run_key(config.key, seed) for seed in seeds},
            epochs=config.epochs,
        )
        self._proposed += 1
        self._on_event(event)
        if self._followup is not None:
            self._followup.note(event)
        return _trial_config(event, config, 0)

    def _follow(self, trial_id: str) -> Any:
        """What comes after the search: nothing of it is told to the source."""
        proposal = None if self._followup is None else self._followup.next(bool(self._live))
        if proposal is None:
            waiting = self._followup is not None and self._followup.left
            return None if waiting else Searcher.FINISHED
        fields = {name: value for name, value in proposal.items() if name not in ("event", "time")}
        event = self._journal.write("proposed", **{**fields, "index": -1, "trial": trial_id})
        self._on_event(event)
        return _trial_config(event, self._plan.resolve(thaw(event["point"])), 0)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._names:
            self._last[trial_id] = result["progress"], result[self.metric]
            self._source.report(self._names[trial_id], *self._last[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._live.discard(trial_id)
        self._last.pop(trial_id, None)
        self._tell(trial_id, result, error)

    def _tell(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        if trial_id in self._names:
            tell_end(self._source, self._names.pop(trial_id), result, error, self._plan.objectives)

    def abandon(self, trial_id: str) -> None:
        """The trial goes on with another config (PBT): the proposed one counts as stopped where it stood."""
        progress, value = self._last.get(trial_id, (0.0, math.nan))
        self._tell(trial_id, {"progress": progress, self.metric: value}, error=False)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the journal is the searcher's state. Tune pickles its parts for a restore that is never used."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `tuning.resume`."""


def outcome_of(result: Mapping[str, Any] | None, error: bool, objectives: Sequence[str]) -> tuple[str, list[float]]:
    """What a source is told of a trial's end: the outcome, and its last value of each objective."""
    result = result or {}
    if error or result.get("stop_reason") in ("diverged", "crashed", "oom", "storage"):
        return FAIL, []
    finished = result.get("stop_reason") == "finished"
    values = [result.get(name, math.nan) for name in (objectives if finished else objectives[:1])]
    if not all(map(math.isfinite, values)):
        return FAIL, []
    return (COMPLETE if finished else PRUNED), values


def tell_end(
    source: Source, trial: str, result: Mapping[str, Any] | None, error: bool, objectives: Sequence[str]
) -> None:
    """Tell a source how a trial ended. Tune keeps the result at which a trial was stopped from its searcher: a pruned
    trial without it would say nothing, so it is told first."""
    outcome, values = outcome_of(result, error, objectives)
    if outcome == PRUNED and result is not None:
        source.report(trial, result["progress"], values[0])
    source.tell(trial, outcome, values[0] if values else None, values[1:])


def _trial_config(event: Event, config: Config, reported: int) -> dict[str, Any]:
    """What the Tune trial holds; reports up to the epoch `reported` were journalled before and are not repeated."""
    return {
        "config_key": event["config_key"],
        "point": dict(config.point),
        "values": dict(config.values),
        "program": program_name(config.program),  # one text: Tune copies and flattens what is nested
        "runs": dict(event["runs"]),
        "parent": event.get("parent", {}),
        "phase": event["phase"],
        "epochs": config.epochs,
        "reports": [epoch for epoch in config.reports if epoch > reported],
        "worst": dict(event.get("worst", {})),
    }
