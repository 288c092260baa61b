"""The ground a sweep stands on: is its folder there, and can it be written? Asked when something has failed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

PROBE_BYTES = 1 << 16
BAD_GROUND = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.ESTALE, errno.ENODEV)


class StorageFailed(Exception):
    """The sweep's folder failed while the sweep ran; the message is one line."""


def trouble(folder: Path, error: BaseException | None = None) -> str:
    """What is wrong with a sweep's folder, and what to do, in one line; "" where nothing is.

    Args:
        folder: the sweep's.
        error: what failed: a folder that is well again does not make it unsaid.
    """
    if not (folder / "sweep.json").is_file():
        return f"{folder} has vanished: bring it back (is its file system mounted?)"
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with open(probe, "wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return _told(folder, problem)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    while error is not None:
        if isinstance(error, StorageFailed):
            return f"{error}: look after {folder}"
        if isinstance(error, OSError) and error.errno in BAD_GROUND and _beneath(error.filename, folder):
            return _told(folder, error)
        error = error.__cause__ or error.__context__
    return ""


def unmake(folder: Path) -> None:
    """Remove what Ray Tune has made in the place of a sweep's folder that vanished: it would be in the way when that is
    brought back."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} == {"ray"}:
        shutil.rmtree(folder, ignore_errors=True)


def _beneath(name: object, folder: Path) -> bool:
    return name is None or (isinstance(name, (str, os.PathLike)) and Path(name).is_relative_to(folder))


def _told(folder: Path, problem: OSError) -> str:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            left = shutil.disk_usage(folder).free
            return f"the storage is full ({left / 1e6:.0f} MB left at {folder}): make room"
        return f"the storage is full ({folder}): make room"
    if problem.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the storage has become read-only ({folder}): make it writable"
    return f"{folder} cannot be written ({problem.strerror}): look after it"
