"""Whether two devices do twice the work of one: `python benchmarks/two_gpus.py`.

The same sweep (the ci_vit notebook's learning-rate table, three layers, cut short) by the ordinary command, in fresh
processes: on one GPU and on two, in turns. A process sees the GPUs that CUDA_VISIBLE_DEVICES leaves it. Before that, a
very short sweep that is not counted fills the caches of compiled code. Two ratios are printed: of what a user waits
for, the whole search with starting and compiling, and of the training alone, from the first epoch that any run ended
to the last end. `--cpu` does it with one processor core against two, a test of this script:

    python benchmarks/two_gpus.py --cpu --configs 6 --seeds 2 --tasks 30 --lanes 2
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script is imported from its own folder; the packages stand one above
from benchmarks.gpu_watch import visible_gpus  # noqa: E402

LEARNING_RATES = [round(10 ** (-1.5 - 2.5 * i / 63), 7) for i in range(64)]


def main(
    configs: Annotated[int, typer.Option(help="learning rates tried, at most 64")] = 64,
    seeds: Annotated[int, typer.Option(help="runs a config")] = 4,
    tasks: Annotated[int, typer.Option(help="tasks of each run's stream, 120 steps each on real data")] = 60,
    lanes: Annotated[str, typer.Option(help="lanes a device; auto probes in every sweep")] = "128",
    rounds: Annotated[int, typer.Option(help="how often each side is run")] = 1,
    data: Annotated[str, typer.Option(help="data set, on GPUs")] = "tinyimagenet32",
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets", envvar="LANEWISE_DATA")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="cores instead of GPUs, on digits, small")] = False,
    out: Annotated[Path | None, typer.Option(help="append the result as one JSON line")] = None,
) -> None:
    """Run both sides in turns and print the ratio of their rates."""
    devices = visible(cpu)
    if len(devices) < 2:
        raise SystemExit(f"this needs two {'cores' if cpu else 'GPUs'}, and sees {len(devices)}")
    command = ["lr", "--scheduler", "none", "--searcher", "grid", "--seeds", str(seeds), "--lanes", lanes, "--quiet"]
    command += ["--space", "lr=" + ",".join(map(str, LEARNING_RATES[:configs]))]
    command += ["--set", "train_acc_after=false", "--engine", "auto" if lanes == "auto" else "stacked"]
    if cpu:
        small = {"data": "digits", "depth": 1, "hidden": 6, "batch": 50}
        command += [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    else:
        command += [
            "--data",
            data,
            "--set",
            "depth=3",
            "--set",
            "precision=bf16",
            *(["--data-dir", str(data_dir)] if data_dir else []),
        ]
    whole: dict[int, list[float]] = {1: [], 2: []}
    training: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="lw") as scratch:
        search([*command, "--set", "tasks=2"], devices[:2], cpu, Path(scratch), "warm")
        order = [count for turn in range(rounds) for count in ((2, 1), (1, 2))[turn % 2]]
        begun, work = time.perf_counter(), 0.0
        for number, count in enumerate(order):
            took = search([*command, "--set", f"tasks={tasks}"], devices[:count], cpu, Path(scratch), f"run{number}")
            whole[count].append(took[0])
            training[count].append(took[1])
            work += 1 / count
            left = (time.perf_counter() - begun) / work * sum(1 / other for other in order[number + 1 :])
            print(
                f"{count} device{'s' * (count > 1)}: search {took[0]:.1f} s, training {took[1]:.1f} s; "
                f"{left:.0f} s to finish",
                flush=True,
            )
    found: dict[str, Any] = {"configs": configs, "seeds": seeds, "tasks": tasks, "lanes": lanes, "cpu": cpu}
    for name, seconds in (("search", whole), ("training", training)):
        one, two = statistics.median(seconds[1]), statistics.median(seconds[2])
        print(f"{name}: one device {one:.1f} s, two {two:.1f} s: two do {one / two:.2f} times the work of one")
        found[name] = {"one": seconds[1], "two": seconds[2], "ratio": one / two}
    if out is not None:
        with open(out, "a") as file:
            file.write(json.dumps(found) + "\n")


def visible(cpu: bool) -> list[str]:
    """Names by which a child process can be left a device."""
    if cpu:
        return [str(core) for core in sorted(os.sched_getaffinity(0))]
    return visible_gpus()


def search(command: list[str], devices: list[str], cpu: bool, scratch: Path, name: str) -> tuple[float, float]:
    """(seconds of one sweep's search, of its training) on these devices alone."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": path, "LANEWISE_CACHE": str(scratch / "cache")}
    environment["CUDA_VISIBLE_DEVICES"] = "" if cpu else ",".join(devices)
    if cpu:  # there are no more hosts than configs in flight
        command = [*command, "--max-concurrent", str(len(devices))]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tune_ci_vit.py"), *command, "--name", name, "--storage", str(scratch / "sweeps")],
        cwd=ROOT,
        env=environment,
        preexec_fn=(lambda: os.sched_setaffinity(0, {int(core) for core in devices})) if cpu else None,
    )
    if process.wait():
        raise SystemExit(f"the sweep {name} ended with code {process.returncode}: {tail(scratch / 'sweeps' / name)}")
    seconds = json.loads((scratch / "sweeps" / name / "timing.json").read_text())
    if seconds["devices"] != len(devices):
        raise SystemExit(f"{name} trained on {seconds['devices']:.0f} devices, not on {len(devices)}")
    return seconds["search"], training_seconds(scratch / "sweeps" / name)


def training_seconds(folder: Path) -> float:
    """From the first epoch that a run ended to the last end of a config."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    from tuning.journal import read

    first = pc.min(ds.dataset(folder / "epochs", format="parquet").to_table(columns=["time"])["time"]).as_py()
    ends = [event["time"] for event, _ in read(folder / "journal.jsonl") if event["event"] == "end"]
    return (datetime.fromisoformat(ends[-1]) - first).total_seconds()


def tail(folder: Path) -> str:
    log = folder / "log.txt"
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


if __name__ == "__main__":
    typer.run(main)
