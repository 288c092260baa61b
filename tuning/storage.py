"""Where sweeps lie: a folder that every machine sees, or object storage. Both hold whole, named files.

`Folder` and `Bucket` do the same few things, so that whoever writes checkpoints, curves and tables need not know
which it is. Neither appends and neither renames: object storage can do neither. What needs more (the journal, two
drivers at once, programs that want paths) is in `tuning.segments`, `tuning.lease` and `tuning.mirror`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from trainables.files import write_atomically

SCHEMES = ("s3", "gs")
PATIENCE_SECONDS = 600.0
"""How long to go on trying when object storage does not answer, before the sweep stops."""
HOPELESS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED")
T = TypeVar("T")
log = logging.getLogger(__name__)


class StorageError(OSError):
    """Object storage cannot be used; the message is one line and names the URL."""


class Store(Protocol):
    """Whole files by key, a relative path with `/`. A reader sees all of a file, or the one before it, or none."""

    def at(self, name: str) -> Store:
        """The part of it below `name`."""

    def write(self, key: str, data: bytes) -> None:
        """Put a file there, lasting once this returns, over the one that was there."""

    def read(self, key: str) -> bytes:
        """Its bytes. Raises `FileNotFoundError`."""

    def names(self, below: str = "") -> list[str]:
        """Keys of the files directly in the folder `below`, sorted; none where it does not exist."""

    def remove(self, key: str) -> None:
        """Take a file away, if it is there."""

    def clear(self, below: str) -> None:
        """Take away everything below."""


@dataclass(frozen=True)
class Folder:
    """Files of a file system: written aside, flushed to disk, renamed.

    Args:
        path: the folder.
        root: the sweep's, of which it is part; where that has vanished, nothing is made in its place.
    """

    path: Path
    root: Path | None = None

    def __str__(self) -> str:
        return str(self.path)

    def at(self, name: str) -> Folder:
        return Folder(self.path / name, self.root or self.path)

    def write(self, key: str, data: bytes) -> None:
        path = self.path / key
        if not path.parent.is_dir():
            (self.root or self.path).stat()
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def names(self, below: str = "") -> list[str]:
        folder = self.path / below
        return sorted(f"{below}/{p.name}".lstrip("/") for p in folder.glob("[!.]*") if p.is_file())

    def remove(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def clear(self, below: str) -> None:
        shutil.rmtree(self.path / below, ignore_errors=True)


@dataclass(frozen=True)
class Bucket:
    """Objects below a URL, through pyarrow: `s3://bucket/prefix` (or `gs://`).

    Credentials, region and endpoint are the environment's or the machine's own (AWS_ACCESS_KEY_ID, AWS_REGION,
    AWS_ENDPOINT_URL ..., an instance's role), and are written nowhere.

    Args:
        url: without a slash at its end.
        patience: seconds to go on trying when the storage does not answer.
    """

    url: str
    patience: float = PATIENCE_SECONDS

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> Bucket:
        return replace(self, url=f"{self.url}/{name}")

    def write(self, key: str, data: bytes) -> None:
        def put() -> None:
            with self._files.open_output_stream(self._path(key)) as stream:
                stream.write(data)

        self._try(put)

    def read(self, key: str) -> bytes:
        def get() -> bytes:
            with self._files.open_input_stream(self._path(key)) as stream:
                return stream.read()

        return self._try(get)

    def names(self, below: str = "") -> list[str]:
        return sorted(self.times(below))

    def times(self, below: str = "", recursive: bool = False) -> dict[str, float]:
        """Key -> seconds since 1970, by the storage's own clock, at which it was written."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path(below), allow_not_found=True, recursive=recursive)
        found = self._try(lambda: self._files.get_file_info(selector))
        start = len(self._path("")) + 1
        return {i.path[start:]: i.mtime.timestamp() for i in found if i.type == FileType.File}

    def folders(self) -> list[str]:
        """Names of what lies below it as folders do."""
        from pyarrow.fs import FileSelector, FileType

        found = self._try(lambda: self._files.get_file_info(FileSelector(self._path(""), allow_not_found=True)))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda: self._files.delete_file(self._path(key)))

    def clear(self, below: str) -> None:
        for key in self.times(below, recursive=True):
            self.remove(key)

    def exists(self, key: str) -> bool:
        from pyarrow.fs import FileType

        return self._try(lambda: self._files.get_file_info(self._path(key))).type == FileType.File

    def check(self) -> None:
        """Write, read and remove a file. `StorageError` says why that cannot be done, at once."""
        here, key = replace(self, patience=0.0), f".check-{os.getpid()}-{time.time_ns()}"
        try:
            here.write(key, b"of lanewise")
            here.read(key)
            here.remove(key)
        except FileNotFoundError:
            raise StorageError(f"{self.url}: what was written there could not be read again") from None

    def for_tune(self) -> dict[str, Any]:
        """The same place in the words of Ray Tune's RunConfig."""
        return {"storage_path": self._path(""), "storage_filesystem": self._files}

    @property
    def _files(self) -> Any:
        return _filesystem(urlsplit(self.url).scheme, urlsplit(self.url).netloc)

    def _path(self, key: str) -> str:
        _, _, path = self.url.partition("://")
        return f"{path}/{key}".rstrip("/")

    def _try(self, call: Callable[[], T]) -> T:
        """Call, again while it fails for what may pass, for `patience` seconds."""
        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                told = " ".join(str(error).split())
                if time.monotonic() + pause > deadline or any(f"AWS Error {code}" in told for code in HOPELESS):
                    raise StorageError(f"{self.url} cannot be used: {_short(told)}") from None
                log.warning("%s does not answer, trying again in %.1f s: %s", self.url, pause, _short(told))
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


Storage = Folder | Bucket


def open_storage(text: str | Path) -> Storage:
    """The folder or bucket that a user named. Looks at neither. Raises `StorageError` for what is no such thing."""
    text = str(text)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text)
    if match is None:
        return Folder(Path(text).expanduser().resolve())
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    if scheme not in SCHEMES:
        raise StorageError(f"--storage {text}: sweeps go to a folder, or to s3://BUCKET/PREFIX (or gs://)")
    if "@" in rest.split("/")[0] or "?" in rest:
        hidden = f"{scheme}://...{rest.rpartition('@')[2].split('?')[0]}"
        raise StorageError(
            f"--storage {hidden}: leave keys and options out of the URL, where they would be recorded; give them in "
            "the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]{3,}(/[\w.=+-]+)*", rest):
        raise StorageError(f"--storage {text} should look like {scheme}://BUCKET/PREFIX")
    return Bucket(f"{scheme}://{rest}")


def is_url(text: str | Path) -> bool:
    """Whether a user named object storage (also where a `Path` has swallowed a slash)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(text)) is not None


def as_store(place: Store | Path) -> Store:
    """A path as the folder that it names."""
    return Folder(place) if isinstance(place, Path) else place


def here_for(bucket: Bucket, purpose: str) -> Path:
    """This machine's folder for what concerns a bucket; `purpose` keeps writers and readers apart."""
    digest = hashlib.sha256(f"{bucket.url} {os.environ.get('AWS_ENDPOINT_URL', '')}".encode()).hexdigest()[:12]
    return cache_dir() / purpose / digest


def cache_dir() -> Path:
    """The node's cache of decoded data and probe results: $LANEWISE_CACHE, or the user's cache folder."""
    if own := os.environ.get("LANEWISE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lanewise"


@cache
def _filesystem(scheme: str, bucket: str) -> Any:
    """One client a process. pyarrow does not read the endpoint's variables by itself."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # allow_delayed_open: a small file is one request, and a failed one leaves nothing
    return fs.S3FileSystem(
        endpoint_override=endpoint, region=region, connect_timeout=10, request_timeout=60, allow_delayed_open=True
    )


def _short(told: str) -> str:
    """The cause out of pyarrow's words; the URL is told beside it."""
    _, found, cause = told.partition("AWS Error ")
    return (cause if found else told).partition(" (Request ID")[0].partition("; Details:")[0][:200]
