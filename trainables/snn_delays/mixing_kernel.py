"""`.mixing` as GPU kernels, written in Triton.

An instance takes MOST_ROWS rows (sample, step and position) of one lane, a few at a time: whatever its neighbours, a
lane has as many instances, and its sums the same order. All channels of a row are multiplied at once; sums over rows,
the weight's gradient among them, stay in registers until the instance's last row, and the instances' are added up
afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import NARROW, contiguous, launch

MOST_ROWS = 2048
"""Of one instance."""
VALUES = 4096
"""Of a tile: rows at a time times channels."""


@triton.jit
def _at(row, first, channel, CHANNELS: tl.constexpr, rows):
    """Offsets of rows x channels of a lane that begins at row `first`, and which of them there are."""
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    return (first + row)[:, None] * CHANNELS + channel[None, :], inside


@triton.jit
def _forward(
    x, weight, centre, counted, y, parts, rows, positions,
    C: tl.constexpr, D: tl.constexpr, WIDE_C: tl.constexpr, WIDE_D: tl.constexpr, MOST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`parts`: of every instance the two sums, [G, splits, 2, D]."""
    split, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c, d = tl.arange(0, WIDE_C), tl.arange(0, WIDE_D)
    corner = (c < C)[:, None] & (d < D)[None, :]
    w = tl.load(weight + lane * D * C + d[None, :] * C + c[:, None], mask=corner, other=0.0).to(x.dtype.element_ty)
    middle = tl.load(centre + lane * D + d, mask=d < D, other=0.0)[None, :]
    first = tl.zeros((ROWS, WIDE_D), tl.float32)
    second = tl.zeros((ROWS, WIDE_D), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        at, inside = _at(row, lane * rows, c, C, rows)
        product = tl.dot(tl.load(x + at, mask=inside, other=0.0), w, input_precision="ieee")
        rounded = product.to(y.dtype.element_ty)
        at, inside = _at(row, lane * rows, d, D, rows)
        tl.store(y + at, rounded, mask=inside)
        counts = tl.load(counted + (lane * rows + row) // positions, mask=row < rows, other=0.0)
        away = (rounded.to(tl.float32) - middle) * counts[:, None]
        first += away
        second += away * away
    part = parts + (lane * tl.num_programs(0) + split) * 2 * D + d
    tl.store(part, tl.sum(first, 0), mask=d < D)
    tl.store(part + D, tl.sum(second, 0), mask=d < D)


@triton.jit
def _backward(
    grad, to_sums, x, y, weight, centre, counted, dx, parts, rows, positions,
    C: tl.constexpr, D: tl.constexpr, WIDE_C: tl.constexpr, WIDE_D: tl.constexpr, MOST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`parts`: of every instance the weight's gradient, [G, splits, D, C]."""
    split, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c, d = tl.arange(0, WIDE_C), tl.arange(0, WIDE_D)
    corner = (d < D)[:, None] & (c < C)[None, :]
    w = tl.load(weight + lane * D * C + d[:, None] * C + c[None, :], mask=corner, other=0.0).to(x.dtype.element_ty)
    middle = tl.load(centre + lane * D + d, mask=d < D, other=0.0)[None, :]
    level = tl.load(to_sums + lane * 2 * D + d, mask=d < D, other=0.0)[None, :]
    tilt = 2.0 * tl.load(to_sums + lane * 2 * D + D + d, mask=d < D, other=0.0)[None, :]
    total = tl.zeros((WIDE_D, WIDE_C), tl.float32)
    for start in range(0, MOST, ROWS):
        row = split * MOST + start + tl.arange(0, ROWS)
        at, inside = _at(row, lane * rows, d, D, rows)
        counts = tl.load(counted + (lane * rows + row) // positions, mask=row < rows, other=0.0)
        away = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - middle
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) + counts[:, None] * (level + tilt * away)
        slope = tl.where(inside, slope, 0.0).to(x.dtype.element_ty)
        at, inside = _at(row, lane * rows, c, C, rows)
        tl.store(dx + at, tl.dot(slope, w, input_precision="ieee").to(dx.dtype.element_ty), mask=inside)
        total += tl.dot(tl.trans(slope), tl.load(x + at, mask=inside, other=0.0), input_precision="ieee")
    part = parts + (lane * tl.num_programs(0) + split) * D * C + d[:, None] * C + c[None, :]
    tl.store(part, total, mask=corner)


def forward(x: Tensor, weight: Tensor, centre: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """As `mixing.mix_forward`."""
    x, weight, centre, counted = contiguous(x, weight, centre, counted)
    outputs = weight.shape[1]
    rows, splits = _cut(x)
    y, parts = x.new_empty((*x.shape[:-1], outputs)), weight.new_empty((len(x), splits, 2, outputs))
    launch(_forward, (splits, len(x)))(
        x, weight, centre, counted, y, parts, rows, x.shape[3], *_shape(weight), **_how(weight)
    )
    return y, parts.sum(1)


def backward(
    grad: Tensor, to_sums: Tensor, x: Tensor, y: Tensor, weight: Tensor, centre: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """As `mixing.mix_backward`."""
    grad, to_sums, x, y, weight, centre, counted = contiguous(grad, to_sums, x, y, weight, centre, counted)
    rows, splits = _cut(x)
    dx, parts = torch.empty_like(x), weight.new_empty((len(x), splits, *weight.shape[1:]))
    launch(_backward, (splits, len(x)))(
        grad, to_sums, x, y, weight, centre, counted, dx, parts, rows, x.shape[3], *_shape(weight), **_how(weight)
    )
    return dx, parts.sum(1)


def _cut(x: Tensor) -> tuple[int, int]:
    """Rows of a lane, and its instances."""
    rows = x[0, ..., 0].numel()
    return rows, triton.cdiv(rows, MOST_ROWS)


def _wide(channels: int) -> int:
    """As tiles are wide: a product takes 16 channels at least."""
    return max(16, triton.next_power_of_2(channels))


def _shape(weight: Tensor) -> tuple[int, ...]:
    """C, D, both as tiles are wide, and rows of an instance and of a tile."""
    outputs, inputs = weight.shape[1:]
    wide = _wide(inputs), _wide(outputs)
    return inputs, outputs, *wide, MOST_ROWS, min(64, VALUES // max(wide))


def _how(weight: Tensor) -> dict[str, int]:
    return {"num_warps": 2 if min(map(_wide, weight.shape[1:])) <= NARROW else 4, "num_stages": 3}
