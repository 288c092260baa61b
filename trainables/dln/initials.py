"""Initial weights whose scales and fans are per-lane numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainables import draws
from trainables.dln.program import Program
from trainables.family import Hypers, dtype_of

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal cut at 2 (what JAX's initialisers divide by)."""


def gaussian(program: Program, seed: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Unit variance, normal or truncated normal, as the program says."""
    zero, dtype = torch.zeros_like(seed), dtype_of(program)
    if program.init == "normal":
        return draws.normal(seed, zero, name, shape, dtype)
    return draws.truncated_normal(seed, zero, name, shape, dtype) / TRUNCATED_STD


def matrix(
    program: Program,
    hyper: Hypers,
    seed: Tensor,
    name: str,
    shape: tuple[int, int],
    scale: Tensor | float,
    average: Tensor,
) -> Tensor:
    """A block's matrix [in, out] with standard deviation matrix_scale * scale / fan^fan_power.

    fan = the mean of fan-in and fan-out where `average` is 1, the fan-in where it is 0. So Glorot is scale 1 on the
    average; minGPT's 1, He's for ReLU sqrt(2), and the journal's "he" 1/sqrt(2), on the fan-in.
    """
    fan_in, fan_out = shape
    fan = average * (fan_in + fan_out) / 2 + (1 - average) * fan_in
    return hyper["matrix_scale"] * scale * fan ** -hyper["fan_power"] * gaussian(program, seed, name, shape)


def linear(program: Program, seed: Tensor, name: str, fan_in: int, fan_out: int) -> tuple[Tensor, Tensor]:
    """Weight [in, out] and bias [out] of a dense layer, both uniform within 1/sqrt(in) (Equinox's and torch's)."""
    zero, dtype, bound = torch.zeros_like(seed), dtype_of(program), 1 / math.sqrt(fan_in)
    weight = draws.uniform(seed, zero, f"{name}/w", (fan_in, fan_out), dtype)
    bias = draws.uniform(seed, zero, f"{name}/b", (fan_out,), dtype)
    return bound * (2 * weight - 1), bound * (2 * bias - 1)


def log_uniform(program: Program, seed: Tensor, name: str, size: int, low: Tensor, high: Tensor) -> Tensor:
    """[size] values, log-uniform between two per-lane numbers."""
    u = draws.uniform(seed, torch.zeros_like(seed), name, (size,), dtype_of(program))
    return torch.exp(torch.log(low) + u * (torch.log(high) - torch.log(low)))
