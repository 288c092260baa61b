"""What the family's sweeps share."""

from __future__ import annotations

from typing import Any

from search_spaces.space import Arms, Space

Fields = dict[str, Any]

ADAM: Fields = {
    "lr": 1e-4,
    "warmup": 0.0,
    "final_fraction": 1.0,
    "b2": 0.999,
    "weight_decay": 0.0,
    "clip": 0.0,
    "norm_eps": 1e-5,
}
"""optax.adam at a constant rate: what the digit and byte runs train with."""


def runs(by_log: dict[str, Fields]) -> Space:
    """Single runs of the notebook under their log's name."""
    return Space((Arms("run", {f"logs/{name}": fields for name, fields in by_log.items()}, run_names=True),))
