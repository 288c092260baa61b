"""Draws are the same compiled, stacked or plain: the law of lanes stands on it."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from trainables import draws


@pytest.mark.parametrize("purpose", ["order", "dropout/h3/attention", "epsilon/hidden2"])
def test_compiled_stacked_draws_equal_plain_ones(purpose):
    seeds, steps = torch.tensor([0, 7, -3], dtype=torch.int32), torch.tensor([0, 1, 4999], dtype=torch.int32)

    def draw(seed, step):
        # 40 and 333 fill vectors and leave a rest: there the compiler once computed another hash
        return (
            draws.bits(seed, step, purpose, 5),
            draws.uniform(seed, step, purpose, (2, 3), torch.float32),
            draws.bits(seed, step, purpose, 40),
            draws.uniform(seed, step, purpose, (9, 37), torch.float64),
        )

    compiled = torch.compile(vmap(draw), dynamic=False, fullgraph=True)(seeds, steps)
    for lane in range(3):
        for actual, expected in zip(compiled, draw(seeds[lane], steps[lane]), strict=True):
            assert torch.equal(actual[lane], expected)
