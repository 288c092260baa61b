"""The passes of `.batch_norm` over a convolution's result, as formulas and as operators over all lanes at once.

    z = pool(relu((x - centre) * scale + shift))

torch.compile writes what several sums read to memory, in float32; on a GPU in bf16 each pass is one Triton kernel
instead (`.norm_kernel`), which reads and writes what it must once. Samples stand in groups (lanes), the first N / G in
the first, and each group has its own vectors [G, C]. Arithmetic is in the vectors' dtype.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from trainables.operators import takes_lanes, triton_for

# --- formulas ---------------------------------------------------------------------------------------------------------


def forward_formula(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """`norm_forward` on any device."""
    value = _affine(x, centre, scale, shift).flatten(0, 1)
    if not pool:
        return torch.relu(value).to(x.dtype), x.new_zeros((len(x), 0), dtype=torch.int8)
    return torch.relu(_windows(value).amax((2, 4))).to(x.dtype), _first_largest(value)


def sums_formula(
    grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool
) -> Tensor:
    """`norm_sums` on any device."""
    slope = _slope(grad, x, chosen, centre, scale, shift, pool)
    return torch.stack([slope.sum((1, 2, 3)), (slope * _centred(x, centre)).sum((1, 2, 3))], 1)


def backward_formula(
    grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, tilt: Tensor,
    weight: Tensor, pool: bool,
) -> Tensor:  # fmt: skip
    """`norm_backward` on any device."""
    shared = _spread(mean) + _centred(x, centre) * _spread(tilt)
    if weight.shape[1]:
        shared = shared * weight[..., None, None, None]
    slope = _slope(grad, x, chosen, centre, scale, shift, pool)
    return (_spread(scale) * (slope - shared)).flatten(0, 1).to(x.dtype)


def _spread(vector: Tensor) -> Tensor:
    """[G, C] -> [G, 1, 1, 1, C]."""
    return vector[:, None, None, None]


def _centred(x: Tensor, centre: Tensor) -> Tensor:
    """[G, N / G, H, W, C]."""
    return x.unflatten(0, (len(centre), -1)).to(centre.dtype) - _spread(centre)


def _affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _centred(x, centre) * _spread(scale) + _spread(shift)


def _slope(grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> Tensor:
    """The gradient before pooling and ReLU, [G, N / G, H, W, C]."""
    grad = grad.to(centre.dtype)
    if pool:
        place = torch.arange(4, dtype=torch.int8, device=grad.device).reshape(2, 1, 2, 1)
        grad, chosen = (tensor[:, :, None, :, None] for tensor in (grad, chosen))
        grad = torch.where(chosen == place, grad, 0).flatten(3, 4).flatten(1, 2)
    return torch.where(_affine(x, centre, scale, shift) > 0, grad.unflatten(0, (len(centre), -1)), 0)


def _windows(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H / 2, 2, W / 2, 2, C]."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


def _first_largest(x: Tensor) -> Tensor:
    """Which of a window's four is the first of the largest, row by row, int8 [N, H / 2, W / 2, C]."""
    a, b, c, d = (x[:, i::2, j::2] for i in range(2) for j in range(2))
    upper, lower = (b > a).to(torch.int8), (d > c).to(torch.int8) + 2
    return torch.where(torch.maximum(c, d) > torch.maximum(a, b), lower, upper)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lanewise::norm_forward", mutates_args=())
def norm_forward(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """Normalised, rectified, and pooled by 2x2 where asked.

    Args:
        x: [N, H, W, C].
        centre, scale, shift: [G, C].

    Returns:
        z [N, H, W, C] in x's dtype, or half as high and wide; and, pooled, which of a window's four is the first of the
        largest, row by row, int8 of z's shape, else [N, 0].
    """
    return forward_formula(x, centre, scale, shift, pool)


@torch.library.custom_op("lanewise::norm_sums", mutates_args=())
def norm_sums(
    grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool
) -> Tensor:
    """With g the gradient that passes pooling and ReLU: sum g and sum g (x - centre) of every channel, [G, 2, C].

    Args:
        grad: with respect to z. chosen: as `norm_forward` gave it.
    """
    return sums_formula(grad, x, chosen, centre, scale, shift, pool)


@torch.library.custom_op("lanewise::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, x: Tensor, chosen: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, tilt: Tensor,
    weight: Tensor, pool: bool,
) -> Tensor:  # fmt: skip
    """scale * (g - weight * (mean + tilt * (x - centre))), of x's shape and dtype.

    Args:
        mean, tilt: [G, C]. weight: of every sample [G, N / G], or [G, 0]: all 1.
    """
    return backward_formula(grad, x, chosen, centre, scale, shift, mean, tilt, weight, pool)


@norm_forward.register_fake
def _(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    samples, height, width, channels = x.shape
    z = x.new_empty((samples, height // 2, width // 2, channels) if pool else x.shape)
    return z, x.new_empty(z.shape if pool else (samples, 0), dtype=torch.int8)


@norm_sums.register_fake
def _(grad, x, chosen, centre, scale, shift, pool) -> Tensor:
    return centre.new_empty((len(centre), 2, centre.shape[1]))


@norm_backward.register_fake
def _(grad, x, chosen, centre, scale, shift, mean, tilt, weight, pool) -> Tensor:
    return x.new_empty(x.shape)


@norm_forward.register_kernel("cuda")
def _(*args) -> tuple[Tensor, Tensor]:
    return gpu_kernel().forward(*args)


@norm_sums.register_kernel("cuda")
def _(*args) -> Tensor:
    return gpu_kernel().sums(*args)


@norm_backward.register_kernel("cuda")
def _(*args) -> Tensor:
    return gpu_kernel().backward(*args)


def gpu_kernel() -> ModuleType:
    """The module of the GPU kernels. Raises `BadValue` where Triton is missing."""
    with triton_for("BatchNorm in bf16 on a GPU needs", "take precision=float32"):
        from trainables.vgg_decay import norm_kernel
    return norm_kernel


for _operator in (norm_forward, norm_sums, norm_backward):
    takes_lanes(_operator)
