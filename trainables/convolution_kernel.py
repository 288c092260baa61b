# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005
# Triton's tuples grow by +, not by unpacking, and are typed where they are compiled
"""Convolutions of all lanes as GPU kernels, written in Triton.

Each is a matrix product whose left side is never written down (implicit GEMM): a row is a position of a sample, and for
each of the k * k taps it reads the channels of the position that far away, or zeros outside the image. Lanes are the
grid's last axis, each with its own weight. Channels stand innermost everywhere, so that every read is of whole lines;
an image's few channels are read for all taps at once.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.convolution import DIVISOR, FEW, few
from trainables.operators import NARROW, contiguous, launch


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: rows and columns of a tile, terms of a sum at a time, warps, tiles on their way at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 3


MOST_ROWS = 4096
"""Positions whose products one instance of the weight's gradient sums; the sums of all instances are added after."""


@triton.jit
def _reach(row, tap, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr):
    """How far away in positions a tap reads, and for which rows that is inside the image."""
    down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
    h, w = row // W % H + down, row % W + right
    return down * W + right, (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _product(
    x, weight, y, positions,
    H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr,
    BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[row, o] = sum over taps and c of x[row + tap, c] weight[o, tap, c]; with BACK weight[c, last tap - tap, o]."""
    TILES: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    TAPS: tl.constexpr = SIZE * SIZE
    PARTS: tl.constexpr = INPUTS // DEPTH
    group = tl.program_id(1).to(tl.int64)
    x += group * positions * INPUTS
    y += group * positions * OUTPUTS
    weight += group * (INPUTS * OUTPUTS * TAPS)
    row = tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    term = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(TAPS * PARTS):
        tap, first = k // PARTS, k % PARTS * DEPTH
        away, inside = _reach(row, tap, H, W, SIZE)
        inside &= row < positions
        a = tl.load(x + (row + away)[:, None] * INPUTS + (first + term)[None, :], mask=inside[:, None], other=0.0)
        if BACK:
            at = ((first + term) * (TAPS * OUTPUTS))[:, None] + ((TAPS - 1 - tap) * OUTPUTS + column)[None, :]
            b = tl.load(weight + at, mask=(column < OUTPUTS)[None, :], other=0.0)
        else:
            at = (column * (TAPS * INPUTS))[:, None] + (tap * INPUTS + first + term)[None, :]
            b = tl.trans(tl.load(weight + at, mask=(column < OUTPUTS)[:, None], other=0.0))
        total = tl.dot(a, b, total, input_precision="ieee")
    written = (row < positions)[:, None] & (column < OUTPUTS)[None, :]
    tl.store(y + row[:, None] * OUTPUTS + column[None, :], total.to(y.dtype.element_ty), mask=written)


@triton.jit
def _product_of_few(
    x, weight, y, positions,
    H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_product`, where DEPTH holds all taps' channels."""
    TILES: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    TERMS: tl.constexpr = INPUTS * SIZE * SIZE
    group = tl.program_id(1).to(tl.int64)
    x += group * positions * INPUTS
    y += group * positions * OUTPUTS
    weight += group * (OUTPUTS * TERMS)
    row = tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    term = tl.arange(0, DEPTH)
    a = _neighbours(x, row, term, positions, H, W, INPUTS, SIZE)
    there = (column < OUTPUTS)[:, None] & (term < TERMS)[None, :]
    b = tl.trans(tl.load(weight + (column * TERMS)[:, None] + term[None, :], mask=there, other=0.0))
    total = tl.dot(a, b, input_precision="ieee")
    written = (row < positions)[:, None] & (column < OUTPUTS)[None, :]
    tl.store(y + row[:, None] * OUTPUTS + column[None, :], total.to(y.dtype.element_ty), mask=written)


@triton.jit
def _neighbours(x, row, term, positions, H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, SIZE: tl.constexpr):
    """[rows, terms]: for each term, tap by tap, the channel of the position that far away."""
    away, inside = _reach(row[:, None], (term // INPUTS)[None, :], H, W, SIZE)
    inside &= (row < positions)[:, None] & (term < INPUTS * SIZE * SIZE)[None, :]
    return tl.load(x + (row[:, None] + away) * INPUTS + (term % INPUTS)[None, :], mask=inside, other=0.0)


@triton.jit
def _outer(
    grad, x, parts, positions,
    H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr,
    MOST: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts[split, o, tap, c] = sum over the split's rows of grad[row, o] x[row + tap, c], AT_ONCE taps an instance."""
    TAPS: tl.constexpr = SIZE * SIZE
    DOWN: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (INPUTS + COLUMNS - 1) // COLUMNS
    group, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    grad += group * positions * OUTPUTS
    x += group * positions * INPUTS
    parts += (group * tl.num_programs(1) + split) * (INPUTS * OUTPUTS * TAPS)
    tile = tl.program_id(0)
    o = tile % DOWN * ROWS + tl.arange(0, ROWS)
    c = tile // DOWN % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    tap = tile // (DOWN * ACROSS) * AT_ONCE
    totals = ()
    for _ in tl.static_range(AT_ONCE):
        totals = totals + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for start in range(0, MOST, DEPTH):
        row = split * MOST + start + tl.arange(0, DEPTH)
        there = (row < positions)[:, None] & (o < OUTPUTS)[None, :]
        g = tl.trans(tl.load(grad + row[:, None] * OUTPUTS + o[None, :], mask=there, other=0.0))
        added = ()
        for i in tl.static_range(AT_ONCE):
            away, inside = _reach(row, tap + i, H, W, SIZE)
            read = (inside & (row < positions))[:, None] & (c < INPUTS)[None, :]
            a = tl.load(x + (row + away)[:, None] * INPUTS + c[None, :], mask=read, other=0.0)
            added = added + (tl.dot(g, a, totals[i], input_precision="ieee"),)
        totals = added
    written = (o < OUTPUTS)[:, None] & (c < INPUTS)[None, :]
    for i in tl.static_range(AT_ONCE):
        at = parts + (o * (TAPS * INPUTS))[:, None] + ((tap + i) * INPUTS + c)[None, :]
        tl.store(at, totals[i], mask=written)


@triton.jit
def _outer_of_few(
    grad, x, parts, positions,
    H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_outer`, where COLUMNS holds all taps' channels."""
    TERMS: tl.constexpr = INPUTS * SIZE * SIZE
    group, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    grad += group * positions * OUTPUTS
    x += group * positions * INPUTS
    parts += (group * tl.num_programs(1) + split) * (OUTPUTS * TERMS)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    term = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, MOST, DEPTH):
        row = split * MOST + start + tl.arange(0, DEPTH)
        there = (row < positions)[:, None] & (o < OUTPUTS)[None, :]
        g = tl.trans(tl.load(grad + row[:, None] * OUTPUTS + o[None, :], mask=there, other=0.0))
        a = _neighbours(x, row, term, positions, H, W, INPUTS, SIZE)
        total = tl.dot(g, a, total, input_precision="ieee")
    written = (o < OUTPUTS)[:, None] & (term < TERMS)[None, :]
    tl.store(parts + (o * TERMS)[:, None] + term[None, :], total, mask=written)


@triton.jit
def _sums(
    parts, sums,
    SPLITS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums[o, c, tap] = sum over the splits of parts[split, o, tap, c]: the order in which a weight is kept."""
    TILES: tl.constexpr = (INPUTS + COLUMNS - 1) // COLUMNS
    group = tl.program_id(1).to(tl.int64)
    parts += group * (SPLITS * INPUTS * OUTPUTS * TAPS)
    sums += group * (INPUTS * OUTPUTS * TAPS)
    o = tl.program_id(0) // TILES
    c = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tap = tl.arange(0, ROWS)[:, None]
    there = (tap < TAPS) & (c < INPUTS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * (INPUTS * OUTPUTS * TAPS) + (o * TAPS + tap) * INPUTS + c, there, 0.0)
    tl.store(sums + (o * INPUTS + c) * TAPS + tap, total, mask=there)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """As `convolution.conv_forward`."""
    return _multiplied(x, weight, back=False)


def backward_input(grad: Tensor, weight: Tensor) -> Tensor:
    """As `convolution.conv_backward_input`."""
    return _multiplied(grad, weight, back=True)


def backward_weight(grad: Tensor, x: Tensor, weight: Tensor, blocks: Blocks | None = None) -> Tensor:
    """As `convolution.conv_backward_weight`."""
    grad, x = contiguous(grad, x)
    samples, height, width, inputs = x.shape
    groups, outputs, kernel = weight.shape[:3]
    taps = kernel * kernel
    positions = samples // groups * height * width
    terms = inputs * taps if few(inputs, kernel) else inputs
    blocks = fitting(blocks or outer_blocks(terms, outputs), x)
    # as many rows a split whatever the number of lanes: a lane's sums do not depend on its neighbours
    most = min(MOST_ROWS, triton.cdiv(positions, blocks.depth) * blocks.depth)
    splits = triton.cdiv(positions, most)
    parts = torch.empty((groups, splits, outputs * taps * inputs), dtype=torch.float32, device=x.device)
    rows = triton.cdiv(outputs, blocks.rows)
    what = (grad, x, parts, positions, height, width, inputs, outputs, kernel, most)
    shape = (blocks.rows, blocks.columns, blocks.depth)
    how = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if few(inputs, kernel):
        launch(_outer_of_few, (rows, splits, groups))(*what, *shape, **how)
    else:
        at_once = taps_at_once(kernel, blocks)
        tiles = rows * triton.cdiv(inputs, blocks.columns) * (taps // at_once)
        launch(_outer, (tiles, splits, groups))(*what, at_once, *shape, **how)
    sums = torch.empty((groups, outputs, inputs, kernel, kernel), dtype=torch.float32, device=x.device)
    columns = min(128, triton.next_power_of_2(inputs))
    launch(_sums, (outputs * triton.cdiv(inputs, columns), groups))(
        parts, sums, splits, inputs, outputs, taps, triton.next_power_of_2(taps), columns
    )
    return sums


def _multiplied(x: Tensor, weight: Tensor, back: bool, blocks: Blocks | None = None) -> Tensor:
    x, weight = contiguous(x, weight)
    samples, height, width, inputs = x.shape
    groups, kernel = len(weight), weight.shape[2]
    outputs = weight.shape[4] if back else weight.shape[1]
    positions = samples // groups * height * width
    all_taps = not back and few(inputs, kernel)
    blocks = fitting(blocks or product_blocks(inputs * kernel**2 if all_taps else inputs, outputs, all_taps), x)
    y = x.new_empty((samples, height, width, outputs))
    grid = (triton.cdiv(positions, blocks.rows) * triton.cdiv(outputs, blocks.columns), groups)
    what = (x, weight, y, positions, height, width, inputs, outputs, kernel)
    shape = (blocks.rows, blocks.columns, blocks.depth)
    how = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if all_taps:
        launch(_product_of_few, grid)(*what, *shape, **how)
    else:
        launch(_product, grid)(*what, back, *shape, **how)
    return y


def product_blocks(terms: int, outputs: int, all_at_once: bool = False) -> Blocks:
    """Of the forward kernel and of the gradient with respect to x. Measured on an H200 (benchmarks/results/h200.md).

    terms: channels that are summed over, or those of all taps where they are few and go all at once.
    """
    columns, depth = _tile(outputs, 256), _tile(terms, FEW) if all_at_once else _divisor(terms, 64)
    if min(columns, depth) <= NARROW:
        return Blocks(256 if max(columns, depth) <= NARROW else 128, min(columns, 64), depth, 2)
    return Blocks(128, columns, depth, 4 if columns <= 64 else 8, 4 if depth <= 32 else 3)


def outer_blocks(terms: int, outputs: int) -> Blocks:
    """Of the weight's gradient, `terms` by `outputs`. Measured on an H200 (benchmarks/results/h200.md)."""
    rows, columns = _tile(outputs, 128), _tile(terms, 128)
    if max(rows, columns) <= NARROW:
        return Blocks(rows, columns, 64, 1, 2)
    if min(rows, columns) <= NARROW:
        return Blocks(min(rows, 64), min(columns, 64), 64, 2, 2)
    return Blocks(rows, columns, 64, 8 if rows * columns > 128 * 64 else 4)


def fitting(blocks: Blocks, x: Tensor) -> Blocks:
    """The same, or cut smaller where the tiles on their way would not fit the shared memory of x's device."""
    if x.device.type != "cuda":
        return blocks  # interpreted
    most = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    row = blocks.stages * (blocks.rows + blocks.columns) * x.element_size()
    while row * blocks.depth > most and blocks.depth > DIVISOR:
        blocks = replace(blocks, depth=blocks.depth // 2)
    return blocks


def taps_at_once(kernel: int, blocks: Blocks) -> int:
    """Taps whose sums one instance of the weight's gradient keeps in registers: the gradient is read once for all."""
    return kernel if blocks.rows * blocks.columns <= 32 * 64 else 1


def _tile(channels: int, most: int) -> int:
    return min(most, max(DIVISOR, triton.next_power_of_2(channels)))


def _divisor(channels: int, most: int) -> int:
    """The largest power of two that divides it, at most `most`."""
    return min(most, channels & -channels)
