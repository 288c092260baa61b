"""The continual-learning net: two 3x3 convolutions, 2x2 max pooling, a hidden and an output layer.

As sliced-ai/slice-monorepo experiments/EWC/no_ewc.py (PyTorch's MNIST example): 32 and 64 channels without padding,
ReLU, dropout .25 after pooling, 128 hidden units, dropout .5, ten logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainables.multi_neuron.neurons import Layer, Pass
from trainables.multi_neuron.program import CLASSES, Program
from trainables.multi_neuron.sets import IMAGE_SETS


def layers(program: Program) -> list[Layer]:
    """conv1, conv2, hidden, out; the output layer is always plain."""
    first, second = program.channels
    multi = program.choices > 1
    pooled = (IMAGE_SETS[program.data].side - 4) // 2
    return [
        Layer("conv1", (first, 1, 3, 3), multi and program.custom == "all"),
        Layer("conv2", (second, first, 3, 3), multi and program.custom == "all"),
        Layer("hidden", (program.hidden, second * pooled**2), multi),
        Layer("out", (CLASSES, program.hidden), False),
    ]


def forward(net: Pass, images: Tensor) -> Tensor:
    """[B, side, side] -> logits [B, 10]."""
    x = net.conv("conv1", images.unsqueeze(1), relu=True)
    x = net.conv("conv2", x, relu=True)
    x = net.dropout("pool", F.max_pool2d(x, 2), net.hyper["dropout"])
    x = net.linear("hidden", x.flatten(1), relu=True)
    return net.linear("out", net.dropout("hidden", x, net.hyper["dropout_hidden"]))
