"""What the selectors do: shares, two entropies, similarity of computation neurons, gradient sizes.

Notebook words: "selection ratio" is the share of inputs and units of a layer that choose a neuron. "Entropy of
selection ratios" is the entropy of these pooled shares (`pooled`: its printed pairs agree to four digits, .4141 with
.6783); it is near ln N even where each unit always chooses the same neuron. `balance` takes each unit's own shares;
it says how evenly a unit uses its neurons, but cannot tell a decided selector from a coin. "Average entropy"
(`entropy`) is that of the selector's probabilities for each single input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.family import Hypers, State
from trainables.multi_neuron.nets import multi_layers
from trainables.multi_neuron.neurons import Choice, Params
from trainables.multi_neuron.program import Clock, Program, active_choices, clock_of

Record = dict[str, Tensor]
"""`share` [N, out], mean of the one-hot choice; `entropy` 0-d, mean over inputs and units of that of p (nats)."""


def records(choices: Mapping[str, Choice], real: Tensor) -> dict[str, Record]:
    """Layer -> what it chose on one batch; `real` [B] leaves padding out. No gradient passes."""
    found = {}
    for layer, choice in choices.items():
        hard, p = choice.hard.detach(), choice.p.detach()
        weight = real.to(p.dtype) / real.sum()
        # [B, places..., N, out]: every token or place of a map is an input of its own
        share = hard.reshape(hard.shape[0], -1, *hard.shape[-2:]).mean(1)
        uncertainty = entropy(p, -2).flatten(1).mean(1)
        found[layer] = {
            "share": (share * weight[:, None, None]).sum(0),
            "entropy": (uncertainty * weight).sum(),
        }
    return found


def entropy(p: Tensor, dim: int) -> Tensor:
    """-sum p ln p in nats, 0 ln 0 being 0."""
    return -torch.special.xlogy(p, p).sum(dim)


def balance(share: Tensor) -> Tensor:
    """Load-balance entropy of shares [N, out]: of each unit's shares, averaged over units (at most ln N)."""
    return entropy(share, 0).mean()


def cosine(weight: Tensor, active: Tensor) -> Tensor:
    """Mean over units and pairs of the cosine between weights [N, out, ...] of the first `active` neurons; 1 for one
    neuron.

    With unit vectors u_n, sum over pairs of u_i . u_j = (|sum u_n|^2 - n) / 2.
    """
    flat = weight.flatten(2)
    units = flat / flat.norm(dim=-1, keepdim=True)
    used = (torch.arange(flat.shape[0], device=flat.device) < active).to(flat.dtype)
    squared = (units * used[:, None, None]).sum(0).square().sum(-1)
    pairs = active * (active - 1)
    return torch.where(pairs > 0, (squared - active) / torch.clamp(pairs, min=1.0), torch.ones_like(squared)).mean()


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics(found: Mapping[str, Record], prefix: str = "") -> dict[str, Tensor]:
    """Of the first and last multi-neuron layer (layers 1 and 2 of the notebook's MNIST net), and means over layers."""
    if not found:
        return {}
    layers = list(found.values())
    values = {
        f"{prefix}entropy": torch.stack([record["entropy"] for record in layers]).mean(),
        f"{prefix}balance": torch.stack([balance(record["share"]) for record in layers]).mean(),
    }
    for where, record in (("first", layers[0]), ("last", layers[-1])):
        values[f"{prefix}entropy_{where}"] = record["entropy"]
        values[f"{prefix}balance_{where}"] = balance(record["share"])
        values[f"{prefix}pooled_{where}"] = balance(record["share"].mean(1, keepdim=True))
        values[f"{prefix}share_{where}"] = record["share"][0].mean()
    return values


def cosines(program: Program, params: Params, active: Tensor) -> dict[str, Tensor]:
    """`cosine_first` and `cosine_last` of the first and last multi-neuron layer."""
    layers = multi_layers(program)
    if not layers:
        return {}
    return {
        f"cosine_{where}": cosine(params[f"{layer}/weight"], active)
        for where, layer in (("first", layers[0]), ("last", layers[-1]))
    }


# --- covariates: sums over an epoch in the lane's state ---------------------------------------------------------------


def sums_up(program: Program) -> bool:
    """Whether the program asked for covariates that are sums over an epoch."""
    return program.choices > 1 and any(name != "cosine" for name in program.covariates)


def empty(program: Program, params: Params) -> State:
    """Layer -> zeroed sums over the steps of an epoch."""
    sums = {}
    for layer in multi_layers(program):
        bias = params[f"{layer}/bias"]
        sums[layer] = {
            "share": torch.zeros_like(bias),
            "entropy": torch.zeros_like(bias[0, 0]),
            "gradient": torch.zeros_like(bias[:, 0]),
            "steps": torch.zeros_like(bias[0, 0]),
        }
    return sums


def accumulated(sums: State, found: Mapping[str, Record], grads: Params, clock: Clock) -> State:
    """The sums with one more step; they start anew with each epoch.

    `gradient` [N] is the L2 norm of d loss / d weight of each computation neuron over all units of its layer, before
    clipping.
    """
    added = {}
    for layer, record in found.items():
        new = {
            **record,
            "gradient": grads[f"{layer}/weight"].flatten(1).norm(dim=1),
            "steps": torch.ones_like(record["entropy"]),
        }
        added[layer] = {
            name: torch.where(clock.new_epoch, torch.zeros_like(old), old) + new[name].to(old.dtype)
            for name, old in sums[layer].items()
        }
    return added


def inspect(program: Program, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """The covariates asked for, of each multi-neuron layer, over the epoch just trained.

    `share/LAYER` [N], `balance/LAYER`, `entropy/LAYER`, `gradient/LAYER` [N]; `cosine/LAYER` of the present weights.
    """
    clock = clock_of(program, state["step"] - 1, hyper["active"].dtype)
    active = active_choices(program, hyper, clock.epochs)
    found: dict[str, Tensor] = {}
    for layer in multi_layers(program):
        values = {"cosine": cosine(state["params"][f"{layer}/weight"], active)}
        if sums_up(program):
            sums = state["monitor"][layer]
            share = sums["share"] / sums["steps"]
            values |= {
                "share": share.mean(1),
                "balance": balance(share),
                "entropy": sums["entropy"] / sums["steps"],
                "gradient": sums["gradient"] / sums["steps"],
            }
        found |= {f"{name}/{layer}": values[name] for name in program.covariates}
    return found
