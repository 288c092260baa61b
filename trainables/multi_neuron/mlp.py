"""The notebook's MNIST net: hidden layers of multi-neurons with ReLU, then a plain linear layer to ten logits."""

from __future__ import annotations

import itertools

from torch import Tensor

from trainables.multi_neuron.neurons import Layer, Pass
from trainables.multi_neuron.program import CLASSES, Program
from trainables.multi_neuron.sets import IMAGE_SETS


def layers(program: Program) -> list[Layer]:
    """hidden1, hidden2, ... and out."""
    sizes = (IMAGE_SETS[program.data].side ** 2, *program.widths)
    hidden = [
        Layer(f"hidden{i + 1}", (wide, narrow), program.choices > 1)
        for i, (narrow, wide) in enumerate(itertools.pairwise(sizes))
    ]
    return [*hidden, Layer("out", (CLASSES, sizes[-1]), False)]


def forward(net: Pass, images: Tensor) -> Tensor:
    """[B, side, side] -> logits [B, 10]."""
    x = images.flatten(1)
    for i in range(len(net.program.widths)):
        x = net.linear(f"hidden{i + 1}", x, relu=True)
    return net.linear("out", x)


def matched_width(inputs: int, widths: tuple[int, ...], choices: int) -> int:
    """Width of the plain net, equally deep, whose parameter count is nearest to a softmax multi-neuron net's.

    Args:
        inputs: pixels. widths: of the multi-neuron net. choices: its N; computation and selection neurons both count.
    """
    target = count_parameters(inputs, widths, choices)
    width = 1
    while count_parameters(inputs, (width,) * len(widths), 1) < target:
        width += 1
    below = target - count_parameters(inputs, (width - 1,) * len(widths), 1)
    above = count_parameters(inputs, (width,) * len(widths), 1) - target
    return width if above < below else width - 1


def count_parameters(inputs: int, widths: tuple[int, ...], choices: int) -> int:
    """Weights and biases of the net: N computation and N selection neurons a unit (one computation neuron at N = 1)."""
    sizes = (inputs, *widths)
    copies = 1 if choices == 1 else 2 * choices
    hidden = sum((narrow + 1) * wide for narrow, wide in itertools.pairwise(sizes))
    return copies * hidden + (sizes[-1] + 1) * CLASSES
