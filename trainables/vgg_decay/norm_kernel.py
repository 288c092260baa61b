"""What stands between two convolutions, of all lanes, as GPU kernels written in Triton: see `.batch_norm`.

Each is one pass at the memory's speed. An instance holds some rows of windows (1x1, or 2x2 where it pools) and all
channels; a lane has so many instances whatever its neighbours.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

VALUES = 2048
"""Of a tile: rows times channels."""
VALUES_SUMMED = 32_768
"""Of the gradient that one instance sums: the late layers have few, which must not be left to a few instances."""


@triton.jit
def _window(row, W: tl.constexpr, SIDE: tl.constexpr):
    """The position of a window's first value. Rows of windows follow one another through all samples."""
    across: tl.constexpr = W // SIDE
    return row // across * (SIDE * W) + row % across * SIDE


@triton.jit
def _vector(at, group, channel, C: tl.constexpr):
    return tl.load(at + group * C + channel, mask=channel < C, other=0.0)[None, :]


@triton.jit
def _slope(at, centre, scale, shift, g, chosen, inside, PLACE: tl.constexpr, POOL: tl.constexpr):
    """The gradient that reaches one value of each window, before the normalisation, and the value without its mean."""
    centred = tl.load(at, mask=inside, other=0.0).to(tl.float32) - centre
    reached = centred * scale + shift > 0
    if POOL:
        reached &= chosen == PLACE
    return tl.where(reached, g, 0.0), centred


@triton.jit
def _forward(
    x, centre, scale, shift, z, chosen, windows,
    W: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    x += group * windows * (SIDE * SIDE * C)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < windows)[:, None] & (channel < C)[None, :]
    at = x + _window(row, W, SIDE)[:, None] * C + channel[None, :]
    c, s, b = _vector(centre, group, channel, C), _vector(scale, group, channel, C), _vector(shift, group, channel, C)
    top = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - c) * s + b
    first = tl.zeros((ROWS, WIDTH), tl.int8)
    for place in tl.static_range(1, SIDE * SIDE):
        away = (place // SIDE * W + place % SIDE) * C
        value = (tl.load(at + away, mask=inside, other=0.0).to(tl.float32) - c) * s + b
        first = tl.where(value > top, place, first).to(tl.int8)
        top = tl.where(value > top, value, top)
    out = group * windows * C + row[:, None] * C + channel[None, :]
    # not a maximum with 0, which could lose a NaN
    tl.store(z + out, tl.where(top <= 0, 0.0, top).to(z.dtype.element_ty), mask=inside)
    if SIDE > 1:
        tl.store(chosen + out, first, mask=inside)


@triton.jit
def _sums(
    grad, x, chosen, centre, scale, shift, parts, windows,
    W: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """parts[split] = the sums over its windows of the slope, and of the slope times the value without its mean."""
    group, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    x += group * windows * (SIDE * SIDE * C)
    grad += group * windows * C
    chosen += group * windows * C
    channel = tl.arange(0, WIDTH)
    c, s, b = _vector(centre, group, channel, C), _vector(scale, group, channel, C), _vector(shift, group, channel, C)
    plain = tl.zeros((ROWS, WIDTH), tl.float32)
    timed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        inside = (row < windows)[:, None] & (channel < C)[None, :]
        at = x + _window(row, W, SIDE)[:, None] * C + channel[None, :]
        mine = row[:, None] * C + channel[None, :]
        g = tl.load(grad + mine, mask=inside, other=0.0).to(tl.float32)
        which = tl.load(chosen + mine, mask=inside, other=0) if SIDE > 1 else 0
        for place in tl.static_range(SIDE * SIDE):
            away = (place // SIDE * W + place % SIDE) * C
            slope, centred = _slope(at + away, c, s, b, g, which, inside, place, SIDE > 1)
            plain += slope
            timed += slope * centred
    out = parts + (group * tl.num_programs(0) + split) * (2 * C) + channel
    tl.store(out, tl.sum(plain, 0), mask=channel < C)
    tl.store(out + C, tl.sum(timed, 0), mask=channel < C)


@triton.jit
def _backward(
    grad, x, chosen, centre, scale, shift, mean, tilt, weight, dx, windows, samples,
    W: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx = scale (slope - weight (mean + tilt (x - centre)))."""
    group = tl.program_id(1).to(tl.int64)
    x += group * windows * (SIDE * SIDE * C)
    dx += group * windows * (SIDE * SIDE * C)
    grad += group * windows * C
    chosen += group * windows * C
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < windows)[:, None] & (channel < C)[None, :]
    c, s, b = _vector(centre, group, channel, C), _vector(scale, group, channel, C), _vector(shift, group, channel, C)
    m, t = _vector(mean, group, channel, C), _vector(tilt, group, channel, C)
    first = _window(row, W, SIDE)[:, None] * C + channel[None, :]
    mine = row[:, None] * C + channel[None, :]
    g = tl.load(grad + mine, mask=inside, other=0.0).to(tl.float32)
    which = tl.load(chosen + mine, mask=inside, other=0) if SIDE > 1 else 0
    if WEIGHTED:
        sample = row // (windows // samples)
        counts = tl.load(weight + group * samples + sample, mask=row < windows, other=0.0)[:, None]
    for place in tl.static_range(SIDE * SIDE):
        away = (place // SIDE * W + place % SIDE) * C
        slope, centred = _slope(x + first + away, c, s, b, g, which, inside, place, SIDE > 1)
        shared = m + t * centred
        if WEIGHTED:
            shared *= counts
        tl.store(dx + first + away, (s * (slope - shared)).to(dx.dtype.element_ty), mask=inside)


def forward(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """As `norm_ops.norm_forward`."""
    x, centre, scale, shift = contiguous(x, centre, scale, shift)
    samples, height, width, channels = x.shape
    side = 2 if pool else 1
    z = x.new_empty((samples, height // side, width // side, channels))
    chosen = torch.empty(z.shape if pool else (samples, 0), dtype=torch.int8, device=x.device)
    windows, wide, rows = _cut(z, len(centre))
    launch(_forward, (triton.cdiv(windows, rows), len(centre)))(
        x, centre, scale, shift, z, chosen, windows, _width(x, pool), channels, side, rows, wide
    )
    return z, chosen


def sums(grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> Tensor:
    """As `norm_ops.norm_sums`."""
    grad, x, chosen, centre, scale, shift = contiguous(grad, x, chosen, centre, scale, shift)
    channels = x.shape[-1]
    windows, wide, rows = _cut(grad, len(centre))
    most = min(VALUES_SUMMED // wide, triton.cdiv(windows, rows) * rows)
    splits = triton.cdiv(windows, most)
    parts = torch.empty((len(centre), splits, 2, channels), dtype=torch.float32, device=x.device)
    launch(_sums, (splits, len(centre)))(
        grad, x, chosen, centre, scale, shift, parts, windows, _width(x, pool), channels, 2 if pool else 1, most, rows,
        wide,
    )  # fmt: skip
    return parts.squeeze(1) if splits == 1 else parts.sum(1)


def backward(
    grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, tilt: Tensor,
    weight: Tensor, pool: bool,
) -> Tensor:  # fmt: skip
    """As `norm_ops.norm_backward`."""
    grad, x, chosen, centre, scale, shift, mean, tilt, weight = contiguous(
        grad, x, chosen, centre, scale, shift, mean, tilt, weight
    )
    windows, wide, rows = _cut(grad, len(centre))
    dx = torch.empty_like(x)
    launch(_backward, (triton.cdiv(windows, rows), len(centre)))(
        grad, x, chosen, centre, scale, shift, mean, tilt, weight, dx, windows, len(x) // len(centre), _width(x, pool),
        x.shape[-1], 2 if pool else 1, weight.shape[1] > 0, rows, wide,
    )  # fmt: skip
    return dx


def _width(x: Tensor, pool: bool) -> int:
    """Of an image, where it matters: the fewer kernels differ, the fewer are compiled."""
    return x.shape[2] if pool else 1


def _cut(z: Tensor, groups: int) -> tuple[int, int, int]:
    """Windows of a group; a tile's columns and rows."""
    samples, height, width, channels = z.shape
    wide = triton.next_power_of_2(channels)
    return samples // groups * height * width, wide, max(1, VALUES // wide)
