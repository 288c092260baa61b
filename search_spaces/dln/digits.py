"""Digits read pixel by pixel: the whole image back from the last state."""

from __future__ import annotations

from typing import Any

from search_spaces.dln.common import ADAM, Fields, runs
from search_spaces.space import Choice, Space
from search_spaces.sweeps import Sweep
from trainables.dln.presets import PRESETS

DIGITS: Fields = {**PRESETS["reconstruct"], **ADAM}
TDLN_DIGITS: Fields = {**DIGITS, "recurrence": "tdln", "norm_over": "sequence"}


def _digits(name: str, doc: str, space: Space, base: Fields, kind: Any = "notebook", **more: Any) -> Sweep:
    return Sweep(name, doc, kind, space, base, metric="held_out_accuracy", **more)


DIGIT_SWEEPS = (
    _digits(
        "memory_trained",
        "does it help to train the memory (size, theta) too?",
        runs({"20230808-235948": {"train_memory": 1.0}, "20230809-000554": {"train_memory": 0.0}}),
        {**DIGITS, "channels": 50, "train_first": 1.0, "epochs": 20},
    ),
    _digits(
        "partition",
        "freezing by a mask or by stop-gradient: the same by law (a test holds it to that)",
        runs({"20230810-184035": {"freeze": "detach"}, "20230810-184342": {"freeze": "mask"}}),
        {**DIGITS, "channels": 50, "epochs": 6, "train_memory": 0.0},
    ),
    _digits(
        "memory_size",
        "does a larger memory memorise? 500 channels, and the same 'everything with a big model'",
        runs({"20230810-184606": {"channels": 500}, "20230810-191908": {"channels": 50}}),
        {**DIGITS},
    ),
    _digits(
        "tdln",
        "learned time steps in their first form; then T = 1 behind a DLN, and T = 1 in its place",
        runs(
            {
                "20230810-202925": {"levels": 1, "dense": 0, "time_bias": 0.0, "epochs": 9},
                "20230810-203338": {"levels": 1, "dense": 0, "time_bias": 1000.0, "epochs": 3},
                "20230810-203632": {"levels": 0, "dense": 1, "time_bias": 1000.0, "epochs": 11},
            }
        ),
        {**DIGITS, "recurrence": "tdln_shifted"},
    ),
    _digits(
        "tdln_unified",
        "DLN and TDLN as one module, T = 1; run twice, to different lengths",
        runs({"20230810-205047": {"epochs": 12}, "20230810-213808": {"epochs": 32}}),
        {**TDLN_DIGITS, "time_bias": 1000.0},
    ),
    _digits(
        "t_bias",
        "TDLN with and without the time bias that holds T at 1",
        runs({"20230810-221135": {"time_bias": 1000.0}, "20230810-221217": {"time_bias": 0.0}}),
        {**TDLN_DIGITS, "epochs": 4},
    ),
    _digits(
        "tdln_layers",
        "more levels of TDLN, with residual and LayerNorm",
        runs({"20230810-221444": {"levels": 1, "epochs": 9}, "20230810-224054": {"levels": 3, "epochs": 14}}),
        {**TDLN_DIGITS, "dense": 0},
    ),
    _digits(
        "interpolate",
        "the model whose interpolation between two digits is drawn (trainables.dln.pictures)",
        runs({"20230810-223703": {"levels": 1, "dense": 0}}),
        {**TDLN_DIGITS, "epochs": 9},
    ),
    _digits(
        "missing_digit",
        "trained without any 4: does it learn digits or shapes?",
        runs({"20230810-225233": {"levels": 3, "epochs": 4}, "20230810-225938": {"levels": 1, "epochs": 16}}),
        {**TDLN_DIGITS, "dense": 0, "without_digit": 4},
    ),
    _digits(
        "highway_ablation",
        "'need ablation to see if it's just the highway': levels with and without their residual",
        Space((Choice("levels", (1, 3)), Choice("residual", (False, True)))),
        {**TDLN_DIGITS, "dense": 0},
        kind="wish",
    ),
)
