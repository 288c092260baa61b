"""Recurrent language models of bits, bytes and 256-way softmax."""

from __future__ import annotations

from search_spaces.dln.common import ADAM, Fields, runs
from search_spaces.space import Arms, Space
from search_spaces.sweeps import Sweep

BYTES: Fields = {
    **ADAM,
    "task": "tdln",
    "data": "wikitext2",
    "batch": 20,
    "length": 2000,
    "recurrence": "tdln",
    "levels": 1,
    "norm_over": "sequence",
    "forget_low": 0.001,
    "forget_high": 0.1,
    "train_memory": 0.0,
    "steps_per_epoch": 100,
    "eval_batch": 4,
    "eval_windows": 12,
}
BITS: Fields = {**BYTES, "targets": "bits", "loss": "mse", "channels": 400}
SOFTMAX: Fields = {**BYTES, "targets": "softmax", "loss": "ce", "channels": 1024, "batch": 30, "length": 1000}
_FOUR_BYTES: Fields = {"channels": 640, "bytes_per_step": 4, "forget_low": 1e-4, "forget_high": 1e-3}
_FEW: Fields = {"windows": "fixed", "epochs": 9}

BYTE_SWEEPS = (
    Sweep(
        "wikitext2_bytes",
        "bits of WikiText-2, asked for the next row by an indexing mistake: memory fixed or not, lr, size",
        "notebook",
        runs(
            {
                "20230812-180730": {**_FOUR_BYTES, "epochs": 15},
                "20230812-182344": {**_FOUR_BYTES, "train_memory": 1.0, "epochs": 2},
                "20230812-182610": {**_FOUR_BYTES, "train_memory": 1.0, "lr": 1e-5, "epochs": 3},
                "20230812-182751": {**_FOUR_BYTES, "train_memory": 1.0, "lr": 1e-5, "epochs": 5},
                "20230812-190728": {
                    "forget_low": 1e-4,
                    "forget_high": 1e-3,
                    "train_memory": 1.0,
                    "lr": 1e-5,
                    "epochs": 13,
                },
                "20230812-191614": {"train_memory": 1.0, "lr": 1e-5, "epochs": 3},
                "20230812-191938": {"lr": 1e-5, "epochs": 1},
            }
        ),
        {**BITS, "target": "next_row"},
        metric="held_out_accuracy",
    ),
    Sweep(
        "trivial_string",
        "one string, to see it memorised",
        "notebook",
        runs({"20230812-195434": {"fixed_windows": 1, "length": 100, "epochs": 11}}),
        {**BITS, **_FEW, "lr": 1e-5},
        metric="held_out_accuracy",
    ),
    Sweep(
        "wikitext2_fixed",
        "the indexing mistake mended: 'does not learn, at least now it outputs aaaaaa'",
        "notebook",
        runs({"20230812-195711": {"epochs": 7}}),
        {**BITS, "lr": 1e-5},
        metric="held_out_accuracy",
    ),
    Sweep(
        "two_sentences",
        "two sentences, twice; then whole windows at ten times the rate",
        "notebook",
        runs(
            {
                "20230812-200358": {**_FEW, "fixed_windows": 2, "length": 100, "lr": 1e-5, "epochs": 8},
                "20230812-200455": {**_FEW, "fixed_windows": 2, "length": 100, "lr": 1e-5, "epochs": 9},
                "20230812-200805": {"lr": 1e-4, "epochs": 2},
            }
        ),
        {**BITS},
        metric="held_out_accuracy",
    ),
    Sweep(
        "five_entries",
        "five entries of the text at several lengths: it memorises up to 500",
        "notebook",
        runs(
            {
                "20230812-201435": {"length": 2000, "epochs": 1},
                "20230812-201546": {"length": 100, "epochs": 6},
                "20230812-201704": {"length": 200, "epochs": 4},
                "20230812-201728": {"length": 500, "epochs": 7},
            }
        ),
        {**BITS, **_FEW, "fixed_windows": 5},
        metric="held_out_accuracy",
    ),
    Sweep(
        "char_loss",
        "one window of bytes as real numbers, squared error or cross-entropy",
        "notebook",
        runs({"20230814-221319": {"loss": "mse"}, "20230814-223153": {"loss": "bce"}}),
        {**BITS, **_FEW, "targets": "real", "fixed_windows": 1, "length": 4000, "batch": 1},
        metric="held_out_accuracy",
    ),
    Sweep(
        "char_softmax",
        "256-way softmax: one level, two, and two for longer",
        "notebook",
        runs(
            {
                "20230817-231757": {"levels": 0, "epochs": 10},
                "20230817-233350": {"levels": 1, "epochs": 15},
                "20230817-235231": {"levels": 1, "epochs": 38},
            }
        ),
        SOFTMAX,
    ),
    Sweep(
        "batch_length",
        "more rows of fewer steps at the same number of bytes; then more memory on fewer rows",
        "notebook",
        runs(
            {
                "20230818-002901": {"batch": 100, "length": 300, "channels": 1024, "epochs": 6},
                "20230818-003707": {"batch": 10, "length": 300, "channels": 2048, "epochs": 1},
            }
        ),
        {**SOFTMAX, "eval_windows": 40},
    ),
    Sweep(
        "rerun",
        "the base two months on; then with its LayerNorm mended to one position at a time",
        "notebook",
        runs(
            {
                "20231029-160546": {"norm_over": "sequence", "epochs": 6},
                "20231030-215927": {"norm_over": "position", "epochs": 55},
            }
        ),
        {**SOFTMAX, "batch": 10, "length": 300, "channels": 2048, "eval_windows": 40},
    ),
    Sweep(
        "big_state",
        "'batch=1, model=big (5000?), length=max': how to spend memory",
        "wish",
        Space(
            (
                Arms(
                    "shape",
                    {
                        "30 x 1024 x 1000": {"batch": 30, "channels": 1024, "length": 1000},
                        "10 x 2048 x 300": {"batch": 10, "channels": 2048, "length": 300},
                        "3 x 2048 x 1000": {"batch": 3, "channels": 2048, "length": 1000},
                        "1 x 5000 x 4096": {"batch": 1, "channels": 5000, "length": 4096},
                    },
                ),
            )
        ),
        {**SOFTMAX, "norm_over": "position", "epochs": 30},
    ),
)
