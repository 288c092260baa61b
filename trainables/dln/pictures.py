"""The notebook's interpolation picture: two digits mixed, each mixture given back by a trained reconstruction model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainables.dln import tdln
from trainables.dln.program import IMAGE_SIDES, Program
from trainables.family import BadValue, Hypers, State

MIXES = tuple(round(-0.5 + 0.1 * i, 1) for i in range(20))
"""The notebook's coefficients: -0.5, -0.4 ... 1.4."""

_SCALE = 4  # screen pixels per image pixel


def interpolate(
    program: Program,
    state: State,
    hyper: Hypers,
    first: Tensor,
    second: Tensor,
    mixes: Sequence[float] = MIXES,
    space: str = "pixels",
) -> Tensor:
    """What the model makes of second + c (first - second), for each c.

    Args:
        program, state, hyper: a trained lane of task "reconstruct".
        first, second: images [pixels] in [0, 1].
        space: "pixels" mixes the inputs, as the notebook did; "state" mixes the last recurrent states.

    Returns images [len(mixes), pixels] in [0, 1]. Raises `BadValue` for another task or space.
    """
    if program.task != "reconstruct":
        raise BadValue(f"only a reconstruction can be interpolated, not task '{program.task}'")
    if space not in ("pixels", "state"):
        raise BadValue(f"space '{space}' is neither pixels nor state")
    params = state["params"]
    share = torch.tensor(mixes, dtype=first.dtype, device=first.device)[:, None]
    with torch.no_grad():
        if space == "pixels":
            return tdln.reconstruct(program, params, hyper, second + share * (first - second))
        ends = tdln.encode(program, params, hyper, torch.stack([first, second]))
        return tdln.decode(program, params, hyper, ends[1] + share * (ends[0] - ends[1]))


def write_strip(path: Path, program: Program, rows: Sequence[Tensor]) -> None:
    """A PNG with one row of images for each tensor [n, pixels] in [0, 1], bright ink on black."""
    side = IMAGE_SIDES[program.data]
    strips = [
        np.concatenate(list(row.detach().cpu().double().clamp(0, 1).numpy().reshape(-1, side, side)), axis=1)
        for row in rows
    ]
    grey = (255 * np.concatenate(strips, axis=0)).round().astype(np.uint8)
    picture = Image.fromarray(grey)
    picture.resize((picture.width * _SCALE, picture.height * _SCALE), Image.Resampling.NEAREST).save(path)
