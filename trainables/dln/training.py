"""One lane's training step: Adam with warm-up and cosine, decoupled decay, clipping by the lane's own norm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value

from trainables import optimizers
from trainables.dln import gpt, objectives, tdln
from trainables.dln.program import Program
from trainables.family import Hypers, State


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    """Fresh weights and Adam moments."""
    model = gpt if program.task == "gpt" else tdln
    params = model.init_params(program, hyper, seed)
    return {
        "seed": seed,
        "step": torch.zeros_like(seed),
        "params": params,
        "mu": optimizers.zeros_like(params),
        "nu": optimizers.zeros_like(params),
    }


def step(program: Program, state: State, hyper: Hypers, data: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """One update. Returns the next state, and loss, accuracy, gradient norm (before clipping) and learning rate."""
    noise = gpt.Noise(state["seed"], state["step"])

    def objective(params: dict[str, Tensor]) -> tuple[Tensor, objectives.Scores]:
        values = objectives.scores(program, params, hyper, data, noise)
        return values["loss"].mean(), values

    with _autocast(program, state["seed"].device):
        grads, (loss, values) = grad_and_value(objective, has_aux=True)(state["params"])
    limit = torch.where(hyper["clip"] > 0, hyper["clip"], math.inf)
    grads, norm = optimizers.clip_by_global_norm(grads, limit)
    rate = learning_rate(hyper, state["step"])
    shares = trained_shares(program, state["params"], hyper)
    zero = torch.zeros_like(rate)
    decayed = decayed_names(program, state["params"])
    params, mu, nu = optimizers.adam(
        state["params"],
        grads,
        state["mu"],
        state["nu"],
        state["step"] + 1,
        {name: rate * shares[name] if name in shares else rate for name in grads},
        b1=hyper["b1"],
        b2=hyper["b2"],
        decoupled_decay={name: hyper["weight_decay"] if name in decayed else zero for name in grads},
    )
    metrics = {
        "train_loss": loss,
        "train_accuracy": values["accuracy"].mean(),
        "gradient_norm": norm,
        "learning_rate": rate,
    }
    if "exact" in values:
        metrics["train_exact"] = values["exact"].mean()
    return {"seed": state["seed"], "step": state["step"] + 1, "params": params, "mu": mu, "nu": nu}, metrics


def evaluate(program: Program, state: State, hyper: Hypers, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the held-out windows or images of the batch, padding left out."""
    with _autocast(program, state["seed"].device):
        values = objectives.scores(program, state["params"], hyper, data, None)
    sums = {f"held_out_{name}": torch.where(data["real"], value, 0.0).sum() for name, value in values.items()}
    return {**sums, "count": data["real"].sum()}


def learning_rate(hyper: Hypers, done: Tensor) -> Tensor:
    """The rate of the update after `done` earlier ones, as optax.warmup_cosine_decay_schedule: linear from 0 to lr
    over `warmup` steps, cosine to final_fraction * lr at `decay_steps`, constant from there."""
    done = done.to(hyper["lr"].dtype)
    rise = torch.clamp(done / torch.clamp(hyper["warmup"], min=1.0), max=1.0)
    rise = torch.where(hyper["warmup"] > 0, rise, 1.0)
    span = torch.clamp(hyper["decay_steps"] - hyper["warmup"], min=1.0)
    progress = torch.clamp((done - hyper["warmup"]) / span, 0.0, 1.0)
    cosine = 0.5 * (1 + torch.cos(math.pi * progress))
    return hyper["lr"] * rise * (hyper["final_fraction"] + (1 - hyper["final_fraction"]) * cosine)


def decayed_names(program: Program, params: Mapping[str, Tensor]) -> set[str]:
    """The parameters that decoupled weight decay shrinks."""
    if program.decayed == "all":
        return set(params)
    matrices = {name for name, value in params.items() if value.dim() == 2}
    if program.decayed == "matrices+embeddings":
        return matrices
    return matrices - {"embedding", "unembedding", "positions"}


def trained_shares(program: Program, params: dict[str, Tensor], hyper: Hypers) -> dict[str, Tensor]:
    """Name -> share of the learning rate, for what `train_memory` and `train_first` may hold fixed."""
    if program.task == "gpt":
        return {}
    memory, first = tdln.fixed_names(params)
    shares = dict.fromkeys(memory, hyper["train_memory"])
    for name in first:
        shares[name] = shares.get(name, torch.ones_like(hyper["train_first"])) * hyper["train_first"]
    return shares


def inspect(program: Program, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """Root mean square of every weight and of Adam's running gradient, and the memories' sizes, periods or decays."""
    rms = {f"weight_rms/{name}": value.square().mean().sqrt() for name, value in state["params"].items()}
    rms |= {f"gradient_rms/{name}": value.square().mean().sqrt() for name, value in state["mu"].items()}
    endings = (".size", ".theta", ".decay")
    return rms | {name: value for name, value in state["params"].items() if name.endswith(endings)}


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Last values, and the lowest held-out loss of the run (nanoGPT reports that one)."""
    summary = {name: float(values[-1]) for name, values in epochs.items() if len(values) and name != "learning_rate"}
    losses = epochs["held_out_loss"]
    finite = losses[np.isfinite(losses)]
    summary["best_held_out_loss"] = float(finite.min()) if len(finite) else math.nan
    return summary


def _autocast(program: Program, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if program.autocast == "float16":
        return torch.autocast(device.type, dtype=torch.float16)
    return contextlib.nullcontext()
