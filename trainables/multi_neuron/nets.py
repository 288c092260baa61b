"""The three nets behind one interface: their layers, initial parameters and forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from trainables.family import Hypers
from trainables.multi_neuron import cnn, mlp, transformer
from trainables.multi_neuron.neurons import Layer, Params, Pass, init_layers
from trainables.multi_neuron.program import Program

NETS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


def layers(program: Program) -> list[Layer]:
    """Linear and convolution layers in the order of the forward pass."""
    return NETS[program.model].layers(program)


def multi_layers(program: Program) -> list[str]:
    """Names of the multi-neuron layers, in that order."""
    return [layer.name for layer in layers(program) if layer.multi]


def init(program: Program, hyper: Hypers, seed: Tensor, dtype: torch.dtype) -> Params:
    """Flat dict of initial parameters."""
    if program.model == "transformer":
        return transformer.init(program, hyper, seed, dtype)
    return init_layers(program, hyper, seed, layers(program), dtype)


def forward(net: Pass, x: Tensor) -> Tensor:
    """Images [B, side, side] -> logits [B, 10], or token ids [B, T] -> logits [B, T, symbols]."""
    return NETS[net.program.model].forward(net, x)
