"""Every sweep of the dln notebook: digits, bytes, and the minGPT journal. `python tune_dln.py --list` shows them.

Run names are the log files' (`logs/20240605-204752`); where one log holds several runs, the run follows behind a slash.
Iterations of the digit and byte runs are the logs' own, rounded to the hundred: the originals were stopped by hand.
"""

from __future__ import annotations

from search_spaces.dln.common import Fields
from search_spaces.dln.digits import DIGIT_SWEEPS
from search_spaces.dln.texts import BYTE_SWEEPS
from search_spaces.dln.transformers import GPT, GPT_SWEEPS
from search_spaces.space import Arms, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps
from trainables.dln.presets import PRESETS

DEMO: Fields = {
    "task": "gpt",
    "data": "pydoc",
    "lower": True,
    "batch": 8,
    "length": 32,
    "layers": 2,
    "width": 32,
    "heads": 2,
    "memory": 8,
    "dropout_at": (),
    "steps_per_epoch": 40,
    "epochs": 6,
    "eval_windows": 24,
    "eval_batch": 24,
    "warmup": 20.0,
    "decay_steps": 240.0,
    "v_scale": 0.3,
}

OWN_SWEEPS = (
    Sweep(
        "demo",
        "short attention beside a recurrence, with and without its state, on Python's documentation",
        "product",
        Space(
            (
                Range("lr", 1e-3, 3e-2, log=True),
                Choice("window", (0.0, 1.0, 4.0)),
                Choice("state_returned", (0.0, 1.0)),
            )
        ),
        DEMO,
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=12,
    ),
    Sweep(
        "best",
        "ranges around the journal's winners, for TPE",
        "product",
        Space(
            (
                Range("lr", 3e-4, 3e-3, log=True),
                Range("weight_decay", 1e-2, 1.0, log=True),
                Range("dropout", 0.1, 0.4),
                Range("qk_scale", 0.01, 1.0, log=True),
                Range("v_scale", 0.003, 1.0, log=True),
                Range("embedding_scale", 0.003, 1.0, log=True),
                Range("bump", 0.5, 1.6, sets="act_a"),
            )
        ),
        {**GPT, "windows": "random", "activation": "shrink", "act_b": 1.0, "epochs": 20},
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=64,
        metric="best_held_out_loss",
    ),
    Sweep(
        "nanogpt",
        "nanoGPT's shakespeare_char settings; its best validation loss is 1.4697",
        "product",
        Space((Arms("preset", {"shakespeare_char": {}}),)),
        PRESETS["nanogpt"],
        seeds=3,
        metric="best_held_out_loss",
    ),
)

SWEEPS = Sweeps("dln", "demo", (*OWN_SWEEPS, *DIGIT_SWEEPS, *BYTE_SWEEPS, *GPT_SWEEPS))
