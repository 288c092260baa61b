"""A real PostgreSQL and a real `mlflow server` for tests: on loopback, in folders of their own, and killable.

    with postgres() as database, MlflowServer(database.uri(), tmp_path) as server:
        MlflowClient(server.uri)

Needs Debian's package `postgresql` (another system's will do) and psycopg2; `postgres()` skips with a reason where
either is absent. The server runs as an ordinary user: PostgreSQL refuses root.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

READY_SECONDS = 120.0


def missing() -> str:
    """Why no PostgreSQL can be started here; empty where one can."""
    if _binaries() is None:
        return "no PostgreSQL here: install Debian's package `postgresql`"
    if importlib.util.find_spec("psycopg2") is None:
        return "no psycopg2 here: pip install 'lanewise[postgres]'"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL refuses to run as root, and there is no user `postgres` to run it as"
    return ""


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A server of the test's own, gone afterwards; skips where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


class Postgres:
    """One PostgreSQL server with an empty database `mlflow`."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        # not below pytest's folder: that belongs to whoever runs the tests, and the server is another user
        self._folder = Path(tempfile.mkdtemp(prefix="lwpg"))
        if self._owner:
            shutil.chown(self._folder, **self._owner)
        self._password = secrets.token_hex(8)
        self.port = free_port()
        self._process: subprocess.Popen | None = None
        self._init()

    def uri(self, database: str = "mlflow") -> str:
        """For SQLAlchemy, and so for `mlflow server --backend-store-uri`."""
        return f"postgresql+psycopg2://lanewise:{self._password}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Bring it up, also after `kill`: it recovers from its log."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self._process = self._spawn(
                "postgres", "-D", self._data, "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
                "-c", "unix_socket_directories=",
            )  # fmt: skip
            while self._process.poll() is None and not self._answers():
                assert time.monotonic() < deadline, self._log
                time.sleep(0.05)
            if self._process.poll() is None:
                break
            # the backends of a killed server hold its memory until they notice
            assert time.monotonic() < deadline, self._log
            time.sleep(0.1)
        self._make_database()

    def kill(self) -> None:
        """SIGKILL it and all its backends, as a machine that loses its power. A backend that is frozen would never
        notice that its server is gone, and hold its memory against the next one."""
        assert self._process is not None
        backends: list[int] = []
        with contextlib.suppress(FileNotFoundError):  # it has ended by itself
            backends = self._pids()
        self._process.kill()
        for pid in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP it and all its backends: it answers nobody, and nobody is refused."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # killed meanwhile
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def ping(self) -> None:
        """Connect, as a client does, and wait for an answer."""
        self._connect().close()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self._process.send_signal(signal.SIGINT)  # fast shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-2000:]

    def _init(self) -> None:
        word = self._folder / "word"
        word.write_text(self._password)
        word.chmod(0o644)
        process = self._spawn(
            "initdb", "-D", self._data, "-U", "lanewise", "--pwfile", word, "-A", "scram-sha-256", "-E", "UTF8",
            "--no-locale", "--no-sync",
        )  # fmt: skip
        assert process.wait() == 0, self._log
        word.unlink()

    def _spawn(self, program: str, *arguments: object) -> subprocess.Popen:
        folder = _binaries()
        assert folder is not None
        with open(self._folder / "log", "ab") as log:
            return subprocess.Popen(
                [str(folder / program), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                **self._owner,  # type: ignore[arg-type]
            )

    def _answers(self) -> bool:
        import psycopg2

        try:
            self._connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def _make_database(self) -> None:
        connection = self._connect()
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("select 1 from pg_database where datname = 'mlflow'")
            if cursor.fetchone() is None:
                cursor.execute("create database mlflow")

    def _connect(self):  # type: ignore[no-untyped-def]
        import psycopg2

        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user="lanewise", password=self._password, dbname="postgres",
            connect_timeout=5,
        )  # fmt: skip

    def _pids(self) -> list[int]:
        if self._process is None or self._process.poll() is not None:
            return []
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]


class MlflowServer:
    """A real `mlflow server` over any backend store, its artifacts below `folder`, on one port for all its lives."""

    def __init__(self, store: str, folder: Path, *arguments: str, env: dict[str, str] | None = None):
        self._store, self._folder, self._arguments = store, folder, arguments
        self._env = env or {}
        self.port = free_port()
        self._process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, wait: bool = True) -> None:
        """Bring it up, also after `kill`. The first start makes the store's tables."""
        destination = () if "--artifacts-destination" in self._arguments else (
            "--artifacts-destination", str(self._folder / "server-artifacts"),
        )  # fmt: skip
        with open(self._folder / "mlflow-server.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store, "--host", "127.0.0.1",
                    "--port", str(self.port), "--workers", "1", *destination, *self._arguments,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                # its runners of scheduled jobs are seven more processes, for nothing
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._env},
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers."""
        self.thaw()
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while not self._healthy():
            log = self._folder / "mlflow-server.log"
            assert self._process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL it and its workers."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            self._signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _signal(self, number: int) -> None:
        """To its whole group; to nobody once it has ended, for then the number may be another's."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _binaries() -> Path | None:
    """The folder of `initdb` and `postgres`: on PATH, or where Debian keeps each version's."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()), None)


def _user() -> str | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None
