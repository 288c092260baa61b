"""Multi-neuron layers: a selector picks, for each unit and input, which of N computation neurons answers.

The notebook builds each unit as a module of its own and loops over them; here a layer is two matrix products, one of
the selectors and one of all computation neurons, with weights [N, out, in]. Source: sliced-ai/slice-monorepo,
experiments/multi_neuron_models (sigmoid and softmax neurons) and experiments/higher_dimensional_models (transformers).

With p the selector's probabilities, c_n the outputs of the computation neurons and h the one-hot choice, a unit answers

    out = sum_n m_n c_n,    m_n = h_n + ste_sign * (p_n - stop(p_n))

so that forward only the chosen neuron counts, and backward (straight-through, Bengio et al. 2013) the selector hears
d out / d p_n = ste_sign * c_n while computation neuron n hears m_n = h_n, which is 0 where it was not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.convolution import convolution
from trainables.family import Hypers
from trainables.multi_neuron.program import Clock, Program, active_choices, steps_per_epoch

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer of a net.

    Args:
        name: prefix of its parameters. shape: [out, in] or, of a convolution, [out, in, k, k]. multi: multi-neuron.
    """

    name: str
    shape: tuple[int, ...]
    multi: bool

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[1:])


# --- initial weights ------------------------------------------------------------------------------------------------


def init_layers(program: Program, hyper: Hypers, seed: Tensor, layers: list[Layer], dtype: torch.dtype) -> Params:
    """`name/weight` and `name/bias`; [N, ...] and a selector (`/selector_weight`, `/selector_bias`) where multi-neuron.

    Bounds are torch.nn.Linear's, U(-1/sqrt(in), 1/sqrt(in)), or xavier's for computation neurons. The first neurons
    of a layer of many have the very bits of a layer of few, so that a lane whose N is masked starts as the smaller net.
    """
    params: Params = {}
    for layer in layers:
        # filled on the device: a number copied there from the host cannot be captured in a CUDA graph
        bound = torch.full((), 1 / math.sqrt(layer.fan_in), dtype=dtype, device=seed.device)
        if not layer.multi:
            params |= _weights(seed, layer.name, layer.shape, bound, bound)
            continue
        neurons = (program.choices, *layer.shape)
        if program.init == "xavier":
            params |= _weights(
                seed, layer.name, neurons, _xavier(layer, program.choices, hyper["fan_3d"]), torch.zeros_like(bound)
            )
        else:
            params |= _weights(seed, layer.name, neurons, bound, bound)
        selectors = (1 if program.selector == "sigmoid" else program.choices, *layer.shape)
        params |= _weights(seed, layer.name, selectors, bound, bound, prefix="selector_")
    return params


def _weights(
    seed: Tensor, name: str, shape: tuple[int, ...], bound: Tensor, bias_bound: Tensor, prefix: str = ""
) -> Params:
    """Uniform weight of `shape` and bias of its leading dimensions ([out] or [N, out])."""
    zero = torch.zeros_like(seed)
    units = shape[:-1] if len(shape) < 4 else shape[:-3]

    def draw(part: str, size: tuple[int, ...], limit: Tensor) -> Tensor:
        key = f"{name}/{prefix}{part}"
        return (2 * draws.uniform(seed, zero, f"init/{key}", size, limit.dtype) - 1) * limit

    return {
        f"{name}/{prefix}weight": draw("weight", shape, bound),
        f"{name}/{prefix}bias": draw("bias", units, bias_bound),
    }


def _xavier(layer: Layer, choices: int, fan_3d: Tensor) -> Tensor:
    """sqrt(6 / (fan_in + fan_out)) of one neuron's matrix, or of the tensor [N, out, in] as torch counts its fans.

    For a 3-D tensor `xavier_uniform_` takes dimension 1 for inputs, 0 for outputs and the rest for a receptive field:
    fan_in = out * in, fan_out = N * in, which is far too many (Glorot & Bengio 2010 mean the matrix).
    """
    field = math.prod(layer.shape[2:])
    matrix = math.sqrt(6 / (layer.fan_in + layer.shape[0] * field))
    tensor = math.sqrt(6 / (layer.shape[0] * layer.fan_in + choices * layer.fan_in))
    return torch.where(fan_3d > 0.5, torch.full_like(fan_3d, tensor), torch.full_like(fan_3d, matrix))


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exploration:
    """Selector noise of one training step: draws keyed by (seed, update); `on` is a 0-d bool."""

    seed: Tensor
    update: Tensor
    on: Tensor


@dataclass(frozen=True)
class Gate:
    """How selectors choose at one moment: computation neurons in use (0-d float), and noise in training only."""

    active: Tensor
    exploration: Exploration | None = None


def gate_of(program: Program, hyper: Hypers, clock: Clock, seed: Tensor | None = None) -> Gate:
    """The gate at a moment of the run; with `seed`, the one that trains (and may explore)."""
    active = active_choices(program, hyper, clock.epochs)
    if seed is None or not program.explore:
        return Gate(active)
    return Gate(active, Exploration(seed, clock.updates, clock.progress < hyper["explore_until"]))


@dataclass(frozen=True)
class Choice:
    """What a layer chose: one-hot `hard` and probabilities `p`, both [..., N, out]."""

    hard: Tensor
    p: Tensor


def choose(program: Program, hyper: Hypers, gate: Gate, name: str, logits: Tensor) -> Choice:
    """Selector outputs to a choice.

    Args:
        name: the layer's, which keys its noise.
        logits: [..., N, out]; of the sigmoid selector its one output z, [..., 1, out], as p = (1 - sigmoid z, sigmoid
            z).

    Neurons beyond `gate.active` have probability 0 and are never chosen. Noise while exploring: Gumbel noise and its
    own temperature (Gumbel-softmax, Jang et al. 2017), and with probability epsilon a choice at random.
    """
    logits = logits.to(hyper["temperature"].dtype)
    if program.selector == "sigmoid":
        logits = torch.cat([torch.zeros_like(logits), logits], dim=-2)
    number = torch.arange(logits.shape[-2], device=logits.device).unsqueeze(-1)
    allowed = number < gate.active
    temperature, explore = hyper["temperature"], gate.exploration
    if explore is not None:
        u = draws.uniform(explore.seed, explore.update, f"gumbel/{name}", tuple(logits.shape), logits.dtype)
        noise = -torch.log(-torch.log(u))
        noisy = explore.on & (hyper["gumbel"] > 0)
        logits = logits + torch.where(noisy, noise, torch.zeros_like(noise))
        temperature = torch.where(noisy, hyper["gumbel"], temperature)
    logits = torch.where(allowed, logits / temperature, -torch.inf)
    p = torch.softmax(logits, dim=-2)
    if program.selector == "sigmoid":
        chosen = (p[..., 1, :] >= hyper["threshold"]).to(torch.int64)
    else:
        chosen = logits.argmax(dim=-2)
    if explore is not None:
        random = torch.where(allowed, noise, -torch.inf).argmax(dim=-2)
        u = draws.uniform(explore.seed, explore.update, f"epsilon/{name}", tuple(chosen.shape), p.dtype)
        chosen = torch.where(explore.on & (u < hyper["epsilon"]), random, chosen)
    hard = (number == chosen.unsqueeze(-2)).to(p.dtype)
    return Choice(hard, p)


def combine(hyper: Hypers, choice: Choice, outputs: Tensor) -> Tensor:
    """sum_n m_n c_n over N: outputs [..., N, out] -> [..., out], with the straight-through gradient described above."""
    hears = choice.hard + (1 - choice.hard) * hyper["unselected"]
    through = hyper["ste_sign"] * (choice.p - choice.p.detach())
    return ((choice.hard + hears * through) * outputs).sum(dim=-2)


# --- a forward pass -------------------------------------------------------------------------------------------------


class Pass:
    """One forward pass of a net: applies layers by name and keeps what their selectors chose.

    Args:
        params: of the whole net. gate: how selectors choose.
        dropout: (seed, update) that key the dropout masks of training; None = no dropout.
    """

    def __init__(
        self,
        program: Program,
        params: Mapping[str, Tensor],
        hyper: Hypers,
        gate: Gate,
        dropout: tuple[Tensor, Tensor] | None = None,
    ):
        self.program, self.params, self.hyper, self.gate = program, params, hyper, gate
        self._dropout = dropout
        self.choices: dict[str, Choice] = {}

    def linear(self, name: str, x: Tensor, relu: bool = False) -> Tensor:
        """x [..., in] -> [..., out]; the ReLU, where there is one, belongs to each computation neuron."""
        weight, bias = self.params[f"{name}/weight"], self.params[f"{name}/bias"]
        if weight.dim() == 2:
            return _activated(F.linear(x, weight, bias), relu)

        def each(value: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.linear(value, w.flatten(0, 1), b.flatten()).unflatten(-1, (w.shape[0], w.shape[1]))

        return self._multi(name, x, _activated(each(x, weight, bias), relu), each)

    def conv(self, name: str, x: Tensor, relu: bool = False) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W'], without padding; every place of the map chooses on its own."""
        weight, bias = self.params[f"{name}/weight"], self.params[f"{name}/bias"]
        if weight.dim() == 4:
            return _activated(self._conv2d(x, weight, bias), relu)

        def each(value: Tensor, w: Tensor, b: Tensor) -> Tensor:
            maps = self._conv2d(value, w.flatten(0, 1), b.flatten()).unflatten(1, (w.shape[0], w.shape[1]))
            return maps.movedim((1, 2), (-2, -1))

        return self._multi(name, x, _activated(each(x, weight, bias), relu), each).movedim(-1, 1)

    def _conv2d(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.program.precision == "bf16" and x.device.type == "cuda":
            return lane_conv2d(x.to(torch.bfloat16), weight, bias)
        return F.conv2d(x, weight, bias)

    def _multi(self, name: str, x: Tensor, outputs: Tensor, each: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        # x itself forward; backward, `upstream` of the selector's gradient
        seen = x.detach() + self.hyper["upstream"] * (x - x.detach())
        logits = each(seen, self.params[f"{name}/selector_weight"], self.params[f"{name}/selector_bias"])
        choice = choose(self.program, self.hyper, self.gate, name, logits)
        self.choices[name] = choice
        return combine(self.hyper, choice, outputs)

    def dropout(self, name: str, x: Tensor, rate: Tensor) -> Tensor:
        """Inverted dropout with a per-lane rate; the identity outside training."""
        if self._dropout is None:
            return x
        seed, update = self._dropout
        kept = draws.uniform(seed, update, f"dropout/{name}", tuple(x.shape), rate.dtype) >= rate
        return torch.where(kept, x / (1 - rate), torch.zeros_like(x))


def lane_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d by the operator that keeps lanes apart: of the same size, then without the rim where it read zeros."""
    rim = weight.shape[2] // 2
    whole = convolution(x.permute(0, 2, 3, 1), weight)
    inner = whole[:, rim : x.shape[2] - rim, rim : x.shape[3] - rim] + bias.to(x.dtype)
    return inner.permute(0, 3, 1, 2)


def _activated(x: Tensor, relu: bool) -> Tensor:
    return torch.relu(x) if relu else x


# --- growing --------------------------------------------------------------------------------------------------------


def grown(program: Program, params: Params, hyper: Hypers, clock: Clock, layers: list[str]) -> Params:
    """Parameters at the start of a step: computation neurons that join now become copies where the lane wants that.

    `layers` names the multi-neuron ones. Neuron k copies neuron k mod n, n being the number in use until now.
    Selectors keep their own weights: copies that were chosen alike would never part. Optimiser moments stay as they
    are.
    """
    now = active_choices(program, hyper, clock.epochs)
    before = active_choices(program, hyper, (clock.updates - 1).to(now.dtype) / steps_per_epoch(program))
    number = torch.arange(program.choices, device=now.device)
    # the update count stands still in a Fisher epoch: join once, at the training step that follows
    joins = (number >= before) & (number < now) & (hyper["grow_copies"] > 0.5) & ~clock.fisher
    source = torch.where(joins, torch.remainder(number, before.to(number.dtype)), number)
    renewed = dict(params)
    for layer in layers:
        for part in ("weight", "bias"):
            renewed[f"{layer}/{part}"] = params[f"{layer}/{part}"].index_select(0, source)
    return renewed
