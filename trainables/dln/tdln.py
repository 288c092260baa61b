"""DLN and TDLN: stacks of diagonal complex recurrences, for reading an image and for predicting bytes.

DLN keeps h_l = z h_(l-1) + x_l with z = size exp(i theta). TDLN lets the input set the time step: t = sigmoid(bias +
W_t x), h_l = z^t h_(l-1) + t W_d x, output Re h. Source: logs/202308 and logs/202310 (JAX, Equinox). The letters are
expanded nowhere there; the recurrence's function is called `dimensionless`.

A recurrence always computes in at least float32: in half precision a phase of hundreds of radians is noise.
Shapes below: B sequences, L steps, F numbers read a step, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables import draws
from trainables.dln import initials, powers
from trainables.dln.norms import layer_norm, wide
from trainables.dln.program import Program, features, pixels
from trainables.dln.recurrence import last_real, last_real_constant, power, scan
from trainables.family import Hypers, dtype_of

Params = dict[str, Tensor]


# --- parameters -----------------------------------------------------------------------------------------------------


def init_params(program: Program, hyper: Hypers, seed: Tensor) -> Params:
    """Levels are `level<i>.<name>` (0 reads the input), dense layers `dense<i>.<name>`, the read-out `out.<name>`."""
    channels, dtype, device = program.channels, dtype_of(program), seed.device
    params: Params = {}

    def put(name: str, fan_in: int, fan_out: int) -> None:
        params[f"{name}.w"], params[f"{name}.b"] = initials.linear(program, seed, name, fan_in, fan_out)

    def put_norm(name: str) -> None:
        params[f"{name}.gain"] = torch.ones(channels, dtype=dtype, device=device)
        params[f"{name}.shift"] = torch.zeros(channels, dtype=dtype, device=device)

    for level in range(program.levels + 1):
        name, kind = f"level{level}", kind_of(program, level)
        forget = initials.log_uniform(
            program, seed, f"{name}.size", channels, hyper["forget_low"], hyper["forget_high"]
        )
        params[f"{name}.size"] = 1 - forget
        longest, shortest = torch.full_like(hyper["period"], 2 * math.pi), hyper["period"]
        params[f"{name}.theta"] = initials.log_uniform(
            program, seed, f"{name}.theta", channels, longest / shortest, longest
        )
        if kind == "tdln":
            put(f"{name}.time", channels, channels)
            put(f"{name}.data", channels, channels)
        elif kind == "tdln_shifted":
            zero = torch.zeros_like(seed)
            params[f"{name}.time.w"] = draws.normal(seed, zero, f"{name}.time", (channels, channels), dtype)
        if level > 0:
            if program.recurrence == "tdln_shifted":
                put(f"{name}.before", channels, channels)
            else:
                put_norm(f"{name}.norm")
    for index in range(program.dense if program.task == "reconstruct" else 0):
        put(f"dense{index}", channels, channels)
        put_norm(f"dense{index}.norm")
    put("out", channels, pixels(program) if program.task == "reconstruct" else features(program))
    return params


def kind_of(program: Program, level: int) -> str:
    """A level's recurrence: all are the same, but the shifted version begins with a plain DLN where it has more."""
    if program.recurrence == "tdln_shifted" and level == 0 and program.levels > 0:
        return "dln"
    return program.recurrence


def fixed_names(params: Params) -> tuple[set[str], set[str]]:
    """(the memory's parameters, all of the first level's): what `train_memory` and `train_first` hold."""
    memory = {name for name in params if name.endswith((".size", ".theta"))}
    return memory, {name for name in params if name.startswith("level0.")}


# --- forward --------------------------------------------------------------------------------------------------------


def predict(program: Program, params: Params, hyper: Hypers, inputs: Tensor) -> Tensor:
    """Logits [B, L, F] of the next step, from inputs [B, L, F]."""
    x = _states(program, params, hyper, inputs, program.levels + 1)
    return wide(_linear(program, params, "out", x))


def reconstruct(program: Program, params: Params, hyper: Hypers, images: Tensor) -> Tensor:
    """Images [B, pixels] given back in [0, 1], from the last state alone."""
    return decode(program, params, hyper, encode(program, params, hyper, images))


def encode(program: Program, params: Params, hyper: Hypers, images: Tensor) -> Tensor:
    """The last recurrent output [B, D]: all that the decoder sees of an image [B, pixels]."""
    inputs = images[..., None]
    top = program.levels
    if top == 0:
        return _last(program, params, hyper, 0, inputs)
    below = _states(program, params, hyper, inputs, top)
    if program.recurrence == "tdln_shifted":
        return _last(program, params, hyper, top, _before(program, params, f"level{top}", below))
    if program.norm_over == "sequence":  # the statistic needs every position
        return _states(program, params, hyper, inputs, top + 1)[..., -1, :]
    return _join(program, params, hyper, f"level{top}", _last(program, params, hyper, top, below), below[..., -1, :])


def decode(program: Program, params: Params, hyper: Hypers, state: Tensor) -> Tensor:
    """Images [B, pixels] from last states [B, D]: dense layers with ReLU, residual and LayerNorm, then a sigmoid."""
    for index in range(program.dense):
        name = f"dense{index}"
        state = _join(program, params, hyper, name, wide(_linear(program, params, name, state)), state, ("position",))
    return torch.sigmoid(wide(_linear(program, params, "out", state)))


def _states(program: Program, params: Params, hyper: Hypers, inputs: Tensor, levels: int) -> Tensor:
    """Outputs [B, L, D] of the first `levels` levels."""
    x = _level(program, params, hyper, 0, inputs)
    for level in range(1, levels):
        name = f"level{level}"
        if program.recurrence == "tdln_shifted":
            x = _level(program, params, hyper, level, _before(program, params, name, x))
        else:
            x = _join(program, params, hyper, name, _level(program, params, hyper, level, x), x)
    return x


def _join(
    program: Program,
    params: Params,
    hyper: Hypers,
    name: str,
    out: Tensor,
    x: Tensor,
    over: tuple[str, ...] = ("position", "sequence"),
) -> Tensor:
    """LayerNorm(relu(out + x)), the residual being the program's choice."""
    summed = out + x if program.residual else out
    whole = program.norm_over == "sequence" and "sequence" in over
    normed = layer_norm(torch.relu(summed), hyper["norm_eps"], (-2, -1) if whole else (-1,))
    return normed * params[f"{name}.norm.gain"] + params[f"{name}.norm.shift"]


def _before(program: Program, params: Params, name: str, x: Tensor) -> Tensor:
    """The dense layer with ReLU that stands before each shifted level."""
    return torch.relu(wide(_linear(program, params, f"{name}.before", x)))


def _linear(program: Program, params: Params, name: str, x: Tensor) -> Tensor:
    weight, bias = params[f"{name}.w"], params[f"{name}.b"]
    outputs = weight.shape[-1]
    missing = [-size % 8 for size in weight.shape]
    if any(missing) and x.is_cuda and _low(program) != dtype_of(program):  # tensor cores want rows of 8 values
        x, bias = F.pad(x, (0, missing[0])), F.pad(bias, (0, missing[1]))
        weight = F.pad(weight, (0, missing[1], 0, missing[0]))
    return F.linear(x, weight.transpose(-1, -2), bias)[..., :outputs]


def _low(program: Program) -> torch.dtype:
    """What matrix products compute in."""
    if program.autocast == "float16":
        return torch.float16
    return torch.bfloat16 if program.precision == "bf16" else dtype_of(program)


def _level(program: Program, params: Params, hyper: Hypers, level: int, x: Tensor) -> Tensor:
    """All outputs Re h [B, L, D]."""
    log_size, theta = _memory(program, params, level)
    times, inputs = _drive(program, params, hyper, level, x)
    return scan(power(log_size, theta, times), inputs)[0][0]


def _last(program: Program, params: Params, hyper: Hypers, level: int, x: Tensor) -> Tensor:
    """The last output [B, D], without the states before it."""
    log_size, theta = _memory(program, params, level)
    if kind_of(program, level) == "dln" and x.shape[-1] == 1:
        inputs = wide(x[..., 0])
        if inputs.is_cuda:
            return powers.last_real_constant(log_size, theta, inputs, _low(program))
        return last_real_constant(log_size, theta, inputs)
    times, inputs = _drive(program, params, hyper, level, x)
    return last_real(log_size, theta, times, inputs)


def _memory(program: Program, params: Params, level: int) -> tuple[Tensor, Tensor]:
    size, theta = params[f"level{level}.size"], params[f"level{level}.theta"]
    if program.freeze == "detach":
        size, theta = size.detach(), theta.detach()
    return torch.log(size), theta


def _drive(program: Program, params: Params, hyper: Hypers, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Time steps and inputs of a level, [B, L, D] each. x: [B, L, D], or [B, L, F] at level 0."""
    name, kind = f"level{level}", kind_of(program, level)
    if kind == "dln":
        repeated = wide(repeat_to(x, program.channels) if level == 0 else x)
        return torch.ones_like(repeated), repeated

    def project(which: str) -> Tensor:
        weight = params[f"{name}.{which}.w"]
        return wide(x @ (fold(weight, x.shape[-1]) if level == 0 else weight))

    if kind == "tdln_shifted":
        times = torch.sigmoid(hyper["time_bias"] + project("time"))
        shifted = torch.cat([torch.ones_like(times[..., :1, :]), times[..., :-1, :]], -2)
        return times, shifted * wide(repeat_to(x, program.channels) if level == 0 else x)
    times = torch.sigmoid(hyper["time_bias"] + project("time") + params[f"{name}.time.b"])
    return times, times * (project("data") + params[f"{name}.data.b"])


def repeat_to(x: Tensor, channels: int) -> Tensor:
    """[..., F] -> [..., D]: channel j reads input j mod F."""
    return x[..., torch.arange(channels, device=x.device) % x.shape[-1]]


def fold(weight: Tensor, inputs: int) -> Tensor:
    """The matrix [F, D] that does to an input what `weight` [D, D] does to that input repeated over D channels.

    Rows that would read the same number are added up, which spares the repeated input and most of the product.
    """
    channels = weight.shape[-2]
    missing = -channels % inputs
    padded = torch.cat([weight, weight.new_zeros((missing, weight.shape[-1]))], -2) if missing else weight
    return padded.unflatten(-2, (-1, inputs)).sum(-3)
