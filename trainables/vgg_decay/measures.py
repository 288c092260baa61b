"""What the notebook watched beside accuracy: dead units, update-to-weight ratios, decay rates, topographic grouping."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables import draws
from trainables.family import Hypers, State
from trainables.vgg_decay import decay
from trainables.vgg_decay.program import Layer, Program, last_conv, layers, steps_per_epoch
from trainables.vgg_decay.updates import learning_rate

THRESHOLDS = {"dead_units": 1e-9, "dead_units_1e5": 1e-5, "dead_units_1e20": 1e-20}
"""Metric -> a unit is dead below it. The original's default is 1e-20; its notebook reads 1e-9 and 1e-5."""


def dead_per_layer(program: Program, params: Mapping[str, Tensor], threshold: float) -> Tensor:
    """Dead inputs of each layer, int [layers].

    An input channel is dead where the mean |weight| that reads it is below `threshold`: its unit sends nothing on.
    Source: hyqneuron/pylibhuva `th_nn_stats.get_model_utilization`.
    """
    used = [params[f"{layer.name}.weight"].abs().mean((0, 2, 3)) for layer in layers(program)]
    return torch.stack([(mean < threshold).sum() for mean in used])


def weight_measures(program: Program, state: State) -> dict[str, Tensor]:
    """Metrics of the weights alone, 0-d each."""
    params = state["params"]
    return {name: dead_per_layer(program, params, limit).sum() for name, limit in THRESHOLDS.items()}


def inspect(program: Program, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """Covariates at an epoch's end, [layers] each unless said otherwise, in the order conv1_1 .. logit.

    weight_norm, and of the last step: gradient_norm, decay_norm, gradient_on_decay, update_norm and update_ratio;
    decay_rate (L2); effective_lr = lr / ||w||^2; dead_units [3, layers] below 1e-20, 1e-9 and 1e-5; for fc6 and the
    last convolution share [3] (of |w| by cell distance), share_permuted [3] and similarity [2] (see `grouping`).
    """
    params, seen = state["params"], state["memory"]["seen"]
    norms = torch.stack([torch.sqrt((params[f"{layer.name}.weight"] ** 2).sum()) for layer in layers(program)])
    lr = learning_rate(program, hyper, state["step"] - 1, steps_per_epoch(program))
    found = {
        "weight_norm": norms,
        "gradient_norm": seen["gradient"],
        "decay_norm": seen["decay"],
        "gradient_on_decay": seen["projection"],
        "update_norm": seen["update"],
        "update_ratio": seen["update"] / torch.clamp(seen["weight"], min=1e-30),
        "decay_rate": torch.stack(list(decay.rates(program, hyper, state["init_variance"]).values())),
        "effective_lr": lr / torch.clamp(norms, min=1e-30) ** 2,
        "dead_units": torch.stack([dead_per_layer(program, params, limit) for limit in (1e-20, 1e-9, 1e-5)]),
    }
    for layer in topographic(program):
        weight = params[f"{layer.name}.weight"]
        found[f"{layer.name}.share"] = shares(layer, weight)
        found[f"{layer.name}.share_permuted"] = shares(layer, permuted(state["seed"], layer, weight))
        found[f"{layer.name}.similarity"] = torch.stack(contrast(layer.outputs, weight.abs().flatten(1)))
    return found


# --- grouping -------------------------------------------------------------------------------------------------------


def topographic(program: Program) -> tuple[Layer, ...]:
    """The last convolution and fc6: the two layers the notebook gave topographic decay."""
    return tuple(layer for layer in layers(program) if layer.name in (last_conv(program), "fc6"))


def grouping(program: Program, state: State, hidden: Mapping[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """Has a grouping by cells emerged? For each topographic layer, 0-d each:

    <layer>_share: share of |w| between units of the same cell (.111 of all pairs in the notebook's net);
    <layer>_share_permuted: the same after a random permutation of both sides' units, what no grouping would give;
    <layer>_similarity: mean cosine of the |weight| vectors into two units of one cell minus that of two cells;
    <layer>_correlation: mean correlation of two units' activations within a cell minus between cells.
    """
    found: dict[str, Tensor] = {}
    for layer in topographic(program):
        weight = state["params"][f"{layer.name}.weight"]
        within, between = contrast(layer.outputs, weight.abs().flatten(1))
        name = "conv_last" if layer.kernel == 3 else layer.name
        found[f"{name}_share"] = shares(layer, weight)[0]
        found[f"{name}_share_permuted"] = shares(layer, permuted(state["seed"], layer, weight))[0]
        found[f"{name}_similarity"] = within - between
        active = centred(hidden[layer.name].to(weight.dtype), real)
        within, between = contrast(layer.outputs, active)
        found[f"{name}_correlation"] = within - between
    return found


def shares(layer: Layer, weight: Tensor) -> Tensor:
    """Share of the sum of |w| at cell distance 0, 1 and 2, [3]."""
    size = weight.abs().sum((2, 3))
    apart = decay.distances(layer.outputs, layer.inputs, weight.device)
    return torch.stack([torch.where(apart == i, size, 0.0).sum() for i in range(3)]) / torch.clamp(
        size.sum(), min=1e-30
    )


def permuted(seed: Tensor, layer: Layer, weight: Tensor) -> Tensor:
    """The weight with its output and its input units shuffled, the same way all through a run."""
    zero = torch.zeros_like(seed)
    rows = draws.permutation(seed, zero, f"permuted/{layer.name}/outputs", layer.outputs)
    columns = draws.permutation(seed, zero, f"permuted/{layer.name}/inputs", layer.inputs)
    return weight[rows][:, columns]


def centred(hidden: Tensor, real: Tensor) -> Tensor:
    """Activations [N, H, W, C] -> [C, N H W], each unit's mean over the real examples taken off, the others 0."""
    weight = real.to(hidden.dtype)[:, None, None, None]
    count = torch.clamp(weight.sum() * (hidden.shape[1] * hidden.shape[2]), min=1.0)
    mean = (hidden * weight).sum((0, 1, 2)) / count
    return ((hidden - mean) * weight).movedim(3, 0).flatten(1)


def contrast(units: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine between two units' vectors [units, d] within a cell, and between cells."""
    with torch.autocast(vectors.device.type, enabled=False):
        unit = vectors / torch.clamp(torch.sqrt((vectors * vectors).sum(1, keepdim=True)), min=1e-20)
        cosine = unit @ unit.mT
    same = decay.distances(units, units, vectors.device) == 0
    others = same & ~torch.eye(units, dtype=torch.bool, device=vectors.device)
    return _mean_where(cosine, others), _mean_where(cosine, ~same)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / torch.clamp(mask.sum(), min=1)
