"""A net's parameters as few tensors: each weight by itself, and all vectors (biases, gammas, betas) as rows of one.

Three in four parameter tensors are vectors. Updated one by one they cost more kernels than the convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.vgg_decay.program import Program, layers

VECTORS = "vectors"

Packed = dict[str, Tensor]


def vector_lengths(program: Program) -> dict[str, int]:
    """Name -> length of every parameter vector, in the order of the rows."""
    return {name: layer.outputs for layer in layers(program) for name in layer.tensors[1:]}


def pack(program: Program, tensors: Mapping[str, Tensor]) -> Packed:
    """Weights as they are; `vectors` [rows, longest], each row filled up with zeros, which every update leaves at 0."""
    lengths = vector_lengths(program)
    longest = max(lengths.values())
    packed = {f"{layer.name}.weight": tensors[f"{layer.name}.weight"] for layer in layers(program)}
    packed[VECTORS] = torch.stack([F.pad(tensors[name], (0, longest - length)) for name, length in lengths.items()])
    return packed


def unpack(program: Program, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`, in the order of the net."""
    rows = dict(zip(vector_lengths(program), packed[VECTORS].unbind(), strict=True))
    tensors: dict[str, Tensor] = {}
    for layer in layers(program):
        weight, *vectors = layer.tensors
        tensors[weight] = packed[weight]
        tensors.update({name: rows[name][: layer.outputs] for name in vectors})
    return tensors


def sums(packed: Tensor) -> Tensor:
    """Sum over each parameter tensor in a packed one: 0-d for a weight, [rows, 1] for the vectors."""
    return packed.sum(1, keepdim=True) if packed.dim() == 2 else packed.sum()


def norms(packed: Tensor) -> Tensor:
    """Euclidean norm of each parameter tensor in a packed one: 0-d for a weight, [rows, 1] for the vectors."""
    return torch.sqrt(sums(packed * packed))
