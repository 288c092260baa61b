"""Tiny configs that exercise every method in seconds: the conformance suites run each of them."""

from __future__ import annotations

from typing import Any

from trainables.family import Case

_TINY: dict[str, Any] = {
    "widths": (2, 10),
    "batch": 16,
    "eval_batch": 16,
    "train_images": 40,
    "test_images": 20,
    "epochs": 8,
}
"""Three steps an epoch, the last with 8 of 16 examples; ten units, so that the 3x3 grid has five cells."""

_VAR = {"wd": 1e-3, "inverse_variance": 1.0, "dup_mult": 2.0, "last1_mult": 10.0, "halve_every": 2.0}


def _case(program: dict[str, Any] | None = None, /, **hyper: float) -> Case:
    return Case({**_TINY, **(program or {})}, hyper)


CASES = {
    "l2": _case(wd=0.016, momentum=0.9),
    "modern": _case(
        {
            "lr_schedule": "cosine",
            "last_batch": "drop",
            "padding": "mean",
            "holdout": 4,
            "covariates": ("train", "batch_stats"),
        },
        momentum=0.9,
        nesterov=1.0,
        bn_decay=0.0,
        translate=2.0,
        cutout=3.0,
        label_smoothing=0.1,
        warmup=1.0,
    ),
    # on weights alone: a beta that L1 has put to 0 has the exact gradient 0 where the next BatchNorm takes it out
    # again, and goes the way of rounding noise, which is another in every engine
    "l1": _case(l1=0.01, bn_decay=0.0, bias_decay=0.0, l1_front=1.0, l1_back=1.0),
    "topo": _case({"covariates": ("grouping",)}, **_VAR, topo_a=1.0, topo_b=1.0, topo_frozen_beta=1.0),
    "lssgd": _case(**_VAR, lr=0.02, normalize=1.0, by_weight=1.0),
    "lssgd_nwm": _case(**_VAR, lr=0.02, normalize=1.0, norm_ema=0.0, decay_outside=1.0),
    "unit_adam": _case({"optimizer": "adam", "second_moment": "unit"}, **_VAR, lr=0.003),
}
