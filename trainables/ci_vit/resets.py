"""Which MLP units to reset: CBP, ReDO, SNR and SNR-V2 as masks over [depth, neurons], with their running statistics.

Every rule sees what each unit did on the batch before the update, and the weights after it. Definitions follow
ajozefiak/CL-transformers, src/models/reset_neurons_ViT.py (January 2025); where that code departs from the papers, a
hyper chooses (see `Hyper`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables import draws
from trainables.ci_vit.program import RESETTING, Program
from trainables.family import Hypers, dtype_of


@dataclass(frozen=True)
class Seen:
    """What a reset rule may look at.

    Args:
        seed, count: 0-d integers: the lane's seed, and updates done including this one.
        inputs: inputs (image x token) of the batch.
        fired: [depth, neurons], inputs on which a unit's pre-activation was >= 0, before the update.
        activity: [depth, neurons], mean ReLU output over the inputs, before the update (`cbp`, `redo`).
        ages_before, ages: [depth, neurons], batches of silence without and with this one.
        w_in, w_out: [depth, neurons], sums of each unit's absolute incoming and outgoing weights after the update
            (`cbp`).
    """

    seed: Tensor
    count: Tensor
    inputs: int
    fired: Tensor
    activity: Tensor | None
    ages_before: Tensor
    ages: Tensor
    w_in: Tensor | None
    w_out: Tensor | None


Statistics = dict[str, Tensor]


def init(program: Program, hyper: Hypers, seed: Tensor) -> Statistics:
    """The algorithm's statistics before the first step, each [depth, neurons]."""
    shape, dtype, device = (program.depth, program.neurons), dtype_of(program), seed.device
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    statistics: Statistics = {}
    if program.algorithm in RESETTING:
        statistics["reset_count"] = torch.zeros(shape, dtype=torch.int32, device=device)
    if program.algorithm == "cbp":
        statistics.update(cbp_age=zeros, cbp_activity=zeros.clone(), cbp_utility=zeros.clone())
    if program.algorithm in ("snr", "snr_v2"):
        statistics.update(
            snr_threshold=hyper["snr_threshold"].expand(shape).clone(),
            snr_sum=torch.ones_like(zeros),
            snr_count=torch.ones_like(zeros),
        )
    if program.algorithm == "snr_v2":
        statistics["snr_age"] = zeros
    return statistics


def silent_ages(ages: Tensor, fired: Tensor, inputs: int, epsilon: Tensor) -> Tensor:
    """Batches since a unit last fired: 0 where it fired, one more where it was silent on all inputs (or on a fraction
    of at least `epsilon` of them)."""
    silent = (inputs - fired).to(epsilon.dtype) >= epsilon * inputs
    return torch.where(silent, ages + 1, 0)


def choose(program: Program, hyper: Hypers, statistics: Statistics, seen: Seen) -> tuple[Tensor, Statistics]:
    """The units to reset now, bool [depth, neurons], and the statistics carried on."""
    mask, carried = _RULES[program.algorithm](program, hyper, statistics, seen)
    carried["reset_count"] = statistics["reset_count"] + mask
    return mask, {name: carried[name] for name in statistics}  # in the old order: the compiler guards on it


def _cbp(program: Program, hyper: Hypers, statistics: Statistics, seen: Seen) -> tuple[Tensor, Statistics]:
    """Continual backpropagation (Dohare et al. 2021, 2024) with the utility |mean activity - activity| w_out / w_in.

    With freq * n <= 1 one unit of a layer is replaced with that probability, else round(freq * n) units every step.
    """
    assert seen.activity is not None
    assert seen.w_in is not None
    assert seen.w_out is not None
    decay = hyper["cbp_decay"]
    age = statistics["cbp_age"] + 1
    correction = 1 - decay**age
    mean_activity = statistics["cbp_activity"] / correction  # of the batches before this one
    activity = decay * statistics["cbp_activity"] + (1 - decay) * seen.activity
    worth = (mean_activity - seen.activity).abs() * seen.w_out / seen.w_in
    utility_now = statistics["cbp_utility"] / correction  # likewise
    utility = decay * statistics["cbp_utility"] + (1 - decay) * worth

    expected = hyper["reset_freq"] * program.neurons
    one = draws.bernoulli(seen.seed, seen.count, "cbp/replace", expected, (program.depth,))
    wanted = torch.where(expected > 1, torch.round(expected), one.to(expected.dtype))
    eligible = age >= hyper["cbp_age"]
    ranked = torch.where(eligible, utility_now, torch.inf)
    place = torch.argsort(torch.argsort(ranked, dim=-1, stable=True), dim=-1, stable=True)
    chosen = eligible & (place < wanted[:, None])
    highest = torch.where(chosen, utility_now, -torch.inf).amax(-1, keepdim=True)
    tied = eligible & (utility_now <= highest)
    mask = torch.where(hyper["cbp_ties"] > 0, tied, chosen)

    carried = {"cbp_age": age, "cbp_activity": activity, "cbp_utility": utility}
    return mask, {name: torch.where(mask, 0, value) for name, value in carried.items()}


def _redo(program: Program, hyper: Hypers, statistics: Statistics, seen: Seen) -> tuple[Tensor, Statistics]:
    """ReDO (Sokar et al. 2023): with some probability a step, units whose share of the layer's activity is too small.

    The paper divides by the layer's mean, the original by its sum. In a layer that is silent altogether every score
    counts as 0 (the original's 0/0 resets nothing).
    """
    assert seen.activity is not None
    total = seen.activity.sum(-1, keepdim=True)
    norm = total / torch.where(hyper["redo_mean"] > 0, float(program.neurons), 1.0)
    score = torch.where(total > 0, seen.activity / norm, 0)
    now = draws.bernoulli(seen.seed, seen.count, "redo/now", hyper["reset_freq"])
    return (score <= hyper["redo_threshold"]) & now, {}


def _snr(program: Program, hyper: Hypers, statistics: Statistics, seen: Seen) -> tuple[Tensor, Statistics]:
    """Self-normalised resets: a unit silent for as many batches as its threshold, an exponential's percentile."""
    mask = seen.ages >= statistics["snr_threshold"]
    arrived = (seen.ages == 0) | mask
    sums = statistics["snr_sum"] + torch.where(arrived, seen.ages_before + 1, 0)
    counts = statistics["snr_count"] + arrived
    threshold = statistics["snr_threshold"]
    percentile = -torch.log(1 - hyper["snr_percentile"]) * sums / counts
    renewed = torch.ceil(torch.where(threshold <= percentile, 2 * threshold, percentile))
    return mask, _renewed(hyper, seen, threshold, renewed, sums, counts)


def _snr_v2(program: Program, hyper: Hypers, statistics: Statistics, seen: Seen) -> tuple[Tensor, Statistics]:
    """SNR-V2: age in inputs; a unit that fired on the batch has its mean wait there for an age."""
    firings = seen.fired.to(statistics["snr_age"].dtype)
    age = torch.where(firings > 0, seen.inputs / firings.clamp(min=1), statistics["snr_age"] + seen.inputs)
    threshold = statistics["snr_threshold"]
    mask = age >= threshold
    sums = statistics["snr_sum"] + seen.inputs
    counts = statistics["snr_count"] + firings + mask
    renewed = torch.ceil(-torch.log(1 - hyper["snr_percentile"]) * sums / counts)
    carried = _renewed(hyper, seen, threshold, renewed, sums, counts)
    return mask, {**carried, "snr_age": torch.where(mask, 0, age)}


def _renewed(hyper: Hypers, seen: Seen, threshold: Tensor, renewed: Tensor, sums: Tensor, counts: Tensor) -> Statistics:
    """With probability reset_freq take the renewed thresholds and start the arrival statistics again at 1/1."""
    now = draws.bernoulli(seen.seed, seen.count, "snr/renew", hyper["reset_freq"])
    return {
        "snr_threshold": torch.where(now, renewed, threshold),
        "snr_sum": torch.where(now, 1, sums),
        "snr_count": torch.where(now, 1, counts),
    }


_RULES: dict[str, Callable[[Program, Hypers, Statistics, Seen], tuple[Tensor, Statistics]]] = {
    "cbp": _cbp,
    "redo": _redo,
    "snr": _snr,
    "snr_v2": _snr_v2,
}
