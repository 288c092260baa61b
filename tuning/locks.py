"""One driver a sweep, and one delivery to MLflow: the second is told who the first is.

The kernel holds the lock (flock) for as long as its owner lives: neither SIGKILL nor a reboot leaves one behind. The
file's text only says whose it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from trainables.family import BadValue

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
log = logging.getLogger(__name__)


class Taken(BadValue):
    """Somebody else holds the lock; the message says who."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock `path` meanwhile.

    Raises:
        Taken: by a process that lives, named.
        BadValue: the file cannot be made.
    """
    try:
        # the descriptor is closed on exec: no process that is started meanwhile keeps the lock alive
        file = open(path, "a+")  # noqa: SIM115  # held for as long as the caller likes
    except OSError as error:
        raise BadValue(f"{path.parent} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise Taken(owner(file)) from None
            log.warning("%s: the file system has no locks (%s); see that nobody else resumes", path, error.strerror)
        _sign(file)
        yield


def owner(file: IO[str]) -> str:
    """`alice on node7 (process 4711, since 2026-01-02 03:04:05)`, as its text says."""
    file.seek(0)
    try:
        plain = json.loads(file.read())
        return f"{plain['user']} on {plain['host']} (process {plain['pid']}, since {plain['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _sign(file: IO[str]) -> None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"user {os.getuid()}"
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.seek(0)
    with contextlib.suppress(OSError):  # on a full disk the lock is held without a name
        file.truncate()
        file.write(json.dumps({"user": user, "host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        file.flush()
