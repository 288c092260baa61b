"""`.powers` as GPU kernels, written in Triton.

An instance takes some channels of one lane and RUN neighbouring powers: the lowest by exponential, cosine and sine, the
others by multiplying with z. Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

RUN = 28
"""Powers of an instance: what multiplying adds to the rounding of the first is some RUN roundings."""
BLOCK = 512
"""Channels of an instance at most."""


@triton.jit
def _begin(log_size, theta, channel, CHANNELS: tl.constexpr, lowest):
    """z and z^lowest of the instance's channels, as real and imaginary parts; 1 and 1 beyond them."""
    own = tl.program_id(1).to(tl.int64) * CHANNELS + channel
    a = tl.load(log_size + own, mask=channel < CHANNELS, other=0.0)
    b = tl.load(theta + own, mask=channel < CHANNELS, other=0.0)
    size, time = tl.exp(a), lowest.to(a.dtype)
    radius, angle = tl.exp(a * time), b * time
    return size * tl.cos(b), size * tl.sin(b), radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _forward(
    log_size, theta, out, steps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lowest = tl.program_id(0) * RUN
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    z_real, z_imag, real, imag = _begin(log_size, theta, channel, CHANNELS, lowest)
    lane = tl.program_id(1).to(tl.int64)
    for further in range(RUN):
        later = lowest + further
        value = tl.where(channel < CHANNELS, real, 0.0).to(out.dtype.element_ty)
        tl.store(
            out + (lane * steps + steps - 1 - later) * WIDTH + channel, value, mask=(channel < WIDTH) & (later < steps)
        )
        turned = real * z_imag + imag * z_real
        real = real * z_real - imag * z_imag
        imag = turned


@triton.jit
def _backward(
    grad, log_size, theta, parts, steps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`parts`: of every instance both gradients, [G, splits, 2, CHANNELS]."""
    lowest = tl.program_id(0) * RUN
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    z_real, z_imag, real, imag = _begin(log_size, theta, channel, CHANNELS, lowest)
    to_size = tl.zeros((BLOCK,), log_size.dtype.element_ty)
    to_theta = tl.zeros((BLOCK,), log_size.dtype.element_ty)
    lane = tl.program_id(1).to(tl.int64)
    for further in range(RUN):
        later = lowest + further
        at = grad + (lane * steps + steps - 1 - later) * WIDTH + channel
        weighted = tl.load(at, mask=inside & (later < steps), other=0.0).to(to_size.dtype) * later
        to_size += weighted * real
        to_theta -= weighted * imag
        turned = real * z_imag + imag * z_real
        real = real * z_real - imag * z_imag
        imag = turned
    part = parts + (lane * tl.num_programs(0) + tl.program_id(0)) * 2 * CHANNELS + channel
    tl.store(part, to_size, mask=inside)
    tl.store(part + CHANNELS, to_theta, mask=inside)


def forward(log_size: Tensor, theta: Tensor, steps: int, width: int, low: torch.dtype) -> Tensor:
    """As `powers.powers_forward`."""
    log_size, theta = contiguous(log_size, theta)
    lanes, channels = log_size.shape
    out = log_size.new_empty((lanes, steps, width), dtype=low)
    block = _block(width)
    grid = (triton.cdiv(steps, RUN), lanes, triton.cdiv(width, block))
    launch(_forward, grid)(log_size, theta, out, steps, channels, width, RUN, block)
    return out


def backward(grad: Tensor, log_size: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """As `powers.powers_backward`."""
    grad, log_size, theta = contiguous(grad, log_size, theta)
    (lanes, steps, width), channels = grad.shape, log_size.shape[1]
    block, splits = _block(channels), triton.cdiv(steps, RUN)
    parts = log_size.new_empty((lanes, splits, 2, channels))
    launch(_backward, (splits, lanes, triton.cdiv(channels, block)))(
        grad, log_size, theta, parts, steps, channels, width, RUN, block
    )
    total = parts.sum(1)
    return total[:, 0].contiguous(), total[:, 1].contiguous()


def _block(channels: int) -> int:
    return min(BLOCK, max(32, triton.next_power_of_2(channels)))
