"""The MLP half of a block in a few GPU kernels, written in Triton: the hidden layer stays on the chip.

LayerNorm's scale and shift are folded into the first product's weights and bias, once a lane (`_fold`):

    pre = xhat @ (scale * w_in) + (shift @ w_in + b_in),    xhat = (x - mean) / std

so that a row is only standardised, and the gradients of scale and shift follow from sums that the weights' gradients
need anyhow (`_finish`): with p = xhat^T dpre and q = sum of dpre over the rows,

    dw_in = scale * p + shift q,  dscale = sum over neurons of w_in * p,  dshift = w_in q.

A program instance keeps a lane's weights on the chip while it goes through its share of the lane's rows; backward
another kernel does the weights' gradients, an instance a chunk of neurons, working the hidden layer out again from xhat
and the gradient, which the first leaves in bf16. Shares are the same however many lanes there are, and sums over shares
are taken in their order. Nets too wide to stay on the chip are left to cuBLAS: with the weights streaming past a block
of rows these kernels were no faster (192 wide, H200).
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

LEAST = 16  # rows, columns or depth of the smallest product that tensor cores do
CHANNELS = 16  # that one instance of `_finish` does
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


# --- parts ------------------------------------------------------------------------------------------------------------


@triton.jit
def _at(row, channel, width: tl.constexpr):
    return row[:, None] * width + channel[None, :]


@triton.jit
def _read(at, row, channel, rows, width: tl.constexpr):
    """Channels of rows, float32; 0 outside."""
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    return tl.load(at + _at(row, channel, width), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _again(at, row, channel, rows, width: tl.constexpr):
    """As `_read`, of what was read before: another hint, or the compiler would keep the first copy in registers."""
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    return tl.load(at + _at(row, channel, width), mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _write(at, value, row, channel, rows, width: tl.constexpr):
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    tl.store(at + _at(row, channel, width), value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _centred(x, mean, channel, width: tl.constexpr):
    """0 outside the row's channels."""
    return tl.where((channel < width)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _relu(x):
    """Not a number stays so, as in the derivative `where(x <= 0, 0, slope)`: a lane that diverged must be seen to."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(
    scale,
    shift,
    w_in,
    b_in,
    w_out,
    lanes,
    folded,
    rounded,
    width: tl.constexpr,
    neurons: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """scale * w_in [WIDTH, neurons] and w_out [neurons, WIDTH] in the products' dtype; `lanes`: the weights' strides.

    Rows and columns after `width` are 0, but for two rows that add up to shift @ w_in + b_in: a row of x with 1 there
    gets it.
    """
    lane = tl.program_id(0).to(tl.int64)
    channel, neuron = tl.arange(0, WIDTH), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = channel < width
    s = tl.load(scale + lane * lanes[0] + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(shift + lane * lanes[1] + channel, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_in + lane * lanes[2] + _at(channel, neuron, neurons), mask=inside[:, None], other=0.0).to(tl.float32)
    total = tl.load(b_in + lane * lanes[3] + neuron).to(tl.float32) + tl.sum(b[:, None] * w, 0)
    coarse = total.to(folded.dtype.element_ty).to(tl.float32)
    value = tl.where((channel == width)[:, None], coarse[None, :], s[:, None] * w)
    value = tl.where((channel == width + 1)[:, None], (total - coarse)[None, :], value)
    tl.store(folded + lane * WIDTH * neurons + _at(channel, neuron, neurons), value.to(folded.dtype.element_ty))
    w = tl.load(w_out + lane * lanes[4] + _at(neuron, channel, width), mask=inside[None, :], other=0.0)
    tl.store(rounded + lane * WIDTH * neurons + _at(neuron, channel, WIDTH), w.to(rounded.dtype.element_ty))


@triton.jit
def _finish(
    scale,
    shift,
    w_in,
    lanes,
    p,
    q,
    dwo,
    dbo,
    to_scale,
    to_shift,
    to_w_in,
    to_b_in,
    to_w_out,
    to_b_out,
    shares: tl.constexpr,
    dbo_shares: tl.constexpr,
    width: tl.constexpr,
    neurons: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A few channels' gradients from the shares' sums; `lanes`: the strides of scale, shift and w_in.

    p, dwo [G, shares, neurons, width], q [G, shares, neurons], dbo [G, dbo_shares, width].
    """
    lane = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    size: tl.constexpr = neurons * width
    s = tl.load(scale + lane * lanes[0] + channel, mask=inside, other=0.0)[None, :]
    b = tl.load(shift + lane * lanes[1] + channel, mask=inside, other=0.0)[None, :]
    dscale = tl.zeros((CHANNELS,), tl.float32)
    dshift = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(0, neurons, CHUNK):
        neuron = start + tl.arange(0, CHUNK)
        at = _at(neuron, channel, width)
        p_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        dwo_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        q_sum = tl.zeros((CHUNK,), tl.float32)
        for share in tl.range(0, shares):
            place = lane * shares + share
            p_sum += tl.load(p + place * size + at, mask=inside[None, :], other=0.0)
            dwo_sum += tl.load(dwo + place * size + at, mask=inside[None, :], other=0.0)
            q_sum += tl.load(q + place * neurons + neuron)
        turned = neuron[:, None] + channel[None, :] * neurons
        w = tl.load(w_in + lane * lanes[2] + turned, mask=inside[None, :], other=0.0)
        dscale += tl.sum(w * p_sum, 0)
        dshift += tl.sum(w * q_sum[:, None], 0)
        tl.store(to_w_in + lane * size + turned, s * p_sum + b * q_sum[:, None], mask=inside[None, :])
        tl.store(to_w_out + lane * size + at, dwo_sum, mask=inside[None, :])
        if tl.program_id(1) == 0:
            tl.store(to_b_in + lane * neurons + neuron, q_sum)
    dbo_sum = tl.zeros((CHANNELS,), tl.float32)
    for share in tl.range(0, dbo_shares):
        dbo_sum += tl.load(dbo + (lane * dbo_shares + share) * width + channel, mask=inside, other=0.0)
    tl.store(to_scale + lane * width + channel, dscale, mask=inside)
    tl.store(to_shift + lane * width + channel, dshift, mask=inside)
    tl.store(to_b_out + lane * width + channel, dbo_sum, mask=inside)


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
def _standardised(x, row, channel, rows, width: tl.constexpr, eps):
    """xhat, with 1 in the two channels after the last (0 in rows beyond the last), and 1 / std."""
    centred = _centred(x, tl.sum(x, 1) / width, channel, width)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    one = ((channel >= width) & (channel < width + 2))[None, :] & (row < rows)[:, None]
    return tl.where(one, 1.0, centred * rstd[:, None]), rstd


@triton.jit
def _forward(
    x,
    folded,
    rounded,
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
    folded += lane * WIDTH * neurons
    rounded += lane * WIDTH * neurons
    channel, unit = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    ins: tl.tuple = ()
    outs: tl.tuple = ()
    sums: tl.tuple = ()
    for chunk in tl.static_range(neurons // CHUNK):
        ins += (tl.load(folded + _at(channel, chunk * CHUNK + unit, neurons)),)
        outs += (tl.load(rounded + _at(chunk * CHUNK + unit, channel, WIDTH)),)
        sums += (tl.zeros((CHUNK,), tl.float32),)
    last_bias = tl.load(b_out + lane * b_out_lane + channel, mask=channel < width, other=0.0).to(tl.float32)
    counts = tl.zeros((ROWS, CHUNK), tl.int32)  # 8 bits a chunk: added up over the rows only once, at the end
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        xhat, _ = _standardised(_read(x, row, channel, rows, width), row, channel, rows, width, eps)
        xhat = xhat.to(folded.dtype.element_ty)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        added: tl.tuple = ()
        for chunk in tl.static_range(neurons // CHUNK):
            pre = tl.dot(xhat, ins[chunk], input_precision="ieee")
            active = _relu(pre)
            if FIRED:
                counts += tl.where(pre >= 0, 1 << (8 * chunk), 0)
            if ACTIVITY:
                added += (sums[chunk] + tl.sum(active, 0),)
            total = tl.dot(active.to(folded.dtype.element_ty), outs[chunk], total, input_precision="ieee")
        if ACTIVITY:
            sums = added
        _write(y, _again(x, row, channel, rows, width) + total + last_bias[None, :], row, channel, rows, width)
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
    folded,
    rounded,
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
    folded += lane * WIDTH * neurons
    rounded += lane * WIDTH * neurons
    channel, unit = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    ins: tl.tuple = ()
    outs: tl.tuple = ()
    for chunk in tl.static_range(neurons // CHUNK):
        ins += (tl.load(folded + _at(channel, chunk * CHUNK + unit, neurons)),)
        outs += (tl.load(rounded + _at(chunk * CHUNK + unit, channel, WIDTH)),)
    dbo_sum = tl.zeros((WIDTH,), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        g = _read(grad, row, channel, rows, width)
        dbo_sum += tl.sum(g, 0)
        g = g.to(folded.dtype.element_ty)
        xhat, rstd = _standardised(_read(x, row, channel, rows, width), row, channel, rows, width, eps)
        operand = xhat.to(folded.dtype.element_ty)
        _write(slope, g, row, channel, rows, WIDTH)
        _write(standard, operand, row, channel, rows, WIDTH)
        dxhat = tl.zeros((ROWS, WIDTH), tl.float32)
        for chunk in tl.static_range(neurons // CHUNK):
            pre = tl.dot(operand, ins[chunk], input_precision="ieee")
            dactive = tl.dot(g, tl.trans(outs[chunk]), input_precision="ieee")
            dpre = tl.where(pre <= 0, 0.0, dactive).to(folded.dtype.element_ty)
            dxhat = tl.dot(dpre, tl.trans(ins[chunk]), dxhat, input_precision="ieee")
        dxhat = tl.where((channel < width)[None, :], dxhat, 0.0)
        mean = tl.sum(dxhat, 1) / width
        along = tl.sum(dxhat * xhat, 1) / width
        to_x = (dxhat - mean[:, None] - xhat * along[:, None]) * rstd[:, None]
        _write(dx, _again(grad, row, channel, rows, width) + to_x, row, channel, rows, width)
    tl.store(dbo + place * width + channel, dbo_sum, mask=channel < width)


@triton.jit
def _weights(
    standard,
    slope,
    folded,
    rounded,
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
    w_in = tl.load(folded + lane * WIDTH * neurons + _at(channel, neuron, neurons))
    w_out = tl.load(rounded + lane * WIDTH * neurons + _at(neuron, channel, WIDTH))
    p_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    dwo_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        h = tl.load(standard + _at(row, channel, WIDTH), mask=(row < rows)[:, None], other=0.0)
        g = tl.load(slope + _at(row, channel, WIDTH), mask=(row < rows)[:, None], other=0.0)
        pre = tl.dot(tl.trans(w_in), tl.trans(h), input_precision="ieee")
        dactive = tl.dot(w_out, tl.trans(g), input_precision="ieee")
        active = _relu(pre).to(h.dtype)
        dpre = tl.where(pre <= 0, 0.0, dactive).to(h.dtype)
        dwo_sum = tl.dot(active, g, dwo_sum, input_precision="ieee")
        p_sum = tl.dot(dpre, h, p_sum, input_precision="ieee")
    at, inside = place * width * neurons + _at(neuron, channel, width), (channel < width)[None, :]
    tl.store(p + at, p_sum, mask=inside)
    tl.store(dwo + at, dwo_sum, mask=inside)
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
    x, b_out = x.contiguous(), _by_lane(b_out)
    lanes, width, neurons = w_in.shape
    rows = len(x) // lanes
    shares, steps = _shares(rows, blocks)
    y = torch.empty_like(x)
    counts = x.new_empty(lanes, shares, neurons if fired else 0, dtype=torch.int32)
    sums = x.new_empty(lanes, shares, neurons if activity else 0)
    launch(_forward, (lanes, shares))(
        x,
        *_folded(scale, shift, w_in, b_in, w_out, products),
        b_out,
        b_out.stride(0),
        y,
        counts,
        sums,
        rows,
        eps,
        width,
        neurons,
        _padded(width),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `mlp.mlp_backward`."""
    grad, x = contiguous(grad, x)
    scale, shift, w_in = _by_lane(scale), _by_lane(shift), _by_lane(w_in)
    lanes, width, neurons = w_in.shape
    rows, wide = len(x) // lanes, _padded(width)
    folded, rounded = _folded(scale, shift, w_in, b_in, w_out, products)
    dbo_shares, steps = _shares(rows, blocks)
    dx, dbo = torch.empty_like(x), x.new_empty(lanes, dbo_shares, width)
    standard, slope = x.new_empty(2, lanes, rows, wide, dtype=products).unbind(0)
    launch(_backward, (lanes, dbo_shares))(
        grad, x, folded, rounded, dx, standard, slope, dbo, rows, eps, width, neurons, wide, steps, **_cut(blocks)
    )
    shares, steps = _shares(rows, weights)
    p, dwo = x.new_empty(2, lanes, shares, neurons, width).unbind(0)
    q = x.new_empty(lanes, shares, neurons)
    launch(_weights, (neurons // weights.chunk, shares, lanes))(
        standard, slope, folded, rounded, p, q, dwo, rows, width, neurons, wide, steps, **_cut(weights)
    )
    like = (scale, shift, w_in, b_in, w_out, scale)
    to_scale, to_shift, to_w_in, to_b_in, to_w_out, to_b_out = (x.new_empty(tensor.shape) for tensor in like)
    slopes = (to_scale, to_shift, to_w_in, to_b_in, to_w_out, to_b_out)
    launch(_finish, (lanes, triton.cdiv(width, CHANNELS)))(
        scale, shift, w_in, _strides(scale, shift, w_in), p, q, dwo, dbo, *slopes, shares, dbo_shares, width, neurons,
        CHANNELS=CHANNELS, CHUNK=64,
    )  # fmt: skip
    return dx, *slopes


def _folded(
    scale: Tensor, shift: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `_fold` makes."""
    lanes, width, neurons = w_in.shape
    weights, wide, chunk = tuple(map(_by_lane, (scale, shift, w_in, b_in, w_out))), _padded(width), 32
    folded, rounded = w_in.new_empty(2, lanes, wide * neurons, dtype=products).unbind(0)
    launch(_fold, (lanes, neurons // chunk))(*weights, _strides(*weights), folded, rounded, width, neurons, wide, chunk)
    return folded, rounded


def _by_lane(weight: Tensor) -> Tensor:
    """A weight whose lanes are contiguous each: it comes as a block's part of all blocks' weights, and stays there."""
    return weight if weight[0].is_contiguous() else weight.contiguous()


def _strides(*weights: Tensor) -> tuple[int, ...]:
    """From one lane to the next."""
    return tuple(weight.stride(0) for weight in weights)


def _added_up(parts: Tensor, factor: float) -> Tensor:
    lanes, shares, size = parts.shape
    out = parts.new_empty(lanes, size)
    if size:
        launch(_add_up, (lanes, triton.cdiv(size, 128)))(parts, out, shares, size, factor, BLOCK=128)
    return out


def _shares(rows: int, blocks: Blocks) -> tuple[int, int]:
    """Into how many shares a lane's rows go, whatever the number of lanes is, and the blocks of rows in each."""
    done = triton.cdiv(rows, blocks.rows)
    steps = triton.cdiv(done, max(blocks.shares, triton.cdiv(done, COUNTED)))
    return triton.cdiv(done, steps), steps


def _cut(blocks: Blocks) -> dict[str, int]:
    return {"CHUNK": blocks.chunk, "ROWS": blocks.rows, "STAGES": blocks.stages, "num_warps": blocks.warps}


def _padded(width: int) -> int:
    """Channels of a row's tile: at least two to spare."""
    return max(LEAST, triton.next_power_of_2(width + 2))
