"""What a sweep's driver and hosts write with, for each kind of storage: a folder, or a bucket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from trainables.family import BadValue
from tuning.journal import Journal
from tuning.lease import Lease
from tuning.segments import SegmentJournal
from tuning.shipping import LogShipper, send_log
from tuning.storage import Bucket, StorageError, Store
from tuning.sweep import SweepPlan


def refuse_existing(plan: SweepPlan) -> None:
    """A sweep's name is taken, or its storage cannot be written: `BadValue`, before anything is written."""
    if isinstance(plan.store, Bucket):
        check_bucket(plan.bucket)
    if plan.store.exists("sweep.json") if isinstance(plan.store, Bucket) else plan.folder.exists():
        raise BadValue(
            f"the sweep '{plan.name}' already exists in {plan.where}: continue it with --resume {plan.name}, or "
            "choose another --name"
        )
    if plan.bucket:
        return
    parent = plan.storage
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadValue(f"--storage {plan.storage} cannot be written: {parent} is not a writable folder")


def check_bucket(url: str) -> None:
    """`BadValue` where this machine cannot write and read there."""
    try:
        Bucket(url).check()
    except StorageError as error:
        raise BadValue(f"--storage {error}") from None


def make_curves(place: Store, schema_metadata: dict[bytes, bytes], session: datetime, label: str) -> Any:
    from tuning.curves import CurveWriter

    device = label.replace(":", "").replace("@", "-").replace("/", "-")
    return CurveWriter(place, f"{session:%Y%m%dT%H%M%S%f}-{device}-{os.getpid()}", schema_metadata)


def make_checkpoints(place: Store) -> Any:
    from tuning.checkpoints import CheckpointStore

    return CheckpointStore(place.at("checkpoints"))


def make_log(place: Store, label: str) -> str:
    """The file that a host logs to: everybody's one log.txt, or one of its own machine that is sent on."""
    if isinstance(place, Bucket):
        return send_log(place, label)
    return f"{place}/log.txt"


def open_journal(plan: SweepPlan, may_write: Callable[[], None]) -> Journal:
    """The sweep's journal, for its driver; plan.folder / journal.jsonl then holds what there is of it so far."""
    path = plan.folder / "journal.jsonl"
    return SegmentJournal(plan.store, path, may_write) if isinstance(plan.store, Bucket) else Journal(path)


def tune_storage(plan: SweepPlan) -> dict[str, Any]:
    """Where Tune keeps what it wants to keep: pointers to our checkpoints, read by trials on any node."""
    if isinstance(plan.store, Bucket):
        return plan.store.at("ray").for_tune()
    return {"storage_path": str(plan.folder / "ray")}


@contextlib.contextmanager
def shipped_log(plan: SweepPlan) -> Iterator[None]:
    if not isinstance(plan.store, Bucket):
        yield
        return
    shipper = LogShipper(plan.folder / "log.txt", plan.store, "driver")
    try:
        yield
    finally:
        shipper.close()


@contextlib.contextmanager
def only_driver(plan: SweepPlan) -> Iterator[Callable[[], None]]:
    """Be the one driver of a sweep; yields what raises when that is over (object storage only)."""
    if not isinstance(plan.store, Bucket):
        yield lambda: None
        return
    lease = Lease(plan.store)
    lease.take()
    try:
        yield lease.check
    finally:
        lease.release()
