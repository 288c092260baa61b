"""Every sweep of the notebook "Continual ImageNet with ViT", its open wishes and controls, and two of ours.

Grids hold the notebook's own values. Where the notebook's protocol is meant, the base is ImageNet-32, 500 tasks of 10
epochs in batches of 100, and the accuracy on the batch after the update is recorded beside the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_spaces.space import Arms, Axis, Choice, Range, Space, union
from search_spaces.sweeps import Kind, Sweep, Sweeps

BASE: Mapping[str, Any] = {
    "data": "imagenet32",
    "tasks": 500,
    "epochs_per_task": 10,
    "batch": 100,
    "train_acc_after": True,
}

L3, L12_FAST, L12 = "L3@1e-3", "L12@1e-3", "L12@1e-4"

NETS = {L3: {"depth": 3, "lr": 1e-3}, L12_FAST: {"depth": 12, "lr": 1e-3}, L12: {"depth": 12, "lr": 1e-4}}

NET = Arms("net", NETS)

L2_STAR = {"l2_mlp_in": 0.0, "l2_other": 0.0}
"""L2* of January 2025: the penalty acts on the query-key-value kernels only."""

COVARIATES = ("ages", "resets", "entropy", "norms", "dead")


def powers(*exponents: int) -> tuple[float, ...]:
    return tuple(float(f"1e{exponent}") for exponent in exponents)


def a_task(*parts: float) -> tuple[float, ...]:
    """Reset frequencies 1 / (i * 120): on average once in i tasks of 120 steps."""
    return tuple(1 / (part * 120) for part in parts)


REGULARISER = powers(-1, -2, -3, -4, -5, -6, -7)

SPACES: dict[str, Space] = {
    "lr": Space((Choice("depth", (3, 12)), Choice("lr", powers(-1, -2, -3, -4, -5, -6)))),
    "l2": Space((NET, Choice("l2", REGULARISER))),
    "l2init": Space((NET, Choice("l2_init", REGULARISER))),
    "shrink_perturb": Space(
        (
            NET,
            Choice("shrink", (0.99, 0.975, 0.95, 0.9, 0.8, 0.7)),
            Choice("sigma", powers(0, -1, -2, -3, -4, -5, -6)),
        )
    ),
    "cbp": Space((NET, Choice("reset_freq", powers(0, -1, -2, -3, -4, -5, -6, -7)))),
    "redo": Space(
        (
            NET,
            Choice("redo_threshold", (0.0, 0.005, 0.01, 0.02, 0.04, 0.08)),
            Choice("reset_freq", a_task(0.25, 0.5, 1, 2, 4)),
        )
    ),
    "snr": Space(
        (
            NET,
            Choice("snr_percentile", (0.99, 0.98, 0.96, 0.92, 0.84, 0.68)),
            Choice("reset_freq", a_task(1, 2, 4, 8, 16, 32)),
        )
    ),
    "snr_v2": Space(
        (
            NET,
            Choice("snr_percentile", (0.99, 0.975, 0.95, 0.9, 0.8, 0.7, 0.6)),
            Choice("reset_freq", a_task(1, 2, 4, 8, 16, 32)),
        )
    ),
    "snr_v2_fine": Space(
        (
            NET,
            Choice("snr_percentile", (0.65, 0.6, 0.55, 0.5)),
            Choice("reset_freq", a_task(0.25, 0.5, 0.75, 1, 2), when={"net": (L3, L12)}),
            Choice("wide", a_task(0.25, 0.5, 0.75, 1, 2, 4, 8, 16), sets="reset_freq", when={"net": (L12_FAST,)}),
        )
    ),
    "snr_l2": Space(
        (
            Arms(
                "net",
                {
                    L3: {**NETS[L3], "l2": 1e-3, "snr_percentile": 0.84, "reset_freq": 1 / 480},
                    L12_FAST: {**NETS[L12_FAST], "l2": 1e-4, "snr_percentile": 0.92, "reset_freq": 1 / 480},
                    L12: {**NETS[L12], "l2": 1e-7, "snr_percentile": 0.98, "reset_freq": 1 / 3840},
                },
            ),
        )
    ),
    "snr_v2_l2": Space(
        (
            Arms(
                "net",
                {
                    L12_FAST: {**NETS[L12_FAST], "reset_freq": 1 / 60},
                    L3: {**NETS[L3], "l2": 1e-3, "snr_percentile": 0.55, "reset_freq": 1 / 90},
                },
            ),
            Choice("l2", powers(-7, -6, -5, -4, -3, -2, -1), when={"net": (L12_FAST,)}),
            Choice("snr_percentile", (0.5, 0.55, 0.6, 0.65, 0.7, 0.8), when={"net": (L12_FAST,)}),
        )
    ),
    "snr_v2_l2_star": Space(
        (
            Arms(
                "option",
                {
                    "1": {"l2": 1e-3, "snr_percentile": 0.8},
                    "2": {"l2": 1e-4, "snr_percentile": 0.55},
                    "3": {"l2": 5e-5, "snr_percentile": 0.55},
                    "4": {"l2": 1e-5, "snr_percentile": 0.55},
                },
            ),
        )
    ),
    "redo_mean": Space(
        (
            NET,
            Choice("redo_threshold", (0.0, 0.025, 0.05, 0.1)),
            Choice("reset_freq", a_task(0.25, 0.5, 1, 2, 4)),
        )
    ),
}
"""Sweep -> what varies in it. What it fixes besides stands in `FIXED`."""

CBP = {"algorithm": "cbp", "cbp_ties": 1.0}
"""The original's CBP replaces every unit that ties with the last one chosen."""

FIXED: dict[str, Mapping[str, Any]] = {
    "lr": {},
    "l2": {},
    "l2init": {},
    "shrink_perturb": {"algorithm": "shrink_perturb"},
    "cbp": CBP,
    "redo": {"algorithm": "redo"},
    "snr": {"algorithm": "snr"},
    "snr_v2": {"algorithm": "snr_v2"},
    "snr_v2_fine": {"algorithm": "snr_v2"},
    "snr_l2": {"algorithm": "snr"},
    "snr_v2_l2": {"algorithm": "snr_v2"},
    "snr_v2_l2_star": {"algorithm": "snr_v2", **NETS[L12_FAST], **L2_STAR, "reset_freq": 1 / 60},
    "redo_mean": {"algorithm": "redo", "redo_mean": 1.0},
}

MASSIVE = tuple(name for name in SPACES if name != "redo_mean")


def _best_of(net: str) -> dict[str, dict[str, Any]]:
    """The notes' best hypers of every algorithm on one net."""
    pick = [L3, L12_FAST, L12].index(net)
    shrink, sigma = ((0.99, 0.01), (0.7, 0.1), (0.99, 0.01))[pick]
    dormant, dormant_freq = ((0.01, 1 / 30), (0.02, 1 / 30), (0.005, 1 / 30))[pick]
    eta, eta_freq = ((0.84, 1 / 960), (0.92, 1 / 480), (0.84, 1 / 1920))[pick]
    eta_v2, eta_v2_freq = ((0.55, 1 / 30), (0.55, 1 / 60), (0.6, 1 / 60))[pick]
    return {
        "vanilla": {},
        "l2": {"l2": (1e-3, 1e-4, 1e-7)[pick]},
        "l2init": {"l2_init": (1e-2, 1e-3, 1e-3)[pick]},
        "cbp": {**CBP, "reset_freq": 1e-2},
        "shrink_perturb": {"algorithm": "shrink_perturb", "shrink": shrink, "sigma": sigma},
        "redo": {"algorithm": "redo", "redo_threshold": dormant, "reset_freq": dormant_freq},
        "snr": {"algorithm": "snr", "snr_percentile": eta, "reset_freq": eta_freq},
        "snr_v2": {"algorithm": "snr_v2", "snr_percentile": eta_v2, "reset_freq": eta_v2_freq},
    }


ALGORITHMS = union({net: (Space((Arms("algorithm", _best_of(net)),)), NETS[net]) for net in NETS}, name="net")

CHAMPIONS = Arms(
    "champion",
    {
        "l2init": {"l2_init": 1e-2},
        "cbp": {**CBP, "reset_freq": 1e-2},
        "snr_v2_l2_star": {
            "algorithm": "snr_v2",
            **L2_STAR,
            "l2": 5e-5,
            "snr_percentile": 0.5,
            "reset_freq": 1 / 60,
        },
    },
)
"""The three that held up best on the three-layer net, at their best hypers there."""


def massive() -> Space:
    """Every hyperparameter grid as one space; what the fine SNR-V2 grid repeats of the first one is left out."""
    spaces = dict(SPACES)
    net, percentile, common, wide = spaces["snr_v2_fine"].axes
    rest = {"snr_percentile": (0.65, 0.55, 0.5)}
    spaces["snr_v2_fine"] = Space(
        (
            net,
            percentile,
            Choice("reset_freq", common.values, when={**common.when, **rest}),  # type: ignore[union-attr]
            Choice("wide", wide.values, sets="reset_freq", when={**wide.when, **rest}),  # type: ignore[union-attr]
            Choice("below", a_task(0.25, 0.5, 0.75), sets="reset_freq", when={"snr_percentile": (0.6,)}),
        )
    )
    return union({name: (spaces[name], FIXED[name]) for name in MASSIVE}, name="grid")


def _around(*first: Axis, methods: Mapping[str, tuple[Mapping[str, Any], tuple[Axis, ...]]]) -> Space:
    """Common axes, then a method whose own axes exist only where it is chosen."""
    parts = {name: (Space(axes), fixed) for name, (fixed, axes) in methods.items()}
    return Space((*first, *union(parts, name="method").axes))


BEST = _around(
    Choice("depth", (3, 12)),
    Range("lr", 3e-5, 3e-3, log=True),
    methods={
        "vanilla": ({}, ()),
        "l2": ({}, (Range("l2", 1e-7, 1e-2, log=True),)),
        "l2init": ({}, (Range("l2_init", 1e-4, 1e-1, log=True),)),
        "shrink_perturb": (
            {"algorithm": "shrink_perturb"},
            (Range("shrink", 0.7, 0.999), Range("sigma", 1e-4, 1e-1, log=True)),
        ),
        "cbp": (
            {"algorithm": "cbp"},
            (Range("reset_freq", 1e-3, 1e-1, log=True), Range("cbp_age", 5, 200, log=True)),
        ),
        "redo": (
            {"algorithm": "redo"},
            (Range("redo_threshold", 1e-3, 4e-2, log=True), Range("reset_freq", 1 / 120, 1 / 10, log=True)),
        ),
        "snr_v2": (
            {"algorithm": "snr_v2"},
            (Range("snr_percentile", 0.4, 0.8), Range("reset_freq", 1 / 240, 1 / 20, log=True)),
        ),
        "snr_v2_l2_star": (
            {"algorithm": "snr_v2", **L2_STAR},
            (
                Range("l2", 1e-6, 1e-3, log=True),
                Range("snr_percentile", 0.4, 0.8),
                Range("reset_freq", 1 / 240, 1 / 20, log=True),
            ),
        ),
    },
)

DEMO_BASE: Mapping[str, Any] = {
    "data": "digits",
    "depth": 2,
    "hidden": 12,
    "patch": 4,
    "batch": 28,
    "tasks": 24,
    "epochs_per_task": 3,
    "window": 6,
}
"""720 steps of a two-block net on 24 pairs of digits, each pair under a pixel permutation of its own."""

DEMO = _around(
    Range("lr", 1e-3, 5e-2, log=True),
    methods={
        "vanilla": ({}, ()),
        "l2": ({}, (Range("l2", 1e-4, 1e-2, log=True),)),
        "l2init": ({}, (Range("l2_init", 1e-3, 3e-2, log=True),)),
        "cbp": ({"algorithm": "cbp", "cbp_age": 30.0}, (Range("reset_freq", 1e-3, 3e-2, log=True),)),
        "snr_v2": ({"algorithm": "snr_v2", "reset_freq": 1 / 60}, (Range("snr_percentile", 0.5, 0.8),)),
    },
)


def _grid(name: str, kind: Kind, doc: str, seeds: int = 5) -> Sweep:
    return Sweep(name, doc, kind, SPACES[name], {**BASE, **FIXED[name]}, seeds=seeds)


def _sweep(name: str, kind: Kind, doc: str, space: Space, fixed: Mapping[str, Any], **settings: Any) -> Sweep:
    return Sweep(name, doc, kind, space, {**BASE, **fixed}, **{"seeds": 5, **settings})


SWEEPS = Sweeps(
    family="ci_vit",
    default="demo",
    sweeps=(
        Sweep(
            "demo",
            "five plasticity methods x learning rates on the bundled digits, about a minute on two cores",
            "product",
            DEMO,
            DEMO_BASE,
            seeds=2,
            searcher="optuna",
            scheduler="asha",
            trials=20,
        ),
        _grid("lr", "notebook", "TODO 1: learning rates of both depths, no intervention"),
        _grid("l2", "notebook", "TODO 2: L2 over all leaves"),
        _grid("l2init", "notebook", "TODO 2: pull towards the run's own initial weights"),
        _grid("shrink_perturb", "notebook", "TODO 2: shrink and perturb after every step"),
        _grid("cbp", "notebook", "TODO 3: continual backpropagation, replacement rates"),
        _grid("redo", "original", "ReDO as coded: scores are shares of the layer's sum"),
        _grid("snr", "original", "self-normalised resets, ages in batches"),
        _grid("snr_v2", "original", "SNR-V2, ages in inputs"),
        _grid("snr_v2_fine", "original", "SNR-V2 around its best (SNR_V2_sweep_finer)"),
        _grid("snr_l2", "original", "SNR with L2, one config a net"),
        _grid("snr_v2_l2", "original", "SNR-V2 with L2"),
        _grid("snr_v2_l2_star", "notebook", "the *-algorithms: SNR-V2 with L2 on the QKV kernels only", seeds=1),
        _sweep("algorithms", "original", "every algorithm at its best hypers (opt_h_param_sweep)", ALGORITHMS, {}),
        _sweep("massive", "notebook", "12/30/24: every hyperparameter grid of the notes as one sweep", massive(), {}),
        _sweep(
            "covariates",
            "wish",
            "TODO 1's other covariates: ages, resets, attention entropy, weight norms, dead units",
            ALGORITHMS,
            {},
            covariates=COVARIATES,
        ),
        _sweep(
            "sandp_key",
            "wish",
            "shrink and perturb with a fresh draw each step, or one an epoch as it was run",
            Space((Choice("perturb_key_epoch", (0.0, 1.0)),)),
            {**NETS[L3], "algorithm": "shrink_perturb", "shrink": 0.99, "sigma": 0.01},
        ),
        _sweep(
            "cbp_age",
            "wish",
            "'may need to lower the age threshold'",
            Space((Choice("cbp_age", (5.0, 10.0, 25.0, 50.0, 100.0)),)),
            {**NETS[L3], **CBP, "reset_freq": 1e-2},
        ),
        _sweep(
            "cbp_decay",
            "wish",
            "'perhaps play with the decay factor'",
            Space((Choice("cbp_decay", (0.9, 0.97, 0.99, 0.999)),)),
            {**NETS[L3], **CBP, "reset_freq": 1e-2},
        ),
        _sweep(
            "snr_epsilon",
            "wish",
            "'allow for epsilon-death': silent on this fraction of a batch counts as dead",
            Space((Choice("snr_epsilon", (1.0, 0.999, 0.99, 0.8)),)),
            {**NETS[L3], "algorithm": "snr", "snr_percentile": 0.84, "reset_freq": 1 / 960},
        ),
        _sweep(
            "longer",
            "wish",
            "1,000 tasks on the three-layer net, classes paired anew after 500",
            Space((CHAMPIONS,)),
            {**NETS[L3], "tasks": 1000},
        ),
        _sweep(
            "more_epochs",
            "wish",
            "20 and 40 epochs a task on the three-layer net",
            Space((CHAMPIONS, Choice("epochs_per_task", (20, 40)))),
            NETS[L3],
        ),
        _grid("redo_mean", "control", "ReDO by the paper: scores are relative to the layer's mean"),
        _sweep(
            "fresh_start",
            "control",
            "no plasticity to lose: fresh weights and optimiser at every task",
            Space((NET,)),
            {"algorithm": "shrink_perturb", "fresh_start": 1.0},
        ),
        _sweep(
            "best",
            "product",
            "ranges around the notebook's winners, for TPE",
            BEST,
            {},
            seeds=3,
            searcher="optuna",
            scheduler="asha",
            trials=64,
        ),
    ),
)
