"""What a storm changed: a sweep that was hit again and again against its undisturbed twin.

Everything is counted, nothing asserted: a count of the storm's table, and a line that says where for each thing found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from mlflow import MlflowClient

from tests.toy_sweeps import Swept

TABLE = ["stop_reason", "config_stop_reason", "rung", "epoch", "step", "epochs_total", "final.test_loss",
         "final.train_loss", "best.test_loss", "best.train_loss", "parent_run_key"]  # fmt: skip


@dataclass
class Verdict:
    """Findings by kind."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.changed or self.curves)

    def lines(self) -> list[str]:
        return [f"{kind}: {line}" for kind, lines in vars(self).items() for line in lines]


def judge(swept: Swept, twin: Swept, exact: bool, kept: bytes, uri: str) -> Verdict:
    """Compare.

    Args:
        swept: what the storm left.
        twin: the same sweep undisturbed. Where not `exact`, one that stops nothing, so that its curves are whole.
        exact: whether decisions do not depend on arrival order: then all must be equal bit for bit.
        kept: the journal when the driver died last: what it says must still stand.
        uri: where MLflow's runs are.
    """
    verdict = Verdict()
    journal = (swept.folder / "journal.jsonl").read_bytes()
    if not journal.startswith(kept[: kept.rfind(b"\n") + 1]):
        verdict.changed.append("the journal from before a kill was not kept")
    _compare_journal(verdict, swept, twin, exact)
    _compare_tables(verdict, swept, twin, exact)
    _compare_curves(verdict, swept, twin, exact)
    _compare_mlflow(verdict, swept, uri)
    return verdict


def judge_mlflow(swept: Swept, uri: str) -> Verdict:
    """Compare what MLflow at `uri` has of a sweep with what is on disk."""
    verdict = Verdict()
    _compare_mlflow(verdict, swept, uri)
    return verdict


def decisions(swept: Swept) -> dict[str, list[tuple]]:
    """What was decided of each config, in order: independent of restarts and trial ids."""
    made: dict[str, list[tuple]] = {}
    for event in swept.events("decision"):
        made.setdefault(event["config_key"], []).append((event["epoch"], event["decision"]))
    return made


def ends(swept: Swept) -> dict[str, list[tuple]]:
    made: dict[str, list[tuple]] = {}
    for event in swept.events("end"):
        made.setdefault(event["config_key"], []).append((event["stop_reason"], event["epoch"]))
    return made


def _compare_journal(verdict: Verdict, swept: Swept, twin: Swept, exact: bool) -> None:
    for kind in ("proposed", "report", "decision", "end"):
        seen = Counter((event["config_key"], event.get("epoch")) for event in swept.events(kind))
        verdict.doubled += [f"{kind} of {key} {count} times" for key, count in seen.items() if count > 1]
    for key, made in ends(swept).items():
        if len(made) > 1:
            verdict.doubled.append(f"{key} ended {made}")
    reported = {(event["config_key"], event["epoch"]) for event in swept.events("report")}
    decided = {(event["config_key"], event["epoch"]) for event in swept.events("decision")}
    verdict.changed += [f"no decision on {key}" for key in sorted(reported ^ decided)]
    stopped = {key: [epoch for epoch, decision in made if decision == "STOP"] for key, made in decisions(swept).items()}
    for key, made in decisions(swept).items():
        if stopped[key] and made[-1][0] != stopped[key][0]:
            verdict.changed.append(f"{key} went on after it was stopped: {made}")
    if exact:
        mine, other = decisions(swept), decisions(twin)
        for key in mine.keys() | other.keys():
            if mine.get(key) != other.get(key):
                verdict.changed.append(f"decisions of {key}: {mine.get(key)} instead of {other.get(key)}")
        order = [[event["config_key"] for event in side.events("proposed")] for side in (swept, twin)]
        if order[0] != order[1]:
            verdict.changed.append(f"proposed {order[0]} instead of {order[1]}")


def _compare_tables(verdict: Verdict, swept: Swept, twin: Swept, exact: bool) -> None:
    mine, other = swept.runs, twin.runs
    doubled = mine.run_key[mine.run_key.duplicated()]
    verdict.doubled += [f"{key} twice in runs.parquet" for key in doubled]
    mine, other = mine.drop_duplicates("run_key").set_index("run_key"), other.set_index("run_key")
    verdict.lost += [f"{key} is not in runs.parquet" for key in other.index.difference(mine.index)]
    verdict.doubled += [f"{key} is not in the twin" for key in mine.index.difference(other.index)]
    whole = ("finished", "stopped", "diverged")
    for key in mine.index.intersection(other.index):
        if mine.loc[key, "stop_reason"] not in whole:
            verdict.lost.append(f"{key} is {mine.loc[key, 'stop_reason']}: {mine.loc[key, 'error']}")
        elif exact:
            columns = [name for name in TABLE if name in other]
            pairs = [(name, mine.loc[key].get(name), other.loc[key, name]) for name in columns]
            verdict.changed += [f"{key} {name}: {a} instead of {b}" for name, a, b in pairs if not _same(a, b)]


def _compare_curves(verdict: Verdict, swept: Swept, twin: Swept, exact: bool) -> None:
    runs = swept.runs.drop_duplicates("run_key").set_index("run_key")
    for kind, axis in (("epochs", "epoch"), ("steps", "step")):
        by = ["run_key", axis]
        mine, other = swept.table(kind).set_index(by), twin.table(kind).set_index(by)
        if "time" in mine:
            mine, other = mine.drop(columns="time"), other.drop(columns="time")
        ends_at = runs[axis]
        wanted = other[[at <= ends_at.get(key, 0) for key, at in other.index]]
        if exact:
            wanted = other
        missing = wanted.index.difference(mine.index)
        verdict.curves += [f"{len(missing)} rows of {kind} are lost: {list(missing[:3])}"] if len(missing) else []
        if exact and len(extra := mine.index.difference(other.index)):
            verdict.curves.append(f"{len(extra)} rows of {kind} are not the twin's: {list(extra[:3])}")
        common = mine.index.intersection(other.index)
        columns = sorted(set(mine.columns) & set(other.columns))
        a, b = mine.loc[common, columns], other.loc[common, columns]
        unequal = ~((a == b) | (a.isna() & b.isna())).all(axis=1)
        if unequal.any():
            verdict.curves.append(f"{unequal.sum()} rows of {kind} differ: {list(common[unequal][:3])}")


def _compare_mlflow(verdict: Verdict, swept: Swept, uri: str) -> None:
    """Every run once, none still RUNNING, and each curve's points once each, with the values on disk."""
    client = MlflowClient(uri)
    found = [run for experiment in client.search_experiments()
             for run in client.search_runs([experiment.experiment_id], f"tags.sweep = '{swept.folder.name}'", max_results=5000)]  # fmt: skip  # noqa: E501
    by_key: dict[tuple[str, str], list[Any]] = {}
    for run in found:
        tags = run.data.tags
        name = {"sweep": "sweep", "config": "config_key", "run": "run_key"}[tags["kind"]]
        by_key.setdefault((tags["kind"], tags[name]), []).append(run)
    verdict.doubled += [f"{len(runs)} MLflow runs for {key}" for key, runs in by_key.items() if len(runs) > 1]
    verdict.lost += [
        f"MLflow's {key} is still RUNNING" for key, runs in by_key.items() if runs[0].info.status == "RUNNING"
    ]
    table = swept.runs.drop_duplicates("run_key").set_index("run_key")
    wanted = {("sweep", swept.folder.name), *(("run", key) for key in table.index),
              *(("config", key) for key in table.config_key)}  # fmt: skip
    verdict.lost += [f"MLflow has no run for {key}" for key in sorted(wanted - by_key.keys())]
    verdict.doubled += [f"MLflow has a run for {key}" for key in sorted(by_key.keys() - wanted)]
    epochs = swept.table("epochs")
    for (kind, key), runs in by_key.items():
        if kind == "run":
            rows = epochs[epochs.run_key == key]
            for name in ("test_loss", "train_loss"):
                _compare_points(verdict, client, runs[0], name, dict(zip(rows.epoch, rows[name], strict=True)))
        elif kind == "config":
            said = {event["epoch"]: event["values"].get("test_loss", math.nan)
                    for event in swept.events("report") if event["config_key"] == key}  # fmt: skip
            _compare_points(verdict, client, runs[0], "test_loss", said)


def _compare_points(verdict: Verdict, client: MlflowClient, run: Any, name: str, said: Mapping[int, float]) -> None:
    said = {int(step): value for step, value in said.items() if math.isfinite(value)}
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
    label = f"{name} of {run.data.tags['kind']} {run.data.tags.get('run_key') or run.data.tags.get('config_key')}"
    steps = Counter(step for step, _ in points)
    if twice := [step for step, count in steps.items() if count > 1]:
        verdict.doubled.append(f"MLflow has points of {label} twice: {sorted(twice)[:8]}")
    if lost := sorted(said.keys() - steps.keys()):
        verdict.lost.append(f"MLflow has no points of {label} at {lost[:8]}")
    wrong = [(step, value) for step, value in points if not _same(value, said.get(step, math.nan))]
    if wrong:
        verdict.curves.append(f"MLflow's {label} differs: {wrong[:3]}")


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or (pd.isna(a) and pd.isna(b)))
