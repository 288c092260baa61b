"""What is compared: each family's notebook configuration, as one table of configs that differ in one number.

A workload names a sweep of the family, fixes what the notebook fixes, and varies one hyper over a logarithmic range, so
that any number of configs can be asked for. Where its data set is not there, the family's bundled one is taken at
shapes as near as it allows, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trainables.family import BadValue
from tuning.cli import resolve
from tuning.runner import cache_dir
from tuning.sweep import SweepPlan

Fields = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A row of the table.

    Args:
        family, sweep: whose notebook, and which sweep of its the base comes from.
        doc: one line.
        fixed: fields set over the sweep's base.
        axis: the hyper that varies, evenly in its logarithm, from `low` to `high`.
        data: the real set, tried first; `bundled`: what to set where it is not there.
        length: number of update steps -> fields that make a run so long (about).
    """

    family: str
    sweep: str
    doc: str
    axis: str
    low: float
    high: float
    data: str
    length: Callable[[int, bool], Fields]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    bundled: Mapping[str, Any] = field(default_factory=dict)


def _tasks(steps: int, bundled: bool) -> Fields:
    """Tasks of 10 epochs of 10 steps."""
    return {"tasks": max(1, round(steps / 100))}


def _images(steps: int, bundled: bool) -> Fields:
    """Ten epochs of part of the training set, and of the test set in proportion; halved twice on the way."""
    images = 128 * max(1, steps // 10)
    train, test = min(images, 1437 if bundled else 50_000), min(max(images // 5, 64), 360 if bundled else 10_000)
    epochs = max(1, round(steps / -(-train // 128)))
    return {"epochs": epochs, "halve_every": max(1.0, epochs / 3), "train_images": train, "test_images": test}


def _spikes(steps: int, bundled: bool) -> Fields:
    """Five epochs, or more where the training set is short."""
    most = (1437 if bundled else 2700) * 9 // 10
    train = min(32 * max(1, steps // 5), most)
    return {"epochs": max(1, round(steps / -(-train // 32))), "train_examples": 0 if train == most else train}


def _five(steps: int, bundled: bool) -> Fields:
    return {"epochs": 5, "epoch_steps": max(1, steps // 5)}


def _fives(steps: int, bundled: bool) -> Fields:
    return {"epochs": 5, "steps_per_epoch": max(1, steps // 5)}


VIT: Fields = {"train_acc_after": False, "epochs_per_task": 10, "batch": 100}
DIGITS_AS_VIT: Fields = {"data": "digits", "batch": 28}
NEURONS: Fields = {"active": 0.0, "evaluate_on": "test"}

WORKLOADS: dict[str, Workload] = {
    "ci_vit_l3": Workload(
        "ci_vit", "lr", "ViT of 3 blocks, width 48, batch 100: learning rates (the notebook's TODO 1)",
        "lr", 1e-5, 1e-2, "tinyimagenet32", _tasks, {**VIT, "depth": 3}, DIGITS_AS_VIT,
    ),
    "ci_vit_l12": Workload(
        "ci_vit", "lr", "ViT of 12 blocks, width 192, batch 100: learning rates (the notebook's TODO 1)",
        "lr", 1e-6, 1e-3, "tinyimagenet32", _tasks, {**VIT, "depth": 12}, DIGITS_AS_VIT,
    ),
    "vgg_decay": Workload(
        "vgg_decay", "null", "VGG13-like net 32..256, batch 128, variance-inverse decay: base rates around ixp2",
        "wd", 1e-5, 1e-3, "cifar10", _images, {}, {"data": "digits"},
    ),
    "snn_delays": Workload(
        "snn_delays", "seeds_null", "spiking net, stem 7, 3 stages, 32 channels, batch 32: learning rates",
        "lr", 1e-3, 2e-2, "fsdd", _spikes, {"max_ms": 1000.0}, {"data": "digits"},
    ),
    "multi_neuron": Workload(
        "multi_neuron", "n_choices", "multi-neuron MLP 784-64-64-10 of 5 choices, batch 64: learning rates",
        "lr", 3e-3, 3e-1, "mnist", _five, NEURONS, {"data": "digits"},
    ),
    "multi_neuron_plain": Workload(
        "multi_neuron", "n_choices", "its control, the plain MLP 784-64-64-10, batch 64: learning rates",
        "lr", 3e-3, 3e-1, "mnist", _five, {**NEURONS, "choices": 1}, {"data": "digits"},
    ),
    "dln": Workload(
        "dln", "memory_size", "DLN of 500 channels giving digits back, batch 40: learning rates",
        "lr", 1e-5, 1e-2, "mnist", _fives, {"channels": 500}, {"data": "digits"},
    ),
    "nanogpt": Workload(
        "dln", "nanogpt", "nanoGPT's 6-layer GPT of width 384, 64 windows of 256: learning rates",
        "lr", 1e-4, 1e-2, "shakespeare", _fives, {"eval_windows": 64}, {"data": "pydoc"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A workload at a size: the resolved plan and how it was come by."""

    name: str
    workload: Workload
    plan: SweepPlan
    bundled: bool
    flags: list[str]
    """The tune script's arguments that give this plan, but for its name and storage."""

    @property
    def configs(self) -> list[Any]:
        return [self.plan.resolve(point) for point in self.plan.space.grid()]

    @property
    def steps(self) -> int:
        program, _ = self.plan.loaded.build(self.plan.reference.values)
        return self.plan.loaded.schedule(program).steps


def job_of(
    name: str,
    configs: int,
    steps: int,
    precision: str,
    extra: list[str],
    data_dir: Path | None,
    storage: Path,
    bundled: bool = False,
) -> Job:
    """The plan of `configs` configs of about `steps` steps each, one seed, grid and ASHA; on real data if it is there.

    extra: further NAME=VALUE fields, as the tune script's --set.
    """
    if name not in WORKLOADS:
        raise BadValue(f"there is no workload '{name}'; there are: {', '.join(WORKLOADS)}")
    work = WORKLOADS[name]
    values = np.geomspace(work.low, work.high, configs) if configs > 1 else [(work.low * work.high) ** 0.5]
    axis = f"{work.axis}={','.join(f'{value:.6g}' for value in values)}"

    def planned(bundled: bool) -> Job:
        own = work.bundled if bundled else {"data": work.data}
        fields = {**work.fixed, "precision": precision, **work.length(steps, bundled), **own}
        settings = [f"{field}={text_of(value)}" for field, value in fields.items()] + extra
        plan = resolve(
            import_module(f"search_spaces.{work.family}").SWEEPS,
            work.sweep,
            data=None,
            data_dir=data_dir,
            trials=None,
            seeds=1,
            seed=0,
            searcher="grid",
            scheduler="asha",
            metric=None,
            covariates="none",
            lanes="auto",
            engine="auto",
            settings=settings,
            dimensions=[axis],
            name="bench",
            storage=storage,
            tracking_uri=None,
            address="",
            max_concurrent=0,
            time_budget=0.0,
        )
        flags = [work.sweep, "--seeds", "1", "--searcher", "grid", "--scheduler", "asha", "--covariates", "none"]
        flags += ["--space", axis, *(part for text in settings for part in ("--set", text))]
        flags += ["--data-dir", str(data_dir)] if data_dir else []
        return Job(name, work, plan, bundled, flags)

    if not bundled:
        try:
            job = planned(False)
            program, _ = job.plan.loaded.build(job.plan.reference.values)
            job.plan.loaded.load(program, data_dir, cache_dir())
            return job
        except BadValue as error:
            print(f"{name}: the bundled data instead of {work.data} ({error})", flush=True)
    return planned(True)


def text_of(value: Any) -> str:
    """A field's value as --set takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
