"""What dies under a sweep: a family's exception ends its config at once; a lost process costs nothing but time."""

from __future__ import annotations

import pytest

from tests.test_interruption import reported
from tests.test_sweeps import assert_consistent, assert_same_curves
from tests.toy_sweeps import Process, sweep

LONG = ("grid", "--engine", "serial", "--scheduler", "none", "--max-concurrent", "2", "--set", "epochs=80")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("untouched"), "long", *LONG)


def test_what_a_family_raises_is_a_crash_at_once_and_tried_once(tmp_path):
    swept = Process(tmp_path, "widths", "--engine", "serial", module="tests.toys.failing").wait()
    assert swept.code == 0, swept.err
    reasons = {event["config_key"]: event["stop_reason"] for event in swept.events("end")}
    assert sorted(reasons.values()) == ["crashed", "finished", "finished"]
    (crashed,) = [event for event in swept.events("end") if event["stop_reason"] == "crashed"]
    assert crashed["error"] == "ValueError: three units are not enough"
    assert swept.log.count("a program failed") == 1
    runs = swept.runs.set_index("program.width")
    assert set(runs.loc[3, "stop_reason"]) == {"crashed"}
    assert set(runs.loc[3, "error"]) == {"ValueError: three units are not enough"}


@pytest.mark.heavy
@pytest.mark.parametrize("victim", ["ray::HostActor", "ray::ResourceTrainable.train"])
def test_a_lost_process_costs_no_config_and_changes_no_value(tmp_path, untouched, victim):
    process = Process(tmp_path, "long", *LONG)
    process.when(reported(40))
    process.kill_one(victim)
    swept = process.wait()
    assert swept.code == 0, swept.err
    assert process.left() == []
    assert {event["stop_reason"] for event in swept.events("end")} == {"finished"}
    reports = [(event["config_key"], event["epoch"]) for event in swept.events("report")]
    assert len(set(reports)) == len(reports), "nothing is reported twice"
    assert_consistent(swept, lost=True)
    assert_same_curves(swept, untouched)
