"""Small programs for every method: what the conformance suites run."""

from trainables.family import Case

_TEXT = {
    "data": "pydoc",
    "batch": 3,
    "length": 8,
    "steps_per_epoch": 10,
    "epochs": 2,
    "eval_windows": 5,
    "eval_batch": 3,
}
_GPT = {**_TEXT, "task": "gpt", "layers": 1, "width": 12, "heads": 2}
_TDLN = {**_TEXT, "task": "tdln", "channels": 11, "levels": 1}
_IMAGES = {
    **_TEXT,
    "task": "reconstruct",
    "data": "digits",
    "channels": 10,
    "steps_per_epoch": 7,
    "eval_windows": 10,
    "eval_batch": 6,
}
_FAST = {"warmup": 3.0, "decay_steps": 18.0, "lr": 0.01}
_STEADY = {"warmup": 0.0, "final_fraction": 1.0, "lr": 0.003, "weight_decay": 0.0, "clip": 0.0, "b2": 0.999}

CASES = {
    "mingpt": Case({**_GPT, "layers": 2, "skip": "double", "lower": True, "windows": "breaks"}, _FAST),
    "nanogpt": Case(
        {
            **_GPT,
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
        },
        {**_FAST, "matrix_scale": 0.02, "fan_power": 0.0, "qk_scale": 1.0, "v_scale": 1.0, "embedding_scale": 0.1},
    ),
    "window_memory": Case(
        {**_GPT, "memory": 5, "dropout_at": ("memory",), "activation": "shrink"},
        {**_FAST, "window": 3.0, "act_a": 3.15, "act_b": 3.0, "state_returned": 0.75, "v_scale": 0.5},
    ),
    "gate_rope": Case(
        {
            **_GPT,
            "mlp": "gate",
            "activation": "sigmoid",
            "hidden": 16,
            "positions": "rope",
            "qk_norm": "gain",
            "norm_over": "sequence",
            "unembedding": "free",
            "dropout_at": (),
            "decayed": "all",
        },
        {**_FAST, "qk_scale": 1.0, "v_scale": 1.0},
    ),
    "tdln": Case(_TDLN, _STEADY),
    "tdln_bits": Case(
        {**_TDLN, "targets": "bits", "loss": "bce", "bytes_per_step": 2, "target": "next_row", "residual": False},
        {**_STEADY, "train_memory": 0.0},
    ),
    "tdln_real": Case(
        {**_TDLN, "targets": "real", "loss": "mse", "freeze": "detach", "windows": "fixed", "fixed_windows": 2},
        {**_STEADY, "time_bias": 1.0},
    ),
    "dln_images": Case({**_IMAGES, "recurrence": "dln"}, _STEADY),
    "tdln_images": Case({**_IMAGES, "levels": 1, "without_digit": 4}, {**_STEADY, "train_first": 0.0}),
    "shifted_images": Case({**_IMAGES, "recurrence": "tdln_shifted", "levels": 1, "dense": 0}, _STEADY),
}
