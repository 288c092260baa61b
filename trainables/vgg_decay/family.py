"""VGG13-like nets under every weight decay of the notebook: init, step, evaluate, summarize.

Source: hyqneuron/regularizers (`main.py`, `logs/`) and hyqneuron/pylibhuva (`huva/th_util`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from trainables.family import Family, Hypers, Metric, State
from trainables.vgg_decay import data, decay, measures, updates
from trainables.vgg_decay.augment import augmented, normalise
from trainables.vgg_decay.cases import CASES
from trainables.vgg_decay.model import convolves, forward_eval, forward_train, init_params, init_running
from trainables.vgg_decay.presets import PRESETS
from trainables.vgg_decay.program import (
    COVARIATES,
    Hyper,
    Program,
    asked,
    has_short_batch,
    sizes,
    steps_per_epoch,
    validate,
)


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    params = init_params(program, seed)
    return {
        "seed": seed,
        "step": torch.zeros_like(seed),
        "params": params,
        "running": init_running(program, seed),
        "memory": updates.init_memory(program, params),
        "init_variance": decay.init_variance(program, params),
    }


def step(program: Program, state: State, hyper: Hypers, batch: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """One update. Metrics are of the augmented batch before it."""
    params = state["params"]
    images = augmented(program, hyper, state["seed"], state["step"], batch["images"])

    def objective(trial: dict[str, Tensor]) -> tuple[Tensor, tuple]:
        logits, running = forward_train(program, trial, state["running"], images, batch["real"])
        each = F.cross_entropy(logits, batch["labels"], reduction="none")
        flat = -torch.log_softmax(logits, 1).mean(1)
        smooth = hyper["label_smoothing"]
        loss = _mean_of_real(program, (1 - smooth) * each + smooth * flat, batch["real"])
        return loss, (running, logits, _mean_of_real(program, each, batch["real"]))

    grads, (_, (running, logits, loss)) = grad_and_value(objective, has_aux=True)(params)
    per_epoch = steps_per_epoch(program)
    lr = updates.learning_rate(program, hyper, state["step"], per_epoch)
    updated, memory, ratio = updates.update(
        program, hyper, state["step"], lr, params, grads, state["memory"], state["init_variance"]
    )
    correct = ((logits.argmax(1) == batch["labels"]) & batch["real"]).sum()
    metrics = {
        "train_loss": loss,
        "train_acc": correct.to(loss.dtype) * (per_epoch / _examples(program)),
        "update_ratio": ratio,
        "lr": lr,
    }
    moved = {"params": updated, "running": running, "memory": memory, "step": state["step"] + 1}
    return {**state, **moved}, metrics


def _mean_of_real(program: Program, each: Tensor, real: Tensor) -> Tensor:
    if not has_short_batch(program):
        return each.mean()
    return torch.where(real, each, 0.0).sum() / real.sum()


def _examples(program: Program) -> int:
    """Examples an epoch trains on."""
    train = sizes(program)[0]
    return min(train, steps_per_epoch(program) * program.batch)


def evaluate(program: Program, state: State, hyper: Hypers, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    images, labels, real, part = (normalise(program, batch["images"]), *(batch[k] for k in ("labels", "real", "part")))
    logits, hidden = forward_eval(program, state["params"], state["running"], images)
    correct = logits.argmax(1) == labels
    tested = real & (part == data.TEST)
    count = tested.sum()
    losses = F.cross_entropy(logits, labels, reduction="none")
    sums = {
        "test_acc": (correct & tested).sum(),
        "test_loss": torch.where(tested, losses, 0.0).sum(),
        "count": count,
    }
    train, test = sizes(program)
    # the engine divides all sums by the number of test images: other parts' sums are scaled to it
    if program.holdout:
        sums["val_acc"] = (correct & real & (part == data.VALIDATION)).sum() * (test / program.holdout)
    if asked(program, "train"):
        sums["train_eval_acc"] = (correct & real & (part == data.TRAIN)).sum() * (test / train)
    if asked(program, "batch_stats"):
        fresh, _ = forward_train(program, state["params"], state["running"], images, real)
        sums["test_acc_batch_stats"] = ((fresh.argmax(1) == labels) & tested).sum()
    whole = measures.weight_measures(program, state)
    if asked(program, "grouping"):
        whole |= measures.grouping(program, state, hidden, real)
    return sums | {name: value * count for name, value in whole.items()}


READ_AT = (64, 100, 140, 150, 160, 180)
"""Epochs (of 200) at which runs of the notebook ended early; under the halving schedule a longer run passes through
exactly what a shorter one ended with."""


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Last values; the best test accuracy, and the test accuracy at the epochs where the notebook's runs ended."""
    last = {name: float(values[-1]) for name, values in epochs.items() if len(values)}
    accuracy = epochs["test_acc"]
    last["test_acc_max"] = float(np.max(accuracy))
    last["train_correct"] = float(np.round(last["train_acc"] * _examples(program)))
    for epoch in READ_AT:
        if program.epochs > epoch and len(accuracy) >= epoch:
            last[f"test_acc_{epoch}"] = float(accuracy[epoch - 1])
    if len(accuracy) >= 60:
        last["test_acc_sd_20_60"] = float(np.std(accuracy[19:60], ddof=1))
    return last


def _grouping_metrics() -> dict[str, Metric]:
    docs = {
        "share": ("fraction", "share of |w| between units of one cell"),
        "share_permuted": ("fraction", "the same with units shuffled: what no grouping gives"),
        "similarity": ("1", "mean cosine of |weight| vectors into two units, within a cell minus between cells"),
        "correlation": ("1", "mean correlation of two units' activations, within a cell minus between cells"),
    }
    return {
        f"{layer}_{name}": Metric(unit, "none", f"{place}: {doc}")
        for layer, place in (("fc6", "fc6"), ("conv_last", "last convolution"))
        for name, (unit, doc) in docs.items()
    }


METRICS = {
    "train_loss": Metric("nats", "min", "cross-entropy of the augmented batch before the update, without smoothing"),
    "train_acc": Metric(
        "fraction",
        "max",
        "correct of all the epoch's examples, augmented, before the update; a step's value is its share",
    ),
    "train_correct": Metric("count", "max", "the last epoch's correct training examples: the notebook's brackets"),
    "update_ratio": Metric("1", "none", "||update|| / ||parameters||, all tensors together"),
    "lr": Metric("1", "none", "learning rate of the step"),
    "test_acc": Metric("fraction", "max", "on the test images, running BatchNorm statistics"),
    "test_loss": Metric("nats", "min", "cross-entropy on the test images"),
    "test_acc_max": Metric(
        "fraction", "max", "best epoch's test accuracy: chosen on the test set, so not a fair result"
    ),
    "test_acc_sd_20_60": Metric("fraction", "none", "standard deviation of the test accuracy over epochs 20 to 60"),
    "test_acc_batch_stats": Metric("fraction", "max", "on the test images, each batch's own BatchNorm statistics"),
    "val_acc": Metric("fraction", "max", "on the held-out training images"),
    "train_eval_acc": Metric("fraction", "max", "on the training images, not augmented, running statistics"),
    "dead_units": Metric("count", "min", "units whose outgoing weights have a mean size below 1e-9, all layers"),
    "dead_units_1e5": Metric("count", "min", "the same below 1e-5"),
    "dead_units_1e20": Metric("count", "min", "the same below 1e-20"),
    **{f"test_acc_{n}": Metric("fraction", "max", f"test accuracy after epoch {n}") for n in READ_AT},
    **_grouping_metrics(),
}

FAMILY: Family = Family(
    covariates=COVARIATES[:-1],
    name="vgg_decay",
    convolves=convolves,
    Program=Program,
    Hyper=Hyper,
    metrics=METRICS,
    headline="test_acc",
    load=data.load,
    schedule=data.schedule,
    init=init,
    order=data.order,
    batch=data.batch,
    step=step,
    test_order=data.test_order,
    evaluate=evaluate,
    inspect=measures.inspect,
    summarize=summarize,
    validate=validate,
    presets=PRESETS,
    cases=CASES,
)
"""The family, as the engines and the command line take it."""
