"""A toy family for tests of the machinery: a two-layer net on a fixed random regression, with noise and resets.

It trains in microseconds, uses draws in every step, and can be told to diverge, so that engines, hosts, schedulers and
trackers can be tested without a real model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.func import grad_and_value

from trainables import draws
from trainables.family import PRECISIONS, BadValue, Case, Family, Metric, Schedule, dtype_of


@dataclass(frozen=True)
class Program:
    data: str = "synthetic"
    precision: str = "float64"
    width: int = 8
    batch: int = 5
    epochs: int = 9
    optimizer: str = "sgd"


@dataclass(frozen=True)
class Hyper:
    lr: float = 0.05
    noise: float = 0.0
    explode_at: float = 1e9  # the step at which the loss turns infinite


def load(program, data_dir, cache_dir):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 4))
    return {"x": x, "y": np.sin(x.sum(1, keepdims=True))}


def schedule(program):
    return Schedule(steps_per_epoch=32 // program.batch, epochs=program.epochs, epochs_per_task=program.epochs)


def init(program, hyper, seed):
    zero, dtype, width = torch.zeros_like(seed), dtype_of(program), program.width
    return {
        "seed": seed,
        "step": zero,
        "params": {
            "w1": draws.normal(seed, zero, "w1", (4, width), dtype) / 2,
            "w2": draws.normal(seed, zero, "w2", (width, 1), dtype) / width**0.5,
        },
    }


def order(program, arrays, seed, epoch):
    index = draws.permutation(draws.counter(seed), draws.counter(epoch), "order", 32)
    steps = 32 // program.batch
    return {"index": index[: steps * program.batch].reshape(steps, program.batch)}


def test_order(program, arrays, seed, epoch):
    index = torch.arange(32, 48)
    padded = torch.cat([index, torch.full((4,), -1)])
    return {"index": padded.reshape(2, 10)}


def batch(program, arrays, row):
    dtype = dtype_of(program)
    index = row["index"].clamp(min=0)
    return {"x": arrays["x"][index].to(dtype), "y": arrays["y"][index].to(dtype), "real": row["index"] >= 0}


def squared_errors(params, data):
    return ((torch.tanh(data["x"] @ params["w1"]) @ params["w2"] - data["y"]) ** 2).squeeze(-1)


def step(program, state, hyper, data):
    grads, loss = grad_and_value(lambda p: squared_errors(p, data).mean())(state["params"])
    count = state["step"] + 1
    params = {}
    for name, value in state["params"].items():
        kick = draws.normal(state["seed"], count, f"kick/{name}", tuple(value.shape), value.dtype)
        params[name] = value - hyper["lr"] * grads[name] + hyper["noise"] * kick
    loss = torch.where(count >= hyper["explode_at"], torch.inf, loss)
    return {"seed": state["seed"], "step": count, "params": params}, {"train_loss": loss}


def evaluate(program, state, hyper, data):
    errors = torch.where(data["real"], squared_errors(state["params"], data), 0.0)
    return {"test_loss": errors.sum(), "count": data["real"].sum()}


def inspect(program, state, hyper):
    return {"weight_norm": torch.stack([value.norm() for value in state["params"].values()])}


def summarize(program, epochs):
    return {"test_loss": float(epochs["test_loss"][-1]), "train_loss": float(epochs["train_loss"][-1])}


def validate(program):
    if program.optimizer not in ("sgd",):
        raise BadValue(f"optimizer '{program.optimizer}' is not sgd")
    if program.width < 1 or program.epochs < 1 or not 1 <= program.batch <= 32:
        raise BadValue("width and epochs should be 1 or more, batch from 1 to 32")
    if program.precision not in PRECISIONS:
        raise BadValue(f"precision '{program.precision}' is none of {', '.join(PRECISIONS)}")


FAMILY = Family(
    name="tests.toys.regression",
    Program=Program,
    Hyper=Hyper,
    metrics={
        "train_loss": Metric("squared error", "min", "mean over the epoch's batches, before each update"),
        "test_loss": Metric("squared error", "min", "on 16 held-out points"),
    },
    headline="test_loss",
    load=load,
    schedule=schedule,
    init=init,
    order=order,
    batch=batch,
    step=step,
    test_order=test_order,
    evaluate=evaluate,
    inspect=inspect,
    summarize=summarize,
    validate=validate,
    cases={"plain": Case(), "noisy": Case(hyper={"noise": 0.01}), "narrow": Case(program={"width": 3})},
)
