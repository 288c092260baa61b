"""The passes between the products of a wide block as GPU kernels, written in Triton: see `.residual`.

An instance takes some rows of one lane, a few at a time, and a lane has so many instances whatever its neighbours. Sums
over rows stay in registers until an instance's last row; the few instances' sums of a lane are added up afterwards.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

VALUES = 2048
"""Of a tile: rows times channels, of the residual."""
VALUES_HIDDEN = 4096
"""And of the hidden layer."""
ROWS_SUMMED = 128
"""By one instance of a kernel that sums over rows."""
MOST_UNITS = 128
"""Of the hidden layer, in one instance."""


@triton.jit
def _vector(at, lane, channel, D: tl.constexpr):
    return tl.load(at + lane * D + channel, mask=channel < D, other=0.0)[None, :]


@triton.jit
def _residual_forward(
    x, added, bias, scale, shift, y, h, mean, rate, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    at = (lane * rows + row)[:, None] * D + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0) + tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    value += _vector(bias, lane, channel, D)
    centre = tl.sum(value, 1) / D  # all is 0 beside the channels
    centred = tl.where((channel < D)[None, :], value - centre[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    normal = centred * r[:, None] * _vector(scale, lane, channel, D) + _vector(shift, lane, channel, D)
    tl.store(y + at, value, mask=inside)
    tl.store(h + at, normal.to(h.dtype.element_ty), mask=inside)
    tl.store(mean + lane * rows + row, centre, mask=row < rows)
    tl.store(rate + lane * rows + row, r, mask=row < rows)


@triton.jit
def _residual_backward(
    to_y, to_h, y, mean, rate, scale, dx, dadded, parts, rows,
    D: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    lane, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    factor = _vector(scale, lane, channel, D)
    to_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    to_scale = tl.zeros((ROWS, WIDTH), tl.float32)
    to_shift = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < D)[None, :]
        at = (lane * rows + row)[:, None] * D + channel[None, :]
        centre = tl.load(mean + lane * rows + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(rate + lane * rows + row, mask=row < rows, other=0.0)[:, None]
        z = tl.where(inside, (tl.load(y + at, mask=inside, other=0.0) - centre) * r, 0.0)
        slope = tl.load(to_h + at, mask=inside, other=0.0).to(tl.float32)
        d = slope * factor
        level, along = tl.sum(d, 1)[:, None] / D, tl.sum(d * z, 1)[:, None] / D
        out = tl.load(to_y + at, mask=inside, other=0.0) + (d - level - z * along) * r
        tl.store(dx + at, out, mask=inside)
        tl.store(dadded + at, out.to(dadded.dtype.element_ty), mask=inside)
        to_bias += tl.where(inside, out, 0.0)
        to_scale += slope * z
        to_shift += slope
    part = parts + (lane * tl.num_programs(0) + split) * D + channel
    every = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
    tl.store(part, tl.sum(to_bias, 0), mask=channel < D)
    tl.store(part + every, tl.sum(to_scale, 0), mask=channel < D)
    tl.store(part + 2 * every, tl.sum(to_shift, 0), mask=channel < D)


@triton.jit
def _units(H: tl.constexpr, UNITS: tl.constexpr):
    """Of this instance."""
    return tl.program_id(1) * UNITS + tl.arange(0, UNITS)


@triton.jit
def _rectify_forward(
    product, bias, active, counts, sums, rows,
    H: tl.constexpr, FIRED: tl.constexpr, ACTIVITY: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    lane, split, unit = tl.program_id(2).to(tl.int64), tl.program_id(0), _units(H, UNITS)
    b = _vector(bias, lane, unit, H)
    count = tl.zeros((ROWS, UNITS), tl.int32)
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (unit < H)[None, :]
        at = (lane * rows + row)[:, None] * H + unit[None, :]
        pre = tl.load(product + at, mask=inside, other=0.0).to(tl.float32) + b
        rectified = tl.where(pre <= 0, 0.0, pre)  # not a maximum with 0, which could lose a NaN
        tl.store(active + at, rectified.to(active.dtype.element_ty), mask=inside)
        if FIRED:
            count += (inside & (pre >= 0)).to(tl.int32)
        if ACTIVITY:
            total += tl.where(inside, rectified, 0.0)
    part = (lane * tl.num_programs(0) + split) * H + unit
    if FIRED:
        tl.store(counts + part, tl.sum(count, 0), mask=unit < H)
    if ACTIVITY:
        tl.store(sums + part, tl.sum(total, 0), mask=unit < H)


@triton.jit
def _rectify_backward(
    grad, active, slope, sums, rows,
    H: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    lane, split, unit = tl.program_id(2).to(tl.int64), tl.program_id(0), _units(H, UNITS)
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (unit < H)[None, :]
        at = (lane * rows + row)[:, None] * H + unit[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0)
        passed = tl.where(tl.load(active + at, mask=inside, other=0.0) <= 0, 0.0, g)
        tl.store(slope + at, passed, mask=inside)
        total += passed.to(tl.float32)
    tl.store(sums + (lane * tl.num_programs(0) + split) * H + unit, tl.sum(total, 0), mask=unit < H)


def residual_forward(
    x: Tensor, added: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `residual.residual_forward`."""
    x, added, bias, scale, shift = contiguous(x, added, bias, scale, shift)
    lanes, width = scale.shape
    per_lane, (rows, wide) = len(x) // lanes, _tile(width)
    y, h = torch.empty_like(x), torch.empty_like(added)
    mean, rate = x.new_empty(len(x)), x.new_empty(len(x))
    launch(_residual_forward, (triton.cdiv(per_lane, rows), lanes))(
        x, added, bias, scale, shift, y, h, mean, rate, per_lane, eps, width, rows, wide
    )
    return y, h, mean, rate


def residual_backward(
    to_y: Tensor, to_h: Tensor, y: Tensor, mean: Tensor, rate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `residual.residual_backward`."""
    to_y, to_h, y, mean, rate, scale = contiguous(to_y, to_h, y, mean, rate, scale)
    lanes, width = scale.shape
    per_lane, (rows, wide) = len(y) // lanes, _tile(width)
    splits = triton.cdiv(per_lane, ROWS_SUMMED)
    dx, dadded = torch.empty_like(y), torch.empty_like(to_h)
    parts = scale.new_empty((3, lanes, splits, width))
    launch(_residual_backward, (splits, lanes))(
        to_y, to_h, y, mean, rate, scale, dx, dadded, parts, per_lane, width, ROWS_SUMMED, rows, wide
    )
    return dx, dadded, *(part.sum(1) for part in parts)


def rectify_forward(product: Tensor, bias: Tensor, fired: bool, activity: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `residual.rectify_forward`."""
    product, bias = contiguous(product, bias)
    lanes, hidden = bias.shape
    per_lane, splits, rows, units = _cut(product, lanes)
    active = torch.empty_like(product)
    counts = torch.empty((lanes, splits, hidden if fired else 0), dtype=torch.int32, device=bias.device)
    sums = bias.new_empty((lanes, splits, hidden if activity else 0))
    launch(_rectify_forward, (splits, triton.cdiv(hidden, units), lanes))(
        product, bias, active, counts, sums, per_lane, hidden, fired, activity, ROWS_SUMMED, rows, units
    )
    return active, counts.sum(1, dtype=torch.int32), sums.sum(1) / per_lane


def rectify_backward(grad: Tensor, active: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `residual.rectify_backward`."""
    grad, active = contiguous(grad, active)
    lanes, hidden = bias.shape
    per_lane, splits, rows, units = _cut(grad, lanes)
    slope, sums = torch.empty_like(grad), bias.new_empty((lanes, splits, hidden))
    launch(_rectify_backward, (splits, triton.cdiv(hidden, units), lanes))(
        grad, active, slope, sums, per_lane, hidden, ROWS_SUMMED, rows, units
    )
    return slope, sums.sum(1)


def _tile(width: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    wide = triton.next_power_of_2(width)
    return max(1, VALUES // wide), wide


def _cut(hidden: Tensor, lanes: int) -> tuple[int, int, int, int]:
    """Rows of a lane and its instances along them; rows and units of a tile."""
    per_lane = len(hidden) // lanes
    units = min(MOST_UNITS, triton.next_power_of_2(hidden.shape[1]))
    return per_lane, triton.cdiv(per_lane, ROWS_SUMMED), VALUES_HIDDEN // units, units
