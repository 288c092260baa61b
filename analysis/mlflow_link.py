"""The one place of this package that speaks to MLflow: description and artifacts of a sweep's run."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from analysis.errors import UserError
from analysis.store import Sweep

DESCRIPTION = 8000
"""MLflow's longest tag value, characters."""

PATIENCE = 3.0
"""Seconds to wait for a tracking server to answer; MLflow itself would retry for minutes."""


def tracking_uri(sweep: Sweep, given: str | None = None) -> str | None:
    """Where the sweep was tracked: as given, else what its sweep.json says, else its storage's own database, else None.

    The database under the storage stands in for a sqlite path that does not exist here (written relative to another
    folder, or on another machine).
    """
    if given:
        return given
    stored = _whole(sweep, sweep.info.get("tracking_uri"))
    own = sweep.folder.parent / "mlflow.db"
    if stored and not (
        stored.startswith("sqlite:") and _sqlite_path(stored) != own and not _sqlite_path(stored).exists()
    ):
        return str(stored)
    return f"sqlite:///{own}" if own.exists() else None


def _whole(sweep: Sweep, stored: str | None) -> str | None:
    """The URI with its password, which stands in a file of its own that only its owner can read."""
    path = sweep.folder / "secrets.json"
    try:
        return str(json.loads(path.read_text())["tracking_uri"]) if path.is_file() else stored
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): give --tracking-uri") from error


def shown(uri: str) -> str:
    """A URI without what stands before its @."""
    return re.sub(r"(://(?:[^\s/@:]*:)?)[^\s/]+(?=@)", r"\1***", uri)


def log_to_sweep_run(
    sweep: Sweep,
    uri: str,
    files: Sequence[Path] = (),
    description: str | None = None,
    folder: str = "report",
) -> str:
    """Logs files as artifacts under `folder`, and sets the description, on the sweep's MLflow run. Returns its id.

    MLflow cuts a description after 8,000 characters, where a reader's own words stand: runs are left out instead.

    The run is the one with the tags `sweep` = the sweep's name and `kind` = `sweep`; the newest of several.

    Raises:
        UserError: the server does not answer, or has no such run.
    """
    _answers(uri)
    client = _client(uri)
    run_id = _sweep_run(client, sweep.name, uri)
    if description is not None:
        client.set_tag(run_id, "mlflow.note.content", fitting(description))
    for file in files:
        client.log_artifact(run_id, str(file), folder)
    return run_id


def fitting(text: str, limit: int = DESCRIPTION) -> str:
    """A journal cut to `limit` characters: first the list of runs from its end, then the text's middle."""
    lines = text.split("\n")
    lines[0] = re.sub(r"^# (.*)$", r"**\1**", lines[0])  # MLflow sets a title's lines on top of one another
    left_out = 0
    end = next((i for i, line in enumerate(lines) if line == "Observations:"), len(lines))
    listed = [i for i, line in enumerate(lines[:end]) if line.startswith("- ")]
    size = len(text) + 60
    while size > limit and len(listed) > 5:
        size -= len(lines.pop(listed.pop())) + 1
        left_out += 1
    if left_out:
        lines.insert(listed[-1] + 1, f"- ... {left_out} more lines in the artifact report/journal.md")
    cut = "\n".join(lines)
    if len(cut) <= limit:
        return cut
    half = (limit - 60) // 2
    return f"{cut[:half]}\n... (all of it: the artifact report/journal.md)\n{cut[-half:]}"


def _sweep_run(client: Any, name: str, uri: str) -> str:
    quoted = "'" + name.replace("'", "''") + "'" if '"' in name else f'"{name}"'
    experiments = client.search_experiments()
    while experiments.token:
        more = client.search_experiments(page_token=experiments.token)
        experiments.extend(more)
        experiments.token = more.token
    runs = client.search_runs(
        [experiment.experiment_id for experiment in experiments],
        filter_string=f'tags.sweep = {quoted} and tags.kind = "sweep"',
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not runs:
        raise UserError(f"{shown(uri)} has no run of the sweep '{name}' (tags sweep = {name}, kind = sweep)")
    return str(runs[0].info.run_id)


def _answers(uri: str) -> None:
    """Raises `UserError` at once where MLflow would retry for minutes or make a new, empty database."""
    parts = urlparse(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
        except OSError as error:
            raise UserError(f"the tracking server {shown(uri)} does not answer: {error}") from error
    elif parts.scheme == "sqlite" and not _sqlite_path(uri).exists():
        raise UserError(f"no MLflow database at {_sqlite_path(uri)}")


def _sqlite_path(uri: str) -> Path:
    return Path(uri.split(":///", 1)[-1])


def _client(uri: str) -> Any:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient  # takes seconds: only the commands that log pay for it

    return MlflowClient(tracking_uri=uri)
