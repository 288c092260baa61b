"""Counter-based random draws: a number depends on (seed, step, purpose, index) and on nothing else.

A lane's draws are the same in any slot, beside any neighbours, in any engine and on any device, and they survive a
restart without any generator state to save. The generator is a 32-bit integer hash (multiply, xor-shift; constants of
Chris Wellons' hash-prospector and of xxHash) over a mixed counter, computed in int32 because wrapping int32 products
are exact on every back end.

>>> seed, step = torch.tensor(0, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)
>>> noise = normal(seed, step, "perturb/head", (2, 3), torch.float32)
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_BITS = 23  # (bits + 0.5) / 2^23 is exact in float32, so no draw rounds up to 1


def _wrap(value: int) -> int:
    """The signed 32-bit integer with the same low bits."""
    value &= 0xFFFFFFFF
    return value - 0x100000000 if value >= 0x80000000 else value


def _mix(z: Tensor) -> Tensor:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        z = (z ^ ((z >> shift) & ((1 << (32 - shift)) - 1))) * _wrap(factor)
    return z ^ ((z >> 15) & 0x1FFFF)


@torch.compiler.assume_constant_result  # the compiler cannot trace crc32, and would leave the whole step uncompiled
def _salt(purpose: str) -> int:
    return _wrap(zlib.crc32(purpose.encode()))


def bits(seed: Tensor, step: Tensor, purpose: str, count: int) -> Tensor:
    """`count` pseudo-random int32 values. seed, step: 0-d integer tensors; purpose: any text. Returns [count]."""
    # ^ 0 keeps the compiler from folding the product below into its own index arithmetic, whose overflow is undefined
    index = torch.arange(count, dtype=torch.int32, device=seed.device) ^ 0
    z = _mix(index * _wrap(0x9E3779B1) + _salt(purpose))
    # as [1], not 0-d: under vmap the compiler rounds an integer constant beside a 0-d tensor through float32
    seed, step = seed.to(torch.int32).reshape(1), step.to(torch.int32).reshape(1)
    z = _mix(z + seed * _wrap(0x85EBCA77))
    return _mix(z ^ _mix(step * _wrap(0xC2B2AE3D) + _wrap(0x27D4EB2F)))


def uniform(seed: Tensor, step: Tensor, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uniform on the open interval (0, 1), 2^23 equally likely values; never exactly 0 or 1."""
    high = (bits(seed, step, purpose, math.prod(shape)) >> (32 - _BITS)) & ((1 << _BITS) - 1)
    return ((high.to(dtype) + 0.5) * 2.0**-_BITS).reshape(shape)


def normal(seed: Tensor, step: Tensor, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal by Box-Muller (largest magnitude 5.8)."""
    radius = torch.sqrt(-2 * torch.log(uniform(seed, step, purpose, shape, dtype)))
    return radius * torch.cos(2 * math.pi * uniform(seed, step, purpose + "/angle", shape, dtype))


def truncated_normal(seed: Tensor, step: Tensor, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal conditioned on |z| < 2, as in JAX's `truncated_normal(-2, 2)` (its std is 0.87963)."""
    edge = math.erf(2 / math.sqrt(2))
    u = uniform(seed, step, purpose, shape, dtype)
    return math.sqrt(2) * torch.erfinv((2 * u - 1) * edge)


def bernoulli(seed: Tensor, step: Tensor, purpose: str, p: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Bool tensor of `shape`, True with probability p (broadcast against shape)."""
    return uniform(seed, step, purpose, shape, p.dtype) < p


def integers(seed: Tensor, step: Tensor, purpose: str, high: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform int64 on 0..high-1 for high <= 2^23 (bias below high / 2^23)."""
    u = uniform(seed, step, purpose, shape, torch.float64)
    return (u * high).to(torch.int64)


def permutation(seed: Tensor, step: Tensor, purpose: str, count: int) -> Tensor:
    """A random permutation of 0..count-1, int64 [count]: argsort of hashed bits, ties broken by index."""
    return torch.argsort(bits(seed, step, purpose, count), stable=True)


def counter(value: int, device: torch.device | str = "cpu") -> Tensor:
    """A Python int as the 0-d int32 tensor that draws are keyed by."""
    return torch.tensor(_wrap(value), dtype=torch.int32, device=device)
