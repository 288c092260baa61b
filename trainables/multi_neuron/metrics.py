"""Every number that a multi-neuron trial reports, and its summary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainables.family import Metric
from trainables.multi_neuron import continual
from trainables.multi_neuron.program import Program

TASKS = 5

_PLACES = {
    "": "mean over multi-neuron layers",
    "_first": "first multi-neuron layer",
    "_last": "last multi-neuron layer",
}


def _selection(prefix: str, data: str) -> dict[str, Metric]:
    found = {}
    for place, where in _PLACES.items():
        found[f"{prefix}entropy{place}"] = Metric("nats", "none", f"selector entropy per input, {where}, {data}")
        found[f"{prefix}balance{place}"] = Metric("nats", "none", f"entropy of a unit's shares, {where}, {data}")
        if place:
            found[f"{prefix}pooled{place}"] = Metric(
                "nats", "none", f"entropy of a layer's pooled shares, {where}, {data}"
            )
            found[f"{prefix}share{place}"] = Metric("fraction", "none", f"inputs that choose neuron A, {where}, {data}")
    return found


METRICS: dict[str, Metric] = {
    "train_loss": Metric("nats", "min", "cross-entropy on the step's batch, before the update"),
    "train_acc": Metric("fraction", "max", "correct on the step's batch, before the update"),
    "test_loss": Metric("nats", "min", "cross-entropy on held-out data (per image or symbol)"),
    "test_acc": Metric("fraction", "max", "correct on held-out data"),
    "grad_norm": Metric("1", "none", "global gradient norm before clipping"),
    "ewc_penalty": Metric("nats", "none", "EWC's penalty, not part of train_loss"),
    **_selection("", "training batches"),
    **_selection("test_", "held-out data, batch by batch"),
    "cosine_first": Metric("1", "none", "mean pairwise cosine of computation neurons, first multi-neuron layer"),
    "cosine_last": Metric("1", "none", "mean pairwise cosine of computation neurons, last multi-neuron layer"),
    "mean_acc": Metric("fraction", "max", "mean of held-out accuracy over all tasks"),
    "learned_acc": Metric("fraction", "max", "mean held-out accuracy of each task at its own end"),
    "forgetting": Metric("fraction", "min", "mean loss of accuracy since each earlier task's best"),
    **{f"test_acc_task{j}": Metric("fraction", "max", f"held-out accuracy on task {j}") for j in range(TASKS)},
    **{
        f"acc_after{i}_task{j}": Metric("fraction", "none", f"held-out accuracy on task {j} at the end of task {i}")
        for i in range(TASKS)
        for j in range(TASKS)
    },
}


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Last values, and of several tasks the accuracy matrix, mean and learned accuracy, forgetting."""
    values = {name: float(curve[-1]) for name, curve in epochs.items() if len(curve)}
    if program.tasks > 1:
        values |= continual.summary(program, epochs)
    return values
