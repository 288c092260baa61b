"""Deliver a sweep to MLflow: `python -m tuning.sync NAME`. A running sweep does it by itself."""

from __future__ import annotations

import logging
import os
import select
import time
from pathlib import Path
from typing import Annotated

import typer

from trainables.family import BadValue

FOLLOW_SECONDS = 2.0
PATIENCE_SECONDS = 20.0
log = logging.getLogger(__name__)


def main(
    name: Annotated[str, typer.Argument(help="the sweep's name")],
    storage: Annotated[Path, typer.Option(help="folder of sweeps", envvar="LANEWISE_STORAGE")] = Path("sweeps"),
    follow: Annotated[int, typer.Option(help="keep delivering while this process lives (0: once)", hidden=True)] = 0,
) -> None:
    """Send what MLflow has not got yet: runs, curves, final values, artifacts. Sending twice changes nothing."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s sync %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder = storage / name
    if not (folder / "sweep.json").is_file():
        typer.echo(f"there is no sweep '{name}' in {storage}: {folder / 'sweep.json'} does not exist", err=True)
        raise typer.Exit(2)
    try:
        sent = deliver(folder, follow)
    except BadValue as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    if not follow:
        typer.echo(f"{name}: delivered, {sent} new events and points")


def deliver(folder: Path, follow: int = 0) -> int:
    """Deliver once, or for process `follow` until it is gone or ends our standard input, which it also writes to when
    there is something to deliver at once. Returns what was sent.

    Raises `BadValue` when the server stays away.
    """
    from tuning.tracking import Tracker

    tracker, sent, away_since, over = None, 0, 0.0, not follow
    while True:
        try:
            tracker = tracker or Tracker(folder)
            sent += tracker.deliver()
            away_since = 0.0
            if over:
                tracker.artifacts()
                return sent
        except Exception as error:
            away_since = away_since or time.monotonic()
            log.warning("MLflow is away (%s): points wait on disk", error)
            tracker = None
            if (over or _finished(folder)) and time.monotonic() - away_since > PATIENCE_SECONDS:
                raise BadValue(
                    f"MLflow could not be reached ({type(error).__name__}): everything is on disk, "
                    f"`python -m tuning.sync {folder.name} --storage {folder.parent}` delivers it later"
                ) from error
        over = over or not _wait(FOLLOW_SECONDS) or not _alive(follow)


def _wait(seconds: float) -> bool:
    """Until standard input has something, or so long. False when it has ended."""
    ready, _, _ = select.select([0], [], [], seconds)
    return not ready or bool(os.read(0, 4096))


def _finished(folder: Path) -> bool:
    from tuning.journal import read

    last = ""
    for event, _ in read(folder / "journal.jsonl"):
        if event["event"] in ("begin", "finish"):
            last = event["event"]
    return last == "finish"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
