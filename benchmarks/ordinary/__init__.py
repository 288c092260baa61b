"""What a user would write without lanewise: one trial of each family as an ordinary eager PyTorch loop.

`LOOPS[family](program, hyper, arrays, seed, device)` is a trial; nothing of `lanes/` is in it. The nets are
`torch.nn.Module`s trained by `torch.optim`; only what defines the task (which classes a task has, how wide a delay's
bump is) is taken from the family, so that both sides train the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from benchmarks.ordinary.loop import Loop


def loop_of(family: str) -> Callable[..., Loop]:
    """The family's ordinary loop."""
    return import_module(f"benchmarks.ordinary.{family}").make


__all__ = ["Loop", "loop_of"]
