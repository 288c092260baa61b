"""Proposing configs: grid, random, quasi-random, Optuna and HyperOpt over the same plain spaces.

`Proposer` is the one searcher Ray Tune sees. It asks a source for points, resolves them, journals them, turns a
duplicate into one more seed of the config it repeats, and tells the source what became of each trial. Sources that
learn are Tune's own OptunaSearch and HyperOptSearch; here they are told the truth: a trial that the scheduler stopped
is PRUNED with its intermediate values (never COMPLETE with an early one), a diverged or crashed one is FAIL.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from ray.tune.search import Searcher

from lanes.job import program_name
from search_spaces.space import Axis, Choice, Point, Range, Space
from trainables.family import BadValue
from tuning.journal import Event, Journal
from tuning.sweep import Config, SweepPlan, thaw

PRUNED, FAIL, COMPLETE = "pruned", "fail", "complete"


class Source(Protocol):
    """Where points come from."""

    def ask(self, trial: str) -> Point | None:
        """The next point, or None when there are no more."""

    def report(self, trial: str, progress: float, value: float) -> None:
        """An intermediate value."""

    def tell(self, trial: str, outcome: str, value: float | None) -> None:
        """How a trial ended: PRUNED, FAIL or COMPLETE, and its last value."""


class Listed:
    """Points known beforehand: a grid in the notebook's order, or draws numbered 0, 1, 2, ... of a seeded sequence."""

    def __init__(self, points: Iterable[Point]):
        self._points = iter(points)

    def ask(self, trial: str) -> Point | None:
        return next(self._points, None)

    def report(self, trial: str, progress: float, value: float) -> None:
        pass

    def tell(self, trial: str, outcome: str, value: float | None) -> None:
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
    """Tune's OptunaSearch over a define-by-run space, so that conditional axes exist only where they are active."""

    def __init__(self, space: Space, mode: str, seed: int, startup: int):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        self._optuna = optuna
        self._space = space
        self._search = OptunaSearch(self._define, metric="value", mode=mode, sampler=sampler)
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
        if math.isfinite(value) and self._reported.get(trial) != step:
            self._reported[trial] = step
            self._trial(trial).report(value, step)

    def tell(self, trial: str, outcome: str, value: float | None) -> None:
        states = self._optuna.trial.TrialState
        state = {PRUNED: states.PRUNED, FAIL: states.FAIL, COMPLETE: states.COMPLETE}[outcome]
        study: Any = self._search._ot_study
        study.tell(self._trial(trial), value if outcome == COMPLETE else None, state=state)


class HyperOptSource:
    """Tune's HyperOptSearch over nested hp.choice spaces. HyperOpt knows no pruned trials: they count by their last
    value, which is what its TPE ranks; failed ones are left out of the ranking."""

    def __init__(self, space: Space, mode: str, seed: int, startup: int):
        from ray.tune.search.hyperopt import HyperOptSearch

        self._space = space
        self._search = HyperOptSearch(
            hyperopt_space(space), metric="value", mode=mode, n_initial_points=startup, random_state_seed=seed
        )

    def ask(self, trial: str) -> Point | None:
        raw = _flatten(self._search.suggest(trial) or {})
        point: Point = {}
        for axis in self._space.axes:
            if self._space.is_active(axis, point):
                value = raw[axis.name]
                if isinstance(axis, Range):
                    inside = min(max(value, axis.low), axis.high)
                    point[axis.name] = int(inside) if axis.integer else float(inside)
                else:
                    order = sorted(axis.values) if is_ordered(axis) else axis.values
                    point[axis.name] = order[min(max(int(value), 0), len(order) - 1)]
        return point

    def report(self, trial: str, progress: float, value: float) -> None:
        pass

    def tell(self, trial: str, outcome: str, value: float | None) -> None:
        if outcome == FAIL or value is None or not math.isfinite(value):
            self._search.on_trial_complete(trial, error=True)
        else:
            self._search.on_trial_complete(trial, {"value": value})


def is_ordered(axis: Axis) -> bool:
    """Whether a choice is among numbers: then neighbours are alike, and a model may know it."""
    return isinstance(axis, Choice) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis.values
    )


def hyperopt_space(space: Space) -> dict[str, Any]:
    """The space as nested dicts of hp expressions: an axis that others depend on becomes an hp.choice of branches.

    An axis that depends on two axes of which neither depends on the other cannot stand in a tree: it is drawn always,
    and ignored where it is inactive.
    """
    from hyperopt import hp

    controlling = {other for axis in space.axes for other in axis.when}
    leaves = {axis.name: _hyperopt_leaf(hp, axis) for axis in space.axes if axis.name not in controlling}
    placed: set[str] = set()

    def branch(axes: Iterable[Axis], point: Point) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for axis in axes:
            if not space.is_active(axis, point):
                continue
            placed.add(axis.name)
            if axis.name not in controlling:
                tree[axis.name] = leaves[axis.name]
                continue
            if isinstance(axis, Range):
                raise BadValue(f"{axis.name} is a range: other axes cannot depend on it")
            below = [other for other in space.axes if axis.name in _ancestors(space, other)]
            order = sorted(axis.values) if is_ordered(axis) else axis.values
            options = [{axis.name: i, **branch(below, {**point, axis.name: value})} for i, value in enumerate(order)]
            path = "".join(f"{value}/" for value in point.values())
            tree[f"{axis.name}?"] = hp.choice(f"{path}{axis.name}", options)
        return tree

    tree = branch(space.axes, {})
    return tree | {name: leaf for name, leaf in leaves.items() if name not in placed}


def _ancestors(space: Space, axis: Axis) -> set[str]:
    found = set(axis.when)
    for other in axis.when:
        found |= _ancestors(space, space[other])
    return found


def _hyperopt_leaf(hp: Any, axis: Axis) -> Any:
    """Whole numbers are rounded draws from half below the first to half above the last, so that the two at the ends
    are as likely as the others; `ask` brings back what rounds to outside."""
    if isinstance(axis, Range):
        if axis.integer:
            if axis.log:
                return hp.qloguniform(axis.name, math.log(axis.low - 0.5), math.log(axis.high + 0.5), 1)
            return hp.quniform(axis.name, axis.low - 0.5, axis.high + 0.5, 1)
        if axis.log:
            return hp.loguniform(axis.name, math.log(axis.low), math.log(axis.high))
        return hp.uniform(axis.name, axis.low, axis.high)
    if is_ordered(axis):
        return hp.quniform(axis.name, -0.5, len(axis.values) - 0.5, 1) if len(axis.values) > 1 else 0
    return hp.choice(axis.name, list(range(len(axis.values))))


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(_flatten(value) if isinstance(value, Mapping) else {name: value})
    return flat


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
        return OptunaSource(plan.space, plan.objective.mode, plan.seed, startup)
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
        self._names: dict[str, str] = {}  # trial id -> the id the source knows it by
        self._last: dict[str, tuple[float, float]] = {}  # trial id -> progress and value of its newest result
        self._live: set[str] = set()
        self.limit: float = math.inf  # of configs in flight; may be raised while the sweep runs

    @property
    def remaining(self) -> int:
        """Configs that have not been handed out."""
        return len(self._unfinished) + (0 if self._exhausted else self._plan.budget - self._proposed)

    def suggest(self, trial_id: str) -> Any:
        if self.remaining and len(self._live) >= self.limit:
            return None
        config = self._next(trial_id)
        if config != Searcher.FINISHED:
            self._live.add(trial_id)
        return config

    def _next(self, trial_id: str) -> Any:
        if self._unfinished:
            event = self._unfinished.popleft()
            if event["index"] >= 0 and not event.get("heard"):  # what PBT made is nothing the source knows
                self._names[trial_id] = event["trial_first"]
            self._on_resume(trial_id, event["trial"])
            self._on_event(
                self._journal.write("resumed", trial=trial_id, config_key=event["config_key"], replaces=event["trial"])
            )
            return _trial_config(event, self._plan.resolve(thaw(event["point"])), event["reported"])
        if self._proposed >= self._plan.budget:
            return Searcher.FINISHED
        point = self._source.ask(trial_id)
        if point is None:
            self._exhausted = True
            return Searcher.FINISHED
        self._names[trial_id] = trial_id
        config = self._plan.resolve(point)
        used = self._seeds_used.get(config.key, 0)
        seeds = self._plan.run_seeds() if not used else self._plan.run_seeds(1, first=used)
        self._seeds_used[config.key] = used + len(seeds)
        event = self._journal.write(
            "proposed",
            index=self._proposed,
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
        return _trial_config(event, config, 0)

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
            tell_end(self._source, self._names.pop(trial_id), result, error, self.metric)

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


def outcome_of(result: Mapping[str, Any] | None, error: bool, metric: str) -> tuple[str, float | None]:
    """What a source is told of a trial's end."""
    value = None if result is None else result.get(metric)
    if (
        error
        or value is None
        or not math.isfinite(value)
        or (result or {}).get("stop_reason") in ("diverged", "crashed", "oom", "storage")
    ):
        return FAIL, None
    return (COMPLETE if (result or {}).get("stop_reason") == "finished" else PRUNED), value


def tell_end(source: Source, trial: str, result: Mapping[str, Any] | None, error: bool, metric: str) -> None:
    """Tell a source how a trial ended. Tune keeps the result at which a trial was stopped from its searcher: a pruned
    trial without it would say nothing, so it is told first."""
    outcome, value = outcome_of(result, error, metric)
    if outcome == PRUNED and result is not None and value is not None:
        source.report(trial, result["progress"], value)
    source.tell(trial, outcome, value)


def _trial_config(event: Event, config: Config, reported: int) -> dict[str, Any]:
    """What the Tune trial holds; reports up to the epoch `reported` were journalled before and are not repeated."""
    return {
        "config_key": event["config_key"],
        "point": dict(config.point),
        "values": dict(config.values),
        "program": program_name(config.program),  # one text: Tune copies and flattens what is nested
        "runs": dict(event["runs"]),
        "parent": event.get("parent", {}),
        "epochs": config.epochs,
        "reports": [epoch for epoch in config.reports if epoch > reported],
        "worst": dict(event.get("worst", {})),
    }
