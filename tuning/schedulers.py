"""Deciding which configs go on: Tune's own ASHA, median rule and PBT, their decisions journalled.

Schedulers count `progress` (see `tuning.sweep`), not iterations, so that a rung is a rung wherever a run reports.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ray.tune import Checkpoint
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from lanes.job import program_name
from search_spaces.space import Range
from tuning.sweep import REDUCTION, SEGMENTS, SweepPlan, clamp, perturbable

FAILED = ("crashed", "oom", "storage")
"""Stop reasons of a config that ended by no fault of its values."""


class Decided(TrialScheduler):
    """Mixed into a scheduler: tells `on_decision(trial, result, decision)` what it decided.

    It sees the search's trials only. What comes after the search (a race's rounds, confirming) runs to its end and is
    no measure for others.

    `replayable` says whether a resumed sweep plays its journal to the scheduler; `adopt` then tells it that a config
    goes on under a new trial id.
    """

    on_decision: Callable[[Any, dict[str, Any], str], None] = staticmethod(lambda trial, result, decision: None)
    replayable = True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if searched(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if searched(trial):
            super().on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if searched(trial):
            super().on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not searched(trial):
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        self.on_decision(trial, result, decision)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if not searched(trial):
            return
        if result.get("stop_reason") in FAILED:
            self.on_trial_error(tune_controller, trial)  # its values say nothing of others
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def adopt(self, trial_id: str, past: Any, result: Mapping[str, Any] | None) -> None:
        """The config of the earlier trial `past` continues as `trial_id`; `result` is the last that it reported."""


def searched(trial: Any) -> bool:
    """Whether a trial belongs to the search."""
    return trial.config.get("phase", "search") == "search"


class Asha(Decided, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020), Ray's stopping variant."""

    def adopt(self, trial_id: str, past: Any, result: Mapping[str, Any] | None) -> None:
        """Rungs know configs by trial id: under a new one it would be recorded again, at every rung it has passed, with
        what it reaches later."""
        for bracket in self._brackets:
            for _, recorded in bracket._rungs:
                if past.trial_id in recorded:
                    recorded[trial_id] = recorded.pop(past.trial_id)


class Median(Decided, MedianStoppingRule):
    """Median stopping rule (Golovin et al. 2017)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._past: dict[str, Any] = {}

    def adopt(self, trial_id: str, past: Any, result: Mapping[str, Any] | None) -> None:
        self._past[trial_id] = past

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if not searched(trial):
            return
        past = self._past.pop(trial.trial_id, None)
        if past is not None and past in self._results:  # one config, one curve: before and after the restart
            self._results[trial] = self._results.pop(past)


class Pbt(Decided, PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017).

    Tune decides who copies whom. What the copy is, is made here: the donor's config with its perturbable axes changed
    and put back into their ranges, under a run key of its own that names its lineage, continuing from the donor's
    states. `exploited(trial_id, config)` is told. Every draw derives from the sweep's seed and the number of decisions
    before it. A resumed population is not replayed: each member is given the score, the time and the states that it
    had, so that whoever reports next is compared with all of them, and may copy from any.
    """

    exploited: Callable[[str, dict[str, Any]], None] = staticmethod(lambda trial, config: None)
    replayable = False

    def __init__(self, plan: SweepPlan, **kwargs: Any):
        super().__init__(**kwargs)
        self._plan = plan
        self._decisions = 0
        self._adopted: dict[str, Mapping[str, Any]] = {}

    def adopt(self, trial_id: str, past: Any, result: Mapping[str, Any] | None) -> None:
        if result is not None and math.isfinite(result[self._plan.metric]):
            self._adopted[trial_id] = result

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Tune refuses PBT beside any searcher; `tuning.searchers.Proposer` knows how to give up a trial
        alone: Any = SimpleNamespace(search_alg=None)
        super().on_trial_add(alone, trial)
        result = self._adopted.pop(trial.trial_id, None)
        if result is not None:
            state: Any = self._trial_state[trial]
            self._save_trial_state(state, result["progress"], dict(result), trial)
            state.last_perturbation_time = result["progress"]
            state.last_checkpoint = self._pointer(trial)

    def _pointer(self, trial: Any) -> Any:
        """What Tune takes for a checkpoint of a trial: the states themselves are in the sweep's own store."""
        folder = self._plan.folder / "ray" / "resumed" / trial.trial_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pointer.json").write_text(json.dumps({"runs": trial.config["runs"], "epoch": 0}))
        return Checkpoint.from_directory(folder)

    def skip(self, decisions: int) -> None:
        """As many decisions have been made before a restart."""
        self._decisions += decisions

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._decisions += 1
        shared = random.getstate()  # Tune draws from the process's own generator
        random.seed(f"{self._plan.seed}/{self._decisions}")
        try:
            return super().on_trial_result(tune_controller, trial, result)
        finally:
            random.setstate(shared)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        explored, operations = super()._get_new_config(trial, trial_to_clone)
        state: Any = self._trial_state[trial_to_clone]
        epoch = int(state.last_result["epoch"])
        made = descend(self._plan, explored, trial_to_clone.config, epoch, trial.config)
        self.exploited(trial.trial_id, made)
        return made, operations


def descend(
    plan: SweepPlan, explored: Mapping[str, Any], donor: Mapping[str, Any], epoch: int, old: Mapping[str, Any]
) -> dict[str, Any]:
    """The trial config that continues `donor` from `epoch` at the perturbed point, in the place of `old`."""
    config = plan.resolve(clamp(plan.space, explored["point"]))
    lineage = "/".join((config.key, str(epoch), *donor["runs"].values(), *old["runs"].values()))
    runs = {seed: plan.run_key(lineage, int(seed)) for seed in donor["runs"]}
    return {
        "config_key": config.key,
        "label": config.label,
        "algorithm": config.algorithm,
        "point": dict(config.point),
        "values": dict(config.values),
        "program": program_name(config.program),
        "hyper": config.hyper,
        "runs": runs,
        "epochs": config.epochs,
        "reports": [at for at in config.reports if at > epoch],
        "parent": {seed: (key, epoch) for seed, key in donor["runs"].items()},
    }


class Fifo(Decided, FIFOScheduler):
    """No early stopping."""


def make_scheduler(plan: SweepPlan) -> Decided:
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
            plan,
            time_attr="progress",
            # every report decides: segments end at whole epochs, so that two may be little more than half one apart
            perturbation_interval=0.5 * plan.length / SEGMENTS["pbt"],
            hyperparam_mutations={"point": mutations(plan)},
            **common,
        )
    else:
        scheduler = Fifo()
    return scheduler


def mutations(plan: SweepPlan) -> dict[str, Any]:
    """What PBT may do to each perturbable axis: a list of values to step along, or a draw to resample from."""

    def draw(axis: Range) -> Callable[[], float]:
        return lambda: axis.at(random.random())  # of the generator that `Pbt` seeds for each decision

    return {
        axis.name: draw(axis) if isinstance(axis, Range) else sorted(axis.values)
        for axis in perturbable(plan.space, plan.loaded)
    }
