"""`--plan`: what would run, and from a few calibrating steps how long it would take."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import torch
from rich.console import Console

from lanes.engine import put
from lanes.probe import probe
from trainables.family import program_key
from tuning.demand import GPU_LANES
from tuning.followup import most_seeds
from tuning.progress import clock
from tuning.runner import CPU_LANES, cache_dir
from tuning.sweep import SweepPlan

MOST_PROGRAMS = 40


def print_plan(plan: SweepPlan, console: Console) -> None:
    """Configs, runs and steps; for each program the probe's table; then hours on this machine and device-hours."""
    programs = _programs(plan)
    cuda = torch.cuda.is_available()
    devices = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    if not cuda:
        torch.set_num_threads(1)
    console.print(f"{plan.family} {plan.sweep}: {plan.doc}")
    console.print(
        f"{plan.budget} configs x {plan.seeds} seeds by {plan.searcher}, scheduler {plan.scheduler}, "
        f"metric {', '.join(f'{name} ({mode})' for name, mode in plan.modes.items())}"
    )
    further = _after_the_search(plan, console)
    share = (plan.budget * plan.seeds + further) / len(programs)
    seconds = 0.0
    for program, hyper, label in programs:
        schedule = plan.loaded.schedule(program)
        arrays = put(plan.loaded.load(program, plan.data_dir, cache_dir()), "cuda" if cuda else "cpu")
        choice = probe(
            plan.loaded,
            program,
            hyper,
            arrays,
            "cuda" if cuda else "cpu",
            wanted=GPU_LANES if cuda else CPU_LANES,
        )
        best = max(row.rate for row in choice.table)
        seconds += share * schedule.steps / best
        console.print(f"\nprogram of {label}: {schedule.steps:,} steps a run, {schedule.epochs} epochs")
        for line in choice.lines():
            console.print(f"  {line}")
    console.print(
        f"\nat most {clock(seconds / devices)} on {devices} {'GPU' if cuda else 'core'}s of this machine "
        f"({seconds / 3600:.2f} device-hours); a scheduler that prunes makes it shorter"
    )


def _after_the_search(plan: SweepPlan, console: Console) -> int:
    """Say what follows the search. Returns the most runs that it can take."""
    runs = 0
    if plan.race:
        most = most_seeds(plan)
        console.print(f"then a race: up to {most} seeds for configs that may still be the best")
        runs += plan.budget * (most - plan.seeds)
    if plan.confirm:
        seeds = len(plan.fresh_seeds())
        console.print(f"then the {plan.confirm} best on {seeds} fresh seeds")
        runs += plan.confirm * seeds
    return runs


def _programs(plan: SweepPlan) -> list[tuple[Any, Any, str]]:
    """Each distinct program of the sweep once, with the hyper and label of a config that has it."""
    points = (
        islice(plan.space.grid(), 5000)
        if plan.space.size() is not None
        else [plan.space.at({axis.name: f for axis in plan.space.axes}) for f in (0.0, 0.25, 0.5, 0.75)]
    )
    found: dict[str, tuple[Any, Any, str]] = {}
    for point in points:
        config = plan.resolve(point)
        program, hyper = plan.loaded.build(config.values)
        found.setdefault(program_key(plan.family, program), (program, hyper, config.label))
        if len(found) == MOST_PROGRAMS:
            break
    return list(found.values())
