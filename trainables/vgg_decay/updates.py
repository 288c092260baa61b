"""One update of all parameters: SGD with momentum, layer-normalised SGD, or Adam with shared second moments.

Each parameter tensor apart, with g its gradient and c its decay term (`.decay.term`):

    d = g + c                      (g alone with decay_outside)
    u = momentum's direction of d  (or Adam's)
    n = norm_ema n + (1 - norm_ema) ||u||, at first ||u||
    s = 1 / (n + 1e-8) where normalised, times ||w|| with by_weight; else 1
    w = w - lr (s u)               (w - lr (s u + c) with decay_outside)

Source: hyqneuron/pylibhuva `th_monitor.MonitoredSGD`, `MonitoredSpecificSGD`. There the scale was written into the
momentum buffer itself, which then explodes; here the buffer stays unscaled (without momentum the two are the same).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.family import Hypers
from trainables.vgg_decay import decay
from trainables.vgg_decay.program import Layer, Program, layers

Tensors = dict[str, Tensor]
NORM_EPSILON = 1e-8
SEEN = ("weight", "gradient", "decay", "projection", "update")


def init_memory(program: Program, params: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """What an update remembers: momentum, the norms' averages, Adam's second moments, and the last step's norms."""
    memory = {
        "momentum": {name: torch.zeros_like(value) for name, value in params.items()},
        "norm": {name: torch.zeros_like(value.sum()) for name, value in params.items()},
        "seen": {
            name: torch.stack([torch.zeros_like(params["logit.bias"].sum())] * len(layers(program))) for name in SEEN
        },
    }
    if program.optimizer == "adam":
        memory["second"] = {name: torch.zeros_like(_shared(program, value)) for name, value in params.items()}
    return memory


def update(
    program: Program,
    hyper: Hypers,
    step: Tensor,
    lr: Tensor,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    memory: Mapping[str, Tensors],
    init_variance: Tensor,
) -> tuple[Tensors, dict[str, Tensors]]:
    """The parameters and the memory after one update.

    Args:
        step: 0-d integer, number of updates done before.
        lr: 0-d, this step's learning rate.

    Returns:
        (params, memory). memory["seen"] holds, for each layer's weight, the norms of the weight, gradient and decay
        before the update, of the update itself, and the gradient's projection on the decay, [layers] each.
    """
    rates = decay.rates(program, hyper, init_variance)
    updated: Tensors = {}
    kept: dict[str, Tensors] = {name: {} for name in memory if name != "seen"}
    seen: dict[str, list[Tensor]] = {name: [] for name in SEEN}
    for layer in layers(program):
        for name in layer.tensors:
            value, grad = params[name], grads[name]
            term = decay.term(program, hyper, layer, name, value, rates[layer.name])
            outside = hyper["decay_outside"] > 0
            direction = _direction(program, hyper, step, name, torch.where(outside, grad, grad + term), memory, kept)
            scale = _scale(hyper, step, name, value, direction, memory, kept)
            moved = value - lr * (scale * direction + torch.where(outside, term, 0.0))
            updated[name] = _restrained(program, hyper, layer, name, value, moved)
            if name.endswith(".weight"):
                _note(seen, value, grad, term, updated[name])
    return updated, {**kept, "seen": {name: torch.stack(values) for name, values in seen.items()}}


def _direction(program, hyper, step, name, d, memory, kept) -> Tensor:
    if program.optimizer == "adam":
        return _adam(program, hyper, step, name, d, memory, kept)
    velocity = hyper["momentum"] * memory["momentum"][name] + d
    kept["momentum"][name] = velocity
    return torch.where(hyper["nesterov"] > 0, d + hyper["momentum"] * velocity, velocity)


def _adam(program, hyper, step, name, d, memory, kept) -> Tensor:
    """Adam (Kingma & Ba 2015); second moments of a unit or a layer are means of the squares they share."""
    b1, b2, count = hyper["beta1"], hyper["beta2"], (step + 1).to(d.dtype)
    first = b1 * memory["momentum"][name] + (1 - b1) * d
    second = b2 * memory["second"][name] + (1 - b2) * _shared(program, d * d)
    kept["momentum"][name], kept["second"][name] = first, second
    return (first / (1 - b1**count)) / (torch.sqrt(second / (1 - b2**count)) + hyper["adam_eps"])


def _shared(program: Program, squares: Tensor) -> Tensor:
    """Squares pooled over what shares a second moment; a unit is one output channel."""
    if program.second_moment == "element" or (program.second_moment == "unit" and squares.dim() == 1):
        return squares
    first = 0 if program.second_moment == "layer" else 1
    return squares.mean(tuple(range(first, squares.dim())), keepdim=True)


def _scale(hyper, step, name, value, direction, memory, kept) -> Tensor:
    length = _norm(direction)
    average = hyper["norm_ema"] * memory["norm"][name] + (1 - hyper["norm_ema"]) * length
    average = torch.where(step == 0, length, average)
    kept["norm"][name] = average
    weight = torch.maximum(_norm(value), hyper["norm_floor"])
    factor = torch.where(hyper["by_weight"] > 0, weight, 1.0) / (average + NORM_EPSILON)
    return torch.where(hyper["normalize"] > 0, factor, 1.0)


def _restrained(program: Program, hyper: Hypers, layer: Layer, name: str, old: Tensor, new: Tensor) -> Tensor:
    """L1's clamp at 0, and the beta that the original never updated."""
    new = torch.where(decay.clamps(program, hyper, layer) & (old * new < 0), 0.0, new)
    frozen = decay.freezes_beta(program, hyper, layer)
    if name.endswith(".beta") and frozen is not None:
        new = torch.where(frozen, old, new)
    return new


def _note(seen, value: Tensor, grad: Tensor, term: Tensor, new: Tensor) -> None:
    length = _norm(term)
    seen["weight"].append(_norm(value))
    seen["gradient"].append(_norm(grad))
    seen["decay"].append(length)
    seen["projection"].append((term * grad).sum() / (length + NORM_EPSILON))
    seen["update"].append(_norm(new - value))


def _norm(value: Tensor) -> Tensor:
    return torch.sqrt((value * value).sum())


def learning_rate(program: Program, hyper: Hypers, step: Tensor, per_epoch: int) -> Tensor:
    """This step's learning rate. step: 0-d integer, updates done before."""
    dtype = hyper["lr"].dtype
    warm = torch.clamp((step.to(dtype) + 1) / torch.clamp(hyper["warmup"] * per_epoch, min=1.0), max=1.0)
    if program.lr_schedule == "halving":
        epoch = torch.div(step, per_epoch, rounding_mode="floor").to(dtype)
        return hyper["lr"] * warm * hyper["lr_factor"] ** torch.floor(epoch / hyper["halve_every"])
    start = hyper["warmup"] * per_epoch
    done = torch.clamp((step.to(dtype) - start) / torch.clamp(program.epochs * per_epoch - start, min=1.0), 0.0, 1.0)
    if program.lr_schedule == "linear":
        return hyper["lr"] * warm * (1 - done)
    return hyper["lr"] * warm * 0.5 * (1 + torch.cos(torch.pi * done))
