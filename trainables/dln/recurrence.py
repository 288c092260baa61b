"""Diagonal linear recurrences h_l = z_l h_(l-1) + u_l: step by step, as an associative scan, and the last state alone.

Complex numbers are explicit (real, imaginary) pairs: they go through vmap, autocast and the compiler as ordinary
tensors. Time is the second to last dimension, channels the last; whatever stands before is batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(real, imaginary)."""


def multiply(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def power(log_size: Tensor, theta: Tensor, time: Tensor) -> Pair:
    """(size exp(i theta))^time = size^time (cos(theta time), sin(theta time)), elementwise."""
    radius, angle = torch.exp(log_size * time), theta * time
    return radius * torch.cos(angle), radius * torch.sin(angle)


def sequential(decay: Pair, inputs: Tensor) -> Pair:
    """All states [..., L, D], one step after another, from h = 0. decay, inputs: [..., L, D], the inputs real."""
    real = torch.zeros_like(inputs[..., 0, :])
    state = (real, real)
    states: list[Pair] = []
    for step in range(inputs.shape[-2]):
        turned = multiply((decay[0][..., step, :], decay[1][..., step, :]), state)
        state = (turned[0] + inputs[..., step, :], turned[1])
        states.append(state)
    return torch.stack([s[0] for s in states], -2), torch.stack([s[1] for s in states], -2)


def scan(decay: Pair, inputs: Tensor) -> tuple[Pair, Pair]:
    """The same by an associative scan, in about 2 L work and 2 log2(L) dependent passes.

    Returns (states, products): the states [..., L, D], and the running products of the decays. The original's attention
    variant returned the latter by mistake.
    """

    def combine(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        product = multiply((first[0], first[1]), (second[0], second[1]))
        carried = multiply((first[2], first[3]), (second[0], second[1]))
        return [*product, carried[0] + second[2], carried[1] + second[3]]

    wide = torch.broadcast_tensors(decay[0], decay[1], inputs)
    products_real, products_imag, real, imag = associative_scan(combine, [*wide, torch.zeros_like(wide[2])])
    return (real, imag), (products_real, products_imag)


def real_scan(decay: Tensor, inputs: Tensor) -> Pair:
    """The scan with real decays [..., L, D]. Returns (states, running products of the decays)."""

    def combine(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        return [first[0] * second[0], first[1] * second[0] + second[1]]

    products, states = associative_scan(combine, list(torch.broadcast_tensors(decay, inputs)))
    return states, products


def associative_scan(
    combine: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]], elements: Sequence[Tensor]
) -> list[Tensor]:
    """Inclusive prefix combinations along dimension -2 (Blelloch 1990, in the odd-even form of jax.lax).

    Neighbours are combined, the half-long sequence is scanned, and the places in between are filled in.
    """
    count = elements[0].shape[-2]
    if count == 1:
        return list(elements)
    firsts = [e[..., 0 : count - 1 : 2, :] for e in elements]
    seconds = [e[..., 1::2, :] for e in elements]
    at_odd = associative_scan(combine, combine(firsts, seconds))
    if count == 2:
        return [torch.cat([e[..., :1, :], o], -2) for e, o in zip(elements, at_odd, strict=True)]
    before = [o[..., : (count - 1) // 2, :] for o in at_odd]
    later = combine(before, [e[..., 2::2, :] for e in elements])
    at_even = [torch.cat([e[..., :1, :], x], -2) for e, x in zip(elements, later, strict=True)]
    return [_interleave(even, odd) for even, odd in zip(at_even, at_odd, strict=True)]


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """Places 0, 2, 4 ... from `even`, 1, 3, 5 ... from `odd`; `even` may be one longer."""
    pairs = odd.shape[-2]
    woven = torch.stack([even[..., :pairs, :], odd], -2).flatten(-3, -2)
    return woven if even.shape[-2] == pairs else torch.cat([woven, even[..., pairs:, :]], -2)


def last_real(log_size: Tensor, theta: Tensor, times: Tensor, inputs: Tensor) -> Tensor:
    """Real part of the last state where z_l = (size exp(i theta))^(t_l), without a scan.

    The powers add up, so input l reaches the end multiplied by z to the sum of the later time steps.

    Args:
        log_size, theta: [D].
        times: t [..., L, D]. inputs: u [..., L, D].

    Returns [..., D].
    """
    total = times.cumsum(-2)
    later = total[..., -1:, :] - total
    return (power(log_size, theta, later)[0] * inputs).sum(-2)


def last_real_constant(log_size: Tensor, theta: Tensor, inputs: Tensor) -> Tensor:
    """The same where every time step is 1 and every channel reads the same input [..., L]. Returns [..., D]."""
    return inputs @ power(log_size, theta, later_steps(inputs.shape[-1], log_size))[0]


def later_steps(steps: int, like: Tensor) -> Tensor:
    """How many steps come after each one, [L, 1]."""
    return torch.arange(steps - 1, -1, -1, device=like.device, dtype=like.dtype)[:, None]
