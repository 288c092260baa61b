"""Random views of training images: mirror, shift, cut out. One draw an example, keyed by (seed, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainables import draws
from trainables.family import Hypers, dtype_of
from trainables.vgg_decay.program import DATA_SETS, Program


def normalise(program: Program, images: Tensor) -> Tensor:
    """Stored integers [N, C, H, W] -> normalised values in the program's dtype."""
    info = DATA_SETS[program.data]
    planes = zip(images.to(dtype_of(program)).unbind(1), info.mean, info.std, strict=True)
    return torch.stack([(plane - mean * info.top) / (std * info.top) for plane, mean, std in planes], 1)


def augmented(program: Program, hyper: Hypers, seed: Tensor, step: Tensor, images: Tensor) -> Tensor:
    """Normalised random views of stored images.

    Each is mirrored with probability `flip`, then shifted by whole pixels drawn evenly from -translate..translate in
    both directions (edges as `program.padding` says), then blanked to the mean colour in a square of side `cutout`
    whose centre is any pixel, so that it may stand out over the edge (DeVries & Taylor 2017).

    Args:
        images: stored integers [N, C, H, W].
    """
    side = images.shape[-1]
    dtype = dtype_of(program)
    at = torch.arange(side, device=images.device)

    def drawn(purpose: str, count: Tensor) -> Tensor:
        """[N, 1] whole numbers, evenly from 0..count-1."""
        u = draws.uniform(seed, step, purpose, (images.shape[0], 1), dtype)
        return torch.floor(u * count).to(torch.int64)

    mirrored = draws.bernoulli(seed, step, "flip", hyper["flip"], (images.shape[0], 1))
    reach = torch.floor(hyper["translate"])
    rows = at + drawn("shift/rows", 2 * reach + 1) - reach.to(torch.int64)
    columns = at + drawn("shift/columns", 2 * reach + 1) - reach.to(torch.int64)
    inside = _within(rows, side)[:, :, None] & _within(columns, side)[:, None, :]
    rows, columns = _reflected(rows, side), _reflected(columns, side)
    columns = torch.where(mirrored, side - 1 - columns, columns)
    index = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    views = torch.gather(images.flatten(2), 2, index[:, None, :].expand(-1, images.shape[1], -1))
    result = normalise(program, views.reshape(images.shape))
    if program.padding == "mean":
        result = result * inside[:, None].to(dtype)
    pixels = torch.full_like(hyper["cutout"], side)
    hole = _covered(at, drawn("cutout/rows", pixels), hyper["cutout"])[:, :, None]
    hole = hole & _covered(at, drawn("cutout/columns", pixels), hyper["cutout"])[:, None, :]
    return torch.where(hole[:, None], 0.0, result)


def _within(index: Tensor, side: int) -> Tensor:
    return (index >= 0) & (index < side)


def _reflected(index: Tensor, side: int) -> Tensor:
    """Indices beyond an edge walk back inside, without repeating the edge pixel; past the far edge they stop there."""
    index = torch.abs(index)
    return torch.clamp(torch.where(index >= side, 2 * (side - 1) - index, index), 0, side - 1)


def _covered(at: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Bool [N, side]: is the row or column in the square?"""
    first = centre - torch.floor(size / 2).to(torch.int64)
    return (at >= first) & (at < first + torch.floor(size).to(torch.int64))
