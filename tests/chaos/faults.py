"""What the storm does to a sweep: each fault finds its victims among the sweep's own processes and files.

A fault is `strike(scene)`; it returns a few words of what it hit, or "" where nothing was there to hit (then it does
not count). `fatal` ones end the driver: the sweep is resumed after them. Victims are found by a mark in the environment
of everything the sweep started, so that another Ray on this machine is never touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.postgres import MlflowServer, Postgres
from tests.toy_sweeps import Process
from tuning.journal import Event, read

HOST, TRIAL, RAYLET, SYNC = "ray::HostActor", "ray::ConfigTrial", "raylet/raylet", "tuning.sync"


@dataclass
class Scene:
    """Where a fault strikes.

    Args:
        process: the sweep's driver and, by its mark, all that it started.
        folder: the sweep's folder.
        rng: of the storm's seed.
        small_disk: whether the storage is a small file system of its own that may be filled.
        database, server: behind the sweep's tracking URI, where it has them.
    """

    process: Process
    folder: Path
    rng: random.Random
    small_disk: bool = False
    database: Postgres | None = None
    server: MlflowServer | None = None

    @property
    def journal(self) -> list[Event]:
        return [event for event, _ in read(self.folder / "journal.jsonl")]


@dataclass(frozen=True)
class Fault:
    """One kind. `weight`: how often, among the others."""

    strike: Callable[[Scene], str]
    fatal: bool = False
    weight: float = 1.0


def kill_driver(scene: Scene) -> str:
    scene.process.kill()
    return "driver"


def kill_machine(scene: Scene) -> str:
    """All at once, as when the power goes. What runs on other machines stays."""
    pids = scene.process.pids()
    for pid in pids:
        _send(pid, signal.SIGSTOP)  # none of them sees another one go
    for pid in pids:
        _send(pid, signal.SIGKILL)
    return f"{len(pids)} processes"


def corrupt_checkpoint(scene: Scene) -> str:
    """The machine dies, and of a run or two the newest checkpoint did not survive it."""
    if not _pairs(scene):
        return ""
    kill_machine(scene)
    _await_gone(scene)
    found = _pairs(scene)
    hit = [_damage(pairs[-1], scene.rng) for pairs in scene.rng.sample(found, min(2, len(found)))]
    return ", ".join(hit) or "gone before it could be damaged"


def _pairs(scene: Scene) -> list[list[Path]]:
    """The checkpoints of every run that has two: with only one there is none before it, and the run begins again."""
    runs = sorted(path for path in (scene.folder / "checkpoints").glob("*") if path.is_dir())
    found = [sorted(run.glob("[0-9]*.json")) for run in runs]
    return [pairs for pairs in found if len(pairs) >= 2]


def _damage(path: Path, rng: random.Random) -> str:
    """One way out of many in which a pair of files can be wrong."""
    tensors = path.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "tensors cut": lambda: tensors.write_bytes(whole[: rng.randrange(len(whole))]),
        "tensors flipped": lambda: tensors.write_bytes(_flip(whole, rng)),
        "tensors gone": tensors.unlink,
        "tensors empty": lambda: tensors.write_bytes(b""),
        "JSON cut": lambda: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
        "JSON flipped": lambda: path.write_bytes(_flip(path.read_bytes(), rng)),
        "JSON a list": lambda: path.write_text("[1, 2]"),
        "JSON bytes": lambda: path.write_bytes(rng.randbytes(200)),
        "JSON of another version": lambda: path.write_text('{"schema_version": 99}'),
    }
    way = rng.choice(sorted(ways))
    ways[way]()
    return way


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def fill_disk(scene: Scene) -> str:
    """Not a byte is free for a while, or until the driver gives up."""
    if not scene.small_disk:
        return ""
    balloon = scene.folder.parent / ".balloon"
    fill(balloon)
    deadline = time.monotonic() + scene.rng.uniform(0.5, 6.0)
    while scene.process.running and time.monotonic() < deadline:
        time.sleep(0.02)
        fill(balloon)  # what a process has freed
    balloon.unlink()
    return "full"


def fill(balloon: Path) -> None:
    """Let a file grow until the file system has no room."""
    with open(balloon, "ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def victims(scene: Scene, title: str) -> list[int]:
    """The raylet's path stands in the command lines of others too."""
    return scene.process.pids(program=title) if title == RAYLET else scene.process.pids(title)


def _kill_one(title: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        if title == HOST and _kills_without_report(scene) >= 2:
            return ""  # a third would be the config's own fault: tuning.trial.LOSSES
        pids = victims(scene, title)
        return _send(scene.rng.choice(pids), signal.SIGKILL) if pids else ""

    return strike


def _kills_without_report(scene: Scene) -> int:
    """How many hosts were killed since the newest report."""
    reports = sum(event["event"] == "report" for event in scene.journal)
    past = getattr(scene.process, "host_kills", (0, -1))
    count = past[0] + 1 if past[1] == reports else 1
    scene.process.host_kills = (count, reports)  # type: ignore[attr-defined]
    return count - 1


def _stop(title: str) -> Callable[[Scene], str]:
    """SIGSTOP for a while: nothing has died, and nothing answers."""

    def strike(scene: Scene) -> str:
        pids = [scene.process.pid] if title == "driver" else victims(scene, title)
        pids = [pid for pid in pids if _send(pid, signal.SIGSTOP)]
        seconds = scene.rng.uniform(0.2, 4.0)
        time.sleep(seconds)
        for pid in pids:
            _send(pid, signal.SIGCONT)
        return f"{seconds:.1f} s" if pids else ""

    return strike


def _restart(which: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        service = getattr(scene, which)
        if service is None:
            return ""
        service.kill()
        time.sleep(scene.rng.uniform(0.0, 3.0))
        if isinstance(service, MlflowServer):
            service.start(wait=False)  # it takes seconds; the sweep goes on without it
        else:
            service.start()
        return which

    return strike


def _freeze(which: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        service = getattr(scene, which)
        if service is None:
            return ""
        service.freeze()
        # longer than MLflow's client waits (tuning.tracking), now and then: a request then comes twice
        seconds = scene.rng.choice([0.5, 1.0, 2.0, 4.0, 25.0])
        threading.Timer(seconds, service.thaw).start()  # the storm goes on meanwhile
        return f"{which} {seconds:.1f} s"

    return strike


FAULTS: dict[str, Fault] = {
    "SIGKILL driver": Fault(kill_driver, fatal=True, weight=2),
    "SIGKILL raylet": Fault(_kill_one(RAYLET), fatal=True),
    "SIGKILL everything": Fault(kill_machine, fatal=True, weight=1.5),
    "corrupt newest checkpoint": Fault(corrupt_checkpoint, fatal=True),
    "disk full": Fault(fill_disk, fatal=True),
    "SIGKILL host": Fault(_kill_one(HOST), weight=3),
    "SIGKILL trial worker": Fault(_kill_one(TRIAL), weight=3),
    "SIGKILL sync process": Fault(_kill_one(SYNC), weight=2),
    "SIGKILL mlflow server": Fault(_restart("server"), weight=2),
    "SIGKILL PostgreSQL": Fault(_restart("database"), weight=2),
    "SIGSTOP driver": Fault(_stop("driver")),
    "SIGSTOP host": Fault(_stop(HOST)),
    "SIGSTOP trial worker": Fault(_stop(TRIAL)),
    "SIGSTOP raylet": Fault(_stop(RAYLET)),
    "SIGSTOP sync process": Fault(_stop(SYNC)),
    "SIGSTOP mlflow server": Fault(_freeze("server")),
    "SIGSTOP PostgreSQL": Fault(_freeze("database")),
}
NAN = "NaN in a lane"
"""Comes with the sweep: a config whose loss turns infinite at a step, in the storm and in its undisturbed twin."""


def possible(small_disk: bool, database: bool, server: bool) -> list[str]:
    """The kinds that a storm with these things can have."""
    needs = {"disk full": small_disk}
    needs |= {name: server for name in FAULTS if "mlflow" in name}
    needs |= {name: database for name in FAULTS if "PostgreSQL" in name}
    return [name for name in FAULTS if needs.get(name, True)]


def draws(kinds: list[str], rng: random.Random) -> Iterator[str]:
    """Kinds without end, by weight; every kind once before chance decides."""
    first = list(kinds)
    rng.shuffle(first)
    yield from first
    while True:
        yield rng.choices(kinds, [FAULTS[kind].weight for kind in kinds])[0]


def _send(pid: int, number: int) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return f"pid {pid}"
    return ""


def _await_gone(scene: Scene, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while scene.process.pids() and time.monotonic() < deadline:
        time.sleep(0.05)
