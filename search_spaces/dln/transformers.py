"""The minGPT journal: initial scales, windows beside a recurrence, activations, ComputeGate."""

from __future__ import annotations

import math

from search_spaces.dln.common import Fields, runs
from search_spaces.space import Arms, Choice, Space, union
from search_spaces.sweeps import Sweep
from trainables.dln.presets import MINGPT

SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

GPT: Fields = {**MINGPT}
SHORT: Fields = {"steps_per_epoch": 50, "epochs": 5}  # the journal's 250 iterations
LONG: Fields = {"epochs": 16}  # 4,000 iterations
PLAIN: Fields = {  # the block before any scale was tuned: q, k, v in one matrix, Glorot and unit scales
    **GPT,
    "qkv": "joint",
    "qk_scale": 1.0,
    "v_scale": 1.0,
    "embedding_scale": 1.0,
}
HE: Fields = {"up_scale": math.sqrt(2), "up_average": 0.0}  # JAX's he_normal on the matrix before the activation


def _shrink(a: float, b: float = 1.0) -> Fields:
    """x - a tanh(x / b)."""
    return {"activation": "shrink", "act_a": a, "act_b": b}


def _of_fan_in(group: str, scale: float) -> Fields:
    return {f"{group}_scale": scale, f"{group}_average": 0.0}


def _everywhere(scale: float) -> Fields:
    """Every matrix of the blocks by its fan-in."""
    fields: Fields = {}
    for group in ("qkv", "combine", "up", "down"):
        fields |= _of_fan_in(group, scale)
    return fields


JOURNAL_HE = 1 / math.sqrt(2)  # the journal's "he: 1/sqrt(2*in)"

COMPUTE_GATE: Fields = {
    "task": "gpt",
    "data": "shakespeare",
    "lower": True,
    "windows": "breaks",
    "layers": 6,
    "width": 256,
    "heads": 6,
    "head_width": 256,
    "length": 128,
    "qkv": "joint",
    "qk_scale": 1.0,
    "v_scale": 1.0,
    "unembedding": "free",
    "embedding_scale": 16.0,
    "unembedding_scale": 16.0,
    "positional_scale": 1 / math.sqrt(2 / (128 + 256)),
    "norm_over": "sequence",
    "norm_eps": 1e-5,
    "dropout_at": ("attention", "mlp"),
    "dropout": 0.1,
    "lr": 3e-4,
    "final_fraction": 1 / 3,
    "decay_steps": 500.0,
    "steps_per_epoch": 250,
    "epochs": 13,
}

GPT_SWEEPS = (
    Sweep(
        "compute_gate",
        "down(gate * compute) against down(gelu(up)), as coded: unequal parameters, norms that see the future",
        "notebook",
        runs(
            {
                "20240516-230614/gate": {"mlp": "gate", "activation": "sigmoid"},
                "20240516-230614/mlp": {"mlp": "mlp", "activation": "gelu_tanh"},
            }
        ),
        COMPUTE_GATE,
    ),
    Sweep(
        "precision",
        "bfloat16 or float16 for the gradient",
        "notebook",
        Space(
            (
                Arms(
                    "dtype",
                    {
                        "float32": {"precision": "float32"},
                        "bfloat16": {"precision": "bf16"},
                        "float16": {"precision": "float32", "autocast": "float16"},
                    },
                ),
            )
        ),
        GPT,
    ),
    Sweep(
        "attn_scale",
        "attention scaled by the width's root, as first written, or by the head's",
        "notebook",
        Space((Arms("scale", {"1/sqrt(E)": {"attention_scale": math.sqrt(1 / 6)}, "1/sqrt(D)": {}}),)),
        PLAIN,
    ),
    Sweep(
        "emb_norm",
        "embedding drawn normal, or normal / sqrt(E)",
        "notebook",
        Space((Arms("embedding", {"normal": {"embedding_scale": math.sqrt(384)}, "normal/sqrt(E)": {}}),)),
        PLAIN,
    ),
    Sweep(
        "init_family",
        "initial weights: the journal's he, minGPT's, Glorot's",
        "notebook",
        Space(
            (
                Arms(
                    "init_family",
                    {
                        "he 1/sqrt(2 in)": _everywhere(JOURNAL_HE),
                        "minGPT 1/sqrt(in)": _everywhere(1.0),
                        "glorot": {},
                    },
                ),
            )
        ),
        PLAIN,
    ),
    Sweep("norm_eps", "epsilon of the norms", "notebook", Space((Choice("norm_eps", (1e-6, 1e-5)),)), PLAIN),
    Sweep(
        "init_scale",
        "each initial scale alone, Glorot elsewhere",
        "notebook",
        union(
            {
                label: (Space((Choice("scale", SCALES, sets=field),)), {})
                for label, field in (
                    ("matrix", "matrix_scale"),
                    ("qkv", "qkv_scale"),
                    ("positional", "positional_scale"),
                    ("embedding", "embedding_scale"),
                )
            }
        ),
        PLAIN,
    ),
    Sweep(
        "init_scale_matrix",
        "the two further matrix scales of init_scale: '0.5 vs 1.0 seems similar, 0.1 and 2.0 are worse'",
        "notebook",
        Space((Choice("matrix_scale", (0.5, 2.0)),)),
        PLAIN,
    ),
    Sweep(
        "plain_normal",
        "plain normal matrices, whatever their fans: 'make it tiny'",
        "notebook",
        Space((Choice("matrix_scale", SCALES),)),
        {**PLAIN, "fan_power": 0.0, "init": "normal"},
    ),
    Sweep(
        "weight_decay", "decoupled decay", "notebook", Space((Choice("weight_decay", (0.0, 0.01, 0.1, 1.0)),)), PLAIN
    ),
    Sweep(
        "split_qkv",
        "q, k and v projected apart",
        "notebook",
        runs({"20240601-131606": {"qkv": "split"}}),
        {**GPT, "v_scale": 0.1},
    ),
    Sweep(
        "v_scale",
        "initial scale of v (logs/20240601-132328)",
        "notebook",
        runs({f"20240601-132328/{scale:g}": {"v_scale": scale} for scale in SCALES}),
        {**GPT, **SHORT},
    ),
    Sweep(
        "dln_window",
        "attention over 20 positions beside a DLN, scanned step by step (so its state did arrive)",
        "notebook",
        runs({"20240601-145309": {"window": 20.0}}),
        {**GPT, **SHORT, "memory": 100, "decay_low": 0.001, "decay_high": 0.05, "decayed": "all"},
    ),
    Sweep(
        "window",
        "how much history attention needs, as logged: the DLN beside it returned its decays, not its state",
        "notebook",
        runs(
            {
                "20240601-152117/full": {"window": 0.0, "memory": 100},
                "20240601-152117": {"window": 5.0, "memory": 100},
                "20240601-152117/2": {"window": 2.0, "memory": 1},
                "20240601-152117/1": {"window": 1.0, "memory": 1},
            }
        ),
        {**GPT, "state_returned": 0.0, "decay_low": 0.001, "decay_high": 0.05, "decayed": "all"},
    ),
    Sweep(
        "activation",
        "near-linear activations in gelu's place; all but gelu and relu with he for `up`, as coded",
        "notebook",
        runs(
            {
                "20240530-003231": {"activation": "gelu_tanh"},
                "20240605-183134": {"activation": "relu"},
                "20240605-204752/x-3tanh(x/3)": {**_shrink(3.0, 3.0), **HE},
                "20240605-183626": {"activation": "relu", **HE},
                "20240605-215750": {**_shrink(2.5), **HE},
                "20240605-212013": {**_shrink(1.5), **HE},
                "20240605-204752/x-0.9tanh(x)": {**_shrink(0.9), **HE},
                "20240605-204752": {**_shrink(0.5), **HE},
                "20240605-204752/leaky relu 0.98": {"activation": "leaky", "act_a": 0.98, **HE},
                "20240605-204752/x+tanh(x)": {**_shrink(-1.0), **HE},
                "20240605-204752/x": {**_shrink(0.0), **HE},
            }
        ),
        GPT,
    ),
    Sweep(
        "activation4",
        "gelu, relu, sigmoid and tanh forms, Glorot, 4,000 iterations",
        "notebook",
        runs(
            {
                "20240610-213526/gelu": {"activation": "gelu_tanh"},
                "20240610-213526/relu": {"activation": "relu"},
                "20240610-213526/sigmoid": {"activation": "shrink_sigmoid", "act_a": 4.0, "act_b": 1.0},
                "20240610-213526/tanh": _shrink(1.05 * 3, 3.0),
            }
        ),
        {**GPT, **LONG},
    ),
    Sweep(
        "attn_or_mlp_init",
        "'need to check if it matters for attention, combine or mlp': he or Glorot in each",
        "wish",
        Space(
            (
                Arms("attention", {"he": _of_fan_in("qkv", JOURNAL_HE), "glorot": {}}),
                Arms("combine", {"he": _of_fan_in("combine", JOURNAL_HE), "glorot": {}}),
                Arms("mlp", {"he": _of_fan_in("up", JOURNAL_HE) | _of_fan_in("down", JOURNAL_HE), "glorot": {}}),
            )
        ),
        PLAIN,
    ),
    Sweep(
        "qk_gain",
        "'qk layernorm has weights': without and with",
        "wish",
        Space((Arms("qk_norm", {"plain": {}, "gain": {"qk_norm": "gain"}}),)),
        GPT,
    ),
    Sweep(
        "rope",
        "'rope embedding', without and with weights in the q/k norm",
        "wish",
        Space((Arms("qk_norm", {"plain": {}, "gain": {"qk_norm": "gain"}}),)),
        {**GPT, "positions": "rope"},
    ),
    Sweep(
        "activation_val",
        "activations judged by held-out loss, the same init in all: x - a b tanh(x / b), slope 1 - a at 0",
        "control",
        Space(
            (
                Arms(
                    "activation",
                    {name: {"activation": name} for name in ("gelu_tanh", "relu", "silu", "identity")}
                    | {f"shrink a={a:g} b={b:g}": _shrink(a * b, b) for a in (1.0, 1.05, 1.5) for b in (1.0, 3.0)},
                ),
            )
        ),
        {**GPT, **LONG},
        seeds=3,
    ),
    Sweep(
        "window_true",
        "windows alone, and beside a DLN whose state does arrive and does remember",
        "control",
        union(
            {
                "alone": (Space((Choice("window", (1.0, 2.0, 5.0, 20.0, 0.0)),)), {}),
                "with_dln": (Space((Choice("window", (1.0, 5.0, 20.0)),)), {"memory": 100}),
            }
        ),
        GPT,
        seeds=3,
    ),
    Sweep(
        "gate_matched",
        "ComputeGate at the MLP's parameters, with norms of one position",
        "control",
        Space(
            (
                Arms(
                    "mlp",
                    {
                        "gelu MLP x4": {"activation": "gelu_tanh"},
                        "sigmoid gate 8/3": {"mlp": "gate", "activation": "sigmoid", "hidden": 683},
                        "gelu gate 8/3": {"mlp": "gate", "activation": "gelu_tanh", "hidden": 683},
                    },
                ),
            )
        ),
        {**COMPUTE_GATE, "norm_over": "position"},
        seeds=3,
    ),
)
