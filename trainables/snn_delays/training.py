"""One update, one evaluation, and what is read off a lane at the end of an epoch.

Loss and optimisers of github.com/Thvnvtos/CSNN-1D-Delays (model.py, csnnext_delays.py): m = sum over time of the
softmax over classes of the membranes; cross-entropy of m (a second softmax); the class is the largest m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from trainables import draws, optimizers
from trainables.family import Hypers, State, dtype_of
from trainables.snn_delays import delays, model
from trainables.snn_delays.neurons import keep_of_tau, keep_of_weight
from trainables.snn_delays.program import Program, kernel_steps, schedule

DIV, FINAL_DIV, RISE = 25.0, 1e4, 0.3  # OneCycleLR's defaults
BETA1_HIGH, BETA1_LOW = 0.95, 0.85


def one_cycle(epoch: Tensor, epochs: int) -> tuple[Tensor, Tensor]:
    """Learning rate over its maximum, and beta1: torch's OneCycleLR(total_steps=epochs), a step an epoch.

    Args:
        epoch: epochs done, 0-d floating.
        epochs: in the whole run. With one there is no cycle: it gets the schedule's end, as torch gives it.
    """
    top, last = RISE * epochs - 1, epochs - 1
    rising = epoch <= top
    rise = epoch / top if top > 0 else torch.zeros_like(epoch)
    share = torch.where(rising, rise, (epoch - top) / (last - top))
    wave = (1 + torch.cos(math.pi * share)) / 2
    low, end = 1 / DIV, 1 / DIV / FINAL_DIV
    rate = torch.where(rising, 1 + (low - 1) * wave, end + (1 - end) * wave)
    swing = (BETA1_HIGH - BETA1_LOW) * wave
    return rate, torch.where(rising, BETA1_LOW + swing, BETA1_HIGH - swing)


def sigmas(program: Program, hyper: Hypers, step: Tensor) -> Tensor:
    """Width of each stage's delays in the update numbered `step` (from 0), in time steps, [stages]."""
    per_epoch = schedule(program).steps_per_epoch
    dtype = hyper["sigma"].dtype
    epoch = torch.div(step, per_epoch, rounding_mode="floor").to(dtype)
    elapsed = torch.where(hyper["sigma_by_step"] > 0.5, step.to(dtype) / per_epoch, epoch)
    return torch.stack(
        [
            delays.sigma_at(
                hyper["sigma"] * hyper[f"sigma_{stage + 1}"] * model.reach(program, hyper, stage),
                hyper["sigma_epochs"],
                program.epochs,
                elapsed,
                program.kernel,
            )
            for stage in range(len(program.blocks))
        ]
    )


def step(program: Program, state: State, hyper: Hypers, batch: Mapping[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """One update of weights and positions."""
    seed, count = state["seed"], state["step"] + 1
    widths = sigmas(program, hyper, state["step"])
    mask = frames_that_count(program, batch)
    dropout = _dropout(program, hyper, seed, count, len(batch["label"]))

    def loss(params: model.Tensors):
        kernels = model.train_kernels(program, hyper, params, widths)
        forward = model.Pass(program, hyper, params, state["running"], kernels, mask, dropout)
        scores = _scores(forward(batch["frames"]), mask)
        losses, hits = _losses(scores, batch)
        real = batch["real"].to(losses.dtype)
        return losses.sum() / real.sum(), (hits.sum() / real.sum(), forward.moved)

    grads, (value, (accuracy, running)) = grad_and_value(loss, has_aux=True)(state["params"])
    params, mu, nu = _update(program, state, hyper, grads, count)
    new: State = {"seed": seed, "step": count, "params": params, "mu": mu, "nu": nu, "running": running}
    if program.grads:
        new["grad_norms"] = {name: grad.norm() for name, grad in grads.items()}
    return new, {"train_loss": value, "train_accuracy": accuracy}


def _update(program: Program, state: State, hyper: Hypers, grads: model.Tensors, count: Tensor):
    """Adam on the weights, Adam on the positions, positions clamped. Returns params, mu, nu."""
    params = state["params"]
    epoch = torch.div(state["step"], schedule(program).steps_per_epoch, rounding_mode="floor").to(dtype_of(program))
    share, beta1 = one_cycle(epoch, program.epochs)
    rate = hyper["lr"] * share
    beta1 = torch.where(hyper["momentum_cycle"] > 0.5, beta1, 0.9)
    cosine = (1 + torch.cos(math.pi * epoch / program.epochs)) / 2
    decayed = {
        name: grad + hyper["weight_decay"] * params[name] if model.is_weight(name) else grad
        for name, grad in grads.items()
    }
    weights = [name for name in params if not name.endswith(".position")]
    places = [name for name in params if name.endswith(".position")]
    rates = {name: rate * _rate_of(name, hyper) for name in weights}

    def adam(names: list[str], lr: Tensor | model.Tensors, b1: Tensor | float):
        chosen = {name: decayed[name] for name in names}
        return optimizers.adam(params, chosen, state["mu"], state["nu"], count, lr, b1=b1)

    parts = (adam(weights, rates, beta1), adam(places, hyper["lr_pos"] * cosine, 0.9))
    # in the order of `params`, or torch.compile would see another state after the first step
    updated, mu, nu = ({name: {**one, **two}[name] for name in params} for one, two in zip(*parts, strict=True))
    for stage, name in model.blocks(program):
        key = f"{name}.position"
        updated[key] = delays.clamp(updated[key], model.taps(program, stage), model.reach(program, hyper, stage))
    if program.fc_delay_ms:
        steps = kernel_steps(program.fc_delay_ms, program.dt_ms)
        updated["fc.position"] = delays.clamp(updated["fc.position"], steps, torch.full_like(rate, steps))
    return updated, mu, nu


def _rate_of(name: str, hyper: Hypers) -> Tensor:
    if name.endswith((".pointwise", ".pointwise_out")):
        return hyper["pointwise_rate"]
    if name.endswith(".tau"):
        return hyper["tau_rate"]
    if name.endswith((".bn_scale", ".bn_shift")):
        return hyper["bn_rate"]
    return hyper["fc_rate"] if name == "fc.weight" else torch.ones_like(hyper["fc_rate"])


def _dropout(program: Program, hyper: Hypers, seed: Tensor, count: Tensor, size: int) -> Tensor:
    """One mask a sample for all its time steps, as spikingjelly's `layer.Dropout` in multi-step mode, [B, C]."""
    features = model.width(program, len(program.blocks) - 1)
    unit = draws.uniform(seed, count, "dropout", (size, features), dtype_of(program))
    return torch.where(unit < hyper["dropout"], 0.0, 1 / (1 - hyper["dropout"]))


# --- loss -------------------------------------------------------------------------------------------------------------


def frames_that_count(program: Program, batch: Mapping[str, Tensor]) -> Tensor:
    """Which frames enter batch statistics and loss, [B, T] bool, by the program's `padding`.

    The net is causal, so frames past the end of a batch change nothing before them: leaving them out is the same as
    padding to the longest sample of the batch only.
    """
    length, real = batch["length"], batch["real"]
    time = torch.arange(batch["frames"].shape[1], device=length.device)
    if program.padding == "own":
        counted = time < length[:, None]
    elif program.padding == "batch":
        counted = (time < torch.where(real, length, 0).amax())[None, :]
    else:
        counted = torch.ones_like(time, dtype=torch.bool)[None, :]
    return counted & real[:, None]


def _scores(membranes: Tensor, mask: Tensor) -> Tensor:
    """m [B, classes] from membranes [B, classes, T]."""
    return (torch.softmax(membranes, dim=1) * mask[:, None, :].to(membranes.dtype)).sum(-1)


def _losses(scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per sample cross-entropy and whether it was right; zero where there is no sample."""
    real = batch["real"].to(scores.dtype)
    picked = F.log_softmax(scores, dim=1).gather(1, batch["label"][:, None]).squeeze(1)
    return -picked * real, (scores.argmax(1) == batch["label"]).to(scores.dtype) * real


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(program: Program, state: State, hyper: Hypers, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over a batch, with whole delays and sigma 0."""
    kernels = model.discrete_kernels(program, hyper, state["params"])
    forward = model.Pass(program, hyper, state["params"], state["running"], kernels, None, None)
    scores = _scores(forward(batch["frames"]), frames_that_count(program, batch))
    losses, hits = _losses(scores, batch)
    return {"loss": losses.sum(), "accuracy": hits.sum(), "count": batch["real"].sum()}


def inspect(program: Program, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """Every stage's sigma, every block's positions, delay histogram and movement, every layer's tau, weight norms, and
    the last step's gradient norms where the program keeps them."""
    params = state["params"]
    found = {"sigma": sigmas(program, hyper, (state["step"] - 1).clamp(min=0))}
    for stage, name in model.blocks(program):
        steps, position = model.taps(program, stage), params[f"{name}.position"]
        start = model.first_positions(program, hyper, state["seed"], stage, name)
        found[f"position/{name}"] = position
        found[f"delays/{name}"] = _histogram(position, steps)
        found[f"moved/{name}"] = (position - start).abs().mean()
    if program.fc_delay_ms:
        steps = kernel_steps(program.fc_delay_ms, program.dt_ms)
        found["delays/fc"] = _histogram(params["fc.position"], steps)
    layers = [*(name for _, name in model.blocks(program)), "fc"]
    fixed = keep_of_tau(hyper["tau_ms"], program.dt_ms)
    keeps = [keep_of_weight(params[f"{name}.tau"]) if program.neuron == "plif" else fixed for name in layers]
    found["tau"] = program.dt_ms / (1 - torch.stack(keeps))
    found |= {f"weight_norm/{name}": value.norm() for name, value in params.items()}
    found |= {f"grad_norm/{name}": value for name, value in state.get("grad_norms", {}).items()}
    return found


def _histogram(position: Tensor, steps: int) -> Tensor:
    """How many synapses have a (rounded) delay of 0, 1, .. steps - 1 steps, [steps]."""
    whole = delays.delay(position.round(), steps).flatten()
    return (whole[:, None] == torch.arange(steps, device=position.device)).sum(0)


def summarize(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Last values; the best validation accuracy beside them; test values once the last epoch has been evaluated."""
    summary = {name: float(values[-1]) for name, values in epochs.items() if len(values)}
    if len(epochs.get("valid_accuracy", ())):
        summary["best_valid_accuracy"] = float(np.max(epochs["valid_accuracy"]))
    return summary
