"""The notebook's minGPT block: attention with normalised q and k, full, windowed or beside a linear recurrence.

Source: the journal's mingpt.py and logs/202406 (JAX). Attention is written out as matmul, softmax, matmul: under vmap
a fused kernel would run lane by lane. Shapes below: B windows, L positions, E width, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables import draws
from trainables.dln import initials
from trainables.dln.activations import activate
from trainables.dln.norms import layer_norm, rms_norm, wide
from trainables.dln.program import Program, head_width, hidden_units, vocabulary_size
from trainables.dln.recurrence import real_scan
from trainables.family import Hypers, dtype_of

Params = dict[str, Tensor]

ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Noise:
    """What a training step's dropout is keyed by; evaluation has none."""

    seed: Tensor
    step: Tensor


# --- parameters -----------------------------------------------------------------------------------------------------


def init_params(program: Program, hyper: Hypers, seed: Tensor) -> Params:
    """All weights as a flat dict; matrices are [in, out]. Block i's are named `h<i>.<name>`."""
    width, vocab = program.width, vocabulary_size(program)
    embedding = hyper["embedding_scale"] / math.sqrt(width) * initials.gaussian(program, seed, "embed", (vocab, width))
    params: Params = {"embedding": embedding}
    if program.unembedding == "tied_at_start":
        params["unembedding"] = embedding.clone()
    elif program.unembedding == "free":
        scale = hyper["unembedding_scale"] / math.sqrt(width)
        params["unembedding"] = scale * initials.gaussian(program, seed, "unembed", (vocab, width))
    if program.positions == "learned":
        scale = hyper["positional_scale"] * math.sqrt(2 / (program.length + width))
        params["positions"] = scale * initials.gaussian(program, seed, "positions", (program.length, width))
    for index in range(program.layers):
        block = _init_block(program, hyper, seed, f"h{index}")
        params.update({f"h{index}.{name}": value for name, value in block.items()})
    if program.final_norm and program.norm_gain:
        params["final_gain"] = torch.ones(width, dtype=dtype_of(program), device=seed.device)
    return params


def _init_block(program: Program, hyper: Hypers, seed: Tensor, name: str) -> Params:
    width, inner, hidden = program.width, program.heads * head_width(program), hidden_units(program)
    reads = width + program.memory
    dtype, device = dtype_of(program), seed.device

    def matrix(which: str, shape: tuple[int, int], scale: Tensor | float, average: str) -> Tensor:
        return initials.matrix(program, hyper, seed, f"{name}.{which}", shape, scale, hyper[average])

    block: Params = {}
    if program.memory:
        u = draws.uniform(seed, torch.zeros_like(seed), f"{name}.decay", (program.memory,), dtype)
        block["decay"] = hyper["decay_low"] + (hyper["decay_high"] - hyper["decay_low"]) * u
        block["memory_in"] = matrix("memory_in", (width, program.memory), 1.0, "qkv_average")
    qk_scale, v_scale = hyper["qkv_scale"] * hyper["qk_scale"], hyper["qkv_scale"] * hyper["v_scale"]
    if program.qkv == "joint":
        columns = torch.cat([qk_scale.expand(2 * inner), v_scale.expand(inner)])
        block["qkv"] = matrix("qkv", (reads, 3 * inner), columns, "qkv_average")
    else:
        block["qk"] = matrix("qk", (reads, 2 * inner), qk_scale, "qkv_average")
        block["v"] = matrix("v", (reads, inner), v_scale, "qkv_average")
    block["combine"] = matrix("combine", (inner, width), hyper["combine_scale"], "combine_average")
    block["up"] = matrix("up", (width, hidden), hyper["up_scale"], "up_average")
    if program.mlp == "gate":
        block["gate"] = matrix("gate", (width, hidden), hyper["up_scale"], "up_average")
    block["down"] = matrix("down", (hidden, width), hyper["down_scale"], "down_average")
    gains = {"q_gain": head_width(program), "k_gain": head_width(program)} if program.qk_norm == "gain" else {}
    gains |= {"attention_gain": reads, "mlp_gain": width} if program.norm_gain else {}
    return block | {gain: torch.ones(size, dtype=dtype, device=device) for gain, size in gains.items()}


# --- forward --------------------------------------------------------------------------------------------------------


def forward(program: Program, params: Params, hyper: Hypers, tokens: Tensor, noise: Noise | None) -> Tensor:
    """Logits [B, L, vocabulary], at least float32, of the token after each position. tokens: integer [B, L].

    noise: where dropout draws come from; None leaves dropout out (evaluation).
    """
    vocab = torch.arange(vocabulary_size(program), device=tokens.device)
    chosen = (tokens[..., None] == vocab).to(params["embedding"].dtype)
    hidden = chosen @ params["embedding"]  # a product, not a gather: its gradient is deterministic and cheap under vmap
    if program.positions == "learned":
        hidden = hidden + params["positions"][: tokens.shape[-1]]
    hidden = _dropout(program, hyper, "embedding", wide(hidden), noise, "")
    for index in range(program.layers):
        prefix = f"h{index}."
        weights = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        out = block(program, weights, hyper, hidden, noise, prefix)
        hidden = hidden + out if program.skip == "double" else out
    if program.final_norm:
        hidden = _norm(program, hyper, hidden, params.get("final_gain"))
    table = params["embedding"] if program.unembedding == "tied" else params["unembedding"]
    return wide(hidden @ table.T)


def block(program: Program, weights: Params, hyper: Hypers, x: Tensor, noise: Noise | None, name: str) -> Tensor:
    """x [B, L, E] -> x + attention, then + MLP. `name` keys the block's dropout draws."""
    read = x
    if program.memory:
        read = torch.cat([x, _memory(program, weights, hyper, x, noise, name)], -1)
    x = x + _attention(program, weights, hyper, read, noise, name)
    return x + _mlp(program, weights, hyper, x, noise, name)


def _norm(program: Program, hyper: Hypers, x: Tensor, gain: Tensor | None) -> Tensor:
    norm = rms_norm if program.norm == "rms" else layer_norm
    normed = norm(x, hyper["norm_eps"], (-1,) if program.norm_over == "position" else (-2, -1))
    return normed if gain is None else normed * gain


def _memory(program: Program, weights: Params, hyper: Hypers, x: Tensor, noise: Noise | None, name: str) -> Tensor:
    """[B, L, memory]: the state of h = decay h + input, or (state_returned = 0) the products of the decays alone."""
    inputs = wide(_norm(program, hyper, x, None) @ weights["memory_in"])
    states, products = real_scan(weights["decay"].to(inputs.dtype), inputs)
    share = hyper["state_returned"]
    return _dropout(program, hyper, "memory", share * states + (1 - share) * products, noise, name)


def _attention(program: Program, weights: Params, hyper: Hypers, x: Tensor, noise: Noise | None, name: str) -> Tensor:
    normed = _norm(program, hyper, x, weights.get("attention_gain"))
    if program.qkv == "joint":
        q, k, v = (_heads(program, part) for part in (normed @ weights["qkv"]).chunk(3, -1))
    else:
        q, k = (_heads(program, part) for part in (normed @ weights["qk"]).chunk(2, -1))
        v = _heads(program, normed @ weights["v"])
    q, k = _prepare(program, weights, hyper, q, "q_gain"), _prepare(program, weights, hyper, k, "k_gain")
    scores = wide(q @ k.transpose(-1, -2)) * (hyper["attention_scale"] / math.sqrt(head_width(program)))
    hidden_ones = ~visible(x.shape[-2], hyper["window"])
    attention = scores.masked_fill(hidden_ones, -math.inf).softmax(-1)
    attention = _dropout(program, hyper, "attention", attention, noise, name)
    gathered = (attention @ v).transpose(-2, -3).flatten(-2)
    return _dropout(program, hyper, "combine", wide(gathered @ weights["combine"]), noise, name)


def visible(length: int, window: Tensor) -> Tensor:
    """Bool [L, L]: query i sees key j where j <= i and i - j < window (all earlier ones where window is 0)."""
    place = torch.arange(length, device=window.device)
    back = place[:, None] - place[None, :]
    reach = torch.where(window > 0, window, float(length))
    return (back >= 0) & (back < reach)


def _heads(program: Program, x: Tensor) -> Tensor:
    """[B, L, H * D] -> [B, H, L, D]."""
    return x.unflatten(-1, (program.heads, head_width(program))).transpose(-2, -3)


def _prepare(program: Program, weights: Params, hyper: Hypers, x: Tensor, gain: str) -> Tensor:
    """Normalise a head's queries or keys, then turn them by position."""
    if program.qk_norm != "none":
        x = layer_norm(x, hyper["norm_eps"], (-1,) if program.norm_over == "position" else (-3, -2, -1))
        x = x * weights[gain] if program.qk_norm == "gain" else x
    return rotate(x) if program.positions == "rope" else x


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [..., L, D]: channels i and i + D/2 turn by l / 10000^(2i/D)."""
    half = x.shape[-1] // 2
    rate = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=wide(x).dtype) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=rate.dtype)[:, None] * rate
    cos, sin = torch.cos(angle), torch.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _mlp(program: Program, weights: Params, hyper: Hypers, x: Tensor, noise: Noise | None, name: str) -> Tensor:
    normed = _norm(program, hyper, x, weights.get("mlp_gain"))
    up = normed @ weights["up"]
    if program.mlp == "gate":
        gate = activate(program.activation, wide(normed @ weights["gate"]), hyper["act_a"], hyper["act_b"])
        expanded = gate * up
    else:
        expanded = activate(program.activation, wide(up), hyper["act_a"], hyper["act_b"])
    return _dropout(program, hyper, "mlp", wide(expanded @ weights["down"]), noise, name)


def _dropout(program: Program, hyper: Hypers, place: str, x: Tensor, noise: Noise | None, name: str) -> Tensor:
    if noise is None or place not in program.dropout_at:
        return x
    rate = hyper["dropout"]
    u = draws.uniform(noise.seed, noise.step, f"dropout/{name}{place}", tuple(x.shape), rate.dtype)
    return torch.where(u < rate, 0.0, x / (1 - rate))
