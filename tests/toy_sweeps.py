"""Runs sweeps of the toy family as users run them, in processes of their own, and reads what they left on disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import pyarrow.parquet as pq

from tuning.journal import Event, read

ROOT = Path(__file__).parent.parent
UNDISTURBED = ("grid", "--scheduler", "asha", "--engine", "serial", "--max-concurrent", "1", "--set", "epochs=27")
"""A sweep whose every decision is fixed: a grid in order, one config at a time, one lane at a time."""


@dataclass(frozen=True)
class Swept:
    """A sweep's folder and how its process ended."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def journal(self) -> list[Event]:
        return [event for event, _ in read(self.folder / "journal.jsonl")]

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.journal if event["event"] == kind]

    @property
    def runs(self) -> pd.DataFrame:
        return pq.read_table(self.folder / "runs.parquet").to_pandas()

    def table(self, kind: str) -> pd.DataFrame:
        """epochs or steps, the last of rows written twice, as docs/storage.md says."""
        by = ["run_key", {"steps": "step", "epochs": "epoch"}[kind]]
        rows = pd.concat([pq.read_table(path).to_pandas() for path in sorted((self.folder / kind).glob("*.parquet"))])
        return rows.drop_duplicates(by, keep="last").sort_values(by).reset_index(drop=True)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()


class Process:
    """A tune command in the background, everything it starts marked by its environment.

    terminal: a descriptor that it gets as its terminal, instead of pipes.
    """

    def __init__(
        self,
        storage: Path | str,
        name: str,
        *arguments: str,
        module: str = "tests.toys.tune_toy",
        environment: Mapping[str, str] = MappingProxyType({}),
        terminal: int | None = None,
    ):
        self.storage, self.name, self.folder = storage, name, Path(storage) / name
        self._mark = uuid.uuid4().hex
        self._ray = tempfile.mkdtemp(prefix="lw")  # short: Ray's sockets live below it
        named = () if "--resume" in arguments else ("--name", name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *named, "--storage", str(storage)],
            stdin=terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "LANEWISE_TEST_MARK": self._mark, "LANEWISE_RAY_TEMP": self._ray, **environment},
        )

    def wait(self, seconds: float = 240) -> Swept:
        out, err = self._process.communicate(timeout=seconds)
        return Swept(self.folder, self._process.returncode, out, err)

    def when(self, reached: Callable[[list[Event]], bool], seconds: float = 240) -> None:
        """Return as soon as the journal has `reached` that."""
        deadline = time.monotonic() + seconds
        while not reached(self.events()):
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < deadline, "the journal never got there"
            time.sleep(0.02)

    def events(self) -> list[Event]:
        """The journal so far."""
        return [event for event, _ in read(self.folder / "journal.jsonl")]

    def kill(self) -> None:
        """SIGKILL the driver alone."""
        self._process.kill()

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the terminal's whole process group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill_one(self, title: str) -> None:
        """SIGKILL one of the processes it started, by the beginning of its title."""
        os.kill(self.pids(title)[0], signal.SIGKILL)

    def pids(self, title: str = "", program: str = "") -> list[int]:
        """Processes it started, itself among them: with `title` in their command lines, of a program of that name."""
        found = ((pid, line) for pid, line in self._alive() if title in line)
        return sorted(pid for pid, line in found if line.split(" ")[0].endswith(program))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def left(self, seconds: float = 60) -> list[str]:
        """Command lines of what it started and is still there after it had time to go. Not counted are the two agents
        of Ray's own that outlive a killed raylet by a minute, trying to tell the dead GCS of it."""
        deadline = time.monotonic() + seconds
        while (alive := list(self._alive())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [line for _, line in alive]

    def _alive(self) -> Iterator[tuple[int, str]]:
        for process in Path("/proc").glob("[0-9]*"):  # Linux
            with contextlib.suppress(OSError):
                if self._mark.encode() in (process / "environ").read_bytes():  # a zombie has no environment left
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if line not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent"):
                        yield int(process.name), line


def sweep(storage: Path, name: str, *arguments: str) -> Swept:
    return Process(storage, name, *arguments).wait()
