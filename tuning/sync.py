"""Deliver a sweep to MLflow: `python -m tuning.sync NAME`. A running sweep does it by itself."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from trainables.family import BadValue
from tuning import mirror
from tuning.exits import run_command
from tuning.journal_check import checked
from tuning.locks import Taken, held
from tuning.names import checked_name
from tuning.plain import load_checked
from tuning.secrets import RedactingFormatter, redact, tracking_uri

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
        checked_name("the sweep's name", name)
        look = partial(mirror.fetch, storage, name) if mirror.is_url(storage) else lambda: Path(storage) / name
        folder = look()
        plain = load_checked(folder)
        checked(folder / "journal.jsonl")
    except FileNotFoundError:
        raise BadValue(f"there is no sweep '{name}' in {storage}: {storage}/{name}/sweep.json does not exist") from None
    except mirror.StorageError as error:
        raise BadValue(str(error)) from None
    try:
        sent = deliver_alone(folder, follow, look, storage)
        if mirror.is_url(storage) and plain["tracking_uri"]:
            mirror.publish(storage, name, [folder / "tracking.json"])
    except (Away, Taken, mirror.StorageError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    if not follow:
        typer.echo(f"{name}: delivered, {sent} new events and points")


class Away(BadValue):
    """MLflow could not be reached."""


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
                raise Taken(f"{folder.name} is being delivered by {error}: it needs no second") from None
        time.sleep(FOLLOW_SECONDS / 4)


def deliver(folder: Path, follow: int = 0, look: Callable[[], Path] | None = None, storage: str = "") -> int:
    """Deliver once, or for process `follow` until it is gone or ends our standard input, which it also writes to when
    there is something to deliver at once. Returns what was sent.

    `look` brings the folder up to date, where it is this machine's copy of a bucket's, which `storage` then names.
    Raises `Away` when the server stays away, `BadValue` when the journal is damaged.
    """
    from tuning.tracking import Tracker

    tracker, sent, away_since, over = None, 0, 0.0, not follow
    while True:
        try:
            if look:
                look()
            tracker = tracker or Tracker(folder)
            sent += tracker.deliver(patient=not over)
            away_since = 0.0
            if over:
                tracker.artifacts()
                tracker.settle()
                return sent
        except BadValue:
            raise
        except Exception as error:
            away_since = away_since or time.monotonic()
            log.warning("MLflow is away (%s): points wait on disk", error)
            tracker = None
            if (over or _finished(folder)) and time.monotonic() - away_since > PATIENCE_SECONDS:
                raise Away(
                    f"{_what_is_wrong(error, folder)}: everything is on disk, "
                    f"`python -m tuning.sync {folder.name} --storage {storage or folder.parent}` delivers it later"
                ) from error
        if over:
            time.sleep(FOLLOW_SECONDS)  # the server is away: once more
        else:
            over = not _wait(FOLLOW_SECONDS) or not _alive(follow)


def _what_is_wrong(error: Exception, folder: Path) -> str:
    if "out-of-date database schema" in str(error):
        uri = redact(tracking_uri(folder, load_checked(folder)))
        return (
            f"the MLflow database was made by another version of MLflow, and `mlflow db upgrade {uri}` has to change it"
        )
    return f"MLflow could not be reached ({type(error).__name__})"


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
    with contextlib.suppress(OSError):  # where there is a /proc: one that was killed, and whose parent does not look
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main_exit(arguments: list[str] | None = None) -> NoReturn:
    """The command line: exits with 0 delivered, 2 a mistake (one line), 3 the server stays away."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(main)
    run_command(app, arguments, "python -m tuning.sync")


if __name__ == "__main__":
    main_exit()
