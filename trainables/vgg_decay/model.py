"""The VGG13-like net: 3x3 convolutions with bias, BatchNorm and ReLU, a 1x1 convolution fc6, and the logit layer.

Source: hyqneuron/regularizers `main.py` and hyqneuron/pylibhuva `th_model.make_cnn_with_conf`, `init_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.family import dtype_of
from trainables.vgg_decay.program import Layer, Program, has_short_batch, layers

EPSILON = 1e-5
MOMENTUM = 0.1

Tensors = dict[str, Tensor]


def init_params(program: Program, seed: Tensor) -> Tensors:
    """Weights N(0, sqrt(2 / fan_in)) including the logit layer's, biases and beta 0, gamma 1."""
    dtype, zero = dtype_of(program), torch.zeros_like(seed)
    params: Tensors = {}
    for layer in layers(program):
        shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
        noise = draws.normal(seed, zero, f"init/{layer.name}", shape, dtype)
        params[f"{layer.name}.weight"] = noise * (2.0 / layer.fan_in) ** 0.5
        params[f"{layer.name}.bias"] = torch.zeros(layer.outputs, dtype=dtype, device=seed.device)
        if layer.norm:
            params[f"{layer.name}.gamma"] = torch.ones(layer.outputs, dtype=dtype, device=seed.device)
            params[f"{layer.name}.beta"] = torch.zeros(layer.outputs, dtype=dtype, device=seed.device)
    return params


def init_running(program: Program, seed: Tensor) -> Tensors:
    """BatchNorm's running statistics: means 0, variances 1."""
    running: Tensors = {}
    for layer in layers(program):
        if layer.norm:
            running[f"{layer.name}.mean"] = torch.zeros(layer.outputs, dtype=dtype_of(program), device=seed.device)
            running[f"{layer.name}.var"] = torch.ones(layer.outputs, dtype=dtype_of(program), device=seed.device)
    return running


def forward_train(
    program: Program, params: Mapping[str, Tensor], running: Mapping[str, Tensor], images: Tensor, real: Tensor
) -> tuple[Tensor, Tensors, Tensors]:
    """The net with each batch's own statistics.

    Args:
        images: [N, C, H, W], normalised.
        real: bool [N]; the others pad a short batch and take no part in the statistics.

    Returns:
        logits [N, classes], the running statistics after this batch, and the last two hidden layers' activations.
    """
    mask = real if has_short_batch(program) else None
    moved: Tensors = {}

    def normalise(layer: Layer, x: Tensor) -> Tensor:
        mean, var, count = _moments(x, mask)
        # The bias cancels against the batch mean, so the forward pass leaves it out: its gradient is exactly 0 and
        # not rounding noise, which Adam and the normalised updates would blow up. The running mean still holds it.
        bias = params[f"{layer.name}.bias"]
        for name, new in (("mean", mean + bias), ("var", var * (count / (count - 1)))):
            old = running[f"{layer.name}.{name}"]
            moved[f"{layer.name}.{name}"] = (1 - MOMENTUM) * old + MOMENTUM * new.detach()
        scale = params[f"{layer.name}.gamma"] / torch.sqrt(var + EPSILON)
        return _affine(x, mean, scale, params[f"{layer.name}.beta"])

    logits, hidden = _forward(program, params, images, normalise)
    return logits, moved, hidden


def forward_eval(
    program: Program, params: Mapping[str, Tensor], running: Mapping[str, Tensor], images: Tensor
) -> tuple[Tensor, Tensors]:
    """The net with the running statistics. Returns logits [N, classes] and the last two hidden layers' activations."""

    def normalise(layer: Layer, x: Tensor) -> Tensor:
        scale = params[f"{layer.name}.gamma"] / torch.sqrt(running[f"{layer.name}.var"] + EPSILON)
        centre = running[f"{layer.name}.mean"] - params[f"{layer.name}.bias"]
        return _affine(x, centre, scale, params[f"{layer.name}.beta"])

    return _forward(program, params, images, normalise)


def _forward(program, params, images, normalise) -> tuple[Tensor, Tensors]:
    dtype = dtype_of(program)
    x, hidden = images, {}
    for layer in layers(program):
        x = F.conv2d(x, params[f"{layer.name}.weight"], padding=layer.kernel // 2)
        if layer.norm:
            # statistics in the parameters' dtype; what the next convolution reads in the convolution's own
            x = torch.relu(normalise(layer, x.to(dtype))).to(x.dtype)
            hidden[layer.name] = x
        if layer.pool_after:
            x = F.max_pool2d(x, 2)
    # one position is left in the notebook's net; a shallower one averages over those it has
    return x.to(dtype).mean((2, 3)) + params["logit.bias"], dict(list(hidden.items())[-2:])


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Mean and biased variance per channel over the real examples, and how many values each is of."""
    if mask is None:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return mean, var, float(x.shape[0] * x.shape[2] * x.shape[3])
    weight = mask.to(x.dtype)[:, None, None, None]
    count = weight.sum() * (x.shape[2] * x.shape[3])
    mean = (x * weight).sum((0, 2, 3)) / count
    spread = (x - mean[:, None, None]) * weight
    return mean, (spread * spread).sum((0, 2, 3)) / count, count


def _affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x - centre[:, None, None]) * scale[:, None, None] + shift[:, None, None]
