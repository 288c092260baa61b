"""Activations of the MLP, those of the notebook's sweep among them. a and b are per-lane numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def activate(name: str, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Apply an activation by name.

    "shrink" is x - a tanh(x / b); (a, b) = (1.05 * 3, 3) is the notebook's best, (-1, 1) its x + tanh(x), a = 0 the
    identity. "shrink_sigmoid" is x - a (sigmoid(x / b) - 1/2), the same as "shrink" with (a / 2, 2 b). "leaky" has the
    slope a below zero. "gelu" is exact, "gelu_tanh" its tanh form (the default of JAX).
    """
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return torch.relu(x)
        case "silu":
            return F.silu(x)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "identity":
            return x
        case "leaky":
            return torch.where(x > 0, x, a.to(x.dtype) * x)
        case "shrink":
            return x - a.to(x.dtype) * torch.tanh(x / b.to(x.dtype))
        case "shrink_sigmoid":
            return x - a.to(x.dtype) * (torch.sigmoid(x / b.to(x.dtype)) - 0.5)
    raise ValueError(name)
