"""What a sweep's driver and hosts write with, for each kind of storage: a folder, or a bucket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trainables.family import BadValue
from trainables.files import write_atomically
from tuning.journal import Journal
from tuning.lease import Lease
from tuning.locks import Taken, held
from tuning.secrets import keep_uri, redact
from tuning.segments import SegmentJournal, fetch
from tuning.shipping import LogShipper, send_log
from tuning.storage import Bucket, Folder, Storage, StorageError, Store, open_storage
from tuning.sweep import SweepPlan, driver_folder


def opened(storage: str | Path) -> Storage:
    """The storage that was named, or `BadValue`."""
    try:
        return open_storage(storage)
    except StorageError as error:
        raise BadValue(str(error)) from None
    except (OSError, ValueError) as error:
        raise BadValue(f"--storage {str(storage)[:200]!r} is no folder's name: {error}") from None


def load_sweep(storage: str | Path, name: str) -> SweepPlan:
    """The plan of a sweep that was begun, or `BadValue`."""
    place = opened(storage)
    if isinstance(place, Folder):
        return SweepPlan.load(place.path / name)
    check_bucket(place.url)
    return SweepPlan.load(driver_folder(place) / name, place.url)


def check_tracking_uri(uri: str) -> None:
    """Refuse a secret in an address that is recorded in a bucket, where no place is for this user's eyes alone."""
    if redact(uri) != uri:
        raise BadValue(
            f"--tracking-uri {redact(uri)}: leave the password out of the address, which is recorded in the bucket; "
            "give it in the environment: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD (PGPASSWORD of a database)"
        )


def refuse_existing(plan: SweepPlan) -> None:
    """A sweep's name is taken, or its storage cannot be written: `BadValue`, before anything is written."""
    if isinstance(plan.store, Bucket):
        check_bucket(plan.bucket)
    try:
        taken = plan.store.exists("sweep.json") if isinstance(plan.store, Bucket) else plan.folder.exists()
    except OSError as error:
        raise BadValue(f"--storage {plan.where} cannot be written: {error.strerror or error}") from None
    if taken:
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


def only_driver(plan: SweepPlan, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Be the sweep's one driver until `stack` ends. Returns what raises once that is over (object storage only).

    `BadValue` names the driver at work.
    """
    if isinstance(plan.store, Bucket):
        lease = Lease(plan.store)
        lease.take()
        stack.callback(lease.release)
        return lease.check
    try:
        stack.enter_context(held(plan.folder / "driver.lock"))
    except Taken as error:
        raise BadValue(
            f"the sweep '{plan.name}' is being run by {error}: let it finish, or stop it there, before it is resumed"
        ) from None
    return lambda: None


def bring_here(plan: SweepPlan) -> None:
    """Fill the driver's folder with what resuming reads: of a folder of sweeps it is there already."""
    if isinstance(plan.store, Bucket):
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir(parents=True)
        (plan.folder / "sweep.json").write_bytes(plan.store.read("sweep.json"))
        fetch(plan.store, plan.folder / "journal.jsonl")


def freeze(plan: SweepPlan, plain: Mapping[str, Any]) -> None:
    """Make the sweep's folder, with its sweep.json. `BadValue` where that cannot be."""
    data = json.dumps(plain, indent=1).encode()
    if plan.bucket:
        shutil.rmtree(plan.folder, ignore_errors=True)  # of a sweep of this name that is gone from the bucket
    try:
        plan.folder.mkdir(parents=True)
    except FileExistsError:
        refuse_existing(plan)  # by another driver, this very moment
    except OSError as error:
        raise BadValue(f"--storage {plan.where} cannot be written: {error.strerror or error}") from error
    try:
        if not plan.bucket:
            keep_uri(plan.folder, plan.tracking_uri)
        write_atomically(plan.folder / "sweep.json", data)
        if plan.bucket:
            plan.store.write("sweep.json", data)
    except OSError as error:
        shutil.rmtree(plan.folder, ignore_errors=True)
        raise BadValue(f"--storage {plan.where} cannot be written: {error.strerror or error}") from error
