"""Replaying a journal: wherever it was cut off, no decision is lost and none is taken twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_command_line import plan_of
from tuning.journal import Journal, read
from tuning.resume import Past, replay
from tuning.schedulers import make_scheduler
from tuning.searchers import Proposer, make_source
from tuning.sweep import SweepPlan

VALUES = [0.5, 0.1, 0.9, 0.4, 0.8, 0.2]  # of six configs, at their first rung


def feed(scheduler, trial: str, value: float, progress: float) -> str:
    result = {"progress": progress, "test_loss": value, "epoch": int(progress), "done": False}
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial, config={}), result)


def write_sweep(plan: SweepPlan, scheduler) -> list[dict]:
    """A sweep's journal as the recorder writes it, one config after the other, decided by a scheduler."""
    plan.folder.mkdir(parents=True)
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    journal.write("begin", versions={})
    for i, value in enumerate(VALUES):
        trial = f"t{i}"
        config = proposer.suggest(trial)
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial, config={}))
        for progress, epoch in ((1.0, 1), (3.0, 3), (9.0, 9)):
            done = progress == 9.0
            per_seed = {
                seed: {"run_key": key, "status": "finished" if done else "training", "epoch": epoch, "step": 6 * epoch,
                       "values": {"test_loss": value, "train_loss": value}, "device_seconds": 1.0}
                for seed, key in config["runs"].items()
            }  # fmt: skip
            identity = {"trial": trial, "config_key": config["config_key"], "epoch": epoch}
            journal.write(
                "report", **identity, progress=progress, values={"test_loss": value}, per_seed=per_seed, done=done,
                engine="serial", lanes=1, device="cpu", spread={}, fraction=progress / 9,
            )  # fmt: skip
            decision = "STOP" if done else feed(scheduler, trial, value, progress)
            journal.write("decision", **identity, decision=decision)
            if decision == "STOP":
                reason = "finished" if done else "stopped"
                journal.write("end", **identity, stop_reason=reason, error=None)
                proposer.on_trial_complete(trial, {"progress": progress, "test_loss": value, "stop_reason": reason})
                break
    journal.close()
    return [event for event, _ in read(plan.folder / "journal.jsonl")]


@pytest.fixture
def plan(tmp_path) -> SweepPlan:
    return plan_of("grid", storage=tmp_path, name="s", scheduler="asha")


def cut(plan: SweepPlan, lines: int) -> None:
    path = plan.folder / "journal.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def resume(plan: SweepPlan, retry: bool = False) -> tuple[Past, object]:
    """Replay, and journal what a kill cut off."""
    scheduler = make_scheduler(plan)
    path = plan.folder / "journal.jsonl"
    past = replay(plan, path, make_source(plan), scheduler, retry)
    journal = Journal(path)
    for kind, fields in past.unwritten:
        journal.write(kind, **fields)
    journal.close()
    return past, scheduler


def told(events: list[dict]) -> list[tuple]:
    fields = ("event", "trial", "epoch", "decision", "stop_reason")
    return [tuple(event.get(name) for name in fields) for event in events]


def test_cut_after_every_line_what_was_begun_is_ended_as_it_would_have_been(plan):
    whole = write_sweep(plan, make_scheduler(plan))
    assert {e["decision"] for e in whole if e["event"] == "decision"} == {"STOP", "CONTINUE"}
    text = (plan.folder / "journal.jsonl").read_text()
    for lines in range(1, len(whole) + 1):
        (plan.folder / "journal.jsonl").write_text(text)
        cut(plan, lines)
        past, scheduler = resume(plan)
        now = [event for event, _ in read(plan.folder / "journal.jsonl")]
        assert told(now) == told(whole[: len(now)]), f"after line {lines}"
        reports = sum(e["event"] == "report" for e in now)
        assert sum(e["event"] == "decision" for e in now) == reports, "every report is decided, once"
        stopped = {e["trial"] for e in now if e["event"] == "decision" and e["decision"] == "STOP"}
        assert stopped == {e["trial"] for e in now if e["event"] == "end"}, "who was to stop has ended"
        assert not stopped & {e["trial"] for e in past.unfinished}
        for open_trial in past.unfinished:
            decided = [e["epoch"] for e in now if e["event"] == "decision" and e["trial"] == open_trial["trial"]]
            assert open_trial["reported"] == max(decided, default=0)
        again, _ = resume(plan)
        assert again.unwritten == [], "a second resume finds nothing left to do"
        assert [e["trial"] for e in again.unfinished] == [e["trial"] for e in past.unfinished]
        fresh = make_scheduler(plan)
        replay(plan, plan.folder / "journal.jsonl", make_source(plan), fresh)
        assert str(fresh._brackets[0]._rungs) == str(scheduler._brackets[0]._rungs), "rungs hold what they held"


@pytest.mark.parametrize("lines", [1, 2])
def test_a_copy_that_pbt_decided_on_is_made_although_the_driver_died_before(tmp_path, lines):
    """decision EXPLOIT, end, proposed: cut after the first and the second."""
    plan = plan_of("grid", storage=tmp_path, name="s", scheduler="pbt")
    plan.folder.mkdir()
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    config = proposer.suggest("t0")
    per_seed = {
        s: {"run_key": k, "status": "training", "epoch": 4, "step": 24, "values": {"test_loss": 0.5}}
        for s, k in config["runs"].items()
    }
    identity = {"trial": "t0", "config_key": config["config_key"], "epoch": 4}
    journal.write("report", **identity, progress=4.0, values={"test_loss": 0.5}, per_seed=per_seed, done=False)
    copied = {
        "config_key": "c2", "label": "copy", "algorithm": "", "point": config["point"], "values": config["values"],
        "program": {}, "hyper": {}, "runs": {"0": "p0", "1": "p1"}, "epochs": 9, "parent": {"0": ["d0", 4]},
    }  # fmt: skip
    journal.write("decision", **identity, decision="EXPLOIT", copy=copied)
    if lines == 2:
        journal.write("end", **identity, stop_reason="stopped", error=None)
    journal.close()
    past, _ = resume(plan)
    events = [event for event, _ in read(plan.folder / "journal.jsonl")][2:]
    assert [event["event"] for event in events] == ["decision", "end", "proposed"]
    assert (events[2]["config_key"], events[2]["index"], events[2]["runs"]) == ("c2", -1, {"0": "p0", "1": "p1"})
    (open_trial,) = past.unfinished
    assert (open_trial["config_key"], open_trial["reported"]) == ("c2", 4)
    assert resume(plan)[0].unwritten == []


def test_a_seed_that_diverges_after_the_restart_counts_as_the_worst_of_before(plan):
    whole = write_sweep(plan, make_scheduler(plan))
    first = next(i for i, e in enumerate(whole) if e["event"] == "decision") + 1
    cut(plan, first)
    past, _ = resume(plan)
    (open_trial,) = past.unfinished
    assert open_trial["worst"] == {"test_loss": 0.5, "train_loss": 0.5}
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(
        plan, make_source(plan), journal, lambda event: None, past.proposed, past.seeds_used, past.unfinished
    )
    assert proposer.suggest("again")["worst"] == {"test_loss": 0.5, "train_loss": 0.5}


@pytest.mark.parametrize("searcher", ["random", "optuna", "hyperopt"])
@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_retry_failed_takes_back_what_failed_and_nothing_else(tmp_path, searcher, scheduler):
    dimensions = ["lr=1e-3..0.3:log"]
    plan = plan_of(
        "grid", storage=tmp_path, name="s", scheduler=scheduler, dimensions=dimensions, searcher=searcher, trials=4
    )
    plan.folder.mkdir()
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    configs = {f"t{i}": proposer.suggest(f"t{i}") for i in range(4)}
    for trial, reason in zip(configs, ("crashed", "finished", "oom", "diverged"), strict=True):
        identity = {"trial": trial, "config_key": configs[trial]["config_key"], "epoch": 1}
        per_seed = {s: {"run_key": k, "status": "training", "values": {}} for s, k in configs[trial]["runs"].items()}
        for progress, done in ((1.0, False), (2.0, True)):
            if done and reason in ("crashed", "oom"):
                break
            journal.write(
                "report", **identity, progress=progress, values={"test_loss": 0.5}, per_seed=per_seed, done=done
            )
            journal.write("decision", **identity, decision="STOP" if done else "CONTINUE")
        journal.write("end", **identity, stop_reason=reason, error=None)
    journal.close()
    assert resume(plan)[0].unfinished == []
    past, _ = resume(plan, retry=True)
    assert past.retried == 3
    assert [(e["trial"], e["reported"]) for e in past.unfinished] == [("t0", 1), ("t2", 1), ("t3", 1)]
    assert [kind for kind, _ in past.unwritten] == ["retry"] * 3
    # they run: under new ids, and one of them fails again
    journal = Journal(plan.folder / "journal.jsonl")
    proposer = Proposer(
        plan, make_source(plan), journal, lambda event: None, past.proposed, past.seeds_used, past.unfinished
    )
    for i, reason in enumerate(("finished", "crashed", "finished")):
        config = proposer.suggest(f"r{i}")
        identity = {"trial": f"r{i}", "config_key": config["config_key"], "epoch": 9}
        per_seed = {s: {"run_key": k, "status": "finished", "values": {}} for s, k in config["runs"].items()}
        for progress, done in ((5.0, False), (9.0, True)):
            journal.write(
                "report", **identity, progress=progress, values={"test_loss": 0.3}, per_seed=per_seed, done=done
            )
            journal.write("decision", **identity, decision="STOP" if done else "CONTINUE")
            proposer.on_trial_result(f"r{i}", {"progress": progress, "test_loss": 0.3})
        proposer.on_trial_complete(f"r{i}", {"progress": 9.0, "test_loss": 0.3, "stop_reason": reason})
        journal.write("end", **identity, stop_reason=reason, error=None)
    assert proposer.remaining == 0
    journal.close()
    assert resume(plan)[0].unfinished == []
    past, _ = resume(plan, retry=True)
    assert [e["trial"] for e in past.unfinished] == ["r1"]
    assert json.dumps(past.unwritten)


@dataclass(eq=False)
class Member:
    """As much of a Tune trial as PBT asks for when one is added."""

    trial_id: str
    config: dict
    experiment_tag: str = ""
    run_metadata = SimpleNamespace(
        checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
    )

    def is_finished(self) -> bool:
        return False


def test_a_resumed_population_is_compared_with_all_its_members(tmp_path):
    plan = plan_of("grid", storage=tmp_path, name="s", scheduler="pbt")
    pbt = make_scheduler(plan)
    trials = [Member(f"n{i}", {"runs": {"0": f"r{i}"}, "point": {}}) for i in range(4)]
    for i, trial in enumerate(trials):
        pbt.adopt(trial.trial_id, None, {"progress": 4.0, "test_loss": 0.1 * (i + 1), "epoch": 4} if i else None)
        pbt.on_trial_add(None, trial)
    lower, upper = pbt._quantiles()
    assert [t.trial_id for t in upper] == ["n1"], "the smallest loss"
    assert [t.trial_id for t in lower] == ["n3"]
    state = pbt._trial_state[trials[1]]
    assert (state.last_result["epoch"], state.last_perturbation_time) == (4, 4.0)
    with state.last_checkpoint.as_directory() as folder:
        assert json.loads((Path(folder) / "pointer.json").read_text())["runs"] == {"0": "r1"}
    assert pbt._trial_state[trials[0]].last_score is None, "one that has not reported is compared with nobody"
