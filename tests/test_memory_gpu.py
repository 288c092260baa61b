"""Out of memory on a real GPU: fewer lanes, the same results, and the memory is given back. `make test-gpu`"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from lanes.host import Host, HostSettings
from tests.test_memory import Strict
from tests.test_stack import STEPS, Shelf, job, run_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
WIDTH = 1 << 22  # 5 weights each: 84 MB a lane, so that weights and their gradients outweigh all else


def train_all(cache_dir, jobs: list, lanes: int) -> tuple[Strict, dict]:
    memory, shelf = Strict(), Shelf()
    settings = HostSettings("stacked", lanes, lanes, 0.0, None, cache_dir, lambda label: memory, lambda: shelf)
    host = Host(settings, "cuda", "cuda:0@here")
    reports = run_host(host, jobs)
    del host
    gc.collect()
    torch.cuda.empty_cache()
    return memory, reports


def test_lanes_that_do_not_fit_train_in_turns(cache_dir):
    jobs = [
        job(f"t{i}", seeds=(0, 1), lr=0.01 * (i + 1) / WIDTH, width=WIDTH, precision="float32", reports=(3, 9))
        for i in range(4)
    ]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    expected, _ = train_all(cache_dir, jobs[:1], lanes=2)
    two = torch.cuda.max_memory_reserved() - before
    assert torch.cuda.memory_reserved() - before < two / 5, "a host that is gone holds no lanes"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 1.5 * two) / total)
    try:
        memory, reports = train_all(cache_dir, jobs, lanes=8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    notices = " ".join(r.notice for rs in reports.values() for r in rs if r.notice)
    assert "out of memory with 8 lanes, going on with 4" in notices
    for each in jobs:
        assert [(r.epoch, r.error) for r in reports[each.token]] == [(3, None), (9, None)]
        for key in each.runs.values():
            assert sorted(memory.step_rows[key]) == list(range(1, STEPS + 1))
            assert sorted(memory.epoch_rows[key]) == list(range(1, 10))
    for key in jobs[0].runs.values():
        one, other = ([rows.step_rows[key][step] for step in range(1, STEPS + 1)] for rows in (expected, memory))
        np.testing.assert_allclose(one, other, rtol=2e-3)
