"""LayerNorm and the product after it in one GPU kernel each way, written in Triton.

`.norm_kernel` tells how the one goes into the other and how the rows are shared out. Forward reads x and writes the
product, backward reads x and both gradients and writes x's, and keeps the sums for the weights' gradients in registers
until its share of the rows is done. Columns stand in two tiles, a power of two and a rest (144: 128 + 16), since Triton
knows powers of two only.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.ci_vit.norm_kernel import (
    LEAST,
    at,
    finished,
    folded,
    padded,
    read,
    shares_of,
    standardised,
    through_norm,
    write,
)


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: rows in a block, warps of a program instance, blocks on their way at once, and into how
    many shares a lane's rows go."""

    rows: int
    warps: int
    stages: int
    shares: int


FORWARD = Blocks(64, 4, 1, 8)
BACKWARD = Blocks(64, 4, 1, 8)


def tiles(columns: int) -> tuple[int, int]:
    """The two tiles of columns: the largest power of two not above them, and what holds the rest."""
    first = 1 << (columns.bit_length() - 1)
    return first, 0 if first == columns else max(LEAST, triton.next_power_of_2(columns - first))


@triton.jit
def _tile(x, row, column, rows, columns: tl.constexpr):
    """As `read`, in the dtype it has."""
    return tl.load(x + at(row, column, columns), mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _forward(
    x,
    w,
    out,
    rows,
    eps,
    width: tl.constexpr,
    columns: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    lane, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += lane * rows * width
    out += lane * rows * columns
    w += lane * WIDTH * columns
    channel, column = tl.arange(0, WIDTH), tl.arange(0, FIRST)
    w0 = tl.load(w + at(channel, column, columns))
    if REST:
        more = FIRST + tl.arange(0, REST)
        w1 = _tile(w, channel, more, WIDTH, columns)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        xhat, _ = standardised(read(x, row, channel, rows, width), row, channel, rows, width, eps)
        xhat = xhat.to(w.dtype.element_ty)
        write(out, tl.dot(xhat, w0, input_precision="ieee"), row, column, rows, columns)
        if REST:
            write(out, tl.dot(xhat, w1, input_precision="ieee"), row, more, rows, columns)


@triton.jit
def _keep(p, q, total, channel, column, width: tl.constexpr, columns: tl.constexpr):
    """A share's p [columns, width] and q [columns]: the channel after xhat's last is 1, so its row is q."""
    exists = column < columns
    turned = channel[:, None] + column[None, :] * width
    tl.store(p + turned, total, mask=(channel < width)[:, None] & exists[None, :])
    tl.store(q + column, tl.sum(tl.where((channel == width)[:, None], total, 0.0), 0), mask=exists)


@triton.jit
def _backward(
    grad,
    carried,
    x,
    w,
    dx,
    p,
    q,
    rows,
    eps,
    width: tl.constexpr,
    columns: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    lane, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = lane * tl.num_programs(1) + share
    x += lane * rows * width
    carried += lane * rows * width
    dx += lane * rows * width
    grad += lane * rows * columns
    w += lane * WIDTH * columns
    p += place * columns * width
    q += place * columns
    channel, column = tl.arange(0, WIDTH), tl.arange(0, FIRST)
    w0 = tl.load(w + at(channel, column, columns))
    p0 = tl.zeros((WIDTH, FIRST), tl.float32)
    if REST:
        more = FIRST + tl.arange(0, REST)
        w1 = _tile(w, channel, more, WIDTH, columns)
        p1 = tl.zeros((WIDTH, REST), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        g = _tile(grad, row, column, rows, columns)
        xhat, rstd = standardised(read(x, row, channel, rows, width), row, channel, rows, width, eps)
        turned = tl.trans(xhat.to(w.dtype.element_ty))
        dxhat = tl.dot(g, tl.trans(w0), input_precision="ieee")
        p0 = tl.dot(turned, g, p0, input_precision="ieee")
        if REST:
            g = _tile(grad, row, more, rows, columns)
            dxhat = tl.dot(g, tl.trans(w1), dxhat, input_precision="ieee")
            p1 = tl.dot(turned, g, p1, input_precision="ieee")
        to_x = read(carried, row, channel, rows, width) + through_norm(dxhat, xhat, rstd, channel, width)
        write(dx, to_x, row, channel, rows, width)
    _keep(p, q, p0, channel, column, width, columns)
    if REST:
        _keep(p, q, p1, channel, more, width, columns)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor, eps: float, dtype: torch.dtype,
    blocks: Blocks = FORWARD,
) -> Tensor:  # fmt: skip
    """As `project.norm_project_forward`; `dtype` is also that of what is multiplied."""
    x = x.contiguous()
    lanes, width, columns = w.shape
    rows = len(x) // lanes
    shares, steps = shares_of(rows, blocks.rows, blocks.shares)
    out = x.new_empty(len(x), columns, dtype=dtype)
    weights, _ = folded(scale, shift, w, b, None, dtype)
    _forward[(lanes, shares)](
        x, weights, out, rows, eps, width, columns, padded(width), *tiles(columns), steps, **_cut(blocks)
    )
    return out


def backward(
    grad: Tensor, carried: Tensor, x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, eps: float,
    blocks: Blocks = BACKWARD,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `project.norm_project_backward`; grad's dtype is also that of what is multiplied."""
    grad, carried, x = grad.contiguous(), carried.contiguous(), x.contiguous()
    lanes, width, columns = w.shape
    rows = len(x) // lanes
    shares, steps = shares_of(rows, blocks.rows, blocks.shares)
    dx = torch.empty_like(x)
    p, q = x.new_empty(lanes, shares, columns, width), x.new_empty(lanes, shares, columns)
    weights, _ = folded(scale, shift, w, None, None, grad.dtype)
    _backward[(lanes, shares)](
        grad, carried, x, weights, dx, p, q, rows, eps, width, columns, padded(width), *tiles(columns), steps,
        **_cut(blocks),
    )  # fmt: skip
    return dx, *finished(scale, shift, w, p, q)


def _cut(blocks: Blocks) -> dict[str, int]:
    return {"ROWS": blocks.rows, "STAGES": blocks.stages, "num_warps": blocks.warps}
