"""The notebook's language model: sine positions, post-LN encoder layers, a linear layer to the symbols.

As sliced-ai/slice-monorepo experiments/higher_dimensional_models: embedding times sqrt(d_model) plus positions;
attention, dropout, add, norm; linear1, ReLU, dropout, linear2, dropout, add, norm (torch.nn.TransformerEncoderLayer's
order).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.family import Hypers
from trainables.multi_neuron.neurons import Layer, Params, Pass, init_layers
from trainables.multi_neuron.program import Program

ATTENTION = ("q", "k", "v", "out_proj")


def symbols(program: Program) -> int:
    """Token ids of the program's text; its vocabulary is known without reading it."""
    from trainables.datasets.text import vocabulary  # only where there is text

    return len(vocabulary(program.data))


def layers(program: Program) -> list[Layer]:
    """layers.0.q, .k, .v, .out_proj, .linear1, .linear2, layers.1..., linear_out."""
    width, wide = program.d_model, program.feedforward
    multi = program.choices > 1
    found = []
    for i in range(program.layers):
        found += [
            Layer(f"layers.{i}.{part}", (width, width), multi and program.custom != "linear") for part in ATTENTION
        ]
        found += [
            Layer(f"layers.{i}.linear1", (wide, width), multi),
            Layer(f"layers.{i}.linear2", (width, wide), multi),
        ]
    return [*found, Layer("linear_out", (symbols(program), width), multi and program.custom != "body")]


def init(program: Program, hyper: Hypers, seed: Tensor, dtype: torch.dtype) -> Params:
    """Embedding N(0, 1), norms 1 and 0, layers as `neurons.init_layers`."""
    zero = torch.zeros_like(seed)
    params = {"embedding": draws.normal(seed, zero, "init/embedding", (symbols(program), program.d_model), dtype)}
    norms = [f"layers.{i}.{norm}" for i in range(program.layers) for norm in ("norm1", "norm2")]
    for norm in [*norms, *(["norm"] if program.norm == "pre" else [])]:
        params[f"{norm}/weight"] = torch.ones(program.d_model, dtype=dtype, device=seed.device)
        params[f"{norm}/bias"] = torch.zeros(program.d_model, dtype=dtype, device=seed.device)
    return params | init_layers(program, hyper, seed, layers(program), dtype)


def forward(net: Pass, tokens: Tensor) -> Tensor:
    """[B, T] token ids -> logits of the next token [B, T, symbols]."""
    program, rate = net.program, net.hyper["dropout"]
    embedding = net.params["embedding"]
    x = embedding[tokens] * (math.sqrt(program.d_model) * net.hyper["embed_scale"])
    x = net.dropout("embedding", x + positions(tokens.shape[-1], program.d_model, x), rate)
    pre = program.norm == "pre"
    for i in range(program.layers):
        at = f"layers.{i}"
        if pre:
            x = x + net.dropout(f"{at}.attention", attention(net, at, norm(net, f"{at}.norm1", x)), rate)
            x = x + net.dropout(f"{at}.linear2", feedforward(net, at, norm(net, f"{at}.norm2", x)), rate)
        else:
            x = norm(net, f"{at}.norm1", x + net.dropout(f"{at}.attention", attention(net, at, x), rate))
            x = norm(net, f"{at}.norm2", x + net.dropout(f"{at}.linear2", feedforward(net, at, x), rate))
    return net.linear("linear_out", norm(net, "norm", x) if pre else x)


def norm(net: Pass, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], net.params[f"{name}/weight"], net.params[f"{name}/bias"])


def attention(net: Pass, at: str, x: Tensor) -> Tensor:
    """Multi-head attention, written out: under a lane axis the fused kernels run lane by lane."""
    heads = net.program.heads

    def split(name: str) -> Tensor:
        return net.linear(f"{at}.{name}", x).unflatten(-1, (heads, -1)).transpose(-2, -3)

    q, k, v = split("q"), split("k"), split("v")
    scores = (q @ k.transpose(-1, -2)).to(net.hyper["causal"].dtype) / math.sqrt(q.shape[-1])
    length = x.shape[-2]
    place = torch.arange(length, device=x.device)
    future = place > place.unsqueeze(-1)
    scores = torch.where(future & (net.hyper["causal"] > 0.5), -torch.inf, scores)
    weights = net.dropout(f"{at}.weights", torch.softmax(scores, dim=-1), net.hyper["dropout"])
    mixed = (weights @ v.to(weights.dtype)).transpose(-2, -3).flatten(-2)
    return net.linear(f"{at}.out_proj", mixed)


def feedforward(net: Pass, at: str, x: Tensor) -> Tensor:
    hidden = net.dropout(f"{at}.linear1", net.linear(f"{at}.linear1", x, relu=True), net.hyper["dropout"])
    return net.linear(f"{at}.linear2", hidden)


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sine in the even, cosine in the odd channels, wavelengths 2 pi .. 10000 * 2 pi (Vaswani et al. 2017)."""
    place = torch.arange(length, device=like.device, dtype=like.dtype).unsqueeze(-1)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=like.dtype) * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(-2)
