"""Deliver a sweep to MLflow: `python -m tuning.sync NAME`. A running sweep does it by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trainables.family import BadValue
from tuning import mirror
from tuning.locks import Taken, held
from tuning.names import checked_name
from tuning.runs import load_plain
from tuning.secrets import RedactingFormatter

FOLLOW_SECONDS = 2.0
PATIENCE_SECONDS = 20.0
log = logging.getLogger(__name__)


def main(
    name: Annotated[str, typer.Argument(help="the sweep's name")],
    storage: Annotated[
        str, typer.Option(help="folder of sweeps, or s3://BUCKET/PREFIX", envvar="LANEWISE_STORAGE")
    ] = "sweeps",
    follow: Annotated[int, typer.Option(help="keep delivering while this process lives (0: once)", hidden=True)] = 0,
) -> None:
    """Send what MLflow has not got yet: runs, curves, final values, artifacts. Sending twice changes nothing."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s sync %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        checked_name("the name", name)
        look = partial(mirror.fetch, storage, name) if mirror.is_url(storage) else lambda: Path(storage) / name
        folder = look()
        if not (folder / "sweep.json").is_file():
            raise FileNotFoundError
    except FileNotFoundError:
        typer.echo(f"there is no sweep '{name}' in {storage}: {storage}/{name}/sweep.json does not exist", err=True)
        raise typer.Exit(2) from None
    except (BadValue, mirror.StorageError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    try:
        sent = deliver_alone(folder, follow, look, storage)
        if mirror.is_url(storage) and load_plain(folder)["tracking_uri"]:
            mirror.publish(storage, name, [folder / "tracking.json"])
    except (BadValue, mirror.StorageError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    if not follow:
        typer.echo(f"{name}: delivered, {sent} new events and points")


def deliver_alone(folder: Path, follow: int = 0, look: Callable[[], Path] | None = None, storage: str = "") -> int:
    """`deliver`, one process at a time: two would both make the runs that neither finds. The recorder of a driver that
    was killed delivers what it left; the next one's waits for it."""
    begun = time.monotonic()
    while True:
        try:
            with held(folder / "sync.lock"):
                return deliver(folder, follow, look, storage)
        except Taken as error:
            if not follow and time.monotonic() - begun > PATIENCE_SECONDS:
                raise BadValue(f"{folder.name} is being delivered by {error}: it needs no second") from None
        time.sleep(FOLLOW_SECONDS / 4)


def deliver(folder: Path, follow: int = 0, look: Callable[[], Path] | None = None, storage: str = "") -> int:
    """Deliver once, or until the sweep has finished and process `follow` needs no more. Returns what was sent.

    `look` brings the folder up to date, where it is this machine's copy of a bucket's, which `storage` then names.
    Raises `BadValue` when the server stays away.
    """
    from tuning.tracking import Tracker

    tracker, sent, away_since = None, 0, 0.0
    while True:
        over = not follow or not _alive(follow)
        try:
            if look:
                look()
            tracker = tracker or Tracker(folder)
            sent += tracker.deliver()
            away_since = 0.0
            over = over or tracker.finished
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
                    f"`python -m tuning.sync {folder.name} --storage {storage or folder.parent}` delivers it later"
                ) from error
        time.sleep(FOLLOW_SECONDS)


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
