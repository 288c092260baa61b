"""Deciding which configs go on: Tune's own ASHA, median rule and PBT, their decisions journalled.

Schedulers count `progress` (see `tuning.sweep`), not iterations, so that a rung is a rung wherever a run reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from search_spaces.space import Arms, Axis, Range
from tuning.sweep import REDUCTION, SEGMENTS, SweepPlan


class Decided(TrialScheduler):
    """Mixed into a scheduler: tells `on_decision(trial, result, decision)` what it decided."""

    on_decision: Callable[[Any, dict[str, Any], str], None]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        self.on_decision(trial, result, decision)
        return decision


class Asha(Decided, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020), Ray's stopping variant."""


class Median(Decided, MedianStoppingRule):
    """Median stopping rule (Golovin et al. 2017)."""


class Pbt(Decided, PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017)."""


class Fifo(Decided, FIFOScheduler):
    """No early stopping."""


def make_scheduler(plan: SweepPlan, on_decision: Callable[[Any, dict[str, Any], str], None]) -> TrialScheduler:
    """The plan's scheduler. Metric and mode are set here, not in TuneConfig (Tune refuses both)."""
    scheduler: Decided
    common: dict[str, Any] = {"metric": plan.metric, "mode": plan.objective.mode}
    if plan.scheduler == "asha":
        scheduler = Asha(time_attr="progress", max_t=plan.length, grace_period=1, reduction_factor=REDUCTION, **common)
    elif plan.scheduler == "median":
        never: Any = math.inf  # a trial without enough company goes on instead of pausing
        scheduler = Median(time_attr="progress", grace_period=3, min_samples_required=3, min_time_slice=never, **common)
    elif plan.scheduler == "pbt":
        scheduler = Pbt(
            time_attr="progress",
            perturbation_interval=plan.length / SEGMENTS["pbt"],
            hyperparam_mutations={"point": mutations(plan)},
            **common,
        )
    else:
        scheduler = Fifo()
    scheduler.on_decision = on_decision
    return scheduler


def mutations(plan: SweepPlan) -> dict[str, Any]:
    """Axes that PBT may perturb: those that set a hyper, never the program (that would be another net)."""
    found: dict[str, Any] = {}
    for axis in plan.space.axes:
        if isinstance(axis, Arms) or axis.when or (axis.sets or axis.name) not in plan.loaded.hyper_fields:
            continue
        found[axis.name] = (
            _resample(axis, np.random.default_rng(plan.seed)) if isinstance(axis, Range) else [*axis.values]
        )
    return found


def _resample(axis: Axis, rng: np.random.Generator) -> Callable[[], float]:
    assert isinstance(axis, Range)
    return lambda: axis.at(float(rng.random()))
