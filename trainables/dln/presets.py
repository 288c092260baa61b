"""Programs and hypers to start from (`--set preset=...`)."""

from __future__ import annotations

import math
from typing import Any

MINGPT: dict[str, Any] = {
    # the journal's base of May 30 - June 10, 2024: 6 layers, 384, 6 heads, lower-cased text, windows at speaker breaks
    "task": "gpt",
    "data": "shakespeare",
    "precision": "bf16",
    "lower": True,
    "windows": "breaks",
    "skip": "double",
    "steps_per_epoch": 250,
    "epochs": 10,
}


def nanogpt(layers: int = 6, width: int = 384, heads: int = 6, length: int = 256) -> dict[str, Any]:
    """nanoGPT's GPT at any size: weights N(0, .02), those into the residual N(0, .02 / sqrt(2 layers)).

    Scales are told relative to this family's own formulas; see `.initials.matrix` and `.gpt.init_params`.
    """
    return {
        "task": "gpt",
        "layers": layers,
        "width": width,
        "length": length,
        "heads": heads,
        "norm": "layer",
        "norm_gain": True,
        "final_norm": True,
        "qk_norm": "none",
        "qkv": "joint",
        "unembedding": "tied",
        "activation": "gelu",
        "dropout_at": ("embedding", "attention", "combine", "mlp"),
        "decayed": "matrices+embeddings",
        "init": "normal",
        "fan_power": 0.0,
        "matrix_scale": 0.02,
        "qk_scale": 1.0,
        "v_scale": 1.0,
        "combine_scale": 1 / math.sqrt(2 * layers),
        "down_scale": 1 / math.sqrt(2 * layers),
        "embedding_scale": 0.02 * math.sqrt(width),
        "positional_scale": 0.02 / math.sqrt(2 / (length + width)),
        "norm_eps": 1e-5,
        "b2": 0.99,
        "weight_decay": 0.1,
        "clip": 1.0,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "mingpt": MINGPT,
    "nanogpt": {
        # config/train_shakespeare_char.py of karpathy/nanoGPT: best validation loss 1.4697
        **nanogpt(),
        "data": "shakespeare",
        "precision": "bf16",
        "batch": 64,
        "dropout": 0.2,
        "lr": 1e-3,
        "final_fraction": 0.1,
        "warmup": 100.0,
        "decay_steps": 5000.0,
        "steps_per_epoch": 250,
        "epochs": 20,
    },
    "nanogpt_cpu": {
        # its README's "I only have a macbook": validation loss 1.88 after 2,000 steps
        **nanogpt(layers=4, width=128, heads=4, length=64),
        "data": "shakespeare",
        "batch": 12,
        "dropout_at": (),
        "lr": 1e-3,
        "final_fraction": 0.1,
        "warmup": 100.0,
        "decay_steps": 2000.0,
        "steps_per_epoch": 250,
        "epochs": 8,
    },
    "reconstruct": {
        # the notebook's first task: MNIST pixel by pixel, the image back from the last state
        "task": "reconstruct",
        "data": "mnist",
        "batch": 40,
        "channels": 500,
        "recurrence": "dln",
        "dense": 1,
        "steps_per_epoch": 100,
        "epochs": 30,
        "eval_windows": 400,
        "eval_batch": 200,
        "lr": 1e-4,
        "warmup": 0.0,
        "final_fraction": 1.0,
        "b2": 0.999,
        "weight_decay": 0.0,
        "clip": 0.0,
        "norm_eps": 1e-5,
        "train_first": 0.0,
    },
}
