"""The long storm: `make chaos N=200`. Writes benchmarks/results/chaos.md and chaos.json.

Sweeps of the toy family are hit until N faults are reached, each sweep in one of several scenarios, behind a real
`mlflow server` over a real PostgreSQL where there is one, on a storage of its own that can be filled where this process
may mount one. What was reached is kept after every sweep: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.faults import FAULTS, NAN, possible
from tests.chaos.storm import SCENARIOS, Storm, small_disk, undisturbed
from tests.postgres import MlflowServer, Postgres, missing
from tests.toy_sweeps import ROOT, Swept

RESULTS = ROOT / "benchmarks" / "results"
PER_SWEEP = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill a sweep in many ways.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="forget what an interrupted run reached")
    arguments = parser.parse_args()
    work = Path(tempfile.gettempdir()) / f"lanewise-chaos-{arguments.faults}-{arguments.seed}"
    if arguments.again:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and mounts go, as with Ctrl-C
    os.environ["LANEWISE_CACHE"] = str(work / "cache")
    if reason := missing():
        print(f"without PostgreSQL and mlflow server: {reason}", flush=True)
    with contextlib.ExitStack() as stack:
        database = server = None
        if not reason:
            database = Postgres()
            stack.callback(database.close)
            database.start()
            server = stack.enter_context(MlflowServer(database.uri(), work))
        disk = stack.enter_context(small_disk(work / "disk"))
        if disk is None:
            print("without a full disk: mounting a tmpfs needs root", flush=True)
        records = run(arguments.faults, arguments.seed, work, disk, database, server)
    write(records, arguments.faults, arguments.seed)
    bad = [line for record in records for line in record["findings"]]
    print("\n".join([f"{RESULTS / 'chaos.md'} written", *bad]))
    return 1 if bad else 0


def run(
    faults: int, seed: int, work: Path, disk: Path | None, database: Postgres | None, server: MlflowServer | None
) -> list[dict[str, Any]]:
    """Sweep after sweep until so many faults were inflicted; those that an earlier call reached count."""
    kept = work / "reached.json"
    records: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    names = [name for name in SCENARIOS if name != "short"]
    kinds = possible(disk is not None, database is not None, server is not None)
    began, before = time.monotonic(), reached(records)
    while (done := reached(records)) < faults:
        number = len(records)
        scenario = names[number % len(names)]
        twin, seconds = twin_of(scenario, work)
        per = (time.monotonic() - began) / max(1, done - before)
        eta = f"about {per * (faults - done) / 60:.0f} min to finish" if done > before else "time to finish: measuring"
        print(f"{done}/{faults} faults · sweep {number + 1}: {scenario} · {eta}", flush=True)
        storage = disk or work / "sweeps"
        storm = Storm(
            scenario,
            seed * 10_000 + number,
            min(PER_SWEEP, faults - done),
            kinds,
            storage,
            disk is not None,
            database,
            server,
            on_fault=lambda line: print(f"    {line}", flush=True),
        )
        name = f"storm-{os.getpid()}-{number}"
        record = storm.run(twin, name)
        findings = record.verdict.lines()
        for line in findings:
            print(f"  !! {line}", flush=True)
        if findings:
            shutil.copytree(storage / name, work / "found" / name, dirs_exist_ok=True)
        plain = asdict(record)
        verdict = {kind: len(lines) for kind, lines in plain.pop("verdict").items()}
        records.append({**plain, **verdict, "findings": findings, "twin_seconds": seconds})
        kept.write_text(json.dumps(records, indent=1))
        for path in storage.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    return records


def reached(records: list[dict[str, Any]]) -> int:
    return sum(sum(record["faults"].values()) for record in records)


def twin_of(scenario: str, work: Path) -> tuple[Swept, float]:
    """The undisturbed sweep, run once, and its seconds."""
    folder = work / "twins"
    known = folder / f"{list(SCENARIOS).index(scenario)}.json"
    if not known.exists():
        folder.mkdir(exist_ok=True)
        swept, seconds = undisturbed(scenario, folder)
        known.write_text(json.dumps({"folder": str(swept.folder), "seconds": seconds}))
    plain = json.loads(known.read_text())
    return Swept(Path(plain["folder"]), 0, "", ""), plain["seconds"]


def write(records: list[dict[str, Any]], faults: int, seed: int) -> None:
    """chaos.json whole, and of chaos.md what lies above the line that people write below."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chaos.json").write_text(json.dumps(records, indent=1) + "\n")
    path = RESULTS / "chaos.md"
    mark = "<!-- written by hand from here on -->"
    below = path.read_text().partition(mark)[2] if path.exists() else "\n"
    path.write_text(table(records, faults, seed) + mark + below)


def table(records: list[dict[str, Any]], faults: int, seed: int) -> str:
    """The page's tables."""
    kinds: Counter[str] = Counter()
    for record in records:
        kinds.update(record["faults"])
    total = Counter({key: sum(record[key] for record in records) for key in ("lost", "doubled", "changed", "curves")})
    seconds, twins = (sum(record[key] for record in records) for key in ("seconds", "twin_seconds"))
    resumes, alone = (sum(record[key] for record in records) for key in ("resumes", "ended_alone"))
    lines = [
        "# A long storm",
        "",
        f"`make chaos N={faults}`" + (f" with seed {seed}" if seed else "") + f": {sum(kinds.values())} faults in "
        f"{len(records)} sweeps, each compared with its undisturbed twin (`tests/chaos/`). "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        "| trials lost | runs or points doubled | decisions changed | curves unequal |",
        "|---:|---:|---:|---:|",
        f"| {total['lost']} | {total['doubled']} | {total['changed']} | {total['curves']} |",
        "",
        f"Resumed {resumes} times ({alone} of them after a fault that was not meant to end the driver); MLflow got the "
        f"rest from `python -m tuning.sync` after the sweep's end {sum(r['delivered_late'] for r in records)} times. "
        f"The storm took {seconds:,.0f} s, its undisturbed twins {twins:,.0f} s: "
        f"{(seconds - twins) / max(1, sum(kinds.values())):.1f} s a fault.",
        "",
        "| fault | times |",
        "|---|---:|",
        *[f"| {kind} | {kinds[kind]} |" for kind in (*FAULTS, NAN) if kinds[kind]],
        "",
        "| sweep | faults | resumed | lost | doubled | changed | unequal | s | twin s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(record["scenario"] for record in records):
        mine = [record for record in records if record["scenario"] == name]
        cells = [sum(sum(record["faults"].values()) for record in mine)]
        cells += [sum(record[key] for record in mine) for key in ("resumes", "lost", "doubled", "changed", "curves")]
        spent = [f"{sum(record[key] for record in mine):,.0f}" for key in ("seconds", "twin_seconds")]
        lines.append(f"| {name} ({len(mine)} times) | " + " | ".join([*map(str, cells), *spent]) + " |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    sys.exit(main())
