"""Weight decay of every kind in the notebook, as per-tensor terms of one lane's numbers.

The term `decay` below is what the original adds to a gradient. Source: hyqneuron/regularizers `main.py`
(`make_param_groups_with_proportional_variance`, `make_optimizer`), hyqneuron/pylibhuva `th_monitor`, `th_model`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.family import Hypers
from trainables.vgg_decay.program import Layer, Program, last_conv, layers

GRID = 3


def rates(program: Program, hyper: Hypers, init_variance: Tensor) -> dict[str, Tensor]:
    """L2 rate of each layer: wd / Var(W_init)^p / dup_mult^(max-pools before it) * the layer's factors.

    Args:
        init_variance: [layers], the sample variance of each weight as it was initialised.
    """
    table: dict[str, Tensor] = {}
    for i, layer in enumerate(layers(program)):
        rate = hyper["wd"] * init_variance[i] ** -hyper["inverse_variance"] * hyper["dup_mult"] ** -float(layer.pools)
        rate = rate * hyper[f"stage{layer.stage}_mult" if layer.stage else "last2_mult"]
        if layer.name == "logit":
            rate = rate * hyper["last1_mult"]
            rate = torch.where(hyper["logit_wd"] >= 0, hyper["logit_wd"], rate)
        table[layer.name] = rate
    return table


def init_variance(program: Program, params: Mapping[str, Tensor]) -> Tensor:
    """Sample variance (n - 1) of each layer's weight, [layers]: taken once, at initialisation."""
    return torch.stack([params[f"{layer.name}.weight"].var() for layer in layers(program)])


def term(program: Program, hyper: Hypers, layer: Layer, tensor: str, value: Tensor, rate: Tensor) -> Tensor:
    """What decay adds to the gradient of one parameter tensor: rate * w * multiplier, or l1 * sign(w)."""
    kind = tensor.rsplit(".", 1)[1]
    l2 = rate * value
    if kind == "weight":
        multiplier = weight_multiplier(program, hyper, layer, value.device)
        l2 = l2 if multiplier is None else l2 * multiplier
    decay = torch.where(uses_l1(program, hyper, layer), hyper["l1"] * torch.sign(value), l2)
    if kind == "weight":
        return decay
    return decay * (hyper["bias_decay"] if kind == "bias" else hyper["bn_decay"])


def uses_l1(program: Program, hyper: Hypers, layer: Layer) -> Tensor:
    """Bool: does this layer decay by L1? The front is conv1_1..conv4_2 in the notebook's net, the back the rest."""
    front = 0 < layer.stage < len(program.widths)
    return hyper["l1_front" if front else "l1_back"] > 0


def clamps(program: Program, hyper: Hypers, layer: Layer) -> Tensor:
    """Bool: is a weight of this layer whose sign changes in a step set to 0? (L1 overshoots 0 otherwise.)"""
    return uses_l1(program, hyper, layer) & (hyper["l1"] != 0) & (hyper["l1_clamp"] > 0)


# --- topographic decay ----------------------------------------------------------------------------------------------


def cells(units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Column and row of each unit's cell: ceil(units / 9) consecutive units a cell, cells laid row by row."""
    cell = torch.arange(units, device=device) // -(-units // GRID**2)
    return cell % GRID, cell // GRID


def distances(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """floor of the Euclidean distance between the cells of each output and input unit, int [outputs, inputs]: 0..2."""
    (out_x, out_y), (in_x, in_y) = cells(outputs, device), cells(inputs, device)
    square = (out_x[:, None] - in_x) ** 2 + (out_y[:, None] - in_y) ** 2
    return (square >= 1).int() + (square >= 4).int()


def topo_flag(program: Program, hyper: Hypers, layer: Layer) -> Tensor | None:
    """The flag that turns a layer's topographic decay on, or None where there is none to turn on."""
    names = {"fc6": "topo_a", last_conv(program): "topo_b"}
    return hyper[names[layer.name]] if layer.name in names else None


def weight_multiplier(program: Program, hyper: Hypers, layer: Layer, device: torch.device) -> Tensor | None:
    """topo_base ^ distance for each pair of units, [out, in, 1, 1], or its mean with `topo_uniform`."""
    flag = topo_flag(program, hyper, layer)
    if flag is None:
        return None
    base, apart = hyper["topo_base"], distances(layer.outputs, layer.inputs, device)
    multiplier = torch.where(apart == 0, torch.ones_like(base), torch.where(apart == 1, base, base * base))
    multiplier = torch.where(hyper["topo_uniform"] > 0, multiplier.mean(), multiplier)
    return torch.where(flag > 0, multiplier, torch.ones_like(base))[:, :, None, None]


def freezes_beta(program: Program, hyper: Hypers, layer: Layer) -> Tensor | None:
    """Bool: is this layer's BatchNorm beta left alone, as the original's short multiplier list had it?"""
    flag = topo_flag(program, hyper, layer)
    return None if flag is None else (flag > 0) & (hyper["topo_frozen_beta"] > 0)
