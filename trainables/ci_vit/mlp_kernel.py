"""The MLP half of a block in a few GPU kernels, written in Triton: the hidden layer stays on the chip where it can.

LayerNorm's scale and shift are folded into the first product's weights and bias, once a lane (`_fold`):

    pre = xhat @ (scale * w_in) + (shift @ w_in + b_in),    xhat = (x - mean) / std

so that a row is only standardised, and the gradients of scale and shift follow from sums that the weights' gradients
need anyhow (`_finish`): with p = xhat^T dpre and q = sum of dpre over the rows,

    dw_in = scale * p + shift q,  dscale = sum over neurons of w_in * p,  dshift = w_in q.

Two ways, by the width. Narrow nets (`resident`): a program instance keeps a lane's weights on the chip while it goes
through its share of the lane's rows; backward another kernel does the weights' gradients, an instance a chunk of
neurons, working the hidden layer out again from xhat and the gradient, which the first leaves in bf16. Wide nets: an
instance does one block of rows and the weights stream past it; backward writes the hidden layer and its gradient in
bf16 for two products that cuBLAS does. Shares are the same however many lanes there are, and sums over shares are taken
in their order.
Triton comes with PyTorch's CUDA wheels; this module is imported only where a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 16  # rows, columns or depth of the smallest product that tensor cores do
CHANNELS = 16  # that one instance of `_finish` does
COUNTED = 255  # blocks of rows that an instance can count in the 8 bits of one neuron


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: rows in a block, warps of a program instance, blocks on their way at once, neurons done at
    a time, and into how many shares a lane's rows go (narrow nets)."""

    rows: int
    warps: int
    stages: int = 2
    chunk: int = 64
    shares: int = 4


def resident(width: int, neurons: int) -> bool:
    """Whether a lane's weights stay on the chip: two channels to spare in a tile of 64, at most 4 chunks of neurons."""
    return width <= 62 and neurons <= 256


def forward_blocks(width: int, neurons: int) -> Blocks:
    """Of the forward kernel."""
    return Blocks(128, 8, 2, shares=13) if resident(width, neurons) else Blocks(64, 4, 2)


def backward_blocks(width: int, neurons: int) -> Blocks:
    """Of the backward kernel."""
    return Blocks(128, 8, 2, shares=13) if resident(width, neurons) else Blocks(64, 4, 2, chunk=32)


def weights_blocks(width: int) -> Blocks:
    """Of the kernel of a narrow net's weights' gradients."""
    return Blocks(64, 4, 3, shares=4)


def tiles(width: int) -> tuple[int, int]:
    """The two tiles of a wide row's channels: the largest power of two not above `width`, and what holds the rest."""
    first = 1 << (width.bit_length() - 1)
    return first, 0 if first == width else max(LEAST, triton.next_power_of_2(width - first))


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
def _fold(
    scale,
    shift,
    w_in,
    b_in,
    w_out,
    folded,
    bias,
    rounded,
    width: tl.constexpr,
    neurons: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """scale * w_in [WIDE, neurons] and w_out [neurons, WIDE] in the products' dtype, and shift @ w_in + b_in.

    Rows and columns after `width` are 0, but for two rows that add up to the bias: a row of x with 1 there gets it.
    """
    lane = tl.program_id(0).to(tl.int64)
    channel, neuron = tl.arange(0, WIDTH), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = channel < width
    s = tl.load(scale + lane * width + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(shift + lane * width + channel, mask=inside, other=0.0).to(tl.float32)
    at = lane * width * neurons + _at(channel, neuron, neurons)
    w = tl.load(w_in + at, mask=inside[:, None], other=0.0).to(tl.float32)
    total = tl.load(b_in + lane * neurons + neuron).to(tl.float32) + tl.sum(b[:, None] * w, 0)
    tl.store(bias + lane * neurons + neuron, total)
    coarse = total.to(folded.dtype.element_ty).to(tl.float32)
    value = tl.where((channel == width)[:, None], coarse[None, :], s[:, None] * w)
    value = tl.where((channel == width + 1)[:, None], (total - coarse)[None, :], value)
    at = lane * WIDE * neurons + _at(channel, neuron, neurons)
    tl.store(folded + at, value.to(folded.dtype.element_ty), mask=(channel < WIDE)[:, None])
    at = lane * width * neurons + _at(neuron, channel, width)
    w = tl.load(w_out + at, mask=inside[None, :], other=0.0)
    at = lane * WIDE * neurons + _at(neuron, channel, WIDE)
    tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask=(channel < WIDE)[None, :])


@triton.jit
def _finish(
    scale,
    shift,
    w_in,
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
    p_shares: tl.constexpr,
    q_shares: tl.constexpr,
    dbo_shares: tl.constexpr,
    width: tl.constexpr,
    neurons: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
):
    """A few channels' gradients from the shares' sums; with ADD also w_out's, which else is done.

    p, dwo [G, p_shares, neurons, width], q [G, q_shares, neurons], dbo [G, dbo_shares, width].
    """
    lane = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    size: tl.constexpr = neurons * width
    s = tl.load(scale + lane * width + channel, mask=inside, other=0.0)[None, :]
    b = tl.load(shift + lane * width + channel, mask=inside, other=0.0)[None, :]
    dscale = tl.zeros((CHANNELS,), tl.float32)
    dshift = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(0, neurons, CHUNK):
        neuron = start + tl.arange(0, CHUNK)
        at = _at(neuron, channel, width)
        p_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        dwo_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        for share in tl.range(0, p_shares):
            here = (lane * p_shares + share) * size + at
            p_sum += tl.load(p + here, mask=inside[None, :], other=0.0)
            if ADD:
                dwo_sum += tl.load(dwo + here, mask=inside[None, :], other=0.0)
        q_sum = tl.zeros((CHUNK,), tl.float32)
        for share in tl.range(0, q_shares):
            q_sum += tl.load(q + (lane * q_shares + share) * neurons + neuron)
        turned = lane * size + neuron[:, None] + channel[None, :] * neurons
        w = tl.load(w_in + turned, mask=inside[None, :], other=0.0)
        dscale += tl.sum(w * p_sum, 0)
        dshift += tl.sum(w * q_sum[:, None], 0)
        tl.store(to_w_in + turned, s * p_sum + b * q_sum[:, None], mask=inside[None, :])
        if tl.program_id(1) == 0:
            tl.store(to_b_in + lane * neurons + neuron, q_sum)
        if ADD:
            tl.store(to_w_out + lane * size + at, dwo_sum, mask=inside[None, :])
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


# --- narrow nets: the weights stay on the chip ------------------------------------------------------------------------


@triton.jit
def _standardised(x, row, channel, rows, width: tl.constexpr, eps):
    """xhat, with 1 in the two channels after the last (0 in rows beyond the last), and 1 / std."""
    centred = _centred(x, tl.sum(x, 1) / width, channel, width)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    one = ((channel >= width) & (channel < width + 2))[None, :] & (row < rows)[:, None]
    return tl.where(one, 1.0, centred * rstd[:, None]), rstd


@triton.jit
def _forward_resident(
    x,
    folded,
    rounded,
    b_out,
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
    last_bias = tl.load(b_out + lane * width + channel, mask=channel < width, other=0.0).to(tl.float32)
    counts = tl.zeros((ROWS, CHUNK), tl.int32)  # 8 bits a chunk: added up over the rows only once, at the end
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        xhat, _ = _standardised(_read(x, row, channel, rows, width), row, channel, rows, width, eps)
        xhat = xhat.to(folded.dtype.element_ty)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        added: tl.tuple = ()
        for chunk in tl.static_range(neurons // CHUNK):
            pre = tl.dot(xhat, ins[chunk], input_precision="ieee")
            active = tl.maximum(pre, 0.0)
            if FIRED:
                counts += tl.where(pre >= 0, 1 << (8 * chunk), 0)
            if ACTIVITY:
                added += (sums[chunk] + tl.sum(active, 0),)
            total = tl.dot(active.to(folded.dtype.element_ty), outs[chunk], total, input_precision="ieee")
        if ACTIVITY:
            sums = added
        _write(y, _again(x, row, channel, rows, width) + total + last_bias[None, :], row, channel, rows, width)
    # in a row beyond the last every pre-activation is 0
    beyond = tl.minimum(tl.maximum((share + 1) * STEPS * ROWS - rows, 0), STEPS * ROWS)
    for chunk in tl.static_range(neurons // CHUNK):
        if FIRED:
            tl.store(fired + place + chunk * CHUNK + unit, tl.sum((counts >> (8 * chunk)) & 255, 0) - beyond)
        if ACTIVITY:
            tl.store(activity + place + chunk * CHUNK + unit, sums[chunk])


@triton.jit
def _backward_resident(
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
    """dx, and for `_weights_resident` xhat and grad in the products' dtype, [N, WIDTH]."""
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
            dpre = tl.where(pre > 0, dactive, 0.0).to(folded.dtype.element_ty)
            dxhat = tl.dot(dpre, tl.trans(ins[chunk]), dxhat, input_precision="ieee")
        dxhat = tl.where((channel < width)[None, :], dxhat, 0.0)
        mean = tl.sum(dxhat, 1) / width
        along = tl.sum(dxhat * xhat, 1) / width
        to_x = (dxhat - mean[:, None] - xhat * along[:, None]) * rstd[:, None]
        _write(dx, _again(grad, row, channel, rows, width) + to_x, row, channel, rows, width)
    tl.store(dbo + place * width + channel, dbo_sum, mask=channel < width)


@triton.jit
def _weights_resident(
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
        active = tl.maximum(pre, 0.0).to(h.dtype)
        dpre = tl.where(pre > 0, dactive, 0.0).to(h.dtype)
        dwo_sum = tl.dot(active, g, dwo_sum, input_precision="ieee")
        p_sum = tl.dot(dpre, h, p_sum, input_precision="ieee")
    at, inside = place * width * neurons + _at(neuron, channel, width), (channel < width)[None, :]
    tl.store(p + at, p_sum, mask=inside)
    tl.store(dwo + at, dwo_sum, mask=inside)
    tl.store(q + place * neurons + neuron, tl.sum(tl.where((channel == width)[None, :], p_sum, 0.0), 1))


# --- wide nets: the weights stream past a block of rows ---------------------------------------------------------------


@triton.jit
def _forward_streamed(
    x,
    folded,
    bias,
    rounded,
    b_out,
    y,
    fired,
    activity,
    rows,
    eps,
    width: tl.constexpr,
    neurons: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FIRED: tl.constexpr,
    ACTIVITY: tl.constexpr,
):
    block, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = (lane * tl.num_programs(0) + block) * neurons
    x += lane * rows * width
    y += lane * rows * width
    folded += lane * width * neurons
    rounded += lane * width * neurons
    row = block * ROWS + tl.arange(0, ROWS)
    channel, unit = tl.arange(0, FIRST), tl.arange(0, CHUNK)
    x0 = _read(x, row, channel, rows, width)
    mean = tl.sum(x0, 1)
    if REST:
        more = FIRST + tl.arange(0, REST)
        x1 = _read(x, row, more, rows, width)
        mean += tl.sum(x1, 1)
    mean /= width
    x0 = _centred(x0, mean, channel, width)
    square = tl.sum(x0 * x0, 1)
    if REST:
        x1 = _centred(x1, mean, more, width)
        square += tl.sum(x1 * x1, 1)
    rstd = tl.rsqrt(square / width + eps)[:, None]
    h0 = (x0 * rstd).to(folded.dtype.element_ty)
    total0 = tl.zeros((ROWS, FIRST), tl.float32)
    if REST:
        h1 = (x1 * rstd).to(folded.dtype.element_ty)
        total1 = tl.zeros((ROWS, REST), tl.float32)
    for start in tl.range(0, neurons, CHUNK, num_stages=STAGES):
        neuron = start + unit
        in0 = tl.load(folded + _at(channel, neuron, neurons))
        out0 = tl.load(rounded + _at(neuron, channel, width))
        pre = tl.dot(h0, in0, input_precision="ieee")
        if REST:
            in1 = tl.load(folded + _at(more, neuron, neurons), mask=(more < width)[:, None], other=0.0)
            out1 = tl.load(rounded + _at(neuron, more, width), mask=(more < width)[None, :], other=0.0)
            pre = tl.dot(h1, in1, pre, input_precision="ieee")
        pre += tl.load(bias + lane * neurons + neuron)[None, :]
        active = tl.maximum(pre, 0.0)
        if FIRED:
            tl.store(fired + place + neuron, tl.sum(((pre >= 0) & (row < rows)[:, None]).to(tl.int32), 0))
        if ACTIVITY:
            tl.store(activity + place + neuron, tl.sum(tl.where((row < rows)[:, None], active, 0.0), 0))
        active = active.to(folded.dtype.element_ty)
        total0 = tl.dot(active, out0, total0, input_precision="ieee")
        if REST:
            total1 = tl.dot(active, out1, total1, input_precision="ieee")
    total0 += tl.load(b_out + lane * width + channel).to(tl.float32)[None, :]
    _write(y, _read(x, row, channel, rows, width) + total0, row, channel, rows, width)
    if REST:
        total1 += tl.load(b_out + lane * width + more, mask=more < width, other=0.0).to(tl.float32)[None, :]
        _write(y, _read(x, row, more, rows, width) + total1, row, more, rows, width)


@triton.jit
def _backward_streamed(
    grad,
    x,
    folded,
    bias,
    rounded,
    dx,
    standard,
    slope,
    hidden,
    to_hidden,
    q,
    dbo,
    rows,
    eps,
    width: tl.constexpr,
    neurons: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and what the weights' gradients are products of, in their dtype: xhat, grad, ReLU's result and dpre."""
    block, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = lane * tl.num_programs(0) + block
    x += lane * rows * width
    grad += lane * rows * width
    dx += lane * rows * width
    standard += lane * rows * width
    slope += lane * rows * width
    hidden += lane * rows * neurons
    to_hidden += lane * rows * neurons
    folded += lane * width * neurons
    rounded += lane * width * neurons
    row = block * ROWS + tl.arange(0, ROWS)
    channel, unit = tl.arange(0, FIRST), tl.arange(0, CHUNK)
    x0 = _read(x, row, channel, rows, width)
    mean = tl.sum(x0, 1)
    if REST:
        more = FIRST + tl.arange(0, REST)
        x1 = _read(x, row, more, rows, width)
        mean += tl.sum(x1, 1)
    mean /= width
    x0 = _centred(x0, mean, channel, width)
    square = tl.sum(x0 * x0, 1)
    if REST:
        x1 = _centred(x1, mean, more, width)
        square += tl.sum(x1 * x1, 1)
    rstd = tl.rsqrt(square / width + eps)[:, None]
    g = _read(grad, row, channel, rows, width)
    tl.store(dbo + place * width + channel, tl.sum(g, 0))
    _write(standard, x0 * rstd, row, channel, rows, width)
    _write(slope, g, row, channel, rows, width)
    dh0 = tl.zeros((ROWS, FIRST), tl.float32)
    if REST:
        g = _read(grad, row, more, rows, width)
        tl.store(dbo + place * width + more, tl.sum(g, 0), mask=more < width)
        _write(standard, x1 * rstd, row, more, rows, width)
        _write(slope, g, row, more, rows, width)
        dh1 = tl.zeros((ROWS, REST), tl.float32)
    # read back, now that all threads have written: what is loaded goes to shared memory, what is computed would take up
    # registers
    tl.debug_barrier()
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    h0 = tl.load(standard + _at(row, channel, width), mask=inside, other=0.0)
    g0 = tl.load(slope + _at(row, channel, width), mask=inside, other=0.0)
    if REST:
        inside = (row < rows)[:, None] & (more < width)[None, :]
        h1 = tl.load(standard + _at(row, more, width), mask=inside, other=0.0)
        g1 = tl.load(slope + _at(row, more, width), mask=inside, other=0.0)
    for start in tl.range(0, neurons, CHUNK, num_stages=STAGES):
        neuron = start + unit
        in0 = tl.load(folded + _at(channel, neuron, neurons))
        out0 = tl.load(rounded + _at(neuron, channel, width))
        pre = tl.dot(h0, in0, input_precision="ieee")
        dactive = tl.dot(g0, tl.trans(out0), input_precision="ieee")
        if REST:
            in1 = tl.load(folded + _at(more, neuron, neurons), mask=(more < width)[:, None], other=0.0)
            out1 = tl.load(rounded + _at(neuron, more, width), mask=(more < width)[None, :], other=0.0)
            pre = tl.dot(h1, in1, pre, input_precision="ieee")
            dactive = tl.dot(g1, tl.trans(out1), dactive, input_precision="ieee")
        pre += tl.load(bias + lane * neurons + neuron)[None, :]
        dpre = tl.where(pre > 0, dactive, 0.0)
        tl.store(q + place * neurons + neuron, tl.sum(dpre, 0))
        dpre = dpre.to(folded.dtype.element_ty)
        _write(hidden, tl.maximum(pre, 0.0), row, neuron, rows, neurons)
        _write(to_hidden, dpre, row, neuron, rows, neurons)
        dh0 = tl.dot(dpre, tl.trans(in0), dh0, input_precision="ieee")
        if REST:
            dh1 = tl.dot(dpre, tl.trans(in1), dh1, input_precision="ieee")
    x0 = _centred(_read(x, row, channel, rows, width), mean, channel, width) * rstd
    mean_slope, along = tl.sum(dh0, 1), tl.sum(dh0 * x0, 1)
    if REST:
        x1 = _centred(_read(x, row, more, rows, width), mean, more, width) * rstd
        mean_slope += tl.sum(dh1, 1)
        along += tl.sum(dh1 * x1, 1)
    mean_slope, along = (mean_slope / width)[:, None], (along / width)[:, None]
    dh0 = (dh0 - mean_slope - x0 * along) * rstd
    _write(dx, _read(grad, row, channel, rows, width) + dh0, row, channel, rows, width)
    if REST:
        dh1 = (dh1 - mean_slope - x1 * along) * rstd
        _write(dx, _read(grad, row, more, rows, width) + dh1, row, more, rows, width)


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
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mlp.mlp_forward`; `products` is the dtype of what is multiplied."""
    x, scale, shift, w_in, b_in, w_out, b_out = (
        tensor.contiguous() for tensor in (x, scale, shift, w_in, b_in, w_out, b_out)
    )
    lanes, width, neurons = w_in.shape
    rows = len(x) // lanes
    narrow, blocks = resident(width, neurons), blocks or forward_blocks(width, neurons)
    shares, steps = _shares(rows, blocks) if narrow else (triton.cdiv(rows, blocks.rows), 1)
    y = torch.empty_like(x)
    counts = x.new_empty(lanes, shares, neurons if fired else 0, dtype=torch.int32)
    sums = x.new_empty(lanes, shares, neurons if activity else 0)
    folded, bias, rounded = _folded(scale, shift, w_in, b_in, w_out, products)
    common = (rounded, b_out, y, counts, sums, rows, eps, width, neurons)
    seen = {"FIRED": fired, "ACTIVITY": activity}
    if narrow:
        _forward_resident[(lanes, shares)](x, folded, *common, _padded(width), steps, **_cut(blocks), **seen)
    else:
        _forward_streamed[(shares, lanes)](x, folded, bias, *common, *tiles(width), **_cut(blocks), **seen)
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
    blocks: Blocks | None = None,
    weights: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `mlp.mlp_backward`."""
    grad, x, scale, shift, w_in, b_in, w_out = (
        tensor.contiguous() for tensor in (grad, x, scale, shift, w_in, b_in, w_out)
    )
    lanes, width, neurons = w_in.shape
    rows = len(x) // lanes
    narrow, blocks = resident(width, neurons), blocks or backward_blocks(width, neurons)
    shares, steps = _shares(rows, blocks) if narrow else (triton.cdiv(rows, blocks.rows), 1)
    folded, bias, rounded = _folded(scale, shift, w_in, b_in, w_out, products)
    dx, dbo = torch.empty_like(x), x.new_empty(lanes, shares, width)
    wide = _padded(width) if narrow else width
    standard, slope = x.new_empty(2, lanes, rows, wide, dtype=products).unbind(0)
    if narrow:
        _backward_resident[(lanes, shares)](
            grad, x, folded, rounded, dx, standard, slope, dbo, rows, eps, width, neurons, wide, steps, **_cut(blocks)
        )
        blocks = weights or weights_blocks(width)
        shares, steps = _shares(rows, blocks)
        q, p, dwo = _empty(
            x, (lanes, shares, neurons), (lanes, shares, neurons, width), (lanes, shares, neurons, width)
        )
        _weights_resident[(neurons // blocks.chunk, shares, lanes)](
            standard, slope, folded, rounded, p, q, dwo, rows, width, neurons, wide, steps, **_cut(blocks)
        )
    else:
        hidden, to_hidden = x.new_empty(2, lanes, rows, neurons, dtype=products).unbind(0)
        q = x.new_empty(lanes, shares, neurons)
        _backward_streamed[(shares, lanes)](
            grad, x, folded, bias, rounded, dx, standard, slope, hidden, to_hidden, q, dbo, rows, eps, width, neurons,
            *tiles(width), **_cut(blocks),
        )  # fmt: skip
        p, dwo = _product(to_hidden, standard).unsqueeze(1), _product(hidden, slope)
    to_scale, to_shift, to_w_in, to_b_in, to_b_out = _empty(
        x, scale.shape, shift.shape, w_in.shape, b_in.shape, scale.shape
    )
    to_w_out = torch.empty_like(w_out) if narrow else dwo
    slopes = (to_scale, to_shift, to_w_in, to_b_in, to_w_out, to_b_out)
    _finish[(lanes, triton.cdiv(width, CHANNELS))](
        scale, shift, w_in, p, q, dwo, dbo, *slopes, p.shape[1], q.shape[1], dbo.shape[1], width, neurons,
        CHANNELS=CHANNELS, CHUNK=64, ADD=narrow,
    )  # fmt: skip
    return dx, *slopes


def _folded(
    scale: Tensor, shift: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_fold` makes."""
    lanes, width, neurons = w_in.shape
    wide = _padded(width) if resident(width, neurons) else width
    folded, rounded = w_in.new_empty(2, lanes, wide * neurons, dtype=products).unbind(0)
    bias, chunk = torch.empty_like(b_in), 32
    _fold[(lanes, neurons // chunk)](
        scale,
        shift,
        w_in,
        b_in,
        w_out,
        folded,
        bias,
        rounded,
        width,
        neurons,
        wide,
        triton.next_power_of_2(wide),
        chunk,
    )
    return folded, bias, rounded


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T @ right of every lane in float32."""
    turned = left.transpose(-1, -2)
    return torch.bmm(turned, right, out_dtype=torch.float32) if left.is_cuda else (turned @ right).float()


def _added_up(parts: Tensor, factor: float) -> Tensor:
    lanes, shares, size = parts.shape
    out = parts.new_empty(lanes, size)
    if size:
        _add_up[(lanes, triton.cdiv(size, 128))](parts, out, shares, size, factor, BLOCK=128)
    return out


def _shares(rows: int, blocks: Blocks) -> tuple[int, int]:
    """Into how many shares a lane's rows go, whatever the number of lanes is, and the blocks of rows in each."""
    done = triton.cdiv(rows, blocks.rows)
    steps = triton.cdiv(done, max(blocks.shares, triton.cdiv(done, COUNTED)))
    return triton.cdiv(done, steps), steps


def _cut(blocks: Blocks) -> dict[str, int]:
    return {"CHUNK": blocks.chunk, "ROWS": blocks.rows, "STAGES": blocks.stages, "num_warps": blocks.warps}


def _empty(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape) for shape in shapes)


def _padded(width: int) -> int:
    """Channels of a narrow row's tile: at least two to spare."""
    return max(LEAST, triton.next_power_of_2(width + 2))
