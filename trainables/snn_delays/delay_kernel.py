# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005
# Triton's tuples grow by +, not by unpacking, and are typed where they are compiled
"""The depthwise convolution over frequency and time as GPU kernels that walk through time, written in Triton.

What there is to do is small, k * K multiply-adds a value. A thread owns one channel at RUN neighbouring positions of
one sample, holds that channel's k * K taps in registers, and walks through time: each step reads RUN + k - 1 values
(coalesced: channels stand innermost), one step ahead, and adds them to the K pending outputs, which stand in registers
too. So a value is read (RUN + k - 1) / RUN times in all and written once. Sums are kept in the kernels' dtype.

Products with banded (Toeplitz) matrices would run on tensor cores, but multiply several times as often (zeros beside
the band and at the tiles' rims), and move more: the values unfolded over frequency are k times the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch
from trainables.snn_delays.delay_ops import bias_gradient, no_bias

MOST_HELD = 200
"""Values that a thread may hold: with the addresses, what 255 registers hold without spilling."""
SIX_FIT, HELD_BY_SIX = 168, 156
"""Registers of a thread with which a multiprocessor holds six instances, and values that they hold without spilling."""
BLOCK = 64
"""Threads, two warps: 640 threads a sample make many small instances, which fill 132 multiprocessors evenly."""


@triton.jit
def _inside(first, offset, POSITIONS: tl.constexpr):
    """Whether a position stands in the sample, for threads that have positions of their own."""
    return (first < POSITIONS) & (first + offset >= 0) & (first + offset < POSITIONS)


@triton.jit
def _walk(
    x, kernels, bias, y, samples,
    STEPS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    RUN: tl.constexpr, BIASED: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum of w[j, K - 1 - lag] x[t - lag, n + j - k // 2], BIASED with bias[min(t, K - 1), n] more; with BACK
    its transpose, backwards."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, first = place % CHANNELS, place // CHANNELS * RUN
    LEFT: tl.constexpr = SIZE - 1 - SIZE // 2 if BACK else SIZE // 2
    STRIDE: tl.constexpr = -POSITIONS * CHANNELS if BACK else POSITIONS * CHANNELS
    at = image * STEPS * POSITIONS * CHANNELS + first * CHANNELS + channel
    if BACK:
        at += (STEPS - 1) * POSITIONS * CHANNELS
    taps = kernels + (image // samples) * SIZE * TAPS * CHANNELS + channel
    zero = tl.zeros((BLOCK,), kernels.dtype.element_ty)
    w = ()
    for _ in tl.static_range(SIZE * TAPS):
        w = w + (zero,)
    for column in range(SIZE):  # not unrolled here: Triton compiles for each load and store as long as the kernel is
        read = ()
        for i in tl.static_range((SIZE - 1) * TAPS):
            read = read + (w[i + TAPS],)
        for lag in tl.static_range(TAPS):
            row = (SIZE - 1 - column if BACK else column) * TAPS + TAPS - 1 - lag
            read = read + (tl.load(taps + row * CHANNELS),)
        w = read
    pending = ()
    for _ in tl.static_range(TAPS * RUN):
        pending = pending + (zero,)
    if BIASED:
        row_of_bias = bias + ((image // samples) * TAPS * POSITIONS + first) * CHANNELS + channel
        for _step in range(TAPS):
            begun = ()
            for i in tl.static_range((TAPS - 1) * RUN):
                begun = begun + (pending[i + RUN],)
            for r in tl.static_range(RUN):
                begun = begun + (tl.load(row_of_bias + r * CHANNELS, mask=first + r < POSITIONS, other=0.0),)
            pending = begun
            row_of_bias += POSITIONS * CHANNELS
    start = ()  # of the outputs further ahead
    for r in tl.static_range(RUN):
        start = start + (pending[(TAPS - 1) * RUN + r],)
    ahead = ()
    for p in tl.static_range(RUN + SIZE - 1):
        ahead = ahead + (tl.load(x + at + (p - LEFT) * CHANNELS, mask=_inside(first, p - LEFT, POSITIONS), other=0.0),)
    for t in range(STEPS):
        seen = ()
        for p in tl.static_range(RUN + SIZE - 1):
            seen = seen + (ahead[p].to(zero.dtype),)
        ahead = ()  # the next step's values are on their way while this one's are multiplied
        for p in tl.static_range(RUN + SIZE - 1):
            inside = _inside(first, p - LEFT, POSITIONS) & (t + 1 < STEPS)
            ahead = ahead + (tl.load(x + at + STRIDE + (p - LEFT) * CHANNELS, mask=inside, other=0.0),)
        moved = ()
        for lag in tl.static_range(TAPS):
            for r in tl.static_range(RUN):
                total = pending[lag * RUN + r]
                for j in tl.static_range(SIZE):
                    total = total + w[j * TAPS + lag] * seen[r + j]
                if lag == 0:
                    tl.store(y + at + r * CHANNELS, total, mask=first + r < POSITIONS)
                else:
                    moved = moved + (total,)
        for r in tl.static_range(RUN):
            moved = moved + (start[r],)
        pending = moved
        at += STRIDE


@triton.jit
def _correlate(
    grad, x, out,
    STEPS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Each thread's part of dw[j, K - 1 - lag] = sum of grad[t, n] x[t - lag, n + j - k // 2], AT_ONCE steps in one."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, first = place % CHANNELS, place // CHANNELS * RUN
    LEFT: tl.constexpr = SIZE // 2
    ROW: tl.constexpr = POSITIONS * CHANNELS
    SPAN: tl.constexpr = RUN + SIZE - 1
    LAGS: tl.constexpr = TAPS + AT_ONCE - 1
    zero = tl.zeros((BLOCK,), out.dtype.element_ty)
    at = image * STEPS * ROW + first * CHANNELS + channel
    sums = ()
    for _ in tl.static_range(SIZE * TAPS):
        sums = sums + (zero,)
    window = ()  # grad at these steps and the TAPS - 1 steps after them
    for _ in tl.static_range(LAGS * RUN):
        window = window + (zero,)
    for later in range(LAGS):  # not unrolled here, as in `_walk`
        kept = ()
        for i in tl.static_range((LAGS - 1) * RUN):
            kept = kept + (window[i + RUN],)
        for r in tl.static_range(RUN):
            inside = (first + r < POSITIONS) & (later < STEPS)
            kept = kept + (tl.load(grad + at + later * ROW + r * CHANNELS, mask=inside, other=0.0).to(zero.dtype),)
        window = kept
    ahead = ()
    for s in tl.static_range(AT_ONCE):
        for p in tl.static_range(SPAN):
            inside = _inside(first, p - LEFT, POSITIONS) & (s < STEPS)
            ahead = ahead + (tl.load(x + at + s * ROW + (p - LEFT) * CHANNELS, mask=inside, other=0.0),)
    for t in range(0, STEPS, AT_ONCE):
        seen = ()
        for i in tl.static_range(AT_ONCE * SPAN):
            seen = seen + (ahead[i].to(zero.dtype),)
        ahead = ()  # the next steps' values are on their way while these are multiplied
        for s in tl.static_range(AT_ONCE):
            for p in tl.static_range(SPAN):
                inside = _inside(first, p - LEFT, POSITIONS) & (t + AT_ONCE + s < STEPS)
                value = tl.load(x + at + (AT_ONCE + s) * ROW + (p - LEFT) * CHANNELS, mask=inside, other=0.0)
                ahead = ahead + (value,)
        last = ()
        for s in tl.static_range(AT_ONCE):
            for r in tl.static_range(RUN):
                inside = (first + r < POSITIONS) & (t + LAGS + s < STEPS)
                last = last + (tl.load(grad + at + (LAGS + s) * ROW + r * CHANNELS, mask=inside, other=0.0),)
        for s in tl.static_range(AT_ONCE):
            added = ()
            for j in tl.static_range(SIZE):
                for lag in tl.static_range(TAPS):
                    total = sums[j * TAPS + lag]
                    for r in tl.static_range(RUN):
                        total = total + window[(s + lag) * RUN + r] * seen[s * SPAN + r + j]
                    added = added + (total,)
            sums = added
        kept = ()
        for i in tl.static_range((TAPS - 1) * RUN):
            kept = kept + (window[i + AT_ONCE * RUN],)
        for i in tl.static_range(AT_ONCE * RUN):
            kept = kept + (last[i].to(zero.dtype),)
        window = kept
        at += AT_ONCE * ROW
    part = out + image * SIZE * TAPS * WIDTH + place
    for j in tl.static_range(SIZE):
        for lag in tl.static_range(TAPS):
            tl.store(part + (j * TAPS + TAPS - 1 - lag) * WIDTH, sums[j * TAPS + lag], mask=place < WIDTH)


def forward(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """As `delay_ops.delay_forward`."""
    return _walked(x, kernels, bias, back=False)


def backward(grad: Tensor, x: Tensor, kernels: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `delay_ops.delay_backward`."""
    grad, x = contiguous(grad, x)
    none = no_bias(x, kernels)
    to_bias = bias_gradient(grad, kernels) if biased else none
    return _walked(grad, kernels, none, back=True), _correlated(grad, x, kernels), to_bias


def _walked(x: Tensor, kernels: Tensor, bias: Tensor, back: bool) -> Tensor:
    x, kernels, bias = contiguous(x, kernels, bias)
    y = torch.empty_like(x)
    groups, samples, steps, positions, channels = x.shape
    size, taps = kernels.shape[1:3]
    run = _run(positions, size, taps, (10, 5, 4))
    grid = (groups * samples, triton.cdiv(triton.cdiv(positions, run) * channels, BLOCK))
    launch(_walk, grid)(
        x, kernels, bias, y, samples, steps, positions, channels, size, taps, run, bias.numel() > 0, back, BLOCK,
        num_warps=BLOCK // 32, maxnreg=SIX_FIT if _held(size, taps, run) <= HELD_BY_SIX else None,
    )  # fmt: skip
    return y


def _correlated(grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
    groups, samples, steps, positions, channels = x.shape
    size, taps = kernels.shape[1:3]
    run = _run(positions, size, taps, (5, 4))
    at_once = 2 if _held(size, taps, run, at_once=2) <= MOST_HELD else 1
    width = triton.cdiv(positions, run) * channels
    parts = kernels.new_empty((groups, samples, size, taps, width))
    launch(_correlate, (groups * samples, triton.cdiv(width, BLOCK)))(
        grad, x, parts, steps, positions, channels, size, taps, run, BLOCK, width, at_once, num_warps=BLOCK // 32
    )
    return parts.unflatten(-1, (-1, channels)).sum((1, 4))


def _run(positions: int, size: int, taps: int, among: tuple[int, ...]) -> int:
    """Positions of a thread: of `among` whichever leaves fewest over; 2 where so many would not fit its registers."""
    fitting = [run for run in among if _held(size, taps, run) <= MOST_HELD]
    return min(fitting, key=lambda run: -positions % run, default=2)


def _held(size: int, taps: int, run: int, at_once: int = 1) -> int:
    """Values that a thread holds: taps or their sums, pending outputs or gradients, these steps and the next."""
    return size * taps + run * (taps + at_once - 1) + 2 * at_once * (run + size)
