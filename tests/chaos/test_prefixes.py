"""A driver that dies after any line of its journal: what resuming writes is what the driver would have written next."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.toy_sweeps import UNDISTURBED, Swept, sweep
from tuning.resume import replay
from tuning.schedulers import make_scheduler
from tuning.searchers import make_source
from tuning.sweep import SweepPlan


def settled(swept: Swept, lines: list[str], folder: Path) -> list[tuple]:
    """(kind, trial, what) of the events that resuming adds to these lines."""
    (folder / "journal.jsonl").write_text("".join(lines))
    plan = SweepPlan.load(swept.folder)
    past = replay(plan, folder / "journal.jsonl", make_source(plan), make_scheduler(plan))
    return [
        (kind, fields["trial"], fields.get("decision") or fields.get("stop_reason")) for kind, fields in past.unwritten
    ]


def assert_every_prefix_is_settled(swept: Swept, folder: Path, stale: bool = False) -> None:
    """stale: as a journal of before, whose `done` was Tune's own, true also where the scheduler said STOP."""
    events = swept.journal
    if stale:
        for now, following in pairwise(events):
            if now["event"] == "report":
                now["done"] = now["done"] or following["decision"] == "STOP"
    lines = [json.dumps(event) + "\n" for event in events]
    seen = set()
    for at, event in enumerate(events, start=1):
        expected = []
        if event["event"] in ("report", "decision"):
            trial = event["trial"]
            rest = [later for later in events[at:] if later.get("trial") == trial]
            if event["event"] == "report":
                expected.append(("decision", trial, rest.pop(0)["decision"]))
            if rest and rest[0]["event"] == "end":
                expected.append(("end", trial, rest[0]["stop_reason"]))
        assert settled(swept, lines[:at], folder) == expected, (at, event["event"])
        seen.update((kind, what) for kind, _, what in expected)
    assert {("decision", "CONTINUE"), ("decision", "STOP"), ("end", "stopped"), ("end", "finished")} <= seen


@pytest.mark.parametrize("stale", [False, True])
def test_asha(undisturbed, tmp_path, stale):
    assert_every_prefix_is_settled(undisturbed, tmp_path, stale)


@pytest.mark.heavy
def test_median_and_hyperopt(tmp_path):
    arguments = ("demo", "--trials", "14", "--searcher", "hyperopt", "--scheduler", "median", *UNDISTURBED[3:])
    swept = sweep(tmp_path / "sweeps", "median", *arguments)
    assert swept.code == 0, swept.err
    assert_every_prefix_is_settled(swept, tmp_path)
