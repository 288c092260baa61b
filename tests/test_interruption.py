"""Killed and interrupted sweeps: nothing is left running, and --resume ends where an undisturbed sweep would have."""

from __future__ import annotations

import pytest

from tests.test_sweeps import assert_consistent, assert_same_curves
from tests.toy_sweeps import UNDISTURBED, Process, sweep


def ended(count: int):
    return lambda events: sum(event["event"] == "end" for event in events) >= count


def reported(epoch: int):
    return lambda events: any(event["event"] == "report" and event["epoch"] >= epoch for event in events)


def outcome(swept) -> list[tuple]:
    """What was decided of each config, in order: independent of restarts and trial ids."""
    return [
        (event["config_key"], event["epoch"], event["decision"])
        for event in swept.journal
        if event["event"] == "decision"
    ]


def assert_resumed_as_if_undisturbed(resumed, undisturbed) -> None:
    assert resumed.code == 0, resumed.err
    assert_consistent(resumed)
    assert_same_curves(resumed, undisturbed)
    columns = ["run_key", "stop_reason", "config_stop_reason", "rung", "epoch", "step", "final.test_loss"]
    mine, other = (
        swept.runs.sort_values("run_key")[columns].reset_index(drop=True) for swept in (resumed, undisturbed)
    )
    assert mine.equals(other)
    assert outcome(resumed) == outcome(undisturbed), "rungs were restored: every decision is the same"


def assert_finished_ones_were_left_alone(swept) -> None:
    """No report of a config after the restart if it had ended before."""
    second = [i for i, event in enumerate(swept.journal) if event["event"] == "begin"][1]
    before, after = swept.journal[:second], swept.journal[second:]
    over = {event["config_key"] for event in before if event["event"] == "end"}
    assert over
    assert not over & {event["config_key"] for event in after if "config_key" in event}


def test_a_killed_sweep_leaves_no_process_and_resumes_as_if_undisturbed(tmp_path, undisturbed):
    process = Process(tmp_path, "whole", *UNDISTURBED)
    process.when(ended(2))
    process.kill()
    process.wait()
    assert process.left() == []
    resumed = sweep(tmp_path, "whole", "--resume", "whole")
    assert_finished_ones_were_left_alone(resumed)
    assert_resumed_as_if_undisturbed(resumed, undisturbed)


@pytest.mark.heavy
def test_ctrl_c_ends_in_order_with_130_and_resumes(tmp_path, undisturbed):
    process = Process(tmp_path, "whole", *UNDISTURBED)
    process.when(ended(1))
    process.interrupt()
    swept = process.wait()
    assert swept.code == 130, swept.err
    assert process.left() == []
    assert swept.journal[-1]["event"] == "finish"
    assert swept.journal[-1]["reason"] == "interrupted"
    assert "--resume whole" in swept.out + swept.err
    assert "Traceback" not in swept.err
    resumed = sweep(tmp_path, "whole", "--resume", "whole")
    assert_resumed_as_if_undisturbed(resumed, undisturbed)


@pytest.mark.heavy
@pytest.mark.parametrize("scheduler", ["none", "median", "pbt"])
def test_killed_in_the_middle_of_configs(tmp_path, scheduler):
    arguments = ("grid", "--engine", "serial", "--scheduler", scheduler, "--set", "epochs=60")
    process = Process(tmp_path, "cut", *arguments)
    process.when(reported(20))
    process.kill()
    process.wait()
    assert process.left() == []
    resumed = sweep(tmp_path, "cut", "--resume", "cut")
    assert resumed.code == 0, resumed.err
    assert_consistent(resumed)
    if scheduler == "none":
        whole = sweep(tmp_path, "whole", *arguments)
        assert_same_curves(resumed, whole)
