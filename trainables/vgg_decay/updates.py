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
from trainables.vgg_decay.decay import Coefficients
from trainables.vgg_decay.packing import VECTORS, Packed, norms, pack, sums, unpack, vector_lengths
from trainables.vgg_decay.program import Program, layers

NORM_EPSILON = 1e-8
SEEN = ("weight", "gradient", "decay", "projection", "update")

Memory = dict[str, Packed]


def init_memory(program: Program, params: Mapping[str, Tensor]) -> Memory:
    """What an update remembers, packed: momentum, norms' averages, Adam's second moments, the last step's norms."""
    packed = pack(program, params)
    unseen = torch.zeros_like(params["logit.bias"][:1]).repeat(len(layers(program)))
    memory = {
        "momentum": {name: torch.zeros_like(value) for name, value in packed.items()},
        "norm": {name: torch.zeros_like(norms(value)) for name, value in packed.items()},
        "seen": {name: unseen.clone() for name in SEEN},
    }
    if program.optimizer == "adam":
        memory["second"] = {name: torch.zeros_like(_shared(program, value)) for name, value in packed.items()}
    return memory


def update(
    program: Program,
    hyper: Hypers,
    step: Tensor,
    lr: Tensor,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    memory: Memory,
    init_variance: Tensor,
) -> tuple[dict[str, Tensor], Memory, Tensor]:
    """The parameters and the memory after one update.

    Args:
        step: 0-d integer, number of updates done before.
        lr: 0-d, this step's learning rate.

    Returns:
        (params, memory, ratio). memory["seen"] holds, for each layer's weight, the norms of the weight, gradient and
        decay before the update, of the update itself, and the gradient's projection on the decay, [layers] each.
        ratio: 0-d, ||update|| / ||parameters||, all tensors together.
    """
    values, slopes = pack(program, params), pack(program, grads)
    factors = _packed_coefficients(program, decay.coefficients(program, hyper, init_variance))
    outside = hyper["decay_outside"] > 0
    updated: Packed = {}
    kept: Memory = {name: {} for name in memory if name != "seen"}
    seen: dict[str, list[Tensor]] = {name: [] for name in SEEN}
    for name, value in values.items():
        term = decay.term(factors[name], value)
        inside = slopes[name] + torch.where(outside, 0.0, term)
        direction = _direction(program, hyper, step, name, inside, memory, kept)
        length = norms(value)
        scale = _scale(hyper, step, name, length, direction, memory, kept)
        moved = value - lr * (scale * direction + torch.where(outside, term, 0.0))
        moved = torch.where(factors[name].clamps & (value * moved < 0), 0.0, moved)
        updated[name] = torch.where(factors[name].frozen, value, moved)
        for key, found in zip(SEEN, _seen(length, value, slopes[name], term, updated[name]), strict=True):
            seen[key].append(found)
    ratio = _whole(seen["update"]) / _whole(seen["weight"])
    kept["seen"] = {name: torch.stack(found[:-1]) for name, found in seen.items()}
    return unpack(program, updated), kept, ratio


def _packed_coefficients(program: Program, table: Mapping[str, Coefficients]) -> dict[str, Coefficients]:
    """Weights' coefficients as they are; the vectors' as columns, one row each."""
    packed = {name: found for name, found in table.items() if name.endswith(".weight")}
    columns = zip(*(table[name] for name in vector_lengths(program)), strict=True)
    packed[VECTORS] = Coefficients(*(torch.stack(column)[:, None] for column in columns))
    return packed


def _direction(
    program: Program, hyper: Hypers, step: Tensor, name: str, d: Tensor, memory: Memory, kept: Memory
) -> Tensor:
    if program.optimizer == "adam":
        return _adam(program, hyper, step, name, d, memory, kept)
    velocity = hyper["momentum"] * memory["momentum"][name] + d
    kept["momentum"][name] = velocity
    return torch.where(hyper["nesterov"] > 0, d + hyper["momentum"] * velocity, velocity)


def _adam(program: Program, hyper: Hypers, step: Tensor, name: str, d: Tensor, memory: Memory, kept: Memory) -> Tensor:
    """Adam (Kingma & Ba 2015); second moments of a unit or a layer are means of the squares they share."""
    b1, b2, count = hyper["beta1"], hyper["beta2"], (step + 1).to(d.dtype)
    first = b1 * memory["momentum"][name] + (1 - b1) * d
    second = b2 * memory["second"][name] + (1 - b2) * _shared(program, d * d)
    kept["momentum"][name], kept["second"][name] = first, second
    return (first / (1 - b1**count)) / (torch.sqrt(second / (1 - b2**count)) + hyper["adam_eps"])


def _shared(program: Program, squares: Tensor) -> Tensor:
    """Packed squares, pooled over what shares a second moment. A unit is an output channel; a vector has one each."""
    if program.second_moment == "element" or (program.second_moment == "unit" and squares.dim() == 2):
        return squares
    if squares.dim() == 2:  # sums over lengths: the rows are filled up with zeros
        return torch.stack([row.sum(0, keepdim=True) / n for row, n in zip(squares, _lengths(program), strict=True)])
    return squares.mean((0, 1, 2, 3) if program.second_moment == "layer" else (1, 2, 3), keepdim=True)


def _lengths(program: Program) -> tuple[int, ...]:
    return tuple(vector_lengths(program).values())


def _scale(
    hyper: Hypers, step: Tensor, name: str, weight: Tensor, direction: Tensor, memory: Memory, kept: Memory
) -> Tensor:
    length = norms(direction)
    average = hyper["norm_ema"] * memory["norm"][name] + (1 - hyper["norm_ema"]) * length
    average = torch.where(step == 0, length, average)
    kept["norm"][name] = average
    by = torch.where(hyper["by_weight"] > 0, torch.maximum(weight, hyper["norm_floor"]), 1.0)
    return torch.where(hyper["normalize"] > 0, by / (average + NORM_EPSILON), 1.0)


def _seen(length: Tensor, value: Tensor, slope: Tensor, term: Tensor, moved: Tensor) -> tuple[Tensor, ...]:
    """In the order of SEEN."""
    decayed = norms(term)
    projection = sums(term * slope) / (decayed + NORM_EPSILON)
    return length, norms(slope), decayed, projection, norms(moved - value)


def _whole(lengths: list[Tensor]) -> Tensor:
    """Norm of all parameters from the norms of the packed tensors."""
    return torch.sqrt(torch.stack([(length * length).sum() for length in lengths]).sum())


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
