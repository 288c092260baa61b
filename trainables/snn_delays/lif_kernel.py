"""LIF neurons over the whole time axis in one GPU kernel, forward and backward, written in Triton.

One program instance holds BLOCK neurons of one group and walks through time with their membranes in registers: every
value is read once and written once, which is all there is to do. Four steps are loaded at a time, since no load
depends on the recurrence: the loads' latencies overlap. Triton comes with PyTorch's CUDA wheels; this module is
imported only where a GPU asks for it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def _addresses(neurons, steps: tl.constexpr, positions: tl.constexpr, BLOCK: tl.constexpr):
    """Where step 0 of this instance's neurons stands in [G, R, T, N], and which of its places are neurons."""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, position = neuron // positions, neuron % positions
    group = tl.program_id(1).to(tl.int64)
    return group * neurons * steps + row * steps * positions + position, neuron < neurons


@triton.jit
def _forward(x, keep, h, neurons, steps: tl.constexpr, positions: tl.constexpr, BLOCK: tl.constexpr):
    at, real = _addresses(neurons, steps, positions, BLOCK)
    k = tl.load(keep + tl.program_id(1))
    v = tl.zeros((BLOCK,), x.dtype.element_ty)
    for t in range(0, steps, 4):
        in1, in2, in3 = real & (t + 1 < steps), real & (t + 2 < steps), real & (t + 3 < steps)
        x0 = tl.load(x + at, mask=real, other=0.0)
        x1 = tl.load(x + at + positions, mask=in1, other=0.0)
        x2 = tl.load(x + at + 2 * positions, mask=in2, other=0.0)
        x3 = tl.load(x + at + 3 * positions, mask=in3, other=0.0)
        h0 = k * v + x0
        v = tl.where(h0 >= 1.0, 0.0, h0)
        h1 = k * v + x1
        v = tl.where(h1 >= 1.0, 0.0, h1)
        h2 = k * v + x2
        v = tl.where(h2 >= 1.0, 0.0, h2)
        h3 = k * v + x3
        v = tl.where(h3 >= 1.0, 0.0, h3)
        tl.store(h + at, h0, mask=real)
        tl.store(h + at + positions, h1, mask=in1)
        tl.store(h + at + 2 * positions, h2, mask=in2)
        tl.store(h + at + 3 * positions, h3, mask=in3)
        at += 4 * positions


@triton.jit
def _slope(grad, h, a):
    """grad * ds/dh of the ATan surrogate."""
    bent = HALF_PI * a * (h - 1.0)
    return grad * (a / 2) / (1.0 + bent * bent)


@triton.jit
def _backward(grad, h, keep, alpha, out, neurons, steps: tl.constexpr, positions: tl.constexpr, BLOCK: tl.constexpr):
    at, real = _addresses(neurons, steps, positions, BLOCK)
    k, a = tl.load(keep + tl.program_id(1)), tl.load(alpha + tl.program_id(1))
    later = tl.zeros((BLOCK,), grad.dtype.element_ty)
    at += (steps - 1) * positions  # from the last step backwards
    for t in range(0, steps, 4):
        in1, in2, in3 = real & (t + 1 < steps), real & (t + 2 < steps), real & (t + 3 < steps)
        d0 = tl.load(grad + at, mask=real, other=0.0)
        d1 = tl.load(grad + at - positions, mask=in1, other=0.0)
        d2 = tl.load(grad + at - 2 * positions, mask=in2, other=0.0)
        d3 = tl.load(grad + at - 3 * positions, mask=in3, other=0.0)
        h0 = tl.load(h + at, mask=real, other=0.0)
        h1 = tl.load(h + at - positions, mask=in1, other=0.0)
        h2 = tl.load(h + at - 2 * positions, mask=in2, other=0.0)
        h3 = tl.load(h + at - 3 * positions, mask=in3, other=0.0)
        g0 = _slope(d0, h0, a) + tl.where(h0 >= 1.0, 0.0, k) * later
        g1 = _slope(d1, h1, a) + tl.where(h1 >= 1.0, 0.0, k) * g0
        g2 = _slope(d2, h2, a) + tl.where(h2 >= 1.0, 0.0, k) * g1
        g3 = _slope(d3, h3, a) + tl.where(h3 >= 1.0, 0.0, k) * g2
        later = g3
        tl.store(out + at, g0, mask=real)
        tl.store(out + at - positions, g1, mask=in1)
        tl.store(out + at - 2 * positions, g2, mask=in2)
        tl.store(out + at - 3 * positions, g3, mask=in3)
        at -= 4 * positions


def forward(x: Tensor, keep: Tensor) -> Tensor:
    """As `neurons.lif_forward`: h [G, R, T, N]."""
    x, keep = x.contiguous(), keep.contiguous()
    h = torch.empty_like(x)
    if x.numel():
        groups, rows, steps, positions = x.shape
        neurons = rows * positions
        grid = (triton.cdiv(neurons, BLOCK), groups)
        _forward[grid](x, keep, h, neurons, steps, positions, BLOCK=BLOCK)
    return h


def backward(grad: Tensor, h: Tensor, keep: Tensor, alpha: Tensor) -> Tensor:
    """As `neurons.lif_backward`: [G, R, T, N]."""
    grad, h, keep, alpha = grad.contiguous(), h.contiguous(), keep.contiguous(), alpha.contiguous()
    out = torch.empty_like(h)
    if h.numel():
        groups, rows, steps, positions = h.shape
        neurons = rows * positions
        grid = (triton.cdiv(neurons, BLOCK), groups)
        _backward[grid](grad, h, keep, alpha, out, neurons, steps, positions, BLOCK=BLOCK)
    return out
