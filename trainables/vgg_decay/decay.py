"""Weight decay of every kind in the notebook, as coefficients of one lane's parameter tensors.

Source: hyqneuron/regularizers `main.py` (`make_param_groups_with_proportional_variance`, `make_optimizer`) and
hyqneuron/pylibhuva `th_monitor`, `th_model.get_topographic_decay_multiplier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainables.family import Hypers
from trainables.operators import kept
from trainables.vgg_decay.program import Layer, Program, last_conv, layers

GRID = 3


class Coefficients(NamedTuple):
    """How one parameter tensor decays: 0-d each, `l2` of a topographic weight [out, in, 1, 1].

    Args:
        l2, l1: the rates; only one of them acts, see `uses_l1`.
        uses_l1: bool, L1 in place of L2.
        clamps: bool, what changes sign in a step becomes 0 (L1 overshoots 0 otherwise).
        frozen: bool, never updated.
    """

    l2: Tensor
    l1: Tensor
    uses_l1: Tensor
    clamps: Tensor
    frozen: Tensor


def term(coefficients: Coefficients, value: Tensor) -> Tensor:
    """What decay adds to the gradient: l2 * w, or l1 * sign(w)."""
    return torch.where(coefficients.uses_l1, coefficients.l1 * torch.sign(value), coefficients.l2 * value)


def rates(program: Program, hyper: Hypers, init_variance: Tensor) -> dict[str, Tensor]:
    """L2 rate of each layer: wd / Var(W_init)^p / dup_mult^(max-pools before it) * the layer's factors.

    Args:
        init_variance: [layers], the sample variance of each weight as it was initialised.
    """
    table: dict[str, Tensor] = {}
    by_variance = (hyper["wd"] * init_variance ** -hyper["inverse_variance"]).unbind()
    by_pools = [hyper["dup_mult"] ** -float(pools) for pools in range(len(program.widths) + 1)]
    for layer, rate in zip(layers(program), by_variance, strict=True):
        rate = rate * by_pools[layer.pools] * hyper[f"stage{layer.stage}_mult" if layer.stage else "last2_mult"]
        if layer.name == "logit":
            rate = rate * hyper["last1_mult"]
            rate = torch.where(hyper["logit_wd"] >= 0, hyper["logit_wd"], rate)
        table[layer.name] = rate
    return table


def init_variance(program: Program, params: Mapping[str, Tensor]) -> Tensor:
    """Sample variance (n - 1) of each layer's weight, [layers]: taken once, at initialisation."""
    return torch.stack([params[f"{layer.name}.weight"].var() for layer in layers(program)])


def coefficients(program: Program, hyper: Hypers, init_variance: Tensor) -> dict[str, Coefficients]:
    """Every parameter tensor's coefficients, in the order of the net."""
    table: dict[str, Coefficients] = {}
    speed = rates(program, hyper, init_variance)
    factors = {"bias": hyper["bias_decay"], "gamma": hyper["bn_decay"], "beta": hyper["bn_decay"]}
    never = hyper["wd"] != hyper["wd"]
    # L1's front is conv1_1..conv4_2 in the notebook's net: every stage but the last
    part_l1 = {front: hyper["l1_front" if front else "l1_back"] > 0 for front in (True, False)}
    part_clamps = {front: on & (hyper["l1"] != 0) & (hyper["l1_clamp"] > 0) for front, on in part_l1.items()}
    for layer in layers(program):
        front = 0 < layer.stage < len(program.widths)
        flag = topo_flag(program, hyper, layer)
        frozen = never if flag is None else (flag > 0) & (hyper["topo_frozen_beta"] > 0)
        for name in layer.tensors:
            kind = name.rsplit(".", 1)[1]
            l2, l1 = speed[layer.name], hyper["l1"]
            if kind == "weight":
                l2 = l2 if flag is None else l2 * topo_multiplier(hyper, flag, layer, l2.device)
            else:
                l2, l1 = l2 * factors[kind], l1 * factors[kind]
            held = frozen if kind == "beta" else never
            table[name] = Coefficients(l2, l1, part_l1[front], part_clamps[front], held)
    return table


# --- topographic decay ----------------------------------------------------------------------------------------------


def cells(units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Column and row of each unit's cell: ceil(units / 9) consecutive units a cell, cells laid row by row."""
    cell = torch.arange(units, device=device) // -(-units // GRID**2)
    return cell % GRID, cell // GRID


def distances(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """floor of the Euclidean distance between the cells of each output and input unit, int [outputs, inputs]: 0..2."""
    (out_x, out_y), (in_x, in_y) = cells(outputs, device), cells(inputs, device)
    # |a - b|^2 as a product: what torch.compile makes of the differences, it works out anew for every weight of a pair
    one, other = torch.ones_like(out_x), torch.ones_like(in_x)
    left = torch.stack([out_x, out_y, out_x**2 + out_y**2, one], 1).float()
    right = torch.stack([-2 * in_x, -2 * in_y, other, in_x**2 + in_y**2]).float()
    square = left @ right  # whole numbers of at most 8: exact in any precision
    return (square >= 1).int() + (square >= 4).int()


def topo_flag(program: Program, hyper: Hypers, layer: Layer) -> Tensor | None:
    """The flag that turns a layer's topographic decay on, or None where there is none to turn on."""
    names = {"fc6": "topo_a", last_conv(program): "topo_b"}
    return hyper[names[layer.name]] if layer.name in names else None


def topo_multiplier(hyper: Hypers, flag: Tensor, layer: Layer, device: torch.device) -> Tensor:
    """topo_base ^ distance for each pair of units, [out, in, 1, 1], or its mean with `topo_uniform`; 1 where off."""
    base, apart = hyper["topo_base"], distances(layer.outputs, layer.inputs, device)
    multiplier = torch.where(apart == 0, torch.ones_like(base), torch.where(apart == 1, base, base * base))
    multiplier = torch.where(hyper["topo_uniform"] > 0, multiplier.mean(), multiplier)
    return kept(torch.where(flag > 0, multiplier, torch.ones_like(base)))[:, :, None, None]
