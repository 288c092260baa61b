"""MLflow, from what is on disk: sweep run -> config runs -> seed runs. The only module of `tuning` that imports MLflow.

The journal and the epochs' Parquet files are the source; this is a projection of them that may lag, stop, and start
again. A run is found by its tags before it is made, points carry the time at which they were recorded, and how far the
delivery got is saved after each batch: delivering twice changes nothing, and a server that is away costs a delay.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tuning.aggregates import config_values, pareto_front, result, summary
from tuning.journal import Event, read
from tuning.mlflow_page import page_tags
from tuning.objectives import COSTS, searched, value
from tuning.runs import RunTable, load_plain

CURVE_POINTS = 1000
STEPS_ARTIFACT_BYTES = 100_000_000
STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FAILED",
    "oom": "FAILED",
    "crashed": "FAILED",
    "cancelled": "KILLED",
}


class Tracker:
    """Delivers one sweep.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path):
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        from mlflow import MlflowClient

        self._folder = folder
        self._plain = load_plain(folder)
        self._client = MlflowClient(self._plain["tracking_uri"])
        self._path = folder / "tracking.json"
        self._state: dict[str, Any] = {"offset": 0, "parts": [], "logged": {}, "artifacts": False}
        if self._path.is_file():
            self._state = json.loads(self._path.read_text())
        self._table = RunTable(self._plain)
        self._experiment = ""
        self._ids: dict[tuple[str, str], str] = {}  # (kind, key) -> MLflow run id
        self._pending: dict[str, dict[str, list]] = defaultdict(lambda: {"metrics": [], "params": [], "tags": []})
        self._status: dict[str, tuple[str, int]] = {}
        self._seeds: dict[str, frozenset[str]] = {}  # config -> its runs, as first proposed
        self._waiting: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}  # (config, epoch) -> run -> its row
        self._confirm: Event | None = None
        self.finished = False

    def connect(self) -> None:
        """Find or make the experiment and the sweep's run, and every run delivered before."""
        name = f"{self._plain['family']}/{self._plain['sweep']}"
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            uri = self._plain["tracking_uri"]
            location = (self._folder.parent / "artifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
            # the tag opens MLflow's page for training runs; without it version 3 takes an experiment for a GenAI one
            kind = {"mlflow.experimentKind": "custom_model_development"}
            self._experiment = self._client.create_experiment(name, artifact_location=location, tags=kind)
        else:
            self._experiment = experiment.experiment_id
        for key, text in page_tags(self._plain).items():
            if experiment is None or experiment.tags.get(key) != text:
                self._client.set_experiment_tag(self._experiment, key, text)
        self._find_runs()
        self._sweep_run()
        # the table needs the whole past, the delivery only what is new
        for event, offset in read(self._folder / "journal.jsonl"):
            if offset <= self._state["offset"]:
                self._table.apply(event)
                self._note_runs(event)
                self._note_finish(event)
        for name in self._state["parts"]:  # epochs that some seeds of a config had reached, and others not yet
            for row in pq.read_table(self._folder / "epochs" / name).to_pylist():
                if self._shown(row):
                    self._gather(row)

    def deliver(self) -> int:
        """Send what is new on disk. Returns the number of events and points sent; raises when the server is away."""
        from mlflow.entities import Metric, Param, RunTag

        if not self._experiment:
            self.connect()
        offset, sent = self._state["offset"], 0
        for event, after in read(self._folder / "journal.jsonl", offset):
            self._table.apply(event)
            self._note_runs(event)
            self._event(event)
            self._note_finish(event)
            offset, sent = after, sent + 1
        new_parts, logged = self._new_points()
        for run_id, content in self._pending.items():
            metrics = [Metric(*entry) for entry in content["metrics"]]
            # a config that was proposed again has its params twice: MLflow takes each name once a call
            params = [Param(key, str(value)[:6000]) for key, value in dict(content["params"]).items()]
            tags = [RunTag(key, str(value)[:8000]) for key, value in dict(content["tags"]).items()]
            sent += len(metrics)
            for metric_part, param_part, tag_part in _batches(metrics, params, tags):
                self._client.log_batch(run_id, metrics=metric_part, params=param_part, tags=tag_part)
        for run_id, (status, at) in self._status.items():
            if status == "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            else:
                self._client.set_terminated(run_id, status, at)
        self._pending.clear()
        self._status.clear()
        self._state["offset"] = offset
        self._state["parts"] += new_parts
        self._state["logged"].update(logged)
        self._save()
        return sent

    def artifacts(self) -> None:
        """The command and space, the runs table and the curves, on the sweep's run."""
        run = self._ids["sweep", self._plain["name"]]
        for name in ("sweep.json", "runs.parquet"):
            if (self._folder / name).is_file():
                self._client.log_artifact(run, str(self._folder / name))
        for kind in ("epochs", "steps", "covariates"):
            folder = self._folder / kind
            if not folder.is_dir():
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            if kind == "epochs" or size <= STEPS_ARTIFACT_BYTES:
                self._client.log_artifacts(run, str(folder), kind)
            else:
                self._client.set_tag(run, f"{kind}_folder", str(folder.resolve()))

    # --- runs ---

    def _find_runs(self) -> None:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.sweep = '{self._plain['name']}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                kind = run.data.tags.get("kind", "")
                key = {"sweep": "sweep", "config": "config_key", "run": "run_key"}.get(kind)
                if key:
                    self._ids[kind, run.data.tags[key]] = run.info.run_id
            token = page.token
            if not token:
                return

    def _sweep_run(self) -> None:
        plain = self._plain
        if ("sweep", plain["name"]) in self._ids:
            return
        tags = {
            "kind": "sweep",
            "family": plain["family"],
            "sweep": plain["name"],
            "git_commit": plain["git"]["commit"],
            "git_dirty": str(plain["git"]["dirty"]).lower(),
            "mlflow.note.content": plain["doc"],
        }
        started = int(datetime.fromisoformat(plain["started_at"]).timestamp() * 1000)
        run = self._client.create_run(self._experiment, started, tags, plain["name"])
        self._ids["sweep", plain["name"]] = run.info.run_id
        shown = ("sweep", "searcher", "seeds", "seed", "trials", "metric", "engine", "lanes")
        params = {name: plain[name] for name in shown} | {"scheduler": plain["scheduler"]["name"]}
        params["metric"] = ",".join([plain["metric"], *plain.get("others", ())])
        self._pending[run.info.run_id]["params"] += params.items()

    def _run(self, kind: str, key: str, parent: str, name: str, tags: Mapping[str, str], at: int) -> str:
        """The MLflow run of a config or a seed, made if it is new."""
        if (kind, key) not in self._ids:
            common = {
                "kind": kind,
                "mlflow.parentRunId": parent,
                "family": self._plain["family"],
                "sweep": self._plain["name"],
                "git_commit": self._plain["git"]["commit"],
                "git_dirty": str(self._plain["git"]["dirty"]).lower(),
            }
            run = self._client.create_run(self._experiment, at, {**common, **tags}, name)
            self._ids[kind, key] = run.info.run_id
        return self._ids[kind, key]

    # --- events ---

    def _note_runs(self, event: Event) -> None:
        if event["event"] == "proposed":
            self._seeds.setdefault(event["config_key"], frozenset(event["runs"].values()))

    def _note_finish(self, event: Event) -> None:
        if event["event"] in ("begin", "finish"):
            self.finished = event["event"] == "finish"
        elif event["event"] == "confirm":
            self._confirm = event

    def _event(self, event: Event) -> None:
        at = int(datetime.fromisoformat(event["time"]).timestamp() * 1000)
        kind = event["event"]
        if kind == "begin":
            self._status[self._ids["sweep", self._plain["name"]]] = ("RUNNING", at)
        elif kind == "proposed":
            self._propose(event, at)
        elif kind == "resumed":
            for key in [*self._table.runs_of[event["trial"]]]:
                self._status[self._ids["run", key]] = ("RUNNING", at)
            self._status[self._ids["config", event["config_key"]]] = ("RUNNING", at)
        elif kind == "report":
            self._report(event, at)
        elif kind == "confirm":
            tags = {"confirm": ", ".join(entry["label"] for entry in event["chosen"]) or "no config ran to its end"}
            self._pending[self._ids["sweep", self._plain["name"]]]["tags"] += tags.items()
        elif kind == "race":
            alive = ", ".join(entry["label"] for entry in event["alive"])
            tags = {"race": event["verdict"] or "going on", "race_left": alive}
            self._pending[self._ids["sweep", self._plain["name"]]]["tags"] += tags.items()
        elif kind == "end":
            self._end(event, at)
        elif kind == "finish":
            self._finish(event, at)

    def _propose(self, event: Event, at: int) -> None:
        arms = {name: value for name, value in event["point"].items() if "." not in name}
        params = {**arms, **event["program"], **event["hyper"]}
        phase = event.get("phase", "search")
        config = self._run(
            "config",
            event["config_key"],
            self._ids["sweep", self._plain["name"]],
            event["label"],
            {"algorithm": event["algorithm"], "config_key": event["config_key"]},
            at,
        )
        self._pending[config]["params"] += params.items()
        for seed, key in event["runs"].items():
            run = self._run(
                "run",
                key,
                config,
                f"{'confirm ' if phase == 'confirm' else ''}seed {seed} · {event['label']}",
                {
                    "phase": phase,
                    "algorithm": event["algorithm"],
                    "config_key": event["config_key"],
                    "run_key": key,
                    "seed": str(seed),
                },
                at,
            )
            self._pending[run]["params"] += [*params.items(), ("seed", seed)]

    def _report(self, event: Event, at: int) -> None:
        """The config's own curve: of the seeds it was proposed with, and beside it of those it is confirmed on."""
        phase = self._table.rows[self._table.runs_of[event["trial"]][0]]["phase"]
        metric = self._plain["metric"]
        name = {"search": metric, "confirm": f"confirm/{metric}"}.get(phase)
        if name:
            run = self._ids["config", event["config_key"]]
            self._metrics(run, {name: event["values"].get(metric)}, at, event["epoch"])

    def _end(self, event: Event, at: int) -> None:
        keys = self._table.runs_of.get(event["trial"], [])
        rows = [self._table.rows[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            run = self._ids["run", key]
            self._pending[run]["tags"] += _tags(row, row["stop_reason"])
            spent = {"device_seconds": row["device_seconds"], "epochs": row["epoch"]}  # tags do not sort as numbers
            self._metrics(run, {**summary(row), **spent}, at, row["epoch"])
            self._status[run] = (STATUS.get(row["stop_reason"], "KILLED"), at)
        self._describe_config(event["config_key"], event["stop_reason"], at)

    def _describe_config(self, config_key: str, reason: str, at: int) -> None:
        """Mean, spread and number of seeds of everything the config's runs ended with."""
        rows = [row for row in self._table.rows.values() if row["config_key"] == config_key]
        run = self._ids["config", config_key]
        costs = [name for name in self._plain.get("others", ()) if name in COSTS]
        values = config_values(rows, {*costs, "device_seconds"})
        values["epochs"] = float(min(row["epoch"] for row in rows))
        total = {**rows[0], "device_seconds": sum(row["device_seconds"] for row in rows)}
        self._metrics(run, values, at, max(row["epoch"] for row in rows))
        self._pending[run]["tags"] += _tags(total, reason)
        self._status[run] = (STATUS.get(reason, "KILLED"), at)

    def _finish(self, event: Event, at: int) -> None:
        sweep = self._ids["sweep", self._plain["name"]]
        metric, mode = self._plain["metric"], self._plain["mode"]
        rows = list(self._table.rows.values())
        finals: dict[str, list[float]] = defaultdict(list)
        for row in searched(rows):
            if row["stop_reason"] == "finished" and math.isfinite(number := value(row, metric)):
                finals[row["config_key"]].append(number)
        means = [math.fsum(numbers) / len(numbers) for numbers in finals.values()]
        if means:  # a config's mean: the best of all runs would be the luckiest seed
            self._metrics(sweep, {f"best/{metric}": max(means) if mode == "max" else min(means)}, at, 0)
        metrics, tags = result(rows, self._confirm, self._plain)
        self._metrics(sweep, metrics, at, 0)
        self._pending[sweep]["tags"] += tags.items()
        self._show_front(sweep, pareto_front(rows, self._plain))
        for row in rows:
            if row["stop_reason"] == "cancelled":
                for run in (self._ids["run", row["run_key"]], self._ids["config", row["config_key"]]):
                    self._pending[run]["tags"].append(("stop_reason", "cancelled"))
                    self._status[run] = ("KILLED", at)
        self._status[sweep] = ("FINISHED" if event["reason"] == "done" else "KILLED", at)

    def _show_front(self, sweep: str, front: list[str] | None) -> None:
        """Of several objectives: which configs nothing beats in all of them."""
        if front is None:
            return
        labels = {row["config_key"]: row["label"] for row in self._table.rows.values()}
        for key in labels:
            self._pending[self._ids["config", key]]["tags"].append(("pareto", str(key in front).lower()))
        self._pending[sweep]["tags"].append(("pareto_front", "; ".join(labels[key] for key in front)))

    def _metrics(self, run: str, values: Mapping[str, float | None] | Mapping[str, float], at: int, step: int) -> None:
        for name, number in values.items():
            if number is not None and math.isfinite(number):
                self._pending[run]["metrics"].append((name, float(number), at, int(step)))

    # --- curves ---

    def _new_points(self) -> tuple[list[str], dict[str, int]]:
        """Queue the points of part files not read before; at most about CURVE_POINTS a curve, the last always."""
        folder = self._folder / "epochs"
        known = set(self._state["parts"])
        new = sorted(path for path in folder.glob("*.parquet") if path.name not in known) if folder.is_dir() else []
        read_parts, logged = [], dict[str, int]()
        for path in new:
            rows = pq.read_table(path).to_pylist()
            if any(("run", row["run_key"]) not in self._ids for row in rows):
                continue  # its proposal is not in the journal yet
            read_parts.append(path.name)
            for row in rows:
                self._point(row, logged)
        return read_parts, logged

    def _shown(self, row: dict[str, Any]) -> bool:
        """Whether a curve of about CURVE_POINTS points has this one."""
        total = self._table.rows[row["run_key"]]["epochs_total"]
        return row["epoch"] % -(-total // CURVE_POINTS) == 0 or row["epoch"] == total

    def _point(self, row: dict[str, Any], logged: dict[str, int]) -> None:
        key, epoch = row["run_key"], row["epoch"]
        if epoch <= logged.get(key, self._state["logged"].get(key, 0)) or not self._shown(row):
            return
        values = {name: row[name] for name in self._plain["metrics"] if row.get(name) is not None}
        self._metrics(self._ids["run", key], values, _milliseconds(row), epoch)
        logged[key] = epoch
        whole = self._gather(row)
        names = [name for name in self._plain["metrics"] if whole and all(r.get(name) is not None for r in whole)]
        means = {name: math.fsum(r[name] for r in whole) / len(whole) for name in names}
        if means:
            run = self._ids["config", row["config_key"]]
            self._metrics(run, means, max(map(_milliseconds, whole)), epoch)

    def _gather(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of all seeds of the config at this epoch, once the last of them is here; until then none."""
        config, place = row["config_key"], (row["config_key"], row["epoch"])
        if row["run_key"] not in self._seeds[config]:
            return []
        rows = self._waiting.setdefault(place, {})
        rows[row["run_key"]] = row
        return list(self._waiting.pop(place).values()) if len(rows) == len(self._seeds[config]) else []

    def _save(self) -> None:
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._state))
        os.replace(scratch, self._path)


def _milliseconds(row: Mapping[str, Any]) -> int:
    return int(row["time"].timestamp() * 1000)


def _tags(row: Mapping[str, Any], reason: str) -> Iterable[tuple[str, str]]:
    return [
        ("stop_reason", reason),
        ("engine", str(row.get("engine", ""))),
        ("lanes", str(row.get("lanes", ""))),
        ("device", str(row.get("device", ""))),
        ("device_seconds", f"{row['device_seconds']:.3f}"),
    ]


def _batches(metrics: list, params: list, tags: list) -> Iterable[tuple[list, list, list]]:
    """MLflow's limits: 1000 metrics, 100 params, 100 tags and 1000 entities together, a call."""
    while metrics or params or tags:
        yield metrics[:700], params[:100], tags[:100]
        metrics, params, tags = metrics[700:], params[100:], tags[100:]
