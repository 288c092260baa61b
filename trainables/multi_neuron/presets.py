"""The notebook's three set-ups, as program and hyper fields to start from."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # testing.ipynb: SGD .01, batch 64, 5 epochs = 4,690 steps, test set
    "notebook_mnist": {
        "data": "mnist",
        "model": "mlp",
        "widths": (64, 64),
        "optimizer": "sgd",
        "lr": 0.01,
        "batch": 64,
        "epochs": 5,
        "evaluate_on": "test",
        "eval_batch": 1000,
    },
    # 2 layers, d 256, 4 heads, ff 512, post-LN, AdamW 1e-4 (torch's decay .01), clip 1, dropout .1, 1,000 windows of 64
    "notebook_text": {
        "data": "wikitext2",
        "model": "transformer",
        "layers": 2,
        "d_model": 256,
        "heads": 4,
        "feedforward": 512,
        "sequence": 64,
        "norm": "post",
        "optimizer": "adamw",
        "lr": 1e-4,
        "weight_decay": 0.01,
        "clip": 1.0,
        "dropout": 0.1,
        "batch": 1,
        "epochs": 1,
        "epoch_steps": 1000,
        "evaluate_on": "test",
        "eval_batch": 50,
    },
    # no_ewc.py: five tasks, one head, SGD .9 at 1e-5, 5 epochs each, batch 64
    "split_mnist": {
        "data": "mnist",
        "model": "cnn",
        "channels": (32, 64),
        "hidden": 128,
        "choices": 1,
        "custom": "linear",
        "dropout": 0.25,
        "dropout_hidden": 0.5,
        "optimizer": "sgd",
        "lr": 1e-5,
        "momentum": 0.9,
        "batch": 64,
        "epochs": 5,
        "tasks": 5,
        "scenario": "class",
        "evaluate_on": "test",
        "eval_batch": 1000,
    },
}
