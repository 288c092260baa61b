"""A host whose configs come and go as in a sweep, without Ray: `python benchmarks/turnover.py --workload ci_vit_l3`.

A thread in Tune's place takes one report after the other, each for some milliseconds, stops two of three configs at
their first report and two of three at their second, and attaches a new one for each that ends. Prints how long the GPU
was idle (NVML), how many lanes trained, and what each call of the host's took of its one thread: what it does while the
device has nothing to go on with is lost.
"""

from __future__ import annotations

import functools
import itertools
import queue
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.gpu_watch import Watch, visible_gpus
from benchmarks.workloads import WORKLOADS, job_of
from lanes.engine import Engine
from lanes.host import SWITCH_SECONDS, Host, HostSettings
from lanes.job import Job, Report
from lanes.stack import Stack
from lanes.stacked import StackedEngine
from tuning.checkpoints import CheckpointStore
from tuning.curves import CurveWriter, metadata

CONFIGS = 2000
TIMED: dict[type, tuple[str, ...]] = {
    Host: ("attach", "release", "tick"),
    Stack: ("_launch", "_admit", "_take_out", "_prepare_next", "_read", "_complete_reports", "_restore"),
    Engine: ("insert_all", "launch", "launch_evaluation", "prepare", "_refresh_orders", "_made"),
    StackedEngine: ("_place", "_set_orders", "states"),
}


def main(
    workload: Annotated[str, typer.Option(help=f"one of {', '.join(WORKLOADS)}")] = "ci_vit_l3",
    steps: Annotated[int, typer.Option(help="update steps of a whole trial, about")] = 500,
    lanes: Annotated[int, typer.Option(help="slots")] = 32,
    in_flight: Annotated[int, typer.Option(help="configs attached at a time")] = 64,
    report_ms: Annotated[float, typer.Option(help="what Tune takes for a report that is accepted")] = 6.0,
    end_ms: Annotated[float, typer.Option(help="what it takes for one config to end and another to begin")] = 12.0,
    seconds: Annotated[float, typer.Option(help="measuring time, four seconds after the first report")] = 10.0,
    bundled: Annotated[bool, typer.Option(help="the bundled data, also where the real set is there")] = False,
    data_dir: Annotated[Path | None, typer.Option(envvar="LANEWISE_DATA", help="folder of data sets")] = None,
) -> None:
    """Run one workload on one host and print where its time goes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.setswitchinterval(SWITCH_SECONDS)
    precision = "bf16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        job = job_of(workload, CONFIGS, steps, precision, [], data_dir, work, bundled)
        for kind in ("epochs", "steps", "checkpoints"):
            (work / kind).mkdir()
        settings = HostSettings(
            engine="stacked",
            lanes=lanes,
            wanted=in_flight,
            expected_steps=1e7,
            data_dir=data_dir,
            cache_dir=work / "cache",
            make_recorder=lambda label: CurveWriter(work, label, metadata("turnover", job.plan.family, {})),
            make_checkpoints=lambda: CheckpointStore(work / "checkpoints"),
        )
        spent = timed()
        sweep = Sweep(job, Host(settings, device, "device"), report_ms, end_ms)
        sweep.attach(in_flight)
        while not sweep.reports:
            sweep.turn()
        sweep.train(4.0)
        spent.clear()
        before = sweep.reports, sweep.ended
        with Watch([int(visible_gpus()[0])] if device == "cuda" else []) as watch:
            lanes_taken, elapsed = sweep.train(seconds)
        idle = watch.summary(None, None).get("idle")
        reports, ended = sweep.reports - before[0], sweep.ended - before[1]
        print(
            f"{workload}: {elapsed:.1f} s, {reports / elapsed:.1f} reports/s, {ended / elapsed:.1f} configs ended/s, "
            f"{lanes_taken:.1f} of {lanes} lanes taken" + (f", GPU idle {idle:.1%}" if idle is not None else ""),
            flush=True,
        )
        for call, (count, total) in sorted(spent.items(), key=lambda item: -item[1][1]):
            print(f"  {call:28} {total:7.2f} s {count:6} calls {1e3 * total / count:9.3f} ms")


class Sweep:
    """A host and what calls it."""

    def __init__(self, job: Any, host: Host, report_ms: float, end_ms: float):
        self._job, self._host = job, host
        self._report_s, self._end_s = report_ms / 1e3, end_ms / 1e3
        self._configs, self._number = itertools.cycle(job.configs), itertools.count()
        self._commands: queue.SimpleQueue[tuple[Callable, Any]] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._going: dict[str, tuple[int, int]] = {}  # token -> (its number, reports so far)
        self.reports = self.ended = 0
        threading.Thread(target=self._tune, daemon=True).start()

    def attach(self, count: int) -> None:
        for _ in range(count):
            self._commands.put((self._host.attach, self._fresh()))

    def turn(self) -> None:
        """As `HostActor` does: what was asked for, then a tick."""
        while not self._host.busy or not self._commands.empty():
            call, what = self._commands.get()
            call(what)
            if self._commands.empty():
                break
        for report in self._host.tick():
            if report.error:
                raise SystemExit(report.error)
            self.reports += 1
            self._told.put(report)

    def train(self, seconds: float) -> tuple[float, float]:
        """Lanes taken on average, and the seconds it took."""
        taken, turns, begun = 0, 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            self.turn()
            taken += sum(stack.in_memory for stack in self._host._stacks.values())
            turns += 1
        return taken / turns, time.perf_counter() - begun

    def _fresh(self) -> Job:
        number, config, token = next(self._number), next(self._configs), uuid.uuid4().hex
        self._going[token] = number, 0
        reports = tuple(self._job.plan.reference.reports)
        return Job(token, self._job.plan.family, config.values, f"c{number:06}", {0: f"c{number:06}-0"}, reports)

    def _tune(self) -> None:
        while True:
            report = self._told.get()
            number, count = self._going.pop(report.token)
            if report.done or number // 3**count % 3:
                time.sleep(self._end_s)
                self.ended += 1
                self._commands.put((self._host.release, report.token))
                self.attach(1)
            else:
                time.sleep(self._report_s)
                self._going[report.token] = number, count + 1
                self._commands.put((self._host.proceed, report.token))


def timed() -> dict[str, tuple[int, float]]:
    """Have calls timed: {name: (how many, seconds)}, brought up to date as they return."""
    spent: dict[str, tuple[int, float]] = {}

    def watched(name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def watching(*args: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                count, total = spent.get(name, (0, 0.0))
                spent[name] = count + 1, total + time.perf_counter() - begun

        return watching

    for owner, names in TIMED.items():
        for name in names:
            setattr(owner, name, watched(f"{owner.__name__}.{name}", getattr(owner, name)))
    return spent


if __name__ == "__main__":
    typer.run(main)
