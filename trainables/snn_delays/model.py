"""CSnnNext: a spiking net over frequency and time with learned delays, no residual paths.

    frames [B, T, F] -> stem (convolution over frequency, kernel = stride) + BN
    stage: blocks of [frequency x delay convolution, depthwise -> pointwise -> BN -> LIF]
           or, inverted: [the same convolution -> C to 4C -> BN -> LIF -> 4C to C (-> BN)]
    between stages: convolution over frequency, kernel = stride = 2, twice the channels, + BN
    mean over frequency -> dropout -> linear (or one learned delay a synapse) -> membrane that never spikes

Everything but the neurons sees all time steps at once. Activations are [B, T, N, C] throughout (batch, time, positions
along frequency, channels): every product over channels is then one matrix product on what is in memory, pairs of
positions included, and nothing is copied from one layout to another.
Source: github.com/Thvnvtos/CSNN-1D-Delays, csnnext_delays.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.family import Hypers, State, dtype_of
from trainables.snn_delays import delays, mixing, pooling
from trainables.snn_delays.neurons import keep_of_tau, keep_of_weight, lif, membrane, weight_of_tau
from trainables.snn_delays.program import Program, classes, kernel_steps

BN_MOMENTUM, BN_EPS = 0.1, 1e-5

Tensors = dict[str, Tensor]
Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel."""


def blocks(program: Program) -> Iterator[tuple[int, str]]:
    """(stage, name) of every block, in order."""
    for stage, count in enumerate(program.blocks):
        for block in range(count):
            yield stage, f"stage{stage + 1}.block{block + 1}"


def width(program: Program, stage: int) -> int:
    return program.channels * 2**stage


def taps(program: Program, stage: int) -> int:
    return kernel_steps(program.max_delay_ms[stage], program.dt_ms)


def reach(program: Program, hyper: Hypers, stage: int) -> Tensor:
    """Taps of the stage's kernel that this lane may use."""
    return delays.reach_of(hyper[f"delay_ms_{stage + 1}"], program.dt_ms, taps(program, stage))


def is_weight(name: str) -> bool:
    """Whether weight decay applies: to everything but BN's scales and shifts and the delay positions."""
    return not name.endswith((".position", ".bn_scale", ".bn_shift"))


# --- first values -----------------------------------------------------------------------------------------------------


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    """Parameters, Adam's moments and BN's running statistics of one lane."""
    params = init_params(program, hyper, seed)
    state: State = {
        "seed": seed,
        "step": torch.zeros_like(seed),
        "params": params,
        "mu": {name: torch.zeros_like(value) for name, value in params.items()},
        "nu": {name: torch.zeros_like(value) for name, value in params.items()},
        "running": {
            name.replace(".bn_scale", kind): torch.full_like(value, fill)
            for name, value in params.items()
            if name.endswith(".bn_scale")
            for kind, fill in ((".mean", 0.0), (".var", 1.0))
        },
    }
    if program.grads:
        state["grad_norms"] = {name: value.new_zeros(()) for name, value in params.items()}
    return state


def init_params(program: Program, hyper: Hypers, seed: Tensor) -> Tensors:
    params: Tensors = {}

    def conv(name: str, *shape: int) -> None:
        params[name] = _first_weights(program, seed, name, shape)

    def norm(name: str, channels: int) -> None:
        ones = torch.ones(channels, dtype=dtype_of(program), device=seed.device)
        params[f"{name}.bn_scale"], params[f"{name}.bn_shift"] = ones, torch.zeros_like(ones)

    def tau(name: str) -> None:
        if program.neuron == "plif":
            params[f"{name}.tau"] = weight_of_tau(hyper["tau_ms"], program.dt_ms).clone()

    conv("stem.weight", program.channels, program.stem)
    norm("stem", program.channels)
    for stage, name in blocks(program):
        channels, size = width(program, stage), program.kernel_sizes[stage]
        conv(f"{name}.delay", channels, size)
        params[f"{name}.position"] = first_positions(program, hyper, seed, stage, name)
        if program.bottleneck == "none":
            conv(f"{name}.pointwise", channels, channels)
            norm(name, channels)
        else:
            conv(f"{name}.pointwise", 4 * channels, channels)
            norm(name, 4 * channels)
            conv(f"{name}.pointwise_out", channels, 4 * channels)
            if program.bottleneck == "two_bn":
                norm(f"{name}.out", channels)
        tau(name)
        if name.endswith(f"block{program.blocks[stage]}") and stage + 1 < len(program.blocks):
            conv(f"down{stage + 1}.weight", 2 * channels, channels * 2)
            norm(f"down{stage + 1}", 2 * channels)
    features = width(program, len(program.blocks) - 1)
    shape = (classes(program), features)
    params["fc.weight"] = hyper["fc_scale"] * _uniform(program, seed, "fc.weight", shape)
    if program.fc_delay_ms:
        steps = kernel_steps(program.fc_delay_ms, program.dt_ms)
        unit = draws.uniform(seed, torch.zeros_like(seed), "fc.position", shape, dtype_of(program))
        full = torch.full_like(hyper["right_most"], steps)
        params["fc.position"] = delays.first_positions(unit, steps, full, hyper["right_most"])
    tau("fc")
    return params


def first_positions(program: Program, hyper: Hypers, seed: Tensor, stage: int, name: str) -> Tensor:
    """Where a block's delays start, [C, k]; a function of seed and hyper alone, so that movement can be measured."""
    shape = (width(program, stage), program.kernel_sizes[stage])
    unit = draws.uniform(seed, torch.zeros_like(seed), f"{name}.position", shape, dtype_of(program))
    return delays.first_positions(unit, taps(program, stage), reach(program, hyper, stage), hyper["right_most"])


def _uniform(program: Program, seed: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """torch's default for convolutions and linear layers, kaiming_uniform(a = sqrt 5): U(-1, 1) / sqrt(fan in)."""
    unit = draws.uniform(seed, torch.zeros_like(seed), name, shape, dtype_of(program))
    return (2 * unit - 1) / math.sqrt(shape[1])


def _first_weights(program: Program, seed: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """[out, fan in] by the program's `conv_init`."""
    if program.conv_init == "kaiming_uniform":
        return _uniform(program, seed, name, shape)
    gaussian = draws.normal(seed, torch.zeros_like(seed), name, shape, dtype_of(program))
    if program.conv_init == "kaiming_normal":
        return gaussian * math.sqrt(2 / shape[1])
    rows, columns = shape
    tall = gaussian if rows >= columns else gaussian.T
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0)  # makes the draw uniform (Mezzadri 2007)
    return q if rows >= columns else q.T


# --- forward ----------------------------------------------------------------------------------------------------------


class Pass:
    """One forward pass of one lane.

    Args:
        params, running: of the state.
        kernels: per block, [C, k, K]; "fc" too where the last layer has delays.
        mask: frames that count, [B, T]; None evaluates with the running statistics.
        dropout: mask over features, [B, C] (zeros and 1 / (1 - p)), or None.
    """

    def __init__(
        self,
        program: Program,
        hyper: Hypers,
        params: Tensors,
        running: Tensors,
        kernels: Tensors,
        mask: Tensor | None,
        dropout: Tensor | None,
    ):
        self.program, self.hyper, self.params, self.running = program, hyper, params, running
        self.kernels, self.mask, self.dropout = kernels, mask, dropout
        self.moved: Tensors = {}
        """BN's running statistics after this batch."""

    def __call__(self, frames: Tensor) -> Tensor:
        """frames [B, T, F] -> membranes of the classes [B, classes, T]."""
        program, params = self.program, self.params
        used = frames.shape[-1] // program.stem * program.stem
        windows, weight = frames[..., :used].unflatten(-1, (-1, program.stem)), params["stem.weight"]
        if frames.is_cuda:  # tensor cores want rows of 8 values
            windows, weight = (F.pad(t, (0, -program.stem % 8)) for t in (windows, weight))
        affine: Affine | None
        x, affine = self._mixed(windows, weight, "stem")
        for stage, name in blocks(program):
            x, affine = self._block(x, affine, name), None
            if name.endswith(f"block{program.blocks[stage]}") and stage + 1 < len(program.blocks):
                x, affine = self._down(x, f"down{stage + 1}")
        features = pooling.mean_over_positions(x, dtype_of(program))
        if self.dropout is not None:
            features = features * self.dropout.unsqueeze(1)
        if program.fc_delay_ms:
            current = delays.synapse_delay(features.transpose(1, 2), self.kernels["fc"])
        else:
            current = torch.einsum("btc,oc->bot", features, params["fc.weight"])
        with torch.autocast(frames.device.type, enabled=False):
            return membrane(current.to(frames.dtype), self._keep("fc"))

    def _block(self, x: Tensor, affine: Affine | None, name: str) -> Tensor:
        """affine: what is still to be done to x."""
        x = delays.frequency_delay(x, self.kernels[name], affine)
        x, affine = self._mixed(x, self.params[f"{name}.pointwise"], name)
        x = lif(x, self._keep(name), self.hyper["alpha"], affine, learn_keep=self.program.neuron == "plif")
        if self.program.bottleneck == "none":
            return x
        weight = self.params[f"{name}.pointwise_out"]
        if self.program.bottleneck != "two_bn":
            return mix(x, weight)
        y, (scale, shift) = self._mixed(x, weight, f"{name}.out")
        return (scale * y + shift).to(y.dtype)

    def _down(self, x: Tensor, name: str) -> tuple[Tensor, Affine]:
        pairs = x[:, :, : x.shape[2] // 2 * 2].unflatten(2, (-1, 2)).flatten(3)
        weight = self.params[f"{name}.weight"].unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1)
        return self._mixed(pairs, weight, name)

    def _keep(self, name: str) -> Tensor:
        if self.program.neuron == "plif":
            return keep_of_weight(self.params[f"{name}.tau"])
        return keep_of_tau(self.hyper["tau_ms"], self.program.dt_ms)

    def _mixed(self, x: Tensor, weight: Tensor, name: str) -> tuple[Tensor, Affine]:
        """A convolution of size one, [B, T, N, D], and its batch normalisation as a scale and a shift of each channel.

        Statistics are over batch, time and positions (torch.nn.BatchNorm1d on time folded into the batch); frames that
        do not count are left out of them. Both moments are taken about the running mean, in one pass over the product:
        about a point so near the batch's own mean their difference does not cancel, as it can about zero.
        """
        mean, var = self.running[f"{name}.mean"], self.running[f"{name}.var"]
        if self.mask is None:
            return mix(x, weight), self._affine(name, mean, var)
        y, *sums = self._summed(x, weight, mean, self.mask.to(mean.dtype))
        count = self.mask.sum().to(mean.dtype) * x.shape[2]
        first, second = (total / count for total in sums)
        batch_mean, batch_var = mean + first, (second - first.square()).clamp(min=0)
        self.moved[f"{name}.mean"] = (1 - BN_MOMENTUM) * mean + BN_MOMENTUM * batch_mean
        self.moved[f"{name}.var"] = (1 - BN_MOMENTUM) * var + BN_MOMENTUM * batch_var * count / (count - 1)
        return y, self._affine(name, batch_mean, batch_var)

    def _summed(self, x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The product y, and over frames that count the sums of y - centre and of its square, [D]."""
        if fused(self.program, x.device) and mixing.fits(*weight.shape):
            low = torch.bfloat16 if self.program.precision == "bf16" else x.dtype
            return mixing.mixed(x.to(low), weight, centre, counted)
        y = mix(x, weight)
        away = (y.to(centre.dtype) - centre) * counted[:, :, None, None]
        # sums of each sample first: a GPU takes them side by side
        first, second = (t.sum((1, 2)).sum(0) for t in (away, away.square()))
        return y, first, second

    def _affine(self, name: str, mean: Tensor, var: Tensor) -> Affine:
        scale = self.params[f"{name}.bn_scale"] * torch.rsqrt(var + BN_EPS)
        return scale, self.params[f"{name}.bn_shift"] - mean * scale


def fused(program: Program, device: torch.device) -> bool:
    """Whether products and BatchNorm's sums are one operator, in bf16 on a GPU. Elsewhere they are ordinary code."""
    return program.precision == "bf16" and device.type == "cuda"


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of size one: x [B, T, N, C], weight [D, C] -> [B, T, N, D].

    One matrix product a sample, so that the gradient of `weight` is one a sample too, and their sum: as one product it
    would be a sum over all of B * T * N in a handful of tiles, for which a batch of lanes gets no split.
    """
    y = torch.bmm(x.flatten(1, 2), weight.t().expand(len(x), -1, -1))
    return y.unflatten(1, x.shape[1:3])


def train_kernels(program: Program, hyper: Hypers, params: Tensors, sigmas: Tensor) -> Tensors:
    """The smooth kernels of a training step; sigmas [stages] in steps, the last one also for the last layer."""
    kernels = {
        name: delays.kernel(
            params[f"{name}.delay"],
            params[f"{name}.position"],
            sigmas[stage],
            taps(program, stage),
            reach(program, hyper, stage),
            program.kernel,
            delays.GAUSS_2_1D,
        )
        for stage, name in blocks(program)
    }
    if program.fc_delay_ms:
        steps = kernel_steps(program.fc_delay_ms, program.dt_ms)
        full = torch.full_like(sigmas[-1], steps)
        kernels["fc"] = delays.kernel(
            params["fc.weight"], params["fc.position"], sigmas[-1], steps, full, program.kernel, delays.GAUSS_1D
        )
    return kernels


def discrete_kernels(program: Program, hyper: Hypers, params: Tensors) -> Tensors:
    """The kernels of evaluation: whole delays, no width."""
    kernels = {
        name: delays.discrete(
            params[f"{name}.delay"],
            params[f"{name}.position"],
            taps(program, stage),
            reach(program, hyper, stage),
        )
        for stage, name in blocks(program)
    }
    if program.fc_delay_ms:
        steps = kernel_steps(program.fc_delay_ms, program.dt_ms)
        full = torch.full_like(hyper["tau_ms"], steps)
        kernels["fc"] = delays.discrete(params["fc.weight"], params["fc.position"], steps, full)
    return kernels
