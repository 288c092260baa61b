"""What the kernels share that multiply rows by weights right after a LayerNorm, written in Triton.

LayerNorm's scale and shift are folded into the product's weights and bias, once a lane (`fold`):

    pre = (xhat * scale + shift) @ w + b = xhat @ (scale * w) + (shift @ w + b),    xhat = (x - mean) / std

so that a row is only standardised, and the gradients of scale and shift follow from sums that the weights' gradients
need anyhow (`finish`): with p = xhat^T dpre and q = sum of dpre over the rows,

    dw = scale * p + shift q,  db = q,  dscale = sum over columns of w * p,  dshift = w q.

A program instance keeps a lane's weights on the chip while it goes through its share of the lane's rows. Shares are the
same however many lanes there are, and sums over shares are taken in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 16  # rows, columns or depth of the smallest product that tensor cores do
CHANNELS = 16  # that one instance of `finish` does


@triton.jit
def at(row, channel, width: tl.constexpr):
    return row[:, None] * width + channel[None, :]


@triton.jit
def read(x, row, channel, rows, width: tl.constexpr):
    """Channels of rows, float32; 0 outside."""
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    return tl.load(x + at(row, channel, width), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def again(x, row, channel, rows, width: tl.constexpr):
    """As `read`, of what was read before: another hint, or the compiler would keep the first copy in registers."""
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    return tl.load(x + at(row, channel, width), mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def write(out, value, row, channel, rows, width: tl.constexpr):
    inside = (row < rows)[:, None] & (channel < width)[None, :]
    tl.store(out + at(row, channel, width), value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def standardised(x, row, channel, rows, width: tl.constexpr, eps):
    """xhat, with 1 in the two channels after the last (0 in rows beyond the last), and 1 / std."""
    centred = tl.where((channel < width)[None, :], x - (tl.sum(x, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    one = ((channel >= width) & (channel < width + 2))[None, :] & (row < rows)[:, None]
    return tl.where(one, 1.0, centred * rstd[:, None]), rstd


@triton.jit
def through_norm(slope, xhat, rstd, channel, width: tl.constexpr):
    """The gradient with respect to x from that with respect to xhat, whose further channels do not count."""
    slope = tl.where((channel < width)[None, :], slope, 0.0)
    mean, along = tl.sum(slope, 1) / width, tl.sum(slope * xhat, 1) / width
    return (slope - mean[:, None] - xhat * along[:, None]) * rstd[:, None]


@triton.jit
def fold(
    scale,
    shift,
    w,
    b,
    w_out,
    lanes,
    folded,
    rounded,
    width: tl.constexpr,
    columns: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """scale * w [WIDTH, columns] in the products' dtype, and so w_out [columns, WIDTH], if there is one.

    Rows and columns after `width` are 0, but for two rows that add up to shift @ w + b (if there is one): a row of xhat
    with 1 there gets it. `lanes` are the weights' strides from lane to lane.
    """
    lane = tl.program_id(0).to(tl.int64)
    channel, column = tl.arange(0, WIDTH), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside, exists = channel < width, column < columns
    s = tl.load(scale + lane * lanes[0] + channel, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(shift + lane * lanes[1] + channel, mask=inside, other=0.0).to(tl.float32)
    both = inside[:, None] & exists[None, :]
    value = tl.load(w + lane * lanes[2] + at(channel, column, columns), mask=both, other=0.0).to(tl.float32)
    total = tl.sum(t[:, None] * value, 0)
    if b is not None:
        total += tl.load(b + lane * lanes[3] + column, mask=exists, other=0.0).to(tl.float32)
    coarse = total.to(folded.dtype.element_ty).to(tl.float32)
    value = tl.where((channel == width)[:, None], coarse[None, :], s[:, None] * value)
    value = tl.where((channel == width + 1)[:, None], (total - coarse)[None, :], value)
    folded += lane * WIDTH * columns
    tl.store(folded + at(channel, column, columns), value.to(folded.dtype.element_ty), mask=exists[None, :])
    if w_out is not None:
        both = exists[:, None] & inside[None, :]
        value = tl.load(w_out + lane * lanes[4] + at(column, channel, width), mask=both, other=0.0)
        rounded += lane * WIDTH * columns
        tl.store(rounded + at(column, channel, WIDTH), value.to(rounded.dtype.element_ty), mask=exists[:, None])


@triton.jit
def finish(
    scale,
    shift,
    w,
    lanes,
    p,
    q,
    dwo,
    dbo,
    to_scale,
    to_shift,
    to_w,
    to_b,
    to_w_out,
    to_b_out,
    shares: tl.constexpr,
    dbo_shares: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A few channels' gradients from the shares' sums; `lanes` are the strides of scale, shift and w.

    p, dwo [G, shares, columns, width], q [G, shares, columns], dbo [G, dbo_shares, width]; the results are a lane's
    gradients after one another. dwo and dbo, or neither, are there.
    """
    lane = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    size: tl.constexpr = columns * width
    s = tl.load(scale + lane * lanes[0] + channel, mask=inside, other=0.0)[None, :]
    t = tl.load(shift + lane * lanes[1] + channel, mask=inside, other=0.0)[None, :]
    dscale = tl.zeros((CHANNELS,), tl.float32)
    dshift = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        exists = column < columns
        here, both = at(column, channel, width), exists[:, None] & inside[None, :]
        p_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        dwo_sum = tl.zeros((CHUNK, CHANNELS), tl.float32)
        q_sum = tl.zeros((CHUNK,), tl.float32)
        for share in tl.range(0, shares):
            place = lane * shares + share
            p_sum += tl.load(p + place * size + here, mask=both, other=0.0)
            q_sum += tl.load(q + place * columns + column, mask=exists, other=0.0)
            if dwo is not None:
                dwo_sum += tl.load(dwo + place * size + here, mask=both, other=0.0)
        turned = column[:, None] + channel[None, :] * columns
        value = tl.load(w + lane * lanes[2] + turned, mask=both, other=0.0)
        dscale += tl.sum(value * p_sum, 0)
        dshift += tl.sum(value * q_sum[:, None], 0)
        tl.store(to_w + lane * size + turned, s * p_sum + t * q_sum[:, None], mask=both)
        if dwo is not None:
            tl.store(to_w_out + lane * size + here, dwo_sum, mask=both)
        if tl.program_id(1) == 0:
            tl.store(to_b + lane * columns + column, q_sum, mask=exists)
    tl.store(to_scale + lane * width + channel, dscale, mask=inside)
    tl.store(to_shift + lane * width + channel, dshift, mask=inside)
    if dbo is not None:
        dbo_sum = tl.zeros((CHANNELS,), tl.float32)
        for share in tl.range(0, dbo_shares):
            dbo_sum += tl.load(dbo + (lane * dbo_shares + share) * width + channel, mask=inside, other=0.0)
        tl.store(to_b_out + lane * width + channel, dbo_sum, mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def folded(
    scale: Tensor, shift: Tensor, w: Tensor, b: Tensor | None, w_out: Tensor | None, products: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What `fold` makes, [G, padded width * columns] both; `products` is the dtype of what is multiplied."""
    lanes, width, columns = w.shape
    weights = [None if weight is None else by_lane(weight) for weight in (scale, shift, w, b, w_out)]
    wide, chunk = padded(width), 32
    out = w.new_empty(lanes, wide * columns, dtype=products)
    rounded = None if w_out is None else torch.empty_like(out)
    fold[(lanes, triton.cdiv(columns, chunk))](
        *weights, lane_strides(*weights), out, rounded, width, columns, wide, chunk
    )
    return out, rounded


def finished(
    scale: Tensor, shift: Tensor, w: Tensor, p: Tensor, q: Tensor, dwo: Tensor | None = None, dbo: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The gradients of scale, shift, w, b, and with dwo and dbo also of w_out and b_out: see `finish`."""
    scale, shift, w = by_lane(scale), by_lane(shift), by_lane(w)
    lanes, width, columns = w.shape
    slopes = [w.new_empty(shape) for shape in (scale.shape, shift.shape, w.shape, (lanes, columns))]
    last = [w.new_empty(shape) for shape in ((lanes, columns, width), (lanes, width))] if dwo is not None else []
    finish[(lanes, triton.cdiv(width, CHANNELS))](
        scale,
        shift,
        w,
        lane_strides(scale, shift, w),
        p,
        q,
        dwo,
        dbo,
        *slopes,
        *(last or (None, None)),
        p.shape[1],
        1 if dbo is None else dbo.shape[1],
        width,
        columns,
        CHANNELS=CHANNELS,
        CHUNK=64,
    )
    return *slopes, *last


def by_lane(weight: Tensor) -> Tensor:
    """A weight whose lanes are contiguous each: it comes as a block's part of all blocks' weights, and stays there."""
    return weight if weight[0].is_contiguous() else weight.contiguous()


def lane_strides(*weights: Tensor | None) -> tuple[int, ...]:
    """From one lane to the next; 0 for what is not there."""
    return tuple(0 if weight is None else weight.stride(0) for weight in weights)


def shares_of(rows: int, block: int, wanted: int) -> tuple[int, int]:
    """Into how many shares a lane's rows go, whatever the number of lanes is, and the blocks of rows in each."""
    blocks = triton.cdiv(rows, block)
    steps = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, steps), steps


def padded(width: int) -> int:
    """Channels of a row's tile: at least two to spare."""
    return max(LEAST, triton.next_power_of_2(width + 2))
