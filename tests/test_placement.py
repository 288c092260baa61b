"""Which device a config gets, and how a sweep follows a cluster that grows and shrinks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lanes.placement import Placement, Slot
from tests.test_command_line import plan_of
from tuning import elastic
from tuning.journal import Journal
from tuning.searchers import Proposer, make_source


def devices(*models: str) -> list[Slot]:
    return [Slot(f"n{i}", f"10.0.0.{i}", "cuda", 0, model) for i, model in enumerate(models)]


def placement(slots: list[Slot], rule="spread", room=1) -> Placement:
    made = Placement(rule, room)
    for slot in slots:
        made.add(slot)
    return made


def fill(made: Placement, configs: int, lanes: int = 1, programs: int = 1) -> None:
    for number in range(configs):
        made.place(f"t{len(made.placed)}", f"p{number % programs}", lanes)


def test_devices_of_one_kind_share_evenly():
    slots = devices("H200", "H200", "H200")
    made = placement(slots)
    fill(made, 30, lanes=2)
    assert sorted(made.loads.values()) == [20, 20, 20]


def test_a_program_stays_where_it_runs_until_another_device_would_be_twice_as_soon():
    slots = devices("H200", "H200")
    made = placement(slots)
    assert made.place("a", "p", 1) is made.place("b", "p", 1)
    assert made.place("c", "p", 1) is not made.placed["a"].slot


@pytest.mark.parametrize(("slow", "share"), [(1.0, 0.5), (0.5, 1 / 3), (0.1, 1 / 11)])
def test_a_slow_device_gets_lanes_in_proportion_to_its_measured_rate(slow, share):
    slots = devices("H200", "T4")
    made = placement(slots)
    made.measured(slots[0], "p0", 1000.0, 128)
    made.measured(slots[1], "p0", 1000.0 * slow, 32)
    for number in range(220):
        made.place(f"t{number}", "p0", 1)
    assert made.loads[slots[1]] / 220 == pytest.approx(share, abs=0.01)
    assert sum(made.loads.values()) == 220


def test_what_one_device_measured_holds_for_others_of_its_model():
    slots = devices("H200", "T4", "T4")
    made = placement(slots)
    made.measured(slots[0], "p", 900.0, 128)
    made.measured(slots[1], "p", 100.0, 8)
    assert [made.rate(slot, "p") for slot in slots] == [900.0, 100.0, 100.0]
    assert made.rate(slots[0], "q") == 1.0, "nobody has measured it"


def test_packed_fills_one_device_before_the_next():
    slots = devices("H200", "H200", "H200")
    made = placement(slots, "packed", room=8)
    fill(made, 6, lanes=2)
    assert sorted(made.loads.values()) == [0, 4, 8]
    made.measured(next(slot for slot in slots if made.loads[slot] == 4), "p0", 100.0, 16)
    fill(made, 5, lanes=2)
    assert sorted(made.loads.values()) == [0, 8, 14], "its host says that it takes 16 lanes of this program"
    assert not made.full("p0", 2)


def test_what_leaves_or_is_lost_makes_room():
    slots = devices("H200", "H200")
    made = placement(slots)
    fill(made, 8, lanes=2)
    gone = made.placed["t0"].slot
    there = [token for token, placed in made.placed.items() if placed.slot == gone]
    made.drop(gone)
    assert made.loads == {slot: 8 for slot in slots if slot != gone}
    for token in there:  # from the queue, on what is left
        assert made.place(f"{token}-again", "p0", 2) != gone
    for token in list(made.placed):
        made.leave(token)
    made.leave("never placed")
    assert list(made.loads.values()) == [0]
    made.drop(next(iter(made.loads)))
    assert made.place("t", "p0", 1) is None


# --- a cluster that grows and shrinks ---


class Calls:
    """Stands for a Ray actor handle; `answers` are what its calls give."""

    def __init__(self, **answers):
        self.made: list[tuple] = []
        self._answers = answers

    def __getattr__(self, name):
        def remote(*args):
            self.made.append((name, *args))
            return self._answers.get(name)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def proposer(tmp_path):
    plan = plan_of("grid", storage=tmp_path, name="s")
    plan.folder.mkdir()
    made = Proposer(plan, make_source(plan), Journal(plan.folder / "journal.jsonl"), lambda event: None)
    made.limit = 2
    return made


def test_more_devices_are_more_configs_in_flight(proposer, monkeypatch):
    pool, now = Calls(), [0.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(elastic, "find_slots", lambda: devices("H200", "H200"))
    assert [proposer.suggest(f"t{i}") is None for i in range(4)] == [False, False, True, True]
    following = elastic.Elastic(pool, proposer, lambda slots: 2 * slots, gpu=True)
    following.step()
    assert pool.made == [], "not at every turn of the loop"
    now[0] = elastic.LOOK_SECONDS
    following.step()
    assert pool.made == [("grow", 4)]
    assert [proposer.suggest(f"u{i}") is None for i in range(3)] == [False, False, True]
    proposer.on_trial_complete("t0", {"progress": 1.0, "test_loss": 1.0, "stop_reason": "finished"})
    assert proposer.suggest("v") is not None


def test_the_end_of_a_sweep_asks_for_what_still_trains(proposer, monkeypatch):
    pool, now, asked = Calls(thin_out="a reference"), [0.0], []
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(elastic, "ask", asked.append)
    in_use = iter([3, 3, 1])
    monkeypatch.setattr(elastic.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(elastic.ray, "get", lambda ref: next(in_use))
    proposer.limit = 100
    following = elastic.Elastic(pool, proposer, None, gpu=True)
    while proposer.remaining:
        proposer.suggest(f"t{proposer.remaining}")
        now[0] += elastic.LOOK_SECONDS
    for _ in range(4):
        now[0] += elastic.LOOK_SECONDS
        following.step()
    assert pool.made == [("thin_out",)] * 4
    assert asked == [3, 1]
