"""A stack: the lanes of one program on one device, from the moment a config is attached to its last report.

Plain Python, no Ray: `lanes.host` puts it into an actor, tests drive it directly. A config's seeds train as lanes of
the stack's engine; at each epoch in its `reports` its runs are parked until somebody says `proceed` or `release`, so
that a run never trains past a decision that might stop it. Parked and waiting runs hold no slot. Runs of a config that
nobody would stop (`Job.stops`) pass their reports and go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from lanes.engine import Engine
from lanes.job import Job, Report
from lanes.runs import Flight, Run, arrival, lane_key
from lanes.states import Parcel, bytes_of, tree_map
from lanes.telling import Telling
from lanes.writer import Writer
from trainables.family import Family

CHUNK_SECONDS = 0.5
"""About how long a stack trains before it looks up: admits lanes, lets another program have the device."""
COMPACTION_PAYS = 4.0
"""A half-empty stack is made smaller when the training ahead is this many times as long as compiling took."""

PREPARING_SHARE = 0.25
"""Part of a chunk's time that may go, while the device trains, into getting ready the lanes that come next."""

COMPACTION_PATIENCE = 60.0
"""Seconds a stack must have been half empty: configs come and go in between."""


class Stack:
    """Lanes of one program.

    On a GPU the next chunk is launched before the one before it is read, so that the device does not wait for the
    bookkeeping. Runs that stop for a report are known beforehand: they give up their slots, and others get them, as
    soon as their last chunk is launched, all in the device's own order of work. Only a checkpoint of what trains, or
    somebody who asks for a config, finds the device at the very step that was read.

    Args:
        family, program: what they compute.
        make_engine: makes the engine when the first lane arrives (it may probe).
        max_lanes: slots; None asks the engine choice (`make_engine` returns it beside the engine).
        writer: where curves and states go.
        checkpoint_seconds: a run is saved when it has trained so long since it last was, or twice so long where the
            disk is slow.
        report_seconds: the same where it comes to a report, while the disk keeps up: of less there is little to lose,
            and runs that take a second each would keep the host busy with states that nobody will read.
    """

    def __init__(
        self,
        family: Family,
        program: Any,
        make_engine: Callable[[], tuple[Engine, int]],
        writer: Writer,
        checkpoint_seconds: float = 60.0,
        report_seconds: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.family = family
        self.program = program
        self.schedule = family.schedule(program)
        self.writer = writer
        self.checkpoint_seconds, self.report_seconds = checkpoint_seconds, report_seconds
        self._clock = clock
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._engine_name = ""
        self._max_lanes = 0
        self._runs: dict[str, list[Run]] = {}  # token -> its runs
        self._telling = Telling(family, program)
        self._waiting: list[Run] = []
        self._training: dict[str, Run] = {}  # lane key -> run
        self._flight: Flight | None = None
        self._landed = False  # a flight was taken down between two ticks: there may be reports to make
        self._half_empty_since: float | None = None
        self._step_seconds = 0.0
        self.most: int | None = None  # lanes that fit into memory, once it has run out
        self._state_bytes = 0  # of one run; 0 until one has been seen
        self._directed = [name for name, metric in family.metrics.items() if metric.mode != "none"]

    @property
    def busy(self) -> bool:
        untold = any(self._telling.waits(token, runs) for token, runs in self._runs.items())
        return bool(self._waiting or self._training or self._flight or self._landed or untold)

    @property
    def lanes(self) -> int:
        """Runs that hold or want a slot."""
        return len(self._waiting) + len(self._training)

    def attach(self, job: Job) -> None:
        """Take a config in: its runs continue from their newest checkpoints, or start."""
        _, hyper = self.family.build(job.values)
        runs = []
        for seed, key in job.runs.items():
            run = Run(key, seed, job, hyper=hyper)
            self._restore(run)
            run.begun = run.step
            runs.append(run)
        self._runs[job.token] = runs
        for run in runs:
            if run.state is not None and run.step and run.step % self.schedule.steps_per_epoch == 0:
                self._park_or_wait(run)
            else:
                self._waiting.append(run)

    def _restore(self, run: Run) -> None:
        """Put a run to where its newest checkpoint, or its parent's, is; to its start where there is none."""
        found = self.writer.load(run.key)
        if found is None and run.seed in run.job.parent:
            donor, epoch = run.job.parent[run.seed]
            found = self.writer.load(donor, epoch * self.schedule.steps_per_epoch)
            if found is None:
                raise RuntimeError(f"run {run.key} should continue from run {donor}, which has no checkpoint")
            found[1]["device_seconds"] = 0.0  # the donor's training is the donor's cost
        start: dict[str, Any] = {"epochs": {}, "sums": {}, "step": 0}
        run.state, extra = found if found is not None else (None, start)
        run.epochs = {name: list(values) for name, values in extra["epochs"].items()}
        run.sums = dict(extra["sums"])
        run.step = int(extra["step"])
        run.unsaved = 0.0
        run.device_seconds = max(run.device_seconds, float(extra.get("device_seconds", 0.0)))

    def proceed(self, token: str) -> None:
        """A report was accepted: the config's parked runs want slots again."""
        for run in self._runs.get(token, ()):
            if run.status == "parked":
                self._telling.forget(token)
                run.status = "waiting"
                run.accepted = run.step // self.schedule.steps_per_epoch
                self._waiting.append(run)

    def release(self, token: str) -> None:
        """Let a config go, at once. Unknown tokens (released before) are fine."""
        self._telling.forget(token)
        runs = self._runs.get(token, [])
        if self._flight and any(lane_key(run) in self._flight.trained for run in runs):
            self._land()  # of others' work under way nothing need be read now: the device would stand still meanwhile
        self._runs.pop(token, None)
        lanes = []
        if self._engine is not None:
            self._engine.forget([lane_key(run) for run in runs])
        wait([run.written for run in runs if run.written])  # whoever let it go may remove its checkpoints now
        for run in runs:
            lane = lane_key(run)
            if self._training.pop(lane, None):
                lanes.append(lane)
            if run in self._waiting:
                self._waiting.remove(run)
        if lanes:
            self._need_engine().remove(lanes)

    def save(self, token: str) -> None:
        """Checkpoint a config's runs now."""
        self._land()
        for run in self._runs.get(token, ()):
            self._checkpoint(run)
        self.writer.settle()

    def tick(self) -> list[Report]:
        """Admit who waits, train about CHUNK_SECONDS, evaluate who ended an epoch. Returns the reports now complete."""
        started = self._clock()
        self._landed = False
        self.writer.check()
        flight = self._flight or self._launch()
        if flight is None:
            self._telling.wait_for_writing(self._runs)
            return self._complete_reports()
        self._flight = self._launch() if self._may_run_ahead() else None
        self._prepare_next(flight)
        self._read(flight)
        elapsed = self._clock() - started
        self._step_seconds = elapsed / flight.chunk.steps
        for run in flight.trained.values():
            run.unsaved += elapsed
            run.device_seconds += elapsed / len(flight.trained)
            run.lanes = len(flight.trained)
        if self._flight is None:
            for run in self._due_for_checkpoints():
                self._checkpoint(run)
        self.writer.write_some()
        return self._complete_reports()

    def save_all(self) -> None:
        """Checkpoint every run that has not ended, now."""
        self._land()
        for runs in self._runs.values():
            for run in runs:
                if run.status in ("training", "parked", "waiting"):
                    self._checkpoint(run)
        self.writer.flush()
        self.writer.settle()

    # --- memory ---

    @property
    def crowd(self) -> int:
        """Lanes that may be in memory together: fewer is a way out of a lack of it while this is above 1."""
        return max(len(self._training), min(self._max_lanes or self.lanes, self.lanes))

    @property
    def in_memory(self) -> int:
        """Lanes on the device now."""
        return len(self._training)

    def shrink(self) -> None:
        """Memory ran out: the engine goes, with all it holds, and half as many lanes as before are let in again.

        What an interrupted step left of its states is not trusted: runs that trained go back to their newest
        checkpoint (`lanes.records.OnceRecorder` keeps rows single), and no report is made twice.
        """
        self.most = self._max_lanes = max(1, self.crowd // 2)
        self._engine, self._step_seconds = None, 0.0
        self._flight, self._half_empty_since = None, None
        self._training.clear()
        everyone = [run for runs in self._runs.values() for run in runs]
        trained = [run for run in everyone if run.status == "training"]
        for run in trained:
            self._restore(run)
            run.status = "waiting"
        self._waiting = trained + self._waiting
        for run in everyone:
            if run.state is not None:
                run.state = tree_map(lambda tensor: tensor.cpu(), run.state)

    def rest(self) -> None:
        """Let the engine go while nothing trains; it is made again when there is work."""
        if not self._training:
            self._engine = None

    def out_of_memory(self) -> str:
        """The token of a config for which there is no memory even alone: the one that trains, or is next; or ""."""
        run = next(iter([*self._training.values(), *self._waiting]), None)
        return run.job.token if run else ""

    # --- within a tick ---

    def _need_engine(self) -> Engine:
        if self._engine is None:
            self._engine, self._max_lanes = self._make_engine()
            self._max_lanes = min(self._max_lanes, self.most or self._max_lanes)
            self._engine_name = self._engine.name
        return self._engine

    def _admit(self) -> None:
        """Fill free slots, oldest first. Lanes that start between others' epochs wait for these to end theirs, so
        that all lanes stay in phase and train in long chunks."""
        if not self._waiting:
            return
        engine = self._need_engine()
        if self._training and engine.until_epoch_end() != self.schedule.steps_per_epoch:
            return
        coming = self._waiting[: max(0, self._max_lanes - len(self._training))]
        engine.insert_all([arrival(run) for run in coming])
        del self._waiting[: len(coming)]
        for run in coming:
            run.state = None
            run.status = "training"
            self._training[lane_key(run)] = run

    def _prepare_next(self, flight: Flight) -> None:
        """While the device trains: what the runs that get slots next will need."""
        engine = self._need_engine()
        if not engine.runs_ahead:
            return
        started, most = self._clock(), PREPARING_SHARE * self._step_seconds * flight.chunk.steps
        for run in self._waiting[: self._max_lanes]:
            engine.prepare(arrival(run))
            if self._clock() - started > most:
                break

    def _compaction_due(self) -> bool:
        """Whether the stack has stayed half empty, and what is left to train repays compiling a smaller one."""
        engine = self._need_engine()
        wanted = sum(run.status in ("waiting", "training", "parked") for runs in self._runs.values() for run in runs)
        if 2 * wanted > len(self._training) + engine.spare:
            self._half_empty_since = None
            return False
        if self._half_empty_since is None:
            self._half_empty_since = self._clock()
        ahead = self._step_seconds * max(self.schedule.steps - run.step for run in self._training.values())
        patient = self._clock() - self._half_empty_since >= COMPACTION_PATIENCE
        return patient and ahead > COMPACTION_PAYS * engine.setup_seconds

    def _launch(self) -> Flight | None:
        """Let in who waits, give the device its next chunk and the evaluation of the lanes that end an epoch with it,
        and take those out that stop at a report. None where nobody trains."""
        self._admit()
        if not self._training:
            return None
        engine = self._need_engine()
        if self._flight is None and self._compaction_due():
            engine.compact()
            self._half_empty_since = None
        affordable = int(CHUNK_SECONDS / self._step_seconds) if self._step_seconds else 4
        steps = max(1, min(engine.until_epoch_end(), affordable))
        chunk = engine.launch(steps)
        ended = tuple(lane for lane in self._training if engine.lanes[lane].step % self.schedule.steps_per_epoch == 0)
        watched = [lane for lane in ended if self._training[lane].job.covariates]
        tests = engine.launch_evaluation(ended) if ended else None
        covariates = engine.launch_inspection(watched) if watched else None
        trained = dict(self._training)
        passed = self._pass(ended)
        return Flight(chunk, trained, ended, self._take_out(ended), passed, tests, covariates)

    def _pass(self, ended: Sequence[str]) -> dict[str, Parcel | None]:
        """Lanes that come to a report and do not stop send their states home, those that are to be saved."""
        engine = self._need_engine()
        passing = [lane for lane in ended if self._passes_at(self._training[lane], engine.lanes[lane].step)]
        saved = self._to_save(passing)
        states = engine.states(saved)
        return {lane: Parcel(states[lane]) if lane in states else None for lane in passing}

    def _take_out(self, ended: Sequence[str]) -> dict[str, Parcel | None]:
        """Lanes that stop at a report leave; what goes on afterwards takes its state along, and sends it home."""
        engine = self._need_engine()
        step = {lane: engine.lanes[lane].step for lane in ended}
        leaving = [
            lane
            for lane in ended
            if self._reports_at(self._training[lane], step[lane])
            and not self._passes_at(self._training[lane], step[lane])
        ]
        if not leaving:
            return {}
        states = engine.states([lane for lane in leaving if step[lane] < self.schedule.steps])
        saved = self._to_save(list(states))
        for lane in leaving:
            self._training.pop(lane).state = states.get(lane)
        engine.remove(leaving)
        return {lane: Parcel(states[lane]) if lane in saved else None for lane in leaving}

    def _to_save(self, reporting: Sequence[str]) -> list[str]:
        """Of lanes at a report: those of which a checkpoint is made now."""
        saved: list[str] = []
        for lane in reporting:
            run = self._training[lane]
            wanted = run.job.donates or run.unsaved > self.checkpoint_seconds
            if wanted or (run.unsaved > self.report_seconds and self._saved_soon(lane, len(saved))):
                saved.append(lane)
        return saved

    def _saved_soon(self, lane: str, chosen: int) -> bool:
        """Whether the disk keeps up with a checkpoint of a lane, after so many others."""
        self._state_bytes = self._state_bytes or bytes_of(self._need_engine().state(lane))
        return self.writer.keeps_up(self._state_bytes, chosen * self._state_bytes)

    def _may_run_ahead(self) -> bool:
        """Whether the next chunk can be launched before the one under way is read."""
        if not self._need_engine().runs_ahead or self._due_for_checkpoints():
            return False
        return not (self._training and self._compaction_due())

    def _read(self, flight: Flight) -> None:
        """Record what a flight brought; lanes that have diverged leave, those that left come to their reports."""
        going = {lane: run for lane, run in flight.trained.items() if run.status == "training"}
        self._record_steps(flight)
        if flight.ended:
            assert flight.tests is not None
            covariates = flight.covariates.wait() if flight.covariates else {}
            self._end_epochs(flight, flight.tests.wait(), covariates)
        self._drop({lane: run for lane, run in going.items() if run.status == "diverged"})
        self._come_to_reports(flight)

    def _land(self) -> None:
        """Read what is under way, so that the states on the device are those of the runs' steps."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._landed = True
            self._read(flight)

    def _due_for_checkpoints(self) -> list[Run]:
        """Runs whose newest checkpoint is old, so many as the disk takes now; and those whose is very old."""
        due: list[Run] = []
        for run in sorted(self._training.values(), key=lambda run: -run.unsaved):
            if run.unsaved <= self.checkpoint_seconds:
                break
            if run.unsaved > 2 * self.checkpoint_seconds or self._saved_soon(lane_key(run), len(due)):
                due.append(run)
        return due

    def _record_steps(self, flight: Flight) -> None:
        curves = flight.chunk.wait()
        bad = np.zeros((flight.chunk.steps, len(flight.chunk.keys)), bool)
        for name in self._directed:
            if name in curves:
                bad |= ~np.isfinite(curves[name])
        for column, lane in enumerate(flight.chunk.keys):
            run = flight.trained[lane]
            if run.status == "training":  # else it diverged in the flight before
                self._record_lane(run, bad[:, column], {n: v[:, column] for n, v in curves.items()})

    def _record_lane(self, run: Run, bad: np.ndarray, curves: dict[str, np.ndarray]) -> None:
        """A run's steps up to the first bad one."""
        if bad.any():
            run.status = "diverged"
            kept = int(bad.argmax()) + 1
            curves = {name: values[:kept] for name, values in curves.items()}
        self.writer.steps(run.key, run.step + 1, curves)
        run.step += len(next(iter(curves.values())))
        for name, values in curves.items():
            # step by step, so that the sum does not depend on how the clock cut the epoch into chunks
            run.sums[name] = float(np.cumsum([run.sums.get(name, 0.0), *values])[-1])

    def _drop(self, diverged: Mapping[str, Run]) -> None:
        """Runs that have just diverged leave, if they have not; their rows are all there will be."""
        there = [lane for lane in diverged if self._training.pop(lane, None)]
        if there:
            self._need_engine().remove(there)
        for run in diverged.values():
            run.state, run.written = None, self.writer.flush()

    def _come_to_reports(self, flight: Flight) -> None:
        """Runs that left with a flight stand at a report, or at their end; others have passed one."""
        for lane, parcel in flight.passed.items():
            run = flight.trained[lane]
            if run.status == "training":
                run.written = self._save(run, parcel) if parcel else self.writer.flush()
                self._telling.note_passed(run, run.written)
        for lane, parcel in flight.left.items():
            run = flight.trained[lane]
            if run.status == "training":
                self._park_or_wait(run)
                run.written = self.writer.flush() if parcel is None else self._save(run, parcel)

    def _end_epochs(
        self,
        flight: Flight,
        tests: Mapping[str, Mapping[str, float]],
        covariates: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        per_epoch = self.schedule.steps_per_epoch
        for lane in flight.ended:
            run = flight.trained[lane]
            if run.status != "training":
                continue
            values = {name: total / per_epoch for name, total in run.sums.items()} | dict(tests[lane])
            run.sums = {}
            for name, value in values.items():
                run.epochs.setdefault(name, []).append(value)
            epoch = run.step // per_epoch
            row = {
                "config_key": run.job.config_key,
                "seed": run.seed,
                "epoch": epoch,
                "task": self.schedule.task_of(epoch - 1),
                "step": run.step,
            }
            self.writer.epoch(run.key, row, values)
            if lane in covariates:
                self.writer.covariates(run.key, epoch, covariates[lane])
            if not all(np.isfinite(values[name]) for name in self._directed if name in values):
                run.status = "diverged"

    def _reports_at(self, run: Run, step: int) -> bool:
        """Whether a run has a report to make at the end of the epoch that `step` ends."""
        epoch = step // self.schedule.steps_per_epoch
        return epoch > run.accepted and epoch in run.job.reports

    def _passes_at(self, run: Run, step: int) -> bool:
        """Whether it makes that report and goes on."""
        return not run.job.stops and step < self.schedule.steps and self._reports_at(run, step)

    def _park_or_wait(self, run: Run) -> None:
        """Where a run stands after a whole epoch: at its end, at a report, or on its way."""
        if run.step >= self.schedule.steps:
            run.status = "finished"
        elif self._reports_at(run, run.step) and run.job.stops:
            run.status = "parked"
        else:
            if self._passes_at(run, run.step):
                self._telling.note_passed(run, None)  # it was taken from a checkpoint, so that is on disk
            run.status = "waiting"
            self._waiting.append(run)

    def _checkpoint(self, run: Run) -> None:
        lane = lane_key(run)
        state = self._need_engine().state(lane) if lane in self._training else run.state
        if state is not None:
            run.written = self._save(run, Parcel(state))

    def _save(self, run: Run, parcel: Parcel) -> Future:
        extra = {
            "epochs": {name: list(values) for name, values in run.epochs.items()},
            "sums": dict(run.sums),
            "step": run.step,
            "device_seconds": run.device_seconds,
        }
        run.unsaved = 0.0
        return self.writer.save(run.key, run.step, parcel, extra)

    def _complete_reports(self) -> list[Report]:
        reports, behind = self._telling.complete(self._runs, lambda: self._engine_name or self._need_engine().name)
        for run in behind:
            run.status = "waiting"
        self._waiting.extend(behind)
        return reports
