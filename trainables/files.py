"""Writing a file so that a reader, or the next start after a power cut, meets the whole of it or the one before; and
telling by source files whether code is what it was."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write beside, flush to disk, rename. The folder must exist; on an error nothing is left behind.

    Args:
        path: what is replaced.
        content: the bytes, or a function that writes them to the open file.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        with open(scratch, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync_folder(path.parent)


def code_beside(*things: Any) -> str:
    """A digest of all modules in the folders in which these classes and functions are defined."""
    digest = hashlib.sha256()
    for thing in things:
        for path in sorted(Path(inspect.getfile(thing)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, where the file system can: a rename in it then outlasts a power cut."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
