"""Running a plan: Ray, the pool of hosts, Tune, the journal, MLflow's recorder, the report."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from trainables.datasets.cache import files_read
from tuning.continuity import data_facts, facts
from tuning.delivery import Delivery
from tuning.demand import ask, configs_a_gpu, release, wanted_gpus
from tuning.ground import StorageFailed, unmake
from tuning.interruptions import Interruptions
from tuning.keeping import freeze, make_checkpoints, make_curves, make_log, open_journal, shipped_log, tune_storage
from tuning.provenance import git
from tuning.secrets import RedactingFormatter
from tuning.storage import cache_dir
from tuning.sweep import SweepPlan

log = logging.getLogger(__name__)
CPU_LANES = 16
SAVE_SECONDS = 60.0
"""How long an interrupted sweep waits for its hosts to checkpoint what they train."""
TRIAL_CPUS = 0.2
"""Share of a node's processors that all trials together may hold; hosts hold the rest."""


LOST_PROCESSES = 10
"""How often Tune tries a trial again whose process or node died; what a family raises is no failure of Tune's."""


@dataclass
class Outcome:
    """How a sweep ended, and where its time went (seconds).

    `reason` is what the journal's `finish` says: done, time budget, interrupted, too many crashes.
    """

    ended: dict[str, int]
    reason: str
    detail: str
    results: int
    seconds: dict[str, float]


def check_data(plan: SweepPlan) -> set[Path]:
    """Decode every data set the sweep names, so that a missing or broken file is told before anything is written.
    Returns the files they are made of."""
    seen = set()
    with files_read() as files:
        for point in _some_points(plan):
            program, _ = plan.loaded.build(plan.values_at(point))
            if program.data not in seen:
                seen.add(program.data)
                plan.loaded.load(program, plan.data_dir, cache_dir())
    return {path for path in files if not path.is_relative_to(cache_dir().resolve())}


def _some_points(plan: SweepPlan, most: int = 2000) -> Iterator[dict[str, Any]]:
    if plan.space.size() is None:
        yield plan.space.at({axis.name: 0.0 for axis in plan.space.axes})
        return
    for number, point in enumerate(plan.space.grid()):
        if number == most:
            return
        yield point


def run(
    plan: SweepPlan,
    console: Console,
    quiet: bool,
    resume: bool,
    retry: bool = False,
    last_words: str = "",
    may_write: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a plan to its end, or until it is interrupted. Everything but the progress line goes to the log file.

    Args:
        retry: of a resumed sweep, also configs that failed.
        last_words: the line for the second Ctrl-C, which ends the process at once.
        may_write: raises where another driver has taken over (`tuning.keeping.only_driver`).
    """
    started = time.monotonic()
    seconds: dict[str, float] = {}
    with _log_file(plan.folder / "log.txt") as terminal_error, shipped_log(plan):
        from tuning.progress import Progress

        progress = Progress(None if quiet else console, plan.budget, plan.metric, plan.objective.mode)
        interruptions = Interruptions(partial(_say, terminal_error), last_words)
        with progress, contextlib.ExitStack() as stack:
            stack.callback(interruptions.release)
            delivery = Delivery(plan)
            try:
                outcome = _search(plan, progress, interruptions, resume, retry, seconds, may_write, delivery)
            except Exception:
                log.exception("the sweep failed")
                raise
            begun = time.monotonic()
            progress.phase("writing the report")
            delivery.wait_for_report()
            progress.phase("recording in MLflow")
            delivery.finish()
            seconds["report and MLflow"] = time.monotonic() - begun
    seconds["whole"] = time.monotonic() - started
    if not quiet:
        from tuning.ending import print_results

        print_results(console, plan, outcome[1])
    plan.store.write("timing.json", json.dumps(seconds, indent=1).encode())
    return Outcome(dict(progress.ended), *outcome[0], outcome[2], seconds)


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def _search(
    plan: SweepPlan,
    progress: Any,
    interruptions: Interruptions,
    resume: bool,
    retry: bool,
    seconds: dict[str, float],
    may_write: Callable[[], None],
    delivery: Delivery,
) -> tuple[tuple[str, str], Any, int]:
    """The part inside Ray. Returns (why it ended, and details), what it ended with, results the driver took."""
    begun = time.monotonic()
    os.environ.update(
        RAY_AIR_NEW_OUTPUT="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_CHDIR_TO_TRIAL_DIR="0",
        # Tune writes the state of all trials again and again for a restore that is never used (`tuning.resume`)
        TUNE_GLOBAL_CHECKPOINT_S="1e9",
        TUNE_DISABLE_SIGINT_HANDLER="1",  # see `tuning.interruptions`
    )
    if not plan.address:
        # Ray takes 127.0.0.1 for "find my outer address" unless it is told that no other node may join
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    from lanes.host import HostSettings
    from lanes.pool import Pool, find_slots

    # Ray takes seconds, most of which this process only waits; nothing that `ray.init` imports is among these
    threading.Thread(target=_import_libraries, args=(plan.searcher,), name="imports").start()
    _start_ray(plan)
    seconds["Ray's start"] = time.monotonic() - begun
    begun = time.monotonic()
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
        journal = open_journal(plan, may_write)
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
            make_recorder=partial(make_curves, plan.store, _curve_metadata(plain), journal.now),
            make_checkpoints=partial(make_checkpoints, plan.store),
            make_log=partial(make_log, plan.store),
            make_formatter=RedactingFormatter,
            device=os.environ.get("LANEWISE_DEVICE", ""),
        )
        pool = (
            ray.remote(Pool)
            .options(num_cpus=0, scheduling_strategy=_beside_the_driver())
            .remote(settings, concurrent, 1 - TRIAL_CPUS, plan.placement)
        )
        # the hosts start while this process imports what is left
        from ray import tune

        from tuning.elastic import Elastic
        from tuning.ending import Ended
        from tuning.followup import ASKED, Followup
        from tuning.ramp import Ramp
        from tuning.recorder import Recorder
        from tuning.resume import Past, replay
        from tuning.runs import RunTable
        from tuning.schedulers import Pbt, make_scheduler
        from tuning.searchers import Proposer, make_source
        from tuning.stopping import Stopping
        from tuning.trial import ConfigTrial

        table = RunTable(plain)
        source = make_source(plan)
        scheduler = make_scheduler(plan)
        past = replay(plan, plan.folder / "journal.jsonl", source, scheduler, retry) if resume else Past()
        if plan.scheduler == "pbt":
            ray.get(pool.flush.remote())  # type: ignore[attr-defined]  # hosts are up before trials take the rest
        recorder = Recorder(plan, journal, table, progress)
        for event in past.events:
            recorder.apply(event)
        followup = Followup(plan, table.rows, recorder.write, past.events)
        past.events.clear()  # of a long sweep they are many
        scheduler.on_decision = recorder.on_decision
        if isinstance(scheduler, Pbt):
            scheduler.exploited = recorder.on_exploit
        recorder.write("begin", **facts(plan), resumed=resume, **{name: getattr(plan, name) for name in ASKED})
        for kind, fields in past.unwritten:
            recorder.write(kind, **fields)
        recorder.discard_ended()
        if retry and not past.retried:
            progress.say("no config crashed, ran out of memory or diverged: there is nothing to retry")
        stopping = Stopping(plan.time_budget, plan.budget)
        stopping.save = lambda: ray.get(pool.save.remote(), timeout=SAVE_SECONDS)  # type: ignore
        recorder.on_event = stopping.apply
        recorder.on_storage = partial(stopping.stop, "storage")
        recorder.on_step = delivery.check
        proposer = Proposer(
            plan,
            source,
            journal,
            recorder.apply,
            past.proposed,
            past.seeds_used,
            past.unfinished,
            on_resume=lambda trial, replaces: scheduler.adopt(trial, past.trials[replaces], past.last.get(replaces)),
            followup=followup if followup.left else None,
        )
        recorder.on_abandon = proposer.abandon
        if plan.address:
            if gpu:
                ask(wanted_gpus(plan))
            grows = plan.scheduler != "pbt" and not plan.max_concurrent
            elastic = Elastic(pool, proposer, (lambda n: _concurrency(plan, n, gpu)) if grows else None, gpu)
            recorder.on_step = partial(_both, delivery.check, elastic.step)
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
        # a second config for a core comes later; whoever says how many are in flight gets them at once
        first = in_flight if gpu or plan.max_concurrent or plan.scheduler == "pbt" else len(slots)
        ramp = Ramp(proposer, first, in_flight)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": trial_cpus}),
            tune_config=tune.TuneConfig(
                search_alg=proposer,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                **tune_storage(plan),
                verbose=0,
                callbacks=[recorder, ramp],
                stop=stopping,
                failure_config=tune.FailureConfig(max_failures=LOST_PROCESSES),
                # what a trial would save at its end is a pointer that nobody follows: one call less for each
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        interruptions.on_first = partial(stopping.stop, "interrupted")
        interruptions.catch()
        tuner.fit()
        interruptions.on_first = None
        seconds["search"] = time.monotonic() - begun
        seconds["first result"] = (ramp.first_result or time.monotonic()) - begun
        if stopping.reason == "storage":
            raise StorageFailed(stopping.detail)
        trained: Any = ray.get(pool.flush.remote())  # type: ignore[attr-defined]
        seconds["training, all devices"] = sum(trained.values())
        seconds["devices"] = float(len(trained))
        running = any(row["config_stop_reason"] in ("pending", "running") for row in table.rows.values())
        left = running or proposer.remaining > 0
        reason = stopping.reason or ("interrupted" if left else "done")
        if reason == "interrupted" and not left:
            reason = "done"
        recorder.write("finish", reason=reason, detail=stopping.detail)
        recorder.write_table()
        recorder.close()
        journal.close()
        ended = Ended(list(table.rows.values()), followup.look, followup.confirmed)
        delivery.search_is_over()  # both work while Ray goes down
        return (reason, stopping.detail), ended, recorder.results
    finally:
        if plan.address:
            release()
        ray.shutdown()
        if not plan.bucket:
            unmake(plan.folder)


def _import_libraries(searcher: str) -> None:
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    if searcher == "optuna":
        import optuna  # noqa: F401
    elif searcher == "hyperopt":
        import hyperopt  # noqa: F401


def _say(descriptor: int, line: str) -> None:
    """A line to a file descriptor; also from within a signal's handler. On a terminal in place of the live line, and
    with the cursor, which that hides: it may be the last."""
    place = "\r\x1b[K\x1b[?25h" if os.isatty(descriptor) else ""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{place}{line}\n".encode())


def _beside_the_driver() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _concurrency(plan: SweepPlan, devices: int, gpu: bool) -> int:
    """Configs in flight at most: two a core; on GPUs as many as fill the lanes."""
    if not gpu:
        return min(plan.budget, 2 * devices)
    return min(plan.budget, devices * configs_a_gpu(plan))


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


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[int]:
    """Send what libraries and subprocesses print to the log file; the console keeps the terminal. Gives the terminal's
    standard error, a file descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s driver %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield saved[1]
    finally:
        root.removeHandler(handler)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the log's disk may be full
                stream.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])


def terminal() -> Console:
    """A console on the real terminal, whatever standard output is sent to later; 120 columns where there is none."""
    file = os.fdopen(os.dup(1), "w")
    return Console(file=file, highlight=False, width=None if file.isatty() else 120)


def write_sweep_json(plan: SweepPlan, code: Path, data: Iterable[Path] = ()) -> None:
    """Freeze the command: sweep.json, written once, when the sweep's folder is made.

    Args:
        code: the folder of the script.
        data: the files its data sets are made of.
    """
    plain = plan.to_plain() | {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts(plan),
        "git": git(code),
        "data": data_facts(data, cache_dir()),
    }
    freeze(plan, plain)
