"""Attention over few positions in one GPU kernel each way, written in Triton.

One program instance holds one head of one sample: all its keys and values stay on the chip, queries come in blocks of
rows, so that a whole row of scores is there at once and nothing is ever rescaled. No score leaves the chip: forward
reads q, k, v and writes the result and a row's log-sum-exp, backward works the probabilities out again from those.
Keys stand in two tiles, a power of two and a rest (65 positions: 64 + 16, not 128), since Triton knows powers of two
only. Heads are read where the projection left them and written where the next product wants them: nothing is permuted.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

LOG2_E = tl.constexpr(1 / math.log(2))
LEAST = 16  # rows, columns or depth of the smallest product that tensor cores do


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: queries in a block of rows, warps of a program instance, blocks on their way at once."""

    rows: int
    warps: int
    stages: int = 2


def key_tiles(positions: int) -> tuple[int, int]:
    """The two tiles of keys: the largest power of two not above `positions` (at least 16), and what holds the rest."""
    first = max(LEAST, 1 << (positions.bit_length() - 1))
    rest = positions - first
    return first, 0 if rest <= 0 else max(LEAST, triton.next_power_of_2(rest))


def forward_blocks(width: int) -> Blocks:
    """Of the forward kernel, by the padded width of a head."""
    return Blocks(16, 1, 3) if width <= 32 else Blocks(64, 4)


def backward_blocks(width: int) -> Blocks:
    """Of the backward kernel, by the padded width of a head."""
    if width <= 16:
        return Blocks(16, 1, 3)
    return Blocks(32, 4) if width <= 32 else Blocks(32, 2, 2)


@triton.jit
def _at(start, stride: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of BLOCK rows from `start`, [BLOCK, WIDTH]."""
    return (start + tl.arange(0, BLOCK))[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _inside(start, positions: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Which of these are positions and channels of the head."""
    return ((start + tl.arange(0, BLOCK)) < positions)[:, None] & (tl.arange(0, WIDTH) < width)[None, :]


@triton.jit
def _read(
    at,
    start,
    stride: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows from `start` on, [BLOCK, WIDTH]; 0 outside."""
    inside = _inside(start, positions, width, BLOCK, WIDTH)
    return tl.load(at + _at(start, stride, BLOCK, WIDTH), mask=inside, other=0.0)


@triton.jit
def _project(
    at,
    bias,
    start,
    stride: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows with their bias [WIDTH]; rows outside are the bias alone."""
    rows = _read(at, start, stride, positions, width, BLOCK, WIDTH)
    return (rows.to(tl.float32) + bias[None, :]).to(rows.dtype)


@triton.jit
def _bias(at, width: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    return tl.load(at + channel, mask=channel < width, other=0.0).to(tl.float32)


@triton.jit
def _write(
    at,
    value,
    start,
    stride: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    inside = _inside(start, positions, width, BLOCK, WIDTH)
    tl.store(at + _at(start, stride, BLOCK, WIDTH), value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    qkv,
    bias,
    out,
    lse,
    per_bias,
    scale,
    positions: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    stride: tl.constexpr = 3 * heads * width
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    bias += sample // per_bias * stride + head * width
    bq = _bias(bias, width, WIDTH)
    bk = _bias(bias + heads * width, width, WIDTH)
    bv = _bias(bias + 2 * heads * width, width, WIDTH)
    q = qkv + sample * (positions * stride) + head * width
    k, v = q + heads * width, q + 2 * heads * width
    out += sample * (positions * heads * width) + head * width
    lse += (sample * heads + head) * positions
    scale2 = scale * LOG2_E
    k0 = _project(k, bk, 0, stride, positions, width, FIRST, WIDTH)
    v0 = _project(v, bv, 0, stride, positions, width, FIRST, WIDTH)
    if REST:
        k1 = _project(k, bk, FIRST, stride, positions, width, REST, WIDTH)
        v1 = _project(v, bv, FIRST, stride, positions, width, REST, WIDTH)
    for start in tl.range(0, positions, ROWS):
        rows = _project(q, bq, start, stride, positions, width, ROWS, WIDTH)
        s0 = tl.dot(rows, tl.trans(k0), input_precision="ieee")
        if positions < FIRST:
            s0 = tl.where((tl.arange(0, FIRST) < positions)[None, :], s0, float("-inf"))
        top = tl.max(s0, 1)
        if REST:
            s1 = tl.dot(rows, tl.trans(k1), input_precision="ieee")
            s1 = tl.where((FIRST + tl.arange(0, REST) < positions)[None, :], s1, float("-inf"))
            top = tl.maximum(top, tl.max(s1, 1))
        top *= scale2
        p0 = tl.exp2(s0 * scale2 - top[:, None])
        total = tl.sum(p0, 1)
        mixed = tl.dot(p0.to(v0.dtype), v0, input_precision="ieee")
        if REST:
            p1 = tl.exp2(s1 * scale2 - top[:, None])
            total += tl.sum(p1, 1)
            mixed = tl.dot(p1.to(v1.dtype), v1, mixed, input_precision="ieee")
        _write(out, mixed * (1.0 / total)[:, None], start, heads * width, positions, width, ROWS, WIDTH)
        row = start + tl.arange(0, ROWS)
        tl.store(lse + row, (top + tl.log2(total)) / LOG2_E, mask=row < positions)


@triton.jit
def _probabilities(k, q, scale2, lse2, start: tl.constexpr, positions: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile of keys, [BLOCK, ROWS]; 0 where there is no key."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse2[None, :])
    if start + BLOCK > positions:
        p = tl.where((start + tl.arange(0, BLOCK) < positions)[:, None], p, 0.0)
    return p


@triton.jit
def _backward(
    grad,
    qkv,
    bias,
    lse,
    out,
    parts,
    per_bias,
    scale,
    positions: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tiles are [keys, queries]: then only one of the five products needs its left side turned.

    A row beyond the last has the log-sum-exp infinity, so that its probabilities and all that it adds are 0. `parts`
    are the sums of the three gradients over positions, which are the bias's.
    """
    stride: tl.constexpr = 3 * heads * width
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    bias += sample // per_bias * stride + head * width
    bq = _bias(bias, width, WIDTH)
    bk = _bias(bias + heads * width, width, WIDTH)
    bv = _bias(bias + 2 * heads * width, width, WIDTH)
    q = qkv + sample * (positions * stride) + head * width
    k, v = q + heads * width, q + 2 * heads * width
    dq = out + sample * (positions * stride) + head * width
    dk, dv = dq + heads * width, dq + 2 * heads * width
    grad += sample * (positions * heads * width) + head * width
    lse += (sample * heads + head) * positions
    scale2 = scale * LOG2_E
    k0 = _project(k, bk, 0, stride, positions, width, FIRST, WIDTH)
    v0 = _project(v, bv, 0, stride, positions, width, FIRST, WIDTH)
    dk0 = tl.zeros((FIRST, WIDTH), tl.float32)
    dv0 = tl.zeros((FIRST, WIDTH), tl.float32)
    sum_q = tl.zeros((WIDTH,), tl.float32)
    if REST:
        k1 = _project(k, bk, FIRST, stride, positions, width, REST, WIDTH)
        v1 = _project(v, bv, FIRST, stride, positions, width, REST, WIDTH)
        dk1 = tl.zeros((REST, WIDTH), tl.float32)
        dv1 = tl.zeros((REST, WIDTH), tl.float32)
    for start in tl.range(0, positions, ROWS):
        rows = _project(q, bq, start, stride, positions, width, ROWS, WIDTH)
        g = _read(grad, start, heads * width, positions, width, ROWS, WIDTH)
        row = start + tl.arange(0, ROWS)
        lse2 = tl.load(lse + row, mask=row < positions, other=float("inf")) * LOG2_E
        p0 = _probabilities(k0, rows, scale2, lse2, 0, positions, FIRST)
        dp0 = tl.dot(v0, tl.trans(g), input_precision="ieee")
        mean = tl.sum(p0 * dp0, 0)
        if REST:
            p1 = _probabilities(k1, rows, scale2, lse2, FIRST, positions, REST)
            dp1 = tl.dot(v1, tl.trans(g), input_precision="ieee")
            mean += tl.sum(p1 * dp1, 0)
        ds0 = (p0 * (dp0 - mean[None, :])).to(rows.dtype)
        dv0 = tl.dot(p0.to(g.dtype), g, dv0, input_precision="ieee")
        dk0 = tl.dot(ds0, rows, dk0, input_precision="ieee")
        slope = tl.dot(tl.trans(ds0), k0, input_precision="ieee")
        if REST:
            ds1 = (p1 * (dp1 - mean[None, :])).to(rows.dtype)
            dv1 = tl.dot(p1.to(g.dtype), g, dv1, input_precision="ieee")
            dk1 = tl.dot(ds1, rows, dk1, input_precision="ieee")
            slope = tl.dot(tl.trans(ds1), k1, slope, input_precision="ieee")
        sum_q += tl.sum(slope, 0)
        _write(dq, slope * scale, start, stride, positions, width, ROWS, WIDTH)
    _write(dk, dk0 * scale, 0, stride, positions, width, FIRST, WIDTH)
    _write(dv, dv0, 0, stride, positions, width, FIRST, WIDTH)
    sum_k, sum_v = tl.sum(dk0, 0), tl.sum(dv0, 0)
    if REST:
        sum_k += tl.sum(dk1, 0)
        sum_v += tl.sum(dv1, 0)
        _write(dk, dk1 * scale, FIRST, stride, positions, width, REST, WIDTH)
        _write(dv, dv1, FIRST, stride, positions, width, REST, WIDTH)
    channel = tl.arange(0, WIDTH)
    parts += sample * stride + head * width + channel
    tl.store(parts, sum_q * scale, mask=channel < width)
    tl.store(parts + heads * width, sum_k * scale, mask=channel < width)
    tl.store(parts + 2 * heads * width, sum_v, mask=channel < width)


def forward(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention.attention_forward`."""
    qkv, bias = contiguous(qkv, bias)
    samples, positions, _, heads, width = qkv.shape
    out = qkv.new_empty(samples, positions, heads, width)
    lse = qkv.new_empty(samples, heads, positions, dtype=torch.float32)
    if samples:
        padded, (first, rest) = _padded(width), key_tiles(positions)
        blocks = forward_blocks(padded)
        launch(_forward, (samples * heads,))(
            qkv,
            bias,
            out,
            lse,
            samples // len(bias),
            width**-0.5,
            positions,
            heads,
            width,
            WIDTH=padded,
            FIRST=first,
            REST=rest,
            ROWS=blocks.rows,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out, lse


def backward(grad: Tensor, qkv: Tensor, bias: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention.attention_backward`."""
    grad, qkv, bias, lse = contiguous(grad, qkv, bias, lse)
    samples, positions, _, heads, width = qkv.shape
    out = torch.empty_like(qkv)
    parts = bias.new_empty((len(bias), samples // len(bias), 3, heads, width))
    if samples:
        padded, (first, rest) = _padded(width), key_tiles(positions)
        blocks = backward_blocks(padded)
        launch(_backward, (samples * heads,))(
            grad,
            qkv,
            bias,
            lse,
            out,
            parts,
            samples // len(bias),
            width**-0.5,
            positions,
            heads,
            width,
            WIDTH=padded,
            FIRST=first,
            REST=rest,
            ROWS=blocks.rows,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out, parts.sum(1)


def _padded(width: int) -> int:
    return max(LEAST, triton.next_power_of_2(width))
