"""A sweep under fire: faults at moments drawn from a seed, resumed as often as needed, then judged against its twin."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.faults import FAULTS, NAN, Scene, draws, kill_machine
from tests.chaos.verdict import Verdict, judge
from tests.postgres import MlflowServer, Postgres
from tests.toy_sweeps import ROOT, UNDISTURBED, Process, Swept
from tests.toy_sweeps import sweep as run_sweep

DISK_BYTES = 24_000_000
MOST_SESSIONS_WITHOUT_PROGRESS = 8
AXES = ("--space", "lr=0.3,0.1,0.03,0.01", "--space", "explode_at=1e9,30", "--space", "width=3,8")
"""Sixteen configs; half of them turn infinite at step 30."""
SERIAL = ("--engine", "serial", "--set", "epochs=243")


@dataclass(frozen=True)
class Scenario:
    """A sweep to disturb.

    Args:
        arguments: of the toy's tune script.
        twin: of the undisturbed sweep it is compared with.
        exact: whether its decisions do not depend on arrival order. Where they do, the twin stops nothing: its curves
            are whole, and each of the disturbed sweep's must be the beginning of one of them.
        diverging: how many of its configs turn infinite in both.
    """

    arguments: tuple[str, ...]
    twin: tuple[str, ...]
    exact: bool = True
    diverging: int = 0

    @classmethod
    def of(cls, *arguments: str, diverging: int = 0) -> Scenario:
        return cls(arguments, arguments, True, diverging)


SCENARIOS = {
    "short": Scenario.of(*UNDISTURBED),
    "grid, ASHA, one at a time": Scenario.of(
        "grid", "--scheduler", "asha", "--max-concurrent", "1", *SERIAL, *AXES, diverging=8
    ),
    "grid, nothing stopped, four at a time": Scenario.of(
        "grid", "--scheduler", "none", "--max-concurrent", "4", *SERIAL, *AXES, diverging=8
    ),
    "Optuna, ASHA, one at a time": Scenario.of(
        "demo", "--trials", "14", "--scheduler", "asha", "--max-concurrent", "1", *SERIAL
    ),
    "HyperOpt, median, one at a time": Scenario.of(
        "demo", "--trials", "14", "--searcher", "hyperopt", "--scheduler", "median", "--max-concurrent", "1", *SERIAL
    ),
    "grid, ASHA, four at a time": Scenario(
        ("grid", "--scheduler", "asha", "--max-concurrent", "4", *SERIAL, *AXES),
        ("grid", "--scheduler", "none", "--max-concurrent", "4", *SERIAL, *AXES),
        exact=False,
        diverging=8,
    ),
}


@dataclass
class Record:
    """What happened to one sweep."""

    scenario: str
    seed: int
    faults: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    resumes: int = 0
    """Sessions after the first."""
    ended_alone: int = 0
    """Of them, those after a fault that was not expected to end the driver."""
    delivered_late: bool = False
    """MLflow had not got everything when the sweep ended; `python -m tuning.sync` delivered it."""
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)


@dataclass
class Storm:
    """Hits one sweep with `faults` faults.

    Args:
        scenario: a name of SCENARIOS.
        seed: of everything that chance decides here.
        faults: how many; fewer when the sweep is over before.
        kinds: names of FAULTS that may be drawn.
        storage: folder of sweeps; `small_disk` says that it is a file system of its own that may be filled.
        on_fault: told of each, for a progress line.
    """

    scenario: str
    seed: int
    faults: int
    kinds: list[str]
    storage: Path
    small_disk: bool = False
    database: Postgres | None = None
    server: MlflowServer | None = None
    on_fault: Callable[[str], None] = lambda line: None

    def run(self, twin: Swept, name: str) -> Record:
        """Disturb the sweep until it is over. `twin` is the undisturbed one."""
        scenario, rng = SCENARIOS[self.scenario], random.Random(self.seed)
        record, started = Record(self.scenario, self.seed), time.monotonic()
        kinds, kept, idle, size = draws(self.kinds, rng), b"", 0, -1
        folder = self.storage / name
        while True:
            begun = folder.joinpath("sweep.json").is_file()
            arguments = ("--resume", name) if begun else (*scenario.arguments, *self._tracking())
            process = Process(self.storage, name, *arguments)
            scene = Scene(process, folder, rng, self.small_disk, self.database, self.server)
            try:
                fatal = self._session(scene, kinds, record)
                swept = process.wait()
            except BaseException:  # interrupted: nothing of it stays behind
                kill_machine(scene)
                raise
            said = f"session over, code {swept.code}, {len(scene.journal)} lines {swept.err.strip()[-300:]}"
            record.log.append(said)
            self.on_fault(said)
            if swept.code == 0:
                break
            record.resumes += 1
            if not fatal:
                record.ended_alone += 1
            journal = folder / "journal.jsonl"
            kept = journal.read_bytes() if journal.is_file() else b""
            idle, size = (idle + 1, size) if len(kept) <= size else (0, len(kept))
            if idle > MOST_SESSIONS_WITHOUT_PROGRESS:
                record.verdict.lost.append(f"no progress: {swept.err.strip()[-500:]}")
                return record
            if rng.random() < 0.5:
                process.left(20)  # half of the time what is left of the session before is still there
        if scenario.diverging:
            record.faults[NAN] = scenario.diverging
        self._deliver(name, record)
        process.left(20)
        record.seconds = time.monotonic() - started
        found = Swept(folder, swept.code, swept.out, swept.err)
        uri = self.database.uri() if self.database else f"sqlite:///{self.storage / 'mlflow.db'}"
        record.verdict = judge(found, twin, scenario.exact, kept, uri)
        return record

    def _session(self, scene: Scene, kinds: Iterator[str], record: Record) -> bool:
        """Faults in one life of the driver. Returns whether one of them was meant to end it."""
        rng = scene.rng
        while sum(record.faults.values()) < self.faults:
            # most at a point of the sweep's own story, some by the clock: also before it begins and after it ends
            lines = rng.randint(0, 3) if rng.random() < 0.85 else 10**9
            delay = rng.uniform(0.0, 0.3) if lines < 10**9 else rng.uniform(0.5, 8.0)
            if not self._reached(scene, lines, delay):
                return False
            kind = next(kinds)
            hit = FAULTS[kind].strike(scene)
            if not hit:
                continue
            record.faults[kind] = record.faults.get(kind, 0) + 1
            at = scene.journal[-1]["event"] if scene.journal else "start"
            line = f"{kind} ({hit}) after {len(scene.journal)} lines, at {at}"
            record.log.append(line)
            self.on_fault(line)
            if FAULTS[kind].fatal:
                return True
        return False

    def _reached(self, scene: Scene, lines: int, delay: float) -> bool:
        """Wait until the journal has grown by so many lines, or for the delay alone; False when the driver ended."""
        start = len(scene.journal)
        deadline = time.monotonic() + (delay if lines >= 10**9 else 60.0)
        while scene.process.running and time.monotonic() < deadline and len(scene.journal) < start + lines:
            time.sleep(0.01)
        if lines < 10**9:
            time.sleep(delay)
        return scene.process.running

    def _tracking(self) -> tuple[str, ...]:
        return ("--tracking-uri", self.server.uri) if self.server else ()

    def _deliver(self, name: str, record: Record) -> None:
        """What a person would do whose server was away at the end."""
        if self.server is not None:
            self.server.wait()
        if "delivers" in (self.storage / name / "log.txt").read_text():
            command = [sys.executable, "-m", "tuning.sync", name, "--storage", str(self.storage)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            record.delivered_late = "0 new events" not in done.stdout
            if done.returncode:
                record.verdict.lost.append(f"tuning.sync: {done.stderr.strip()}")


def undisturbed(scenario: str, storage: Path) -> tuple[Swept, float]:
    """The twin, and how long it took."""
    started = time.monotonic()
    swept = run_sweep(storage, f"twin-{list(SCENARIOS).index(scenario)}", *SCENARIOS[scenario].twin)
    assert swept.code == 0, swept.err
    return swept, time.monotonic() - started


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of DISK_BYTES at `folder`, where this process may mount one; else None."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "lanewise-chaos", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
