"""Running a plan: Ray, the pool of hosts, Tune, the journal, MLflow's recorder, the report."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from trainables.family import BadValue
from tuning.provenance import git, versions
from tuning.sweep import SweepPlan

log = logging.getLogger(__name__)
CPU_LANES = 16
GPU_LANES = 128
TRIAL_CPUS = 0.2
"""Share of a node's processors that all trials together may hold; hosts hold the rest."""


LOST_PROCESSES = 10
"""How often Tune tries a trial again whose process or node died; what a family raises is no failure of Tune's."""


@dataclass
class Outcome:
    """How a sweep ended, and where its time went (seconds)."""

    ended: dict[str, int]
    interrupted: bool
    results: int
    seconds: dict[str, float]


def cache_dir() -> Path:
    """The node's cache of decoded data and probe results: $LANEWISE_CACHE, or the user's cache folder."""
    base = os.environ.get("LANEWISE_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if os.environ.get("LANEWISE_CACHE"):
        return Path(str(base))
    return Path(base or Path.home() / ".cache") / "lanewise"


def check_data(plan: SweepPlan) -> None:
    """Decode every data set the sweep names, so that a missing or broken file is told before anything is written."""
    seen = set()
    for point in _some_points(plan):
        program, _ = plan.loaded.build(plan.values_at(point))
        if program.data not in seen:
            seen.add(program.data)
            plan.loaded.load(program, plan.data_dir, cache_dir())


def _some_points(plan: SweepPlan, most: int = 2000) -> Iterator[dict[str, Any]]:
    if plan.space.size() is None:
        yield plan.space.at({axis.name: 0.0 for axis in plan.space.axes})
        return
    for number, point in enumerate(plan.space.grid()):
        if number == most:
            return
        yield point


def run(plan: SweepPlan, console: Console, quiet: bool, resume: bool) -> Outcome:
    """Run a plan to its end, or until it is interrupted. Everything but the progress line goes to the log file."""
    started = time.monotonic()
    seconds: dict[str, float] = {}
    with _log_file(plan.folder / "log.txt"):
        from tuning.progress import Progress

        progress = Progress(None if quiet else console, plan.budget, plan.metric, plan.objective.mode)
        with progress:
            sync = _start_sync(plan)
            try:
                outcome = _search(plan, progress, resume, seconds)
            except Exception:
                log.exception("the sweep failed")
                raise
            begun = time.monotonic()
            progress.phase("writing the report")
            logged = _report(plan)
            progress.phase("recording in MLflow")
            _finish_sync(plan, sync)
            if not logged:  # MLflow did not know the sweep yet
                _report(plan)
            seconds["report and MLflow"] = time.monotonic() - begun
    seconds["whole"] = time.monotonic() - started
    if not quiet:
        from tuning.ending import print_results

        print_results(console, plan, outcome[1])
    (plan.folder / "timing.json").write_text(json.dumps(seconds, indent=1))
    return Outcome(dict(progress.ended), outcome[0], outcome[2], seconds)


def _search(plan: SweepPlan, progress: Any, resume: bool, seconds: dict[str, float]) -> tuple[bool, Any, int]:
    """The part inside Ray. Returns (interrupted, what it ended with, results the driver took)."""
    begun = time.monotonic()
    os.environ.update(
        RAY_AIR_NEW_OUTPUT="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_CHDIR_TO_TRIAL_DIR="0",
    )
    if not plan.address:
        # Ray takes 127.0.0.1 for "find my outer address" unless it is told that no other node may join
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray import tune

    from lanes.host import HostSettings, Pool, find_slots
    from tuning.demand import release
    from tuning.ending import Ended
    from tuning.followup import ASKED, Followup
    from tuning.journal import Journal
    from tuning.recorder import Recorder
    from tuning.resume import Past, replay
    from tuning.runs import RunTable
    from tuning.schedulers import Pbt, make_scheduler
    from tuning.searchers import Proposer, make_source
    from tuning.trial import ConfigTrial

    _start_ray(plan)
    seconds["Ray's start"] = time.monotonic() - begun
    try:
        slots = find_slots()
        gpu = slots[0].kind == "cuda"
        concurrent = plan.max_concurrent or _concurrency(plan, len(slots), gpu)
        cpus = ray.cluster_resources().get("CPU", 1.0)
        trial_cpus = max(0.001, round(TRIAL_CPUS * cpus / concurrent, 4))
        # a population is compared with all its members: those that find no room wait their turn, paused
        in_flight = concurrent
        if plan.scheduler == "pbt":
            in_flight = plan.budget
            held = 0.0 if gpu else min(len(slots), concurrent) * (1 - TRIAL_CPUS)
            trial_cpus = math.floor(1e4 * (cpus - held) / concurrent) / 1e4
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(in_flight)
        # there are no files of Tune's own loggers: our tables are elsewhere
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        plain = plan.to_plain()
        schedule = plain["schedule"]
        lanes_wanted = -(-concurrent * plan.seeds // len(slots))
        settings = HostSettings(
            engine="serial" if plan.lanes == "off" else plan.engine,
            lanes=0 if plan.lanes in ("auto", "off") else int(plan.lanes),
            wanted=lanes_wanted,
            expected_steps=plan.budget
            * plan.seeds
            * schedule["steps_per_epoch"]
            * schedule["epochs"]
            / (2 if plan.scheduler in ("asha", "median") else 1)
            / len(slots),
            data_dir=plan.data_dir,
            cache_dir=cache_dir(),
            make_recorder=partial(_make_curve_writer, plan.folder, _curve_metadata(plain), datetime.now(UTC)),
            make_checkpoints=partial(_make_checkpoint_store, plan.folder),
        )
        pool = (
            ray.remote(Pool)
            .options(num_cpus=0, scheduling_strategy=_beside_the_driver())
            .remote(settings, str(plan.folder / "log.txt"), concurrent, 1 - TRIAL_CPUS)
        )
        if plan.scheduler == "pbt":
            ray.get(pool.flush.remote())  # type: ignore[attr-defined]  # hosts are up before trials take the rest
        table = RunTable(plain)
        source = make_source(plan)
        scheduler = make_scheduler(plan)
        past = replay(plan, plan.folder / "journal.jsonl", source, scheduler) if resume else Past()
        journal = Journal(plan.folder / "journal.jsonl")
        recorder = Recorder(plan, journal, table, progress)
        for event in past.events:
            recorder.apply(event)
        scheduler.on_decision = recorder.on_decision
        if isinstance(scheduler, Pbt):
            scheduler.exploited = recorder.on_exploit
        journal.write("begin", versions=versions(), resumed=resume, **{name: getattr(plan, name) for name in ASKED})
        followup = Followup(
            plan, table.rows, lambda kind, **fields: recorder.apply(journal.write(kind, **fields)), past.events
        )
        proposer = Proposer(
            plan,
            source,
            journal,
            recorder.apply,
            past.proposed,
            past.seeds_used,
            past.unfinished,
            on_resume=lambda trial, replaces: scheduler.adopt(trial, past.trials[replaces]),
            followup=followup if followup.left else None,
        )
        recorder.on_abandon = proposer.abandon
        trainable = tune.with_parameters(
            ConfigTrial,
            pool=pool,
            settings={
                "family": plan.family,
                "folder": str(plan.folder),
                "objectives": plan.objectives,
                "modes": {name: metric["mode"] for name, metric in plain["metrics"].items()},
                "scheduler": plan.scheduler,
                "covariates": bool(plan.covariates),
                "length": plan.length,
            },
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": trial_cpus}),
            tune_config=tune.TuneConfig(
                search_alg=proposer,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=in_flight,
                reuse_actors=True,
                time_budget_s=plan.time_budget or None,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(plan.folder / "ray"),
                verbose=0,
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=LOST_PROCESSES),
            ),
        )
        begun = time.monotonic()
        tuner.fit()
        seconds["search"] = time.monotonic() - begun
        trained: Any = ray.get(pool.flush.remote())  # type: ignore[attr-defined]
        seconds["training, all devices"] = sum(trained.values())
        seconds["devices"] = float(len(trained))
        running = any(row["config_stop_reason"] in ("pending", "running") for row in table.rows.values())
        left = running or proposer.remaining > 0
        time_up = 0 < plan.time_budget <= seconds["search"]
        interrupted = left and not time_up
        reason = "interrupted" if interrupted else "time budget" if time_up else "done"
        recorder.apply(journal.write("finish", reason=reason))
        recorder.write_table()
        journal.close()
        return interrupted, Ended(list(table.rows.values()), followup.look, followup.confirmed), recorder.results
    finally:
        if plan.address:
            release()
        ray.shutdown()


def _beside_the_driver() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _concurrency(plan: SweepPlan, devices: int, gpu: bool) -> int:
    """Configs in flight: two a core; on GPUs as many as fill the lanes."""
    if not gpu:
        return min(plan.budget, 2 * devices)
    lanes = int(plan.lanes) if plan.lanes.isdigit() else GPU_LANES
    return min(plan.budget, max(1, devices * lanes // plan.seeds))


def _start_ray(plan: SweepPlan) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if plan.address:
        ray.init(address=plan.address, **quiet)
    else:
        # a job of this sweep's own: loopback only, no dashboard, whatever cluster the environment points to
        os.environ.pop("RAY_ADDRESS", None)
        ray.init(
            address="local",
            include_dashboard=False,
            _temp_dir=os.environ.get("LANEWISE_RAY_TEMP") or None,
            _node_ip_address="127.0.0.1",
            **quiet,
        )


def _curve_metadata(plain: dict[str, Any]) -> dict[bytes, bytes]:
    from tuning.curves import metadata

    return metadata(plain["name"], plain["family"], plain["metrics"])


def _make_curve_writer(folder: Path, schema_metadata: dict[bytes, bytes], session: datetime, label: str) -> Any:
    from tuning.curves import CurveWriter

    device = label.replace(":", "").replace("@", "-").replace("/", "-")
    return CurveWriter(folder, f"{session:%Y%m%dT%H%M%S%f}-{device}-{os.getpid()}", schema_metadata)


def _make_checkpoint_store(folder: Path) -> Any:
    from tuning.checkpoints import CheckpointStore

    return CheckpointStore(folder / "checkpoints")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Send what libraries and subprocesses print to the log file; the console keeps the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s driver %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])


def terminal() -> Console:
    """A console on the real terminal, whatever standard output is sent to later; 120 columns where there is none."""
    file = os.fdopen(os.dup(1), "w")
    return Console(file=file, highlight=False, width=None if file.isatty() else 120)


def write_sweep_json(plan: SweepPlan, code: Path) -> None:
    """Freeze the command: sweep.json, written once, when the sweep's folder is made."""
    plain = plan.to_plain() | {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git(code),
    }
    plan.folder.mkdir(parents=True)
    (plan.folder / "sweep.json").write_text(json.dumps(plain, indent=1))


def _start_sync(plan: SweepPlan) -> subprocess.Popen:
    command = [sys.executable, "-m", "tuning.sync", plan.name, "--storage", str(plan.storage), "--follow"]
    # a session of its own: Ctrl-C in the terminal is for the driver, which then waits for the delivery
    return subprocess.Popen(
        [*command, str(os.getpid())], stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True
    )


def _finish_sync(plan: SweepPlan, sync: subprocess.Popen) -> None:
    if sync.wait() != 0:
        log.error(
            "MLflow's recorder ended with code %s; `python -m tuning.sync %s` delivers later",
            sync.returncode,
            plan.name,
        )


def _report(plan: SweepPlan) -> bool:
    """Report and journal, on disk and on the sweep's MLflow run; whether that was told."""
    command = [sys.executable, "-m", "analysis", "report", plan.name, "--journal", "--storage", str(plan.storage)]
    command += ["--tracking-uri", plan.tracking_uri]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=_environment(), check=False)
    if done.returncode:
        log.error("the report ended with code %s; `%s` writes it again", done.returncode, " ".join(command[1:]))
    return done.returncode == 0


def _environment() -> dict[str, str]:
    """Subprocesses find the code where this process found it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def refuse_existing(plan: SweepPlan) -> None:
    """A sweep's name is taken, or its storage cannot be written: `BadValue`, before anything is written."""
    if plan.folder.exists():
        raise BadValue(
            f"the sweep '{plan.name}' already exists in {plan.storage}: continue it with --resume {plan.name}, or "
            "choose another --name"
        )
    parent = plan.storage
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadValue(f"--storage {plan.storage} cannot be written: {parent} is not a writable folder")
