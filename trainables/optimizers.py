"""Pure optimiser updates on flat {name: tensor} dicts of one lane.

Learning rates are 0-d tensors; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]


def zeros_like(params: Mapping[str, Tensor]) -> Params:
    return {name: torch.zeros_like(value) for name, value in params.items()}


def adam(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    mu: Mapping[str, Tensor],
    nu: Mapping[str, Tensor],
    count: Tensor,
    lr: Tensor | Mapping[str, Tensor],
    *,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float = 1e-8,
    decoupled_decay: Tensor | Mapping[str, Tensor] | None = None,
) -> tuple[Params, Params, Params]:
    """Adam (Kingma & Ba 2015) with bias correction, or AdamW (Loshchilov & Hutter 2019) with `decoupled_decay`.

    Args:
        count: 0-d integer tensor, number of updates INCLUDING this one (1 at the first).
        lr: one 0-d tensor, or one for each parameter name.
        b1: may be a 0-d tensor, so that a schedule or a lane can move it.
        eps: added to the root of the corrected second moment, as in optax and torch.
        decoupled_decay: rate; params shrink by lr * rate before the update, as in torch.optim.AdamW.

    Returns:
        (params, mu, nu), new dicts.
    """
    first, second, updated = {}, {}, {}
    for name, grad in grads.items():
        steps = count.to(grad.dtype)
        rate = lr[name] if isinstance(lr, Mapping) else lr
        first[name] = b1 * mu[name] + (1 - b1) * grad
        second[name] = b2 * nu[name] + (1 - b2) * grad * grad
        direction = (first[name] / (1 - b1**steps)) / (torch.sqrt(second[name] / (1 - b2**steps)) + eps)
        value = params[name]
        if decoupled_decay is not None:
            decay = decoupled_decay[name] if isinstance(decoupled_decay, Mapping) else decoupled_decay
            value = value * (1 - rate * decay)
        updated[name] = value - rate * direction
    return updated, first, second


def sgd(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    lr: Tensor | Mapping[str, Tensor],
    momentum: Tensor,
    *,
    nesterov: bool = False,
) -> tuple[Params, Params]:
    """SGD with heavy-ball momentum in torch.optim.SGD's form: v = m v + g; p -= lr v (Nesterov: p -= lr (g + m v)).

    With momentum 0 it is plain SGD, so that momentum can be a per-lane number. Returns (params, velocity).
    """
    updated, moved = {}, {}
    for name, grad in grads.items():
        rate = lr[name] if isinstance(lr, Mapping) else lr
        moved[name] = momentum * velocity[name] + grad
        direction = grad + momentum * moved[name] if nesterov else moved[name]
        updated[name] = params[name] - rate * direction
    return updated, moved


def clip_by_global_norm(grads: Mapping[str, Tensor], limit: Tensor | float) -> tuple[Params, Tensor]:
    """Scale one lane's gradients so that their joint L2 norm is at most `limit` (torch's clip_grad_norm_, eps 1e-6).

    Returns (grads, norm before clipping).
    """
    norm = torch.stack([(g * g).sum() for g in grads.values()]).sum().sqrt()
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return {name: grad * scale for name, grad in grads.items()}, norm
