"""LIF neurons over the whole time axis in one GPU kernel, forward and backward, written in Triton.

One program instance holds BLOCK neurons of one group and walks through time with their membranes in registers: every
value is read once and written once, which is all there is to do. Four steps are loaded at a time, since no load
depends on the recurrence: the loads' latencies overlap. Triton comes with PyTorch's CUDA wheels; this module is
imported only where a GPU asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainables.operators import contiguous, launch

BLOCK = 128


@triton.jit
def _addresses(neurons, steps: tl.constexpr, places: tl.constexpr, BLOCK: tl.constexpr):
    """Where step 0 of this instance's neurons stands in [G, R, T, P], at which place each is, and which are neurons."""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, place = neuron // places, neuron % places
    group = tl.program_id(1).to(tl.int64)
    return group * neurons * steps + row * steps * places + place, place, neuron < neurons


@triton.jit
def _forward(
    x, scale, shift, keep, spikes, over, neurons,
    steps: tl.constexpr, places: tl.constexpr, channels: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, place, real = _addresses(neurons, steps, places, BLOCK)
    channel = tl.program_id(1) * channels + place % channels
    a, b, k = tl.load(scale + channel), tl.load(shift + channel), tl.load(keep + tl.program_id(1))
    v = tl.zeros((BLOCK,), scale.dtype.element_ty)
    for t in range(0, steps, 4):
        in1, in2, in3 = real & (t + 1 < steps), real & (t + 2 < steps), real & (t + 3 < steps)
        x0 = tl.load(x + at, mask=real, other=0.0)
        x1 = tl.load(x + at + places, mask=in1, other=0.0)
        x2 = tl.load(x + at + 2 * places, mask=in2, other=0.0)
        x3 = tl.load(x + at + 3 * places, mask=in3, other=0.0)
        h0 = k * v + (a * x0.to(v.dtype) + b)
        v = tl.where(h0 >= 1.0, 0.0, h0)
        h1 = k * v + (a * x1.to(v.dtype) + b)
        v = tl.where(h1 >= 1.0, 0.0, h1)
        h2 = k * v + (a * x2.to(v.dtype) + b)
        v = tl.where(h2 >= 1.0, 0.0, h2)
        h3 = k * v + (a * x3.to(v.dtype) + b)
        v = tl.where(h3 >= 1.0, 0.0, h3)
        tl.store(over + at, h0 - 1.0, mask=real)
        tl.store(over + at + places, h1 - 1.0, mask=in1)
        tl.store(over + at + 2 * places, h2 - 1.0, mask=in2)
        tl.store(over + at + 3 * places, h3 - 1.0, mask=in3)
        tl.store(spikes + at, tl.where(h0 >= 1.0, 1.0, 0.0), mask=real)
        tl.store(spikes + at + places, tl.where(h1 >= 1.0, 1.0, 0.0), mask=in1)
        tl.store(spikes + at + 2 * places, tl.where(h2 >= 1.0, 1.0, 0.0), mask=in2)
        tl.store(spikes + at + 3 * places, tl.where(h3 >= 1.0, 1.0, 0.0), mask=in3)
        at += 4 * places


@triton.jit
def _slope(grad, over, a):
    """grad * ds/dh of the ATan surrogate."""
    bent = 1.5707963267948966 * a * over  # pi / 2; as a global constant Triton would name kernels by who calls first
    return grad * (a / 2) / (1.0 + bent * bent)


@triton.jit
def _earlier(grad, over, x, scale, k, a, later, timed, plain, kept):
    """One step of the walk backwards: dx and the current's gradient, and the sums with this step's terms."""
    spiked = over >= 0.0
    kept += later * tl.where(spiked, 0.0, over + 1.0)
    later = _slope(grad, over, a) + tl.where(spiked, 0.0, k) * later
    return scale * later, later, timed + later * x, plain + later, kept


@triton.jit
def _backward(
    grad, over, x, scale, keep, alpha, out, sums, neurons,
    steps: tl.constexpr, places: tl.constexpr, channels: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums`: of each neuron over time, [3, G, neurons]."""
    at, place, real = _addresses(neurons, steps, places, BLOCK)
    k, a = tl.load(keep + tl.program_id(1)), tl.load(alpha + tl.program_id(1))
    c = tl.load(scale + tl.program_id(1) * channels + place % channels)
    later = tl.zeros((BLOCK,), keep.dtype.element_ty)
    timed = tl.zeros((BLOCK,), keep.dtype.element_ty)
    plain = tl.zeros((BLOCK,), keep.dtype.element_ty)
    kept = tl.zeros((BLOCK,), keep.dtype.element_ty)
    at += (steps - 1) * places  # from the last step backwards
    for t in range(0, steps, 4):
        in1, in2, in3 = real & (t + 1 < steps), real & (t + 2 < steps), real & (t + 3 < steps)
        d0 = tl.load(grad + at, mask=real, other=0.0).to(later.dtype)
        d1 = tl.load(grad + at - places, mask=in1, other=0.0).to(later.dtype)
        d2 = tl.load(grad + at - 2 * places, mask=in2, other=0.0).to(later.dtype)
        d3 = tl.load(grad + at - 3 * places, mask=in3, other=0.0).to(later.dtype)
        o0 = tl.load(over + at, mask=real, other=0.0).to(later.dtype)
        o1 = tl.load(over + at - places, mask=in1, other=0.0).to(later.dtype)
        o2 = tl.load(over + at - 2 * places, mask=in2, other=0.0).to(later.dtype)
        o3 = tl.load(over + at - 3 * places, mask=in3, other=0.0).to(later.dtype)
        x0 = tl.load(x + at, mask=real, other=0.0).to(later.dtype)
        x1 = tl.load(x + at - places, mask=in1, other=0.0).to(later.dtype)
        x2 = tl.load(x + at - 2 * places, mask=in2, other=0.0).to(later.dtype)
        x3 = tl.load(x + at - 3 * places, mask=in3, other=0.0).to(later.dtype)
        # before the first step there is none: what is read there is 0, over as if it spiked, so that nothing is added
        g0, later, timed, plain, kept = _earlier(d0, o0, x0, c, k, a, later, timed, plain, kept)
        g1, later, timed, plain, kept = _earlier(d1, o1, x1, c, k, a, later, timed, plain, kept)
        g2, later, timed, plain, kept = _earlier(d2, o2, x2, c, k, a, later, timed, plain, kept)
        g3, later, timed, plain, kept = _earlier(d3, o3, x3, c, k, a, later, timed, plain, kept)
        tl.store(out + at, g0, mask=real)
        tl.store(out + at - places, g1, mask=in1)
        tl.store(out + at - 2 * places, g2, mask=in2)
        tl.store(out + at - 3 * places, g3, mask=in3)
        at -= 4 * places
    every = tl.num_programs(1).to(tl.int64) * neurons
    mine = sums + tl.program_id(1).to(tl.int64) * neurons + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(mine, timed, mask=real)
    tl.store(mine + every, plain, mask=real)
    tl.store(mine + 2 * every, kept, mask=real)


def forward(x: Tensor, scale: Tensor, shift: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """As `neurons.lif_forward`: spikes and h - 1, [G, R, T, P]."""
    x, scale, shift, keep = contiguous(x, scale, shift, keep)
    spikes, over = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        groups, rows, steps, places = x.shape
        neurons = rows * places
        grid = (triton.cdiv(neurons, BLOCK), groups)
        launch(_forward, grid)(
            x, scale, shift, keep, spikes, over, neurons, steps, places, scale.shape[1], BLOCK=BLOCK
        )  # fmt: skip
    return spikes, over


def backward(
    grad: Tensor, over: Tensor, x: Tensor, scale: Tensor, keep: Tensor, alpha: Tensor, learn_keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `neurons.lif_backward`."""
    grad, over, x, scale, keep, alpha = contiguous(grad, over, x, scale, keep, alpha)
    groups, rows, steps, places = over.shape
    out, sums = torch.empty_like(over), scale.new_empty((3, groups, rows * places))
    if over.numel():
        neurons, channels = rows * places, scale.shape[1]
        grid = (triton.cdiv(neurons, BLOCK), groups)
        launch(_backward, grid)(
            grad, over, x, scale, keep, alpha, out, sums, neurons, steps, places, channels, BLOCK=BLOCK
        )
    by_channel = (part.unflatten(-1, (-1, scale.shape[1])).sum(1) for part in sums[:2])
    # kept in any case: beside what is read, its arithmetic is nothing
    return out, *by_channel, sums[2].sum(1) if learn_keep else keep.new_empty((groups, 0))
