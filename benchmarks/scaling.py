"""What a sweep's driver costs as sweeps grow: `python benchmarks/scaling.py`.

Whole sweeps of short trials by the ordinary command, on a Ray cluster of simulated nodes on this machine: every node is
a raylet of its own with one device (a core) that holds a host. The trials are those of the tests' toy family, which
train for milliseconds, so that what is measured is everything but training. From outside, once a second: processor
seconds and memory of every process by its role, and how many configs have ended. Afterwards, on what the sweep left:
the time to replay it (what `--resume` does first), to write its report, to deliver it to a fresh MLflow database, and
its files' sizes. While the sweep runs its MLflow server is away, so that delivering does not take the processor from
what is measured.

Other work on the machine changes wall seconds, and processor seconds much less: read these. Those of docs/scaling.md:

    python benchmarks/scaling.py
    python benchmarks/scaling.py --scheduler none --trials 1000 --epochs 4 --no-deliver
    python benchmarks/scaling.py --trials 1000 --concurrent 48 --no-deliver
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script is imported from its own folder; the packages stand one above
SAMPLE_SECONDS = 1.0
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MARK = "LANEWISE_SCALING_MARK"
AWAY = "http://127.0.0.1:9"
ROLES = (
    ("ray::HostActor", "hosts"),
    ("ray::Pool", "pool"),
    ("ray::", "trials"),
    ("tuning.sync", "MLflow's recorder"),
    ("analysis report", "report"),
    ("gcs_server", "GCS"),
    ("raylet", "raylets"),
)


def main(
    trials: Annotated[str, typer.Option(help="sizes of sweeps, comma-separated")] = "100,1000,10000",
    nodes: Annotated[int, typer.Option(help="simulated nodes, one device each")] = 4,
    concurrent: Annotated[int, typer.Option(help="configs in flight; 0: as a sweep chooses")] = 0,
    seeds: Annotated[int, typer.Option(help="runs a config")] = 1,
    scheduler: Annotated[str, typer.Option(help="asha, or none: four reports a trial")] = "asha",
    searcher: Annotated[str, typer.Option(help="random, qmc, optuna or hyperopt")] = "random",
    epochs: Annotated[int, typer.Option(help="epochs of a trial, six steps each")] = 3,
    out: Annotated[Path, typer.Option(help="folder of results")] = ROOT / "benchmarks" / "results" / "scaling",
    deliver: Annotated[bool, typer.Option(help="also deliver each sweep to MLflow (70 ms a config)")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="keep the sweeps themselves, in the folder of results")] = False,
    side: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure each size; write one JSON file a size, and print a line of results."""
    if side:
        print(json.dumps(replay_seconds(Path(side))))
        return
    os.environ[MARK] = uuid.uuid4().hex  # of everything that is started from here
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lw") as scratch, cluster(nodes, scratch) as address:
        for size in map(int, trials.split(",")):
            storage = Path(scratch) / "sweeps"
            said = {"nodes": nodes, "scheduler": scheduler, "searcher": searcher, "seeds": seeds}
            said |= {"concurrent": concurrent}
            path = out / f"{scheduler}-{searcher}-{concurrent or 'auto'}-{size}.json"
            save = partial(write, path, said)
            found = measure(
                storage,
                f"of{size}",
                address,
                size,
                f"--scheduler {scheduler} --searcher {searcher} --seeds {seeds} --set epochs={epochs} "
                f"--max-concurrent {concurrent} --tracking-uri {AWAY}".split(),
                deliver,
                save,
            )
            save(found)
            print(summary(found), flush=True)
            if keep:
                shutil.copytree(storage / f"of{size}", out / f"of{size}", dirs_exist_ok=True)


def write(path: Path, said: dict[str, Any], found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found | said, indent=1) + "\n")


class cluster:
    """Ray's own test cluster: a head without devices, and `nodes` with one each. Gives its address."""

    def __init__(self, nodes: int, scratch: str):
        self._nodes, self._scratch = nodes, scratch

    def __enter__(self) -> str:
        from ray.cluster_utils import Cluster

        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
        store: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        head = {"num_cpus": 0, "temp_dir": self._scratch, **store}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for number in range(self._nodes):
            self._cluster.add_node(num_cpus=1, node_name=f"node{number}", **store)
            print(f"simulated nodes: {number + 1}/{self._nodes}", file=sys.stderr)
        return str(self._cluster.address)

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()


def measure(
    storage: Path,
    name: str,
    address: str,
    trials: int,
    arguments: list[str],
    deliver: bool,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run one sweep and what comes after it; `save` what is known of it as soon as it is."""
    command = [sys.executable, "-m", "tests.toys.tune_toy", "demo", "--engine", "stacked", "--lanes", "8", "--quiet"]
    command += ["--trials", str(trials), "--name", name, "--storage", str(storage), "--address", address, *arguments]
    folder = storage / name
    begun = time.perf_counter()
    driver = subprocess.Popen(command, cwd=ROOT, env=environment())
    samples = watch(driver, folder, trials, begun)
    if driver.returncode:
        raise SystemExit(f"the sweep ended with code {driver.returncode}: see its log.txt\n{tail(folder / 'log.txt')}")
    found: dict[str, Any] = {"trials": trials, "wall": time.perf_counter() - begun, "samples": samples}
    found["timing"] = json.loads((folder / "timing.json").read_text())
    found["reports"] = (folder / "journal.jsonl").read_bytes().count(b'"event": "report"')
    found["files"] = {kind: files(folder / kind) for kind in sorted(os.listdir(folder))}
    save(found)
    mine = [sys.executable, str(Path(__file__).resolve()), "--side", str(folder)]
    found["replay"] = json.loads(subprocess.run(mine, check=True, capture_output=True, env=environment()).stdout)
    report = ["-m", "analysis", "report", name, "--storage", str(storage)]
    found["report"] = timed([sys.executable, *report])
    if deliver:
        found["delivery"] = delivery(folder)
    return found


def watch(driver: subprocess.Popen, folder: Path, trials: int, begun: float) -> list[dict[str, Any]]:
    """Sample until the driver ends. Processor seconds of processes that ended stay counted."""
    samples, offset, ended = [], 0, 0
    seconds: dict[int, tuple[str, float]] = {}
    printed = 0.0
    while driver.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        if (folder / "journal.jsonl").exists():
            with open(folder / "journal.jsonl", "rb") as file:
                file.seek(offset)
                data = file.read()
            offset += len(data)
            ended += data.count(b'"event": "end"')
        memory: dict[str, float] = defaultdict(float)
        for pid, role, used, resident in processes(driver.pid):
            seconds[pid] = role, used
            memory[role] += resident
        by_role: dict[str, float] = defaultdict(float)
        for role, used in seconds.values():
            by_role[role] += used
        elapsed = time.perf_counter() - begun
        samples.append({"at": elapsed, "ended": ended, "seconds": dict(by_role), "MiB": dict(memory)})
        if elapsed - printed > 10:
            printed = elapsed
            left = f"{elapsed / ended * (trials - ended):.0f} s to finish" if ended else "time to finish: measuring"
            print(f"{folder.name}: {ended}/{trials} ended, {elapsed:.0f} s, {left}", file=sys.stderr, flush=True)
    return samples[:: 1 + len(samples) // 300] + samples[-1:]


def processes(driver: int) -> Iterator[tuple[int, str, float, float]]:
    """(pid, role, processor seconds, MiB resident) of every process that carries our mark but this one."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for process in Path("/proc").glob("[0-9]*"):  # Linux
        try:
            if int(process.name) == os.getpid() or mark not in (process / "environ").read_bytes():
                continue
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            role = "driver" if int(process.name) == driver else "other"
            if role == "other":
                role = next((name for sign, name in ROLES if sign in line), "other")
            used = (int(fields[11]) + int(fields[12])) / TICKS
            yield int(process.name), role, used, int(fields[21]) * PAGE / 2**20
        except OSError:
            continue  # it has ended


def files(path: Path) -> dict[str, int]:
    """Number and bytes of the files below a path."""
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    folders = sum(1 for folder in path.rglob("*") if folder.is_dir()) if path.is_dir() else 0
    return {"files": len(found), "folders": folders, "bytes": sum(file.stat().st_size for file in found)}


def replay_seconds(folder: Path) -> dict[str, float]:
    """What --resume does before anything trains: the journal to a fresh searcher, scheduler and table."""
    from tuning.resume import replay
    from tuning.runs import RunTable
    from tuning.schedulers import make_scheduler
    from tuning.searchers import make_source
    from tuning.sweep import SweepPlan

    plan = SweepPlan.load(folder)
    source, scheduler, table = make_source(plan), make_scheduler(plan), RunTable(plan.to_plain())
    wall, before = time.perf_counter(), processor_seconds()  # imports are not counted
    past = replay(plan, folder / "journal.jsonl", source, scheduler)
    for event in past.events:
        table.apply(event)
    rows = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        table.write(Path(scratch))
    return {
        "events": len(past.events),
        "wall": rows - wall,
        "processor": processor_seconds() - before,
        "table": time.perf_counter() - rows,
    }


def processor_seconds(who: int = resource.RUSAGE_SELF) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def timed(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a command."""
    wall, used = time.perf_counter(), processor_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    return {
        "wall": time.perf_counter() - wall,
        "processor": processor_seconds(resource.RUSAGE_CHILDREN) - used,
    }


def delivery(folder: Path) -> dict[str, float]:
    """Deliver the whole sweep to an MLflow database of its own."""
    storage = folder.parent / f"again-{folder.name}"
    copy = storage / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tracking.json", "ray", "checkpoints", "report"))
    plain = json.loads((copy / "sweep.json").read_text())
    (copy / "sweep.json").write_text(json.dumps(plain | {"tracking_uri": f"sqlite:///{storage / 'mlflow.db'}"}))
    found = timed([sys.executable, "-m", "tuning.sync", folder.name, "--storage", str(storage)])
    shutil.rmtree(storage)
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def summary(found: dict[str, Any]) -> str:
    """One line."""
    work = [sample for sample in found["samples"] if sample["ended"]]
    first, last = work[0], work[-1]
    searched = next(sample for sample in work if sample["ended"] == last["ended"])
    done = searched["ended"] - first["ended"]
    used = searched["seconds"]["driver"] - first["seconds"]["driver"]
    span = searched["at"] - first["at"]
    most = max(sample["MiB"].get("driver", 0.0) for sample in work)
    return (
        f"{found['trials']} trials, {found['reports']} reports: driver {1000 * used / done:.1f} ms a trial, "
        f"{done / span:.1f} trials/s, driver {most:.0f} MiB; replay {found['replay']['processor']:.2f} s, "
        f"report {found['report']['processor']:.1f} s"
        + (f", MLflow {found['delivery']['wall']:.1f} s" if "delivery" in found else "")
    )


if __name__ == "__main__":
    typer.run(main)
