"""Delay kernels with learned positions (dilated convolution with learnable spacings, along time).

One weight w has one delay: a bump of area w on the time axis of a kernel of K taps, centred at c = P + K // 2. The
input is padded by K - 1 steps on the left and cross-correlated, so that c = K - 1 (P = K // 2, "right-most") is no
delay and c = 0 a delay of K - 1 steps. Formulas of `Dcls1d` and `Dcls2_1d`
(github.com/K-H-Ismail/Dilated-Convolution-with-Learnable-Spacings-PyTorch); schedule of CSNN-1D-Delays
(github.com/Thvnvtos/CSNN-1D-Delays: csnnext_delays.py, config.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.snn_delays import delay_ops

GAUSS_2_1D = 1.0
"""Width at sigma 0 of the Gaussian of `Dcls2_1d` (frequency x delay)."""
GAUSS_1D = 0.27
"""Width at sigma 0 of the Gaussian of `Dcls1d` (used in the last layer)."""
SIGMA_END = {"max": 1e-6, "gauss": 0.23, "v1": 1e-6}
"""Sigma on the last epoch of its fall; after it 0 for max, .23 for gauss."""


def kernel(
    weight: Tensor, position: Tensor, sigma: Tensor, taps: int, reach: Tensor, version: str, gauss_floor: float
) -> Tensor:
    """The time kernel of every weight.

    Args:
        weight, position: any equal shape [...]; positions in steps around the kernel's middle.
        sigma: width, 0-d.
        taps: K.
        reach: how many of the K taps may be used, 0-d, odd and at most K: the rest, at the long-delay end, are zero,
            and what is left is the kernel of K = reach.
        version: "max", "gauss" or "v1".
        gauss_floor: added to |sigma| for "gauss".

    Returns:
        [..., K].
    """
    tap = torch.arange(taps, device=weight.device, dtype=weight.dtype)
    distance = tap - (position + taps // 2).unsqueeze(-1)
    if version == "gauss":
        bump = torch.exp(-0.5 * (distance / (sigma.abs() + gauss_floor)) ** 2)
    elif version == "max":
        bump = torch.relu(sigma.abs() + 1 - distance.abs())
    else:
        bump = torch.relu(1 - distance.abs())
    bump = torch.where(tap >= taps - reach, bump, 0.0)
    return weight.unsqueeze(-1) * (bump / (bump.sum(-1, keepdim=True) + 1e-7))


def discrete(weight: Tensor, position: Tensor, taps: int, reach: Tensor) -> Tensor:
    """The kernel of evaluation: whole delays, one tap a weight. The position itself is not changed."""
    rounded = clamp(position.round(), taps, reach)
    return kernel(weight, rounded, torch.zeros_like(reach), taps, reach, "v1", 0.0)


def clamp(position: Tensor, taps: int, reach: Tensor) -> Tensor:
    """Positions held where a delay lies between 0 and reach - 1 steps."""
    return position.clamp(min=taps // 2 + 1 - reach, max=torch.full_like(reach, taps // 2))


def delay(position: Tensor, taps: int) -> Tensor:
    """Position -> delay in steps, 0 .. K - 1."""
    return taps // 2 - position


def first_positions(unit: Tensor, taps: int, reach: Tensor, right_most: Tensor) -> Tensor:
    """Start: delay uniform on 0 .. reach - 1 from `unit` in (0, 1), or zero everywhere where right_most is 1."""
    return taps // 2 - (1 - right_most) * (reach - 1) * unit


def reach_of(delay_ms: Tensor, dt_ms: float, taps: int) -> Tensor:
    """Taps that a lane may use: of the kernel for `delay_ms` (as `program.kernel_steps`), or all where it is 0."""
    steps = torch.floor(delay_ms / dt_ms + 1e-6)
    odd = steps + 1 - torch.remainder(steps, 2)
    return torch.where(delay_ms > 0, odd.clamp(max=taps), torch.full_like(delay_ms, taps))


def sigma_at(start: Tensor, share: Tensor, epochs: int, elapsed: Tensor, version: str) -> Tensor:
    """Width of the bumps during training.

    Falls by the same factor each epoch from `start` to `SIGMA_END` at epoch floor(share * epochs), then drops to 0
    ("max") or stays at .23 ("gauss"). A start of 0 stays 0.

    Args:
        start: sigma in the first epoch, in steps, 0-d.
        share: part of the epochs over which it falls (the original: epochs // 3).
        epochs: in the whole run.
        elapsed: epochs done, 0-d, whole for a fall by epoch, fractional for a fall by step.
    """
    end = SIGMA_END[version]
    final = torch.floor(share * epochs + 1e-6)
    progress = elapsed / final.clamp(min=1)
    falling = start * (end / start.clamp(min=1e-12)) ** progress.clamp(max=1)
    after = torch.full_like(start, end if version == "gauss" else 0.0)
    return torch.where(start > 0, torch.where(elapsed > final, after, falling), 0.0)


def frequency_delay(x: Tensor, kernels: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Depthwise convolution over frequency ("same", zeros) and time (causal).

    On a GPU, in bf16 or float32 and for kernels of up to `delay_ops.LONGEST` taps, by the operators of `delay_ops`;
    elsewhere by PyTorch's convolution.

    Args:
        x: [B, T, N, C].
        kernels: [C, k, K], k along frequency.
        affine: scale and shift, each [C]: of scale * x + shift in the place of x.

    Returns:
        [B, T, N, C].
    """
    channels, size, taps = kernels.shape
    if x.is_cuda and x.dtype != torch.float64 and size * taps <= delay_ops.LONGEST:
        return delay_ops.walked_delay(x, kernels, affine)
    if affine is not None:
        x = (affine[0] * x + affine[1]).to(x.dtype)
    padded = F.pad(x.permute(0, 3, 1, 2), (size // 2, size - 1 - size // 2, taps - 1, 0))
    # rounded here: under vmap alone, as in evaluation, autocast does not see a convolution on the CPU
    weight = kernels.transpose(1, 2).unsqueeze(1).to(x.dtype)
    return F.conv2d(padded, weight, groups=channels).permute(0, 2, 3, 1)


def synapse_delay(x: Tensor, kernels: Tensor) -> Tensor:
    """Full convolution over time, one delay a synapse: x [B, C, T], kernels [O, C, K] -> [B, O, T]."""
    return F.conv1d(F.pad(x, (kernels.shape[-1] - 1, 0)), kernels)
