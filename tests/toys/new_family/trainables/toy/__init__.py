"""The smallest whole family: a line fitted to points of y = 3x - 1 by gradient descent. Copy it to begin your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value

from trainables import draws
from trainables.family import Arrays, Batch, Case, Family, Hypers, Metric, Schedule, State, dtype_of

POINTS, TRAINED_ON, BATCH = 40, 32, 8


@dataclass(frozen=True)
class Program:
    """What decides shapes or code."""

    data: str = "line"
    precision: str = "float32"
    epochs: int = 3


@dataclass(frozen=True)
class Hyper:
    """What may differ between lanes of one stack."""

    lr: float = 0.1


def load(program: Program, data_dir: Path | None, cache_dir: Path) -> dict[str, np.ndarray]:
    """x [40], y [40]; the last eight points are held out."""
    x = np.random.default_rng(0).normal(size=POINTS)
    return {"x": x, "y": 3 * x - 1}


def schedule(program: Program) -> Schedule:
    """One task; each epoch sees every training point once."""
    return Schedule(steps_per_epoch=TRAINED_ON // BATCH, epochs=program.epochs, epochs_per_task=program.epochs)


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    """Slope and offset, drawn from the seed."""
    zero = torch.zeros_like(seed)
    return {"seed": seed, "step": zero, "params": {"line": draws.normal(seed, zero, "line", (2,), dtype_of(program))}}


def order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """index [4, 8]: the training points, shuffled anew for each seed and epoch."""
    index = draws.permutation(draws.counter(seed), draws.counter(epoch), "order", TRAINED_ON)
    return {"index": index.reshape(-1, BATCH)}


def test_order(program: Program, arrays: Arrays, seed: int, epoch: int) -> dict[str, Tensor]:
    """index [1, 8]: the held-out points, one batch."""
    return {"index": torch.arange(TRAINED_ON, POINTS).unsqueeze(0)}


def batch(program: Program, arrays: Arrays, row: dict[str, Tensor]) -> Batch:
    """x [8], y [8] of one step."""
    return {name: arrays[name][row["index"]].to(dtype_of(program)) for name in ("x", "y")}


def squared_errors(params: Mapping[str, Tensor], data: Batch) -> Tensor:
    """[8]"""
    return (params["line"][0] * data["x"] + params["line"][1] - data["y"]) ** 2


def step(program: Program, state: State, hyper: Hypers, data: Batch) -> tuple[State, dict[str, Tensor]]:
    """One step of gradient descent on the batch's mean squared error."""
    grads, loss = grad_and_value(lambda params: squared_errors(params, data).mean())(state["params"])
    params = {name: value - hyper["lr"] * grads[name] for name, value in state["params"].items()}
    return {**state, "step": state["step"] + 1, "params": params}, {"train_loss": loss}


def evaluate(program: Program, state: State, hyper: Hypers, data: Batch) -> dict[str, Tensor]:
    """The sum over held-out points, and how many there are."""
    errors = squared_errors(state["params"], data)
    return {"test_loss": errors.sum(), "count": torch.ones_like(errors).sum()}


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The last epoch's loss."""
    return {"test_loss": float(epochs["test_loss"][-1])}


METRICS: dict[str, Any] = {
    "train_loss": Metric("squared error", "min", "on the batch, before the update"),
    "test_loss": Metric("squared error", "min", "on eight held-out points, after the epoch"),
}

FAMILY = Family(
    name="toy",
    Program=Program,
    Hyper=Hyper,
    metrics=METRICS,
    headline="test_loss",
    load=load,
    schedule=schedule,
    init=init,
    order=order,
    batch=batch,
    step=step,
    test_order=test_order,
    evaluate=evaluate,
    summarize=summarize,
    cases={"plain": Case()},
)
