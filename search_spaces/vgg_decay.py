"""Every sweep of the vgg_decay notebook, its open wishes, and the arms without which its numbers cannot be read.

A run's name (`exp6`, `topo.ac3`) is an arm of the sweep it belongs to. All notebook rows train for 200 epochs, also
where a run of the notebook was stopped earlier: under the halving schedule a longer run passes through exactly what a
shorter one ended with, and the summary has `test_acc_100`, `test_acc_140` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_spaces.space import Arms, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps
from trainables.vgg_decay.presets import IXP2, MODERN, NOTEBOOK, SMALL, VAR_DUP2

DXP4 = {**NOTEBOOK, **VAR_DUP2}
IXP = {**NOTEBOOK, **IXP2}
TOPO = {**IXP, "topo_base": 2.0, "topo_frozen_beta": 1.0}
"""As coded: the BatchNorm beta of a topographic layer is never updated. `--set topo_frozen_beta=0` mends it."""

NWM = {"normalize": 1.0, "norm_ema": 0.98, "by_weight": 0.0}
EMA = {"normalize": 1.0, "norm_ema": 0.98, "by_weight": 1.0}
NO_EMA = {"normalize": 1.0, "norm_ema": 0.0, "by_weight": 1.0}

LR_WD_LOGIT = (0.0, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)


def runs(prefix: str, field: str, values: Mapping[int, float] | tuple[float, ...], **fixed: Any) -> Space:
    """Runs prefix1, prefix2, ... (or with the given numbers), one value of `field` each."""
    numbered = values if isinstance(values, Mapping) else dict(enumerate(values, start=1))
    arms = {f"{prefix}{number}": {field: value, **fixed} for number, value in numbered.items()}
    return Space((Arms("run", arms, run_names=True),))


def arms(name: str, choices: Mapping[str, Mapping[str, Any]]) -> Arms:
    return Arms(name, choices)


NOTEBOOK_SWEEPS = (
    Sweep(
        "l2",
        "exp1..exp7: L2 on every parameter",
        "notebook",
        runs("exp", "wd", (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)),
        NOTEBOOK,
    ),
    Sweep(
        "l2_repeat",
        "exp8: exp6 once more, on a second seed",
        "notebook",
        runs("exp", "wd", {8: 0.016}),
        NOTEBOOK,
        seeds=2,
    ),
    Sweep(
        "momentum",
        "exp9: exp6 with momentum .9, its learning rate not rescaled",
        "notebook",
        runs("exp", "momentum", {9: 0.9}),
        {**NOTEBOOK, "wd": 0.016},
    ),
    Sweep(
        "l1_some",
        "axp1..axp6: L1 with the clamp at 0 on conv1_1..conv4_2, L2 .016 on the rest",
        "notebook",
        runs("axp", "l1", (0.00016, 0.0016, 0.0008, 0.00008, 0.00032, 0.00064)),
        {**NOTEBOOK, "wd": 0.016, "l1_front": 1.0},
    ),
    Sweep(
        "l1_all",
        "bxp1..bxp4: L1 with the clamp at 0 on every parameter",
        "notebook",
        runs("bxp", "l1", (0.0001, 0.0002, 0.0004, 0.0008)),
        {**NOTEBOOK, "l1_front": 1.0, "l1_back": 1.0},
    ),
    Sweep(
        "var_dup4",
        "cxp1..cxp9: decay by inverse initial variance, divided by 4 at every max-pool",
        "notebook",
        runs("cxp", "wd", (5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4, 1.28e-3)),
        {**DXP4, "dup_mult": 4.0},
    ),
    Sweep(
        "var_dup2",
        "dxp1..dxp6: decay by inverse initial variance, divided by 2 at every max-pool",
        "notebook",
        runs("dxp", "wd", (2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4)),
        DXP4,
    ),
    Sweep(
        "var_dup1",
        "fxp1..fxp8: decay by inverse initial variance alone (fxp7 and fxp8 diverged)",
        "notebook",
        runs("fxp", "wd", (5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4)),
        {**DXP4, "dup_mult": 1.0},
    ),
    Sweep(
        "last2_mult",
        "gxp1..gxp5: dxp4 with the decay of fc6 and logit multiplied (1 is dxp4 itself)",
        "notebook",
        runs("gxp", "last2_mult", {1: 0.1, 4: 3.0, 2: 10.0, 5: 30.0, 3: 100.0}),
        DXP4,
    ),
    Sweep(
        "hxp",
        "hxp1..hxp9: L2 around exp6, finely",
        "notebook",
        runs("hxp", "wd", (0.010, 0.012, 0.014, 0.016, 0.018, 0.020, 0.022, 0.024, 0.026)),
        NOTEBOOK,
    ),
    Sweep(
        "last1_mult",
        "ixp1..ixp4: dxp4 with the decay of logit multiplied",
        "notebook",
        runs("ixp", "last1_mult", (3.0, 10.0, 30.0, 100.0)),
        DXP4,
    ),
    Sweep(
        "lssgd",
        "jxp1..jxp4: update / ||update|| x ||w|| a tensor, without average (that version's code is lost: inferred)",
        "notebook",
        runs("jxp", "last1_mult", (3.0, 10.0, 30.0, 100.0)),
        {**DXP4, **NO_EMA},
    ),
    Sweep(
        "lssgd_ema",
        "kxp1..kxp3: the norm averaged over steps",
        "notebook",
        runs("kxp", "last1_mult", (3.0, 10.0, 100.0)),
        {**DXP4, **EMA},
    ),
    Sweep(
        "lssgd_nwm",
        "lxp1..lxp3: the norm averaged over steps, without x ||w||",
        "notebook",
        runs("lxp", "last1_mult", (3.0, 10.0, 100.0)),
        {**DXP4, **NWM},
    ),
    Sweep(
        "topo",
        "topo.a1, topo.b1, topo.ab1: topographic decay on fc6, conv5_2 or both",
        "notebook",
        Space(
            (
                Arms(
                    "run",
                    {
                        "topo.a1": {"topo_a": 1.0},
                        "topo.b1": {"topo_b": 1.0},
                        "topo.ab1": {"topo_a": 1.0, "topo_b": 1.0},
                    },
                    run_names=True,
                ),
            )
        ),
        TOPO,
    ),
    Sweep(
        "topo_aa",
        "topo.aa1..aa6: topo.a over the base rate",
        "notebook",
        runs("topo.aa", "wd", (0.00004, 0.00008, 0.00016, 0.00020, 0.00032, 0.00064)),
        {**TOPO, "topo_a": 1.0},
    ),
    Sweep(
        "topo_ad",
        "topo.ad1..ad9: topo.a over the logit layer's factor",
        "notebook",
        runs("topo.ad", "last1_mult", (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)),
        {**TOPO, "topo_a": 1.0},
    ),
    Sweep(
        "topo_ac",
        "topo.ac1..ac11: topo.a over topo_base (mended, ac1 is ixp2)",
        "notebook",
        runs("topo.ac", "topo_base", (1.0, 1.1, 1.2, 1.5, 1.8, 2.0, 2.3, 2.8, 3.0, 4.0, 6.0)),
        {**TOPO, "topo_a": 1.0},
    ),
)

WISHES = (
    Sweep(
        "wd_front_x_last",
        "how do the decays of the other layers and of the last one interact? logit_wd is that layer's rate itself",
        "wish",
        Space((Choice("wd", (0.0, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4)), Choice("logit_wd", LR_WD_LOGIT))),
        DXP4,
    ),
    Sweep(
        "decay_x_norm",
        "how to combine weight decay with update normalisation: inside or outside the norm, at what strength?",
        "wish",
        Space(
            (
                arms("normalize", {"none": {"normalize": 0.0}, "nwm": NWM, "ema": EMA}),
                arms("decay", {"coupled": {"decay_outside": 0.0}, "decoupled": {"decay_outside": 1.0}}),
                Choice("wd", (4e-5, 1.6e-4, 6.4e-4)),
            )
        ),
        IXP,
    ),
    Sweep(
        "unit_adam",
        "Adam with one second moment an element, a unit or a layer",
        "wish",
        Space((Choice("second_moment", ("element", "unit", "layer")), Choice("lr", (3e-4, 1e-3, 3e-3, 1e-2)))),
        {**IXP, "optimizer": "adam"},
    ),
    Sweep(
        "last1_mult_far",
        "does a far stronger logit decay help, with and without normalised updates (ixp, jxp)?",
        "wish",
        Space(
            (
                arms("normalize", {"no": {"normalize": 0.0}, "yes": NO_EMA}),
                Choice("last1_mult", (100.0, 300.0, 1000.0, 3000.0, 1e4, 3e4)),
            )
        ),
        DXP4,
    ),
    Sweep(
        "l1_tune",
        "weaker L1 on every parameter, and longer: the halving schedule stretched to ten stages of each length",
        "wish",
        Space(
            (
                arms("epochs", {str(n): {"epochs": n, "halve_every": n / 10} for n in (140, 200, 300)}),
                Choice("l1", (1e-6, 1e-5, 3e-5, 1e-4)),
            )
        ),
        {**NOTEBOOK, "l1_front": 1.0, "l1_back": 1.0},
    ),
    Sweep(
        "topo_grouping",
        "does topographic decay group units? share of |w| within a cell, neighbours' correlation (mended)",
        "wish",
        Space((Choice("topo_base", (1.0, 6.0, 20.0)),)),
        {**TOPO, "topo_a": 1.0, "topo_frozen_beta": 0.0},
        covariates=("grouping",),
    ),
)

CONTROLS = (
    Sweep("null", "16 seeds of ixp2 and nothing else: how noisy is one run?", "control", Space(), IXP, seeds=16),
    Sweep(
        "topo_matched",
        "topographic decay against the same layer's uniform decay times the mean multiplier (mended)",
        "control",
        Space(
            (
                arms("multiplier", {"topographic": {"topo_uniform": 0.0}, "uniform": {"topo_uniform": 1.0}}),
                Choice("topo_base", (1.5, 2.0, 6.0)),
            )
        ),
        {**TOPO, "topo_a": 1.0, "topo_frozen_beta": 0.0},
    ),
    Sweep(
        "bn_decay",
        "is it the decay of BatchNorm's gamma and beta and of the biases?",
        "control",
        Space(
            (
                arms("base", {"ixp2": IXP2, "exp6": {"wd": 0.016}}),
                arms(
                    "bn_and_bias",
                    {"yes": {"bn_decay": 1.0, "bias_decay": 1.0}, "no": {"bn_decay": 0.0, "bias_decay": 0.0}},
                ),
            )
        ),
        NOTEBOOK,
    ),
    Sweep(
        "topo_beta",
        "topo.a1, b1 and ab1 as coded (beta never updated) and mended",
        "control",
        Space(
            (
                arms(
                    "layer",
                    {"a": {"topo_a": 1.0}, "b": {"topo_b": 1.0}, "ab": {"topo_a": 1.0, "topo_b": 1.0}},
                ),
                arms("beta", {"as coded": {"topo_frozen_beta": 1.0}, "mended": {"topo_frozen_beta": 0.0}}),
            )
        ),
        TOPO,
    ),
)

PRODUCT = (
    Sweep(
        "demo",
        "bundled digits, three small stages: base decay and logit factor under dup2, in a minute",
        "product",
        Space(
            (
                Range("wd", 1e-5, 1e-2, log=True),
                Range("last1_mult", 1.0, 100.0, log=True),
                Range("lr", 0.05, 0.5, log=True),
            )
        ),
        {**SMALL, "inverse_variance": 1.0, "dup_mult": 2.0, "halve_every": 3.0},
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=16,
    ),
    Sweep(
        "modern",
        "CIFAR-10 with a present-day recipe: shifts, cutout, Nesterov momentum, cosine, smoothing; meant for 94 %",
        "product",
        Space(),
        MODERN,
        seeds=3,
    ),
    Sweep(
        "best",
        "around the notebook's winners (ixp2, dxp4, topo.ad8), chosen on 5,000 held-out training images",
        "product",
        Space(
            (
                Range("lr", 0.02, 0.4, log=True),
                Range("wd", 4e-5, 4e-4, log=True),
                Range("dup_mult", 1.0, 3.0),
                Range("last1_mult", 1.0, 1000.0, log=True),
                Range("momentum", 0.0, 0.95),
            )
        ),
        {**IXP, "holdout": 5000},
        seeds=3,
        searcher="optuna",
        scheduler="asha",
        trials=60,
        metric="val_acc",
    ),
)

SWEEPS = Sweeps(family="vgg_decay", default="demo", sweeps=(*NOTEBOOK_SWEEPS, *WISHES, *CONTROLS, *PRODUCT))
