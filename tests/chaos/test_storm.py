"""The short storm: ten faults, over which sweeps must end as if nothing had happened. `make chaos` is the long one."""

from __future__ import annotations

import pytest

from tests.chaos.faults import possible
from tests.chaos.storm import Storm, small_disk

FAULTS = 10
SWEEPS = 5
"""Sweeps that the faults are spread over at most: a sweep on a fast machine is over before it has met them all."""


@pytest.mark.timeout(900)
def test_sweeps_in_a_short_storm_end_as_their_undisturbed_twin(tmp_path, undisturbed):
    met, resumes, log = 0, 0, []
    for seed in range(20, 20 + SWEEPS):
        with small_disk(tmp_path / f"disk{seed}") as disk:
            kinds = possible(disk is not None, database=False, server=False)
            storage = disk or tmp_path / f"disk{seed}"
            storm = Storm("short", seed=seed, faults=FAULTS - met, kinds=kinds, storage=storage, small_disk=bool(disk))
            record = storm.run(undisturbed, "storm")
            assert record.verdict.clean, "\n".join([*record.log, *record.verdict.lines()])
        met, resumes = met + sum(record.faults.values()), resumes + record.resumes
        log += record.log
        if met >= FAULTS:
            break
    assert met >= FAULTS, log
    assert resumes >= 2, log
