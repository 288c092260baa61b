"""Seconds until MLflow's pages show and sort a sweep of 2,000 runs: `python benchmarks/mlflow_ui.py`.

The runs are made up (`benchmarks/synthetic.py`) and delivered by the product's own tracker; server and browser are
real, on this machine. Writes `benchmarks/results/mlflow_ui.md`, and screenshots with `--shots`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import mlflow
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

import tuning.sync
from benchmarks.mlflow_browser import Pages, page, server
from benchmarks.synthetic import write

RESULTS = Path(__file__).parent / "results" / "mlflow_ui.md"
REPEATS = 3


def seconds(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median of a few repeats."""
    took = []
    for _ in range(REPEATS):
        before()
        began = time.perf_counter()
        action()
        took.append(time.perf_counter() - began)
    return median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--storage", type=Path, help="where the sweep is, or is made [a temporary folder]")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    args = parser.parse_args()
    rows: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        storage = args.storage or Path(scratch)
        folder = storage / "large"
        if not folder.exists():
            write(storage, "large", args.configs, args.seeds)
        began, cpu = time.perf_counter(), time.process_time()
        sent = tuning.sync.deliver(folder)
        rows.append((f"delivering {sent:,} events and points to sqlite", time.perf_counter() - began))
        delivered_cpu = time.process_time() - cpu
        with server(storage / "mlflow.db") as address, page(1400) as opened:
            client = MlflowClient(address)
            experiment = client.get_experiment_by_name("ci_vit/demo").experiment_id
            pages = Pages(opened, address, experiment)

            def shoot(name: str) -> None:
                if args.shots:
                    opened.wait_for_timeout(1000)
                    opened.screenshot(path=args.shots / f"{name}.png")

            pages.tree()  # the first page also fetches the script
            rows.append(("open the experiment: the tree, closed", seconds(pages.tree)))
            rows.append(("expand the sweep", seconds(lambda: pages.expand("large"), pages.tree)))
            shoot("large_tree")
            rows.append(("open the saved view: finished configs, best first", seconds(pages.configs)))
            shoot("large_view")
            for column in ("final/test_acc_last", "device_seconds", "lr"):
                rows.append((f"sort by {column}", seconds(lambda c=column: pages.sort(c))))
            best = client.search_runs(
                [experiment], "tags.kind = 'config' and tags.stop_reason = 'finished'", max_results=2
            )
            two = [run.info.run_id for run in best]
            curve = opened.locator("svg.main-svg .scatterlayer .trace path.js-line").first
            show = lambda: (pages.charts(two), curve.wait_for(state="attached"))
            rows.append(("chart view of two configs: the first curve", seconds(show)))
    runs = args.configs * args.seeds
    text = f"""# MLflow's pages with a sweep of {runs:,} runs

`python benchmarks/mlflow_ui.py --configs {args.configs} --seeds {args.seeds}`:
{args.configs} configs, {args.seeds} seeds,
{runs + args.configs + 1:,} MLflow runs, MLflow {mlflow.__version__}, sqlite, one server worker, headless Chromium and
server on the same {os.cpu_count()} cores, where other work ran beside (load average {os.getloadavg()[1]:.1f}).
Median of {REPEATS}. The delivery took {delivered_cpu:.0f} CPU seconds.

| | seconds |
|---|---|
{chr(10).join(f"| {name} | {took:.1f} |" for name, took in rows)}

MLflow's table loads 100 runs at a time and asks the server to sort, so that the size of a sweep matters little.
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
