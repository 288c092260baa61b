"""How engines have a step compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainables.operators import choose_assembler, keep_compiled, tell_inductor

LONGEST_FUSED_CAT = 64
"""Inductor writes each part of a concatenation of more than 8 by a kernel of its own: hundreds a step, where a net's
biases, gains and their coefficients are updated together."""


def compile_lanes(
    function: Callable, device: torch.device | None = None, small_kernels: bool = False, **more: Any
) -> Callable:
    """torch.compile for engines; `more` goes to it. `small_kernels`: on a GPU, those that need not wait for each other
    become one.

    Programs and lane counts share the engine's code, and every one of them is a compilation of its own: at dynamo's
    usual limit of 8 the ninth would run uncompiled without a word.
    """
    choose_assembler()
    tell_inductor()
    for name in ("_enter_autocast", "_exit_autocast"):
        # their arguments say all there is to know of them, as later versions of PyTorch hold (pytorch/pytorch 191106)
        keep_compiled(f"torch.amp.autocast_mode.{name}", torch.__version__)
    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 65536
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device is not None and device.type == "cuda":
        more["options"] = {"max_pointwise_cat_inputs": LONGEST_FUSED_CAT, "combo_kernels": small_kernels}
    return torch.compile(function, dynamic=False, **more)
