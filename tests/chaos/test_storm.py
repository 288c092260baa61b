"""The short storm: ten faults on one sweep, which must end as if nothing had happened. `make chaos` is the long one."""

from __future__ import annotations

import pytest

from tests.chaos.faults import possible
from tests.chaos.storm import Storm, small_disk

FAULTS = 10


@pytest.mark.timeout(900)
def test_a_sweep_in_a_short_storm_ends_as_its_undisturbed_twin(tmp_path, undisturbed):
    with small_disk(tmp_path / "disk") as disk:
        kinds = possible(disk is not None, database=False, server=False)
        storm = Storm(
            "short", seed=20, faults=FAULTS, kinds=kinds, storage=disk or tmp_path / "disk", small_disk=bool(disk)
        )
        record = storm.run(undisturbed, "storm")
        assert record.verdict.clean, "\n".join([*record.log, *record.verdict.lines()])
        assert sum(record.faults.values()) >= FAULTS, record.log
        assert record.resumes >= 2, record.log
