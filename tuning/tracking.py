"""MLflow, from what is on disk: sweep run -> config runs -> seed runs. Of `tuning` only this module and
`mlflow_database` import MLflow.

The journal and the epochs' Parquet files are the source; this is a projection of them that may lag, stop, and start
again. What is to be sent is noted on disk first and crossed out when the server has it: a delivery that was killed in
between sends the very same points again, with the times at which they were recorded, and MLflow takes a point once. So
delivering twice changes nothing, and a server that is away costs a delay.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trainables.files import write_atomically
from tuning.aggregates import config_values, cost_tags, pareto_front, result, summary
from tuning.journal import Event, read
from tuning.mlflow_database import make_database
from tuning.mlflow_page import page_tags
from tuning.objectives import COSTS, searched, value
from tuning.outbox import Outbox, Which
from tuning.parts import not_merged, parts_in
from tuning.runs import RunTable, load_plain
from tuning.secrets import tracking_uri
from tuning.tracked_runs import TrackedRuns

CURVE_POINTS, FEWEST_POINTS = 1000, 20
"""Epochs that a curve has at most, and those it has however many runs there are."""
SWEEP_POINTS = 50_000
"""Epochs that the curves of all runs have together, about: MLflow takes some 0.05 ms of a processor for each number of
each, and draws slowly what has many. Every epoch is in the sweep's `epochs` files."""
ATTEMPTS = 5
"""Times that part files are listed anew where one was merged while they were read."""
SENDERS = 8
"""Runs that are sent to a tracking server at the same time."""
STEPS_ARTIFACT_BYTES = 100_000_000
STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "diverged": "FAILED",
    "oom": "FAILED",
    "crashed": "FAILED",
    "cancelled": "KILLED",
}
log = logging.getLogger(__name__)


class Tracker:
    """Delivers one sweep.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path):
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # the client would repeat requests that make runs, and a server that only was slow would make two of each
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        from mlflow import MlflowClient

        self._folder = folder
        self._plain = load_plain(folder)
        self._sweep: Which = "sweep", self._plain["name"]
        uri = tracking_uri(folder, self._plain)
        make_database(uri)
        self._client = MlflowClient(uri)
        # a server answers several at once; one SQLite file takes one after the other
        self._at_once = SENDERS if uri.startswith("http") else 1
        self._path = folder / "tracking.json"
        self._state: dict[str, Any] = {"offset": 0, "parts": {}, "logged": {}, "artifacts": False}
        if self._path.is_file():
            try:
                self._state = json.loads(self._path.read_text())
            except ValueError:
                log.warning("%s is damaged: everything is sent again, which changes nothing", self._path)
            if isinstance(self._state["parts"], list):  # names of files, of an earlier version: points are known anyway
                self._state["parts"] = {}
                self._state.pop("sending", None)
        runs = (self._plain["trials"] or 1) * self._plain["seeds"]
        self._curve_points = max(FEWEST_POINTS, min(CURVE_POINTS, SWEEP_POINTS // runs))
        self._table = RunTable(self._plain)
        self._runs: TrackedRuns | None = None
        self._outbox = Outbox(self._state.get("held", ()))
        self._seeds: dict[str, frozenset[str]] = {}  # config -> its runs, as first proposed
        self._waiting: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}  # (config, epoch) -> run -> its row
        self._confirm: Event | None = None
        self.finished = False

    def connect(self) -> None:
        """Find or make the experiment and the sweep's run, and every run delivered before."""
        name = f"{self._plain['family']}/{self._plain['sweep']}"
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            uri = tracking_uri(self._folder, self._plain)
            # a database without a server has nowhere for files: MLflow would put them below the working directory
            server = uri.startswith(("http:", "https:"))
            location = None if server else (self._folder.parent / "artifacts").resolve().as_uri()
            # the tag opens MLflow's page for training runs; without it version 3 takes an experiment for a GenAI one
            kind = {"mlflow.experimentKind": "custom_model_development"}
            identity = self._client.create_experiment(name, artifact_location=location, tags=kind)
        else:
            identity = experiment.experiment_id
        git = self._plain["git"]
        tags = {
            "family": self._plain["family"],
            "git_commit": git["commit"],
            "git_dirty": str(git["dirty"]).lower(),
        }
        self._runs = TrackedRuns(self._client, identity, self._plain["name"], tags)
        for key, text in page_tags(self._plain).items():
            if experiment is None or experiment.tags.get(key) != text:
                self._client.set_experiment_tag(identity, key, text)
        self._sweep_run()
        # the table needs the whole past, the delivery only what is new
        for event, offset in read(self._folder / "journal.jsonl"):
            if offset <= self._state["offset"]:
                self._table.apply(event)
                self._note_runs(event)
                self._note_finish(event)
        # epochs that some seeds of a config had reached, and others not yet
        for row in self._rows_of(self._state["parts"], {}):
            if row["run_key"] in self._table.rows and self._shown(row):
                self._gather(row)

    def deliver(self, patient: bool = False) -> int:
        """Send what is new on disk. Returns the number of events and points sent; raises when the server is away.

        Args:
            patient: what is new of runs that go on may wait until it is worth a call (`tuning.outbox`).
        """
        if self._runs is None:
            self.connect()
        sent = 0
        while batch := self._state.get("sending") or self._next_batch():
            sent += self._take_events(batch["offset"])
            logged = self._points(batch["parts"])
            if "sending" not in self._state:
                self._state["sending"] = batch
                self._save()
            sent += self._send(self._outbox.due(patient))
            self._state["offset"] = batch["offset"]
            self._state["parts"].update(batch["parts"])
            self._state["logged"].update(logged)
            del self._state["sending"]
            self._save()
        if due := self._outbox.due(patient):  # held back until now
            sent += self._send(due)
            self._save()
        return sent

    def _take_events(self, offset: int) -> int:
        """The journal's events up to there. Returns how many."""
        taken = 0
        for event, after in read(self._folder / "journal.jsonl", self._state["offset"]):
            if after > offset:
                break
            self._table.apply(event)
            self._note_runs(event)
            self._event(event)
            self._note_finish(event)
            taken += 1
        return taken

    def _send(self, runs: list[Which]) -> int:
        """Send what there is of these runs; what there is of others is held. Returns the number of points."""
        points = self._outbox.points(runs)
        with ThreadPoolExecutor(self._at_once) as senders:
            for _ in senders.map(self._send_one, runs):
                pass  # raises what one of them raised
        self._outbox.drop(runs)
        self._state["held"] = self._outbox.held()
        return points

    def _send_one(self, which: Which) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run, letter = self._id(*which), self._outbox.letter(which)
        for metrics, params, tags in letter.calls():
            self._client.log_batch(
                run,
                metrics=[Metric(*point) for point in metrics],
                params=[Param(*pair) for pair in params],
                tags=[RunTag(*pair) for pair in tags],
            )
        if letter.status is not None:
            self._set_status(run, *letter.status)

    def _next_batch(self) -> dict[str, Any] | None:
        """What has come since the last one: an offset into the journal, and writer -> number of its newest part."""
        offset, known = self._state["offset"], set(self._table.rows)
        for event, after in read(self._folder / "journal.jsonl", offset):
            offset = after
            known.update(event.get("runs", {}).values())
        parts: dict[str, int] = {}
        behind: set[str] = set()
        for part in not_merged(parts_in(self._folder / "epochs")):
            if part.last <= self._state["parts"].get(part.writer, 0) or part.writer in behind:
                continue
            try:
                keys = pq.read_table(part.path, columns=["run_key"]).column("run_key").unique().to_pylist()
            except FileNotFoundError:  # merged meanwhile: the next time
                behind.add(part.writer)
                continue
            if known.issuperset(keys):
                parts[part.writer] = part.last
            else:
                behind.add(part.writer)  # its proposal is not in the journal yet
        return {"offset": offset, "parts": parts} if parts or offset > self._state["offset"] else None

    def settle(self) -> None:
        """After the last delivery: of two runs one goes, and what ended does not look as if it ran. A server that was
        frozen may have served old requests after new ones."""
        assert self._runs is not None
        status = self._runs.find()
        for row in self._table.rows.values():
            for which, reason in (
                (("run", row["run_key"]), row["stop_reason"]),
                (("config", row["config_key"]), row["config_stop_reason"]),
            ):
                if reason in STATUS and status.get(which) == "RUNNING":
                    ended = row.get("ended_at")
                    at = int(ended.timestamp() * 1000) if ended else None
                    self._set_status(self._runs[which], STATUS[reason], at)

    def _set_status(self, run_id: str, status: str, at: int | None) -> None:
        if status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, status, at)

    def artifacts(self) -> None:
        """The command and space, the runs table, the curves and the report, on the sweep's run."""
        run = self._id(*self._sweep)
        for name in ("sweep.json", "runs.parquet"):
            if (self._folder / name).is_file():
                self._client.log_artifact(run, str(self._folder / name))
        for path in sorted((self._folder / "errors").glob("*.txt")):
            if self._runs is not None and ("config", path.stem) in self._runs:
                self._client.log_artifact(self._runs["config", path.stem], str(path))
        for kind in ("epochs", "steps", "covariates"):
            folder = self._folder / kind
            if not folder.is_dir():
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            if kind == "epochs" or size <= STEPS_ARTIFACT_BYTES:
                self._client.log_artifacts(run, str(folder), kind)
            else:
                self._client.set_tag(run, f"{kind}_folder", str(folder.resolve()))
        if (self._folder / "report").is_dir():
            self._client.log_artifacts(run, str(self._folder / "report"), "report")
        journal = self._folder / "journal.md"
        if journal.is_file():
            self._client.log_artifact(run, str(journal), "report")
        description = self._folder / "report" / "description.md"
        if description.is_file():
            self._client.set_tag(run, "mlflow.note.content", description.read_text(encoding="utf-8"))

    # --- runs ---

    def _sweep_run(self) -> None:
        plain = self._plain
        started = int(datetime.fromisoformat(plain["started_at"]).timestamp() * 1000)
        assert self._runs is not None
        self._runs.need("sweep", plain["name"], plain["name"], started, {"mlflow.note.content": plain["doc"]})
        if not self._state["offset"]:
            shown = ("sweep", "searcher", "seeds", "seed", "trials", "metric", "engine", "lanes")
            params = {name: plain[name] for name in shown} | {"scheduler": plain["scheduler"]["name"]}
            params["metric"] = ",".join([plain["metric"], *plain.get("others", ())])
            self._outbox.params(self._sweep, params.items())

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
            self._outbox.status(self._sweep, "RUNNING", at)
        elif kind == "proposed":
            self._propose(event, at)
        elif kind == "resumed":
            for key in [*self._table.runs_of[event["trial"]]]:
                self._outbox.status(("run", key), "RUNNING", at)
            self._outbox.status(("config", event["config_key"]), "RUNNING", at)
        elif kind == "report":
            self._report(event, at)
        elif kind == "confirm":
            tags = {"confirm": ", ".join(entry["label"] for entry in event["chosen"]) or "no config ran to its end"}
            self._outbox.tags(self._sweep, tags.items())
        elif kind == "race":
            alive = ", ".join(entry["label"] for entry in event["alive"])
            tags = {"race": event["verdict"] or "going on", "race_left": alive}
            self._outbox.tags(self._sweep, tags.items())
        elif kind == "end":
            self._end(event, at)
        elif kind == "finish":
            self._finish(event, at)

    def _propose(self, event: Event, at: int) -> None:
        arms = {name: value for name, value in event["point"].items() if "." not in name}
        params = {**arms, **event["program"], **event["hyper"]}
        assert self._runs is not None
        parent = {"mlflow.parentRunId": self._id(*self._sweep)}
        tags = {"algorithm": event["algorithm"], "config_key": event["config_key"]}
        config = self._runs.need("config", event["config_key"], event["label"], at, {**parent, **tags})
        self._outbox.params(("config", event["config_key"]), params.items())
        tags["mlflow.parentRunId"] = config
        for seed, key in event["runs"].items():
            phase = event.get("phase", "search")
            name = f"{'confirm ' if phase == 'confirm' else ''}seed {seed} · {event['label']}"
            self._runs.need("run", key, name, at, {**tags, "phase": phase, "run_key": key, "seed": str(seed)})
            self._outbox.params(("run", key), [*params.items(), ("seed", seed)])

    def _report(self, event: Event, at: int) -> None:
        """The config's own curve: of the seeds it was proposed with, and beside it of those it is confirmed on."""
        phase = self._table.rows[self._table.runs_of[event["trial"]][0]]["phase"]
        metric = self._plain["metric"]
        name = {"search": metric, "confirm": f"confirm/{metric}"}.get(phase)
        if name:
            values = {name: event["values"].get(metric)}
            self._outbox.metrics(("config", event["config_key"]), values, at, event["epoch"])

    def _end(self, event: Event, at: int) -> None:
        keys = self._table.runs_of.get(event["trial"], [])
        rows = [self._table.rows[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            self._outbox.tags(("run", key), cost_tags(row, row["stop_reason"]))
            spent = {"device_seconds": row["device_seconds"], "epochs": row["epoch"]}  # tags do not sort as numbers
            self._outbox.metrics(("run", key), {**summary(row), **spent}, at, row["epoch"])
            self._outbox.status(("run", key), STATUS.get(row["stop_reason"], "KILLED"), at)
        self._describe_config(event["config_key"], event["stop_reason"], at)

    def _describe_config(self, config_key: str, reason: str, at: int) -> None:
        """Mean, spread and number of seeds of everything the config's runs ended with."""
        rows = self._table.of_config[config_key]
        config = "config", config_key
        costs = [name for name in self._plain.get("others", ()) if name in COSTS]
        values = config_values(rows, {*costs, "device_seconds"})
        values["epochs"] = float(min(row["epoch"] for row in rows))
        total = {**rows[0], "device_seconds": sum(row["device_seconds"] for row in rows)}
        self._outbox.metrics(config, values, at, max(row["epoch"] for row in rows))
        self._outbox.tags(config, cost_tags(total, reason))
        self._outbox.status(config, STATUS.get(reason, "KILLED"), at)

    def _finish(self, event: Event, at: int) -> None:
        metric, mode = self._plain["metric"], self._plain["mode"]
        rows = list(self._table.rows.values())
        finals: dict[str, list[float]] = defaultdict(list)
        for row in searched(rows):
            if row["stop_reason"] == "finished" and math.isfinite(number := value(row, metric)):
                finals[row["config_key"]].append(number)
        means = [math.fsum(numbers) / len(numbers) for numbers in finals.values()]
        if means:  # a config's mean: the best of all runs would be the luckiest seed
            self._outbox.metrics(self._sweep, {f"best/{metric}": max(means) if mode == "max" else min(means)}, at, 0)
        metrics, tags = result(rows, self._confirm, self._plain)
        self._outbox.metrics(self._sweep, metrics, at, 0)
        self._outbox.tags(self._sweep, tags.items())
        self._show_front(pareto_front(rows, self._plain))
        for row in rows:
            if row["stop_reason"] == "cancelled":
                for which in (("run", row["run_key"]), ("config", row["config_key"])):
                    self._outbox.tags(which, [("stop_reason", "cancelled")])
                    self._outbox.status(which, "KILLED", at)
        self._outbox.status(self._sweep, "FINISHED" if event["reason"] == "done" else "KILLED", at)

    def _show_front(self, front: list[str] | None) -> None:
        """Of several objectives: which configs nothing beats in all of them."""
        if front is None:
            return
        labels = {row["config_key"]: row["label"] for row in self._table.rows.values()}
        for key in labels:
            self._outbox.tags(("config", key), [("pareto", str(key in front).lower())])
        self._outbox.tags(self._sweep, [("pareto_front", "; ".join(labels[key] for key in front))])

    # --- curves ---

    def _points(self, parts: dict[str, int]) -> dict[str, int]:
        """Queue the points of part files, {writer: up to this number}; some of them where they are many, the last
        always. Returns run key -> the last epoch queued.

        In the order in which they were recorded: an epoch that was trained again after a kill counts as it was first,
        and part files of two hosts sort by process and not by time. A part may have been merged into a larger one since
        the batch was noted: what else that holds is sent now or found to be known later.
        """
        logged = dict[str, int]()
        for row in sorted(self._rows_of(parts, self._state["parts"]), key=lambda row: (row["time"], row["epoch"])):
            if row["run_key"] in self._table.rows:
                self._point(row, logged)
        return logged

    def _rows_of(self, parts: dict[str, int], before: dict[str, int]) -> list[dict[str, Any]]:
        """Rows of parts up to these numbers and after those before; from the start where one was merged meanwhile."""
        for attempt in range(ATTEMPTS):
            try:
                return [
                    row
                    for part in not_merged(parts_in(self._folder / "epochs"))
                    if part.first <= parts.get(part.writer, 0) and part.last > before.get(part.writer, 0)
                    for row in pq.read_table(part.path).to_pylist()
                ]
            except FileNotFoundError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _shown(self, row: dict[str, Any]) -> bool:
        """Whether MLflow's curves have this epoch: the last one, and so many others, evenly."""
        total = self._table.rows[row["run_key"]]["epochs_total"]
        return row["epoch"] % -(-total // self._curve_points) == 0 or row["epoch"] == total

    def _point(self, row: dict[str, Any], logged: dict[str, int]) -> None:
        key, epoch = row["run_key"], row["epoch"]
        if epoch <= logged.get(key, self._state["logged"].get(key, 0)) or not self._shown(row):
            return
        values = {name: row[name] for name in self._plain["metrics"] if row.get(name) is not None}
        self._outbox.metrics(("run", key), values, _milliseconds(row), epoch)
        logged[key] = epoch
        whole = self._gather(row)
        # the objective's own curve is of the config's reports, which it was judged by
        others = [name for name in self._plain["metrics"] if name != self._plain["metric"]]
        names = [name for name in others if whole and all(r.get(name) is not None for r in whole)]
        means = {name: math.fsum(r[name] for r in whole) / len(whole) for name in names}
        if means:
            self._outbox.metrics(("config", row["config_key"]), means, max(map(_milliseconds, whole)), epoch)

    def _gather(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of all seeds of the config at this epoch, once the last of them is here; until then none."""
        config, place = row["config_key"], (row["config_key"], row["epoch"])
        if row["run_key"] not in self._seeds[config]:
            return []
        rows = self._waiting.setdefault(place, {})
        rows[row["run_key"]] = row
        return list(self._waiting.pop(place).values()) if len(rows) == len(self._seeds[config]) else []

    def _id(self, kind: str, key: str) -> str:
        assert self._runs is not None
        return self._runs[kind, key]

    def _save(self) -> None:
        (self._folder / "sweep.json").stat()  # where the folder has vanished, Ray Tune makes one in its place
        write_atomically(self._path, json.dumps(self._state).encode())


def _milliseconds(row: Mapping[str, Any]) -> int:
    return int(row["time"].timestamp() * 1000)
