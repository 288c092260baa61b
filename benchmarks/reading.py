"""Seconds and peak memory of every reading command on a sweep of 10,000 runs: `python benchmarks/reading.py`.

The sweep is made up (`benchmarks/synthetic.py`: 2,000 configs x 5 seeds, a third of them to the end, 100 training steps
an epoch). Each command is a process of its own, as a user starts it. Writes `benchmarks/results/reading.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.synthetic import write

RESULTS = Path(__file__).parent / "results" / "reading.md"
ROOT = Path(__file__).parent.parent
SMALL = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)"""
"""A process counts the memory of the one it was forked from as its own: start it from a small one."""
COMMANDS = (
    "list",
    "doctor large",
    "journal large --tracking-uri none",
    "compare large --by method",
    "compare large --by method --at epoch=8 --metric test_acc",
    "table large --rows method",
    "replay large --grace 3 --factor 3",
    "plot large --kind curves",
    "plot large",
    "report large --tracking-uri none",
)


def measure(words: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MiB of a command."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SMALL, sys.executable, "-m", "analysis", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    cpu, peak = map(float, done.stdout.split()[-2:])
    return time.perf_counter() - began, cpu, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--storage", type=Path, help="where the sweep is, or is made [a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        storage = args.storage or Path(scratch)
        if not (storage / "large").exists():
            write(storage, "large", args.configs, args.seeds, steps_per_epoch=100)
        curves = sum(p.stat().st_size for kind in ("epochs", "steps") for p in (storage / "large" / kind).iterdir())
        rows = [(command, *measure([*command.split(), "--storage", str(storage)])) for command in COMMANDS]
    runs = args.configs * args.seeds
    text = f"""# Reading a sweep of {runs:,} runs

`python benchmarks/reading.py --configs {args.configs} --seeds {args.seeds}`: {curves / 1e6:.0f} MB of curves on disk;
start-up of Python and its libraries included. {os.cpu_count()} cores, other work beside (load
average {os.getloadavg()[1]:.1f}): the CPU seconds are what to read.

| `python -m analysis` | wall s | CPU s | peak MiB |
|---|---|---|---|
{chr(10).join(f"| `{name}` | {wall:.1f} | {cpu:.1f} | {peak:.0f} |" for name, wall, cpu, peak in rows)}
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
