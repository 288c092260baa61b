"""Continual classification with a small vision transformer: plasticity methods on a stream of class pairs.

The notebook "Continual ImageNet with ViT": data, model and methods as in ajozefiak/CL-transformers (2024-12, 2025-01).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainables.ci_vit.images import load
from trainables.ci_vit.program import COVARIATES, MAX_DEPTH, PRESETS, Hyper, Program, schedule, validate
from trainables.family import Case, Family, Late, Metric


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each curve's value at the last epoch of each task, averaged over the last completed tasks: `<name>_last`.

    Not over the last epochs, which would count each task's first, unlearned epochs as well. Until the first task is
    complete, the value of the last epoch seen.
    """
    summary = {}
    for name in ("test_acc", "test_loss", "train_acc", "train_acc_after", "train_loss", "resets"):
        curve = epochs.get(name)
        if curve is None or not len(curve):
            continue
        ends = curve[program.epochs_per_task - 1 :: program.epochs_per_task]
        summary[f"{name}_last"] = float(np.mean(ends[-program.averaged :]) if len(ends) else curve[-1])
    return summary


def _metrics() -> dict[str, Metric]:
    per_step = {
        "train_loss": Metric("nats", "min", "cross-entropy alone on the batch, before the update"),
        "train_acc": Metric("fraction", "max", "accuracy on the batch, before the update"),
        "train_acc_after": Metric("fraction", "max", "accuracy on the same batch after the update and its resets"),
        "resets": Metric("count", "none", "MLP units reset at a step, all layers"),
        "test_acc": Metric("fraction", "max", "accuracy on the current task's test images, after the epoch"),
        "test_loss": Metric("nats", "min", "cross-entropy on the current task's test images, after the epoch"),
    }
    last = {
        f"{name}_last": Metric(metric.unit, metric.mode, f"{metric.doc}; a task's last epoch, mean of the last tasks")
        for name, metric in per_step.items()
    }
    layers = {}
    for layer in range(MAX_DEPTH):
        layers[f"resets/{layer}"] = Metric("count", "none", f"MLP units of block {layer} reset at a step")
        for part in ("train", "test"):
            for moment, word in (("mean", "mean"), ("std", "standard deviation")):
                layers[f"{part}_entropy_{moment}/{layer}"] = Metric(
                    "nats", "none", f"{word} of attention entropy over images, heads and queries, block {layer}"
                )
    return {**per_step, **last, **layers}


_TINY = {
    "depth": 2,
    "hidden": 6,
    "patch": 4,
    "train_per_class": 20,
    "test_per_class": 6,
    "batch": 8,
    "tasks": 4,
    "epochs_per_task": 3,
}


def _case(algorithm: str, hyper: Mapping[str, float], **program: Any) -> Case:
    return Case({**_TINY, "algorithm": algorithm, **program}, {"lr": 3e-3, **hyper})


CASES = {
    "vanilla": _case("vanilla", {}),
    "l2": _case("vanilla", {"l2": 1e-2}),
    "l2init": _case("vanilla", {"l2_init": 1e-2}),
    "shrink_perturb": _case("shrink_perturb", {"shrink": 0.99, "sigma": 1e-2}),
    "fresh_start": _case("shrink_perturb", {"fresh_start": 1.0}, tasks=6, epochs_per_task=2),
    "cbp": _case("cbp", {"reset_freq": 0.05, "cbp_age": 5.0}),
    "redo": _case("redo", {"reset_freq": 0.2, "redo_threshold": 0.02}),
    "redo_mean": _case("redo", {"reset_freq": 0.2, "redo_threshold": 0.4, "redo_mean": 1.0}),
    "snr": _case("snr", {"reset_freq": 0.1, "snr_percentile": 0.6, "snr_threshold": 2.0, "snr_epsilon": 0.8}),
    "snr_v2": _case("snr_v2", {"reset_freq": 0.1, "snr_percentile": 0.6}),
    "snr_v2_l2_star": _case(
        "snr_v2", {"reset_freq": 0.1, "snr_percentile": 0.55, "l2": 1e-2, "l2_mlp_in": 0.0, "l2_other": 0.0}
    ),
    "covariates": _case(
        "cbp",
        {"reset_freq": 0.05, "cbp_age": 5.0, "cbp_ties": 1.0},
        covariates=("ages", "resets", "entropy", "norms", "dead"),
        train_acc_after=True,
        tasks=2,
    ),
}
"""Tiny programs for the conformance suites: one for every method, with resets and task changes within 50 steps."""

_LEARNING, _STREAM = "trainables.ci_vit.learning", "trainables.ci_vit.stream"

FAMILY = Family(
    name="ci_vit",
    Program=Program,
    Hyper=Hyper,
    metrics=_metrics(),
    headline="test_acc_last",
    load=load,
    schedule=schedule,
    init=Late(_LEARNING, "init"),
    order=Late(_STREAM, "order"),
    batch=Late(_STREAM, "batch"),
    step=Late(_LEARNING, "step"),
    test_order=Late(_STREAM, "test_order"),
    evaluate=Late(_LEARNING, "evaluate"),
    inspect=Late(_LEARNING, "inspect"),
    summarize=summarize,
    validate=validate,
    covariates=COVARIATES,
    presets=PRESETS,
    cases=CASES,
)
