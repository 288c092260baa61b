"""The MLP half of a block in a few GPU kernels, written in Triton: the hidden layer stays on the chip.

`.norm_kernel` tells how LayerNorm goes into the first product and how the rows are shared out. Backward, a kernel does
dx and leaves xhat and the gradient in bf16 for another, which does the gradients of the weights, an instance a chunk of
neurons, working the hidden layer out again. Nets too wide to stay on the chip are left to cuBLAS: with the weights
streaming past a block of rows these kernels were no faster (192 wide, H200).
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.ci_vit.norm_kernel import (
    again,
    at,
    by_lane,
    finished,
    folded,
    padded,
    read,
    shares_of,
    standardised,
    through_norm,
    write,
)

COUNTED = 255  # blocks of rows that an instance can count in the 8 bits of one neuron


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: rows in a block, warps of a program instance, blocks on their way at once, neurons done at
    a time, and into how many shares a lane's rows go."""

    rows: int
    warps: int
    stages: int
    chunk: int
    shares: int


FORWARD = Blocks(64, 4, 1, 64, 8)
BACKWARD = Blocks(64, 4, 1, 64, 8)
WEIGHTS = Blocks(64, 4, 4, 64, 2)
"""Measured at 128 lanes of 6500 rows, 48 wide, 192 neurons, on an H200."""


@triton.jit
def _relu(x):
    """Not a number stays so, as in the derivative `where(x <= 0, 0, slope)`: a lane that diverged must be seen to."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_up(parts, out, shares: tl.constexpr, size, factor, BLOCK: tl.constexpr):
    """[G, shares, size] -> [G, size], times `factor`, in the order of the shares."""
    lane = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(parts + lane * shares * size + place, mask=inside, other=0)
    for share in tl.range(1, shares):
        total += tl.load(parts + (lane * shares + share) * size + place, mask=inside, other=0)
    tl.store(out + lane * size + place, (total * factor).to(out.dtype.element_ty), mask=inside)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    x,
    w_in,
    w_out,
    b_out,
    b_out_lane,
    y,
    fired,
    activity,
    rows,
    eps,
    width: tl.constexpr,
    neurons: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FIRED: tl.constexpr,
    ACTIVITY: tl.constexpr,
):
    lane, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = (lane * tl.num_programs(1) + share) * neurons
    x += lane * rows * width
    y += lane * rows * width
    w_in += lane * WIDTH * neurons
    w_out += lane * WIDTH * neurons
    channel, unit = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    ins: tl.tuple = ()
    outs: tl.tuple = ()
    sums: tl.tuple = ()
    for chunk in tl.static_range(neurons // CHUNK):
        ins += (tl.load(w_in + at(channel, chunk * CHUNK + unit, neurons)),)
        outs += (tl.load(w_out + at(chunk * CHUNK + unit, channel, WIDTH)),)
        sums += (tl.zeros((CHUNK,), tl.float32),)
    last_bias = tl.load(b_out + lane * b_out_lane + channel, mask=channel < width, other=0.0).to(tl.float32)
    counts = tl.zeros((ROWS, CHUNK), tl.int32)  # 8 bits a chunk: added up over the rows only once, at the end
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        xhat, _ = standardised(read(x, row, channel, rows, width), row, channel, rows, width, eps)
        xhat = xhat.to(w_in.dtype.element_ty)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        added: tl.tuple = ()
        for chunk in tl.static_range(neurons // CHUNK):
            pre = tl.dot(xhat, ins[chunk], input_precision="ieee")
            active = _relu(pre)
            if FIRED:
                counts += tl.where(pre >= 0, 1 << (8 * chunk), 0)
            if ACTIVITY:
                added += (sums[chunk] + tl.sum(active, 0),)
            total = tl.dot(active.to(w_in.dtype.element_ty), outs[chunk], total, input_precision="ieee")
        if ACTIVITY:
            sums = added
        write(y, again(x, row, channel, rows, width) + total + last_bias[None, :], row, channel, rows, width)
    # in a row beyond the last every pre-activation is 0, or not a number as in all rows: then there is none to take off
    beyond = tl.minimum(tl.maximum((share + 1) * STEPS * ROWS - rows, 0), STEPS * ROWS)
    for chunk in tl.static_range(neurons // CHUNK):
        if FIRED:
            count = tl.maximum(tl.sum((counts >> (8 * chunk)) & 255, 0) - beyond, 0)
            tl.store(fired + place + chunk * CHUNK + unit, count)
        if ACTIVITY:
            tl.store(activity + place + chunk * CHUNK + unit, sums[chunk])


@triton.jit
def _backward(
    grad,
    x,
    w_in,
    w_out,
    dx,
    standard,
    slope,
    dbo,
    rows,
    eps,
    width: tl.constexpr,
    neurons: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and for `_weights` xhat and grad in the products' dtype, [N, WIDTH]."""
    lane, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = lane * tl.num_programs(1) + share
    x += lane * rows * width
    grad += lane * rows * width
    dx += lane * rows * width
    standard += lane * rows * WIDTH
    slope += lane * rows * WIDTH
    w_in += lane * WIDTH * neurons
    w_out += lane * WIDTH * neurons
    channel, unit = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    ins: tl.tuple = ()
    outs: tl.tuple = ()
    for chunk in tl.static_range(neurons // CHUNK):
        ins += (tl.load(w_in + at(channel, chunk * CHUNK + unit, neurons)),)
        outs += (tl.load(w_out + at(chunk * CHUNK + unit, channel, WIDTH)),)
    dbo_sum = tl.zeros((WIDTH,), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        g = read(grad, row, channel, rows, width)
        dbo_sum += tl.sum(g, 0)
        g = g.to(w_in.dtype.element_ty)
        xhat, rstd = standardised(read(x, row, channel, rows, width), row, channel, rows, width, eps)
        operand = xhat.to(w_in.dtype.element_ty)
        write(slope, g, row, channel, rows, WIDTH)
        write(standard, operand, row, channel, rows, WIDTH)
        dxhat = tl.zeros((ROWS, WIDTH), tl.float32)
        for chunk in tl.static_range(neurons // CHUNK):
            pre = tl.dot(operand, ins[chunk], input_precision="ieee")
            dactive = tl.dot(g, tl.trans(outs[chunk]), input_precision="ieee")
            dpre = tl.where(pre <= 0, 0.0, dactive).to(w_in.dtype.element_ty)
            dxhat = tl.dot(dpre, tl.trans(ins[chunk]), dxhat, input_precision="ieee")
        to_x = through_norm(dxhat, xhat, rstd, channel, width)
        write(dx, again(grad, row, channel, rows, width) + to_x, row, channel, rows, width)
    tl.store(dbo + place * width + channel, dbo_sum, mask=channel < width)


@triton.jit
def _weights(
    standard,
    slope,
    w_in,
    w_out,
    p,
    q,
    dwo,
    rows,
    width: tl.constexpr,
    neurons: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A chunk of neurons' sums over a share of the rows; tiles are [neurons, rows], so that they need not be turned.

    The channel after xhat's last is 1, so p's column there is the sum of dpre.
    """
    chunk, share, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = lane * tl.num_programs(1) + share
    standard += lane * rows * WIDTH
    slope += lane * rows * WIDTH
    channel, neuron = tl.arange(0, WIDTH), chunk * CHUNK + tl.arange(0, CHUNK)
    w_in = tl.load(w_in + lane * WIDTH * neurons + at(channel, neuron, neurons))
    w_out = tl.load(w_out + lane * WIDTH * neurons + at(neuron, channel, WIDTH))
    p_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    dwo_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        h = tl.load(standard + at(row, channel, WIDTH), mask=(row < rows)[:, None], other=0.0)
        g = tl.load(slope + at(row, channel, WIDTH), mask=(row < rows)[:, None], other=0.0)
        pre = tl.dot(tl.trans(w_in), tl.trans(h), input_precision="ieee")
        dactive = tl.dot(w_out, tl.trans(g), input_precision="ieee")
        active = _relu(pre).to(h.dtype)
        dpre = tl.where(pre <= 0, 0.0, dactive).to(h.dtype)
        dwo_sum = tl.dot(active, g, dwo_sum, input_precision="ieee")
        p_sum = tl.dot(dpre, h, p_sum, input_precision="ieee")
    here, inside = place * width * neurons + at(neuron, channel, width), (channel < width)[None, :]
    tl.store(p + here, p_sum, mask=inside)
    tl.store(dwo + here, dwo_sum, mask=inside)
    tl.store(q + place * neurons + neuron, tl.sum(tl.where((channel == width)[None, :], p_sum, 0.0), 1))


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    eps: float,
    fired: bool,
    activity: bool,
    products: torch.dtype = torch.bfloat16,
    blocks: Blocks = FORWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mlp.mlp_forward`; `products` is the dtype of what is multiplied."""
    x, b_out = x.contiguous(), by_lane(b_out)
    lanes, width, neurons = w_in.shape
    rows = len(x) // lanes
    shares, steps = shares_of(rows, blocks.rows, max(blocks.shares, triton.cdiv(rows, COUNTED * blocks.rows)))
    y = torch.empty_like(x)
    counts = x.new_empty(lanes, shares, neurons if fired else 0, dtype=torch.int32)
    sums = x.new_empty(lanes, shares, neurons if activity else 0)
    _forward[(lanes, shares)](
        x,
        *folded(scale, shift, w_in, b_in, w_out, products),
        b_out,
        b_out.stride(0),
        y,
        counts,
        sums,
        rows,
        eps,
        width,
        neurons,
        padded(width),
        steps,
        **_cut(blocks),
        FIRED=fired,
        ACTIVITY=activity,
    )
    return y, _added_up(counts, 1), _added_up(sums, 1 / rows)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    eps: float,
    products: torch.dtype = torch.bfloat16,
    blocks: Blocks = BACKWARD,
    weights: Blocks = WEIGHTS,
) -> tuple[Tensor, ...]:
    """As `mlp.mlp_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    lanes, width, neurons = w_in.shape
    rows, wide = len(x) // lanes, padded(width)
    ins, outs = folded(scale, shift, w_in, b_in, w_out, products)
    shares, steps = shares_of(rows, blocks.rows, blocks.shares)
    dx, dbo = torch.empty_like(x), x.new_empty(lanes, shares, width)
    standard, slope = x.new_empty(2, lanes, rows, wide, dtype=products).unbind(0)
    _backward[(lanes, shares)](
        grad, x, ins, outs, dx, standard, slope, dbo, rows, eps, width, neurons, wide, steps, **_cut(blocks)
    )
    shares, steps = shares_of(rows, weights.rows, weights.shares)
    p, dwo = x.new_empty(2, lanes, shares, neurons, width).unbind(0)
    q = x.new_empty(lanes, shares, neurons)
    _weights[(neurons // weights.chunk, shares, lanes)](
        standard, slope, ins, outs, p, q, dwo, rows, width, neurons, wide, steps, **_cut(weights)
    )
    return dx, *finished(scale, shift, w_in, p, q, dwo, dbo)


def _added_up(parts: Tensor, factor: float) -> Tensor:
    lanes, shares, size = parts.shape
    out = parts.new_empty(lanes, size)
    if size:
        _add_up[(lanes, triton.cdiv(size, 128))](parts, out, shares, size, factor, BLOCK=128)
    return out


def _cut(blocks: Blocks) -> dict[str, int]:
    return {"CHUNK": blocks.chunk, "ROWS": blocks.rows, "STAGES": blocks.stages, "num_warps": blocks.warps}
