"""The VGG13-like net: 3x3 convolutions with bias, BatchNorm and ReLU, a 1x1 convolution fc6, and the logit layer.

Source: hyqneuron/regularizers `main.py` and hyqneuron/pylibhuva `th_model.make_cnn_with_conf`, `init_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.convolution import convolution
from trainables.family import dtype_of
from trainables.vgg_decay.batch_norm import EPSILON, activated, normalised
from trainables.vgg_decay.program import Layer, Program, has_short_batch, layers

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
) -> tuple[Tensor, Tensors]:
    """The net with each batch's own statistics.

    Args:
        images: [N, C, H, W], normalised.
        real: bool [N]; the others pad a short batch and take no part in the statistics.

    Returns:
        logits [N, classes], and the running statistics after this batch.
    """
    mask = real if has_short_batch(program) else None
    moved: Tensors = {}

    def activate(layer: Layer, x: Tensor, pool: bool) -> Tensor:
        # The bias cancels against the batch mean, so the forward pass leaves it out: its gradient is exactly 0 and
        # not rounding noise, which Adam and the normalised updates would blow up. The running mean still holds it.
        gamma, beta, bias = (params[f"{layer.name}.{part}"] for part in ("gamma", "beta", "bias"))
        z, (mean, var, count) = normalised(x, gamma, beta, mask, pool)
        for name, new in (("mean", mean + bias), ("var", var * (count / (count - 1)))):
            old = running[f"{layer.name}.{name}"]
            moved[f"{layer.name}.{name}"] = (1 - MOMENTUM) * old + MOMENTUM * new.detach()
        return z

    return _forward(program, params, images, activate), moved


def forward_eval(
    program: Program, params: Mapping[str, Tensor], running: Mapping[str, Tensor], images: Tensor
) -> tuple[Tensor, Tensors]:
    """The net with the running statistics.

    Returns:
        logits [N, classes], and the activations of the last two hidden layers before pooling, [N, H, W, C].
    """
    watched, hidden = [layer.name for layer in layers(program) if layer.norm][-2:], {}

    def activate(layer: Layer, x: Tensor, pool: bool) -> Tensor:
        scale = params[f"{layer.name}.gamma"] / torch.sqrt(running[f"{layer.name}.var"] + EPSILON)
        centre = running[f"{layer.name}.mean"] - params[f"{layer.name}.bias"]
        shift = params[f"{layer.name}.beta"]
        if layer.name in watched:
            hidden[layer.name] = activated(x, centre, scale, shift, pool=False)
        return activated(x, centre, scale, shift, pool)

    return _forward(program, params, images, activate), hidden


def _forward(
    program: Program, params: Mapping[str, Tensor], images: Tensor, activate: Callable[[Layer, Tensor, bool], Tensor]
) -> Tensor:
    """Logits. `activate`: what stands between a convolution and the next, with pooling or without."""
    x = images.permute(0, 2, 3, 1)
    for layer in layers(program):
        x = _convolution(program, layer, x, params[f"{layer.name}.weight"])
        if layer.norm:
            x = activate(layer, x, layer.pool_after)
    # one position is left in the notebook's net; a shallower one averages over those it has
    return x.to(dtype_of(program)).mean((1, 2)) + params["logit.bias"]


def convolves(program: Program) -> bool:
    """Whether convolutions on a GPU are PyTorch's own, and not the operators that take all lanes at once."""
    return program.precision != "bf16"


def _convolution(program: Program, layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Without bias, same size. x [N, H, W, C], weight [O, C, k, k] -> [N, H, W, O]."""
    if x.device.type == "cuda" and not convolves(program):
        return convolution(x.to(torch.bfloat16), weight)
    if layer.kernel == 1:
        return x @ weight.flatten(1).mT
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=layer.kernel // 2).permute(0, 2, 3, 1)
