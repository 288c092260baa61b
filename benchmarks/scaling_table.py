"""Table, figure and extrapolation from what benchmarks/scaling.py measured: `python benchmarks/scaling_table.py`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script is imported from its own folder; the packages stand one above
RESULTS = ROOT / "benchmarks" / "results" / "scaling"


@dataclass(frozen=True)
class Load:
    """A kind of sweep on many GPUs. Rates are what probes found on one H200 (benchmarks/results/lanes.md).

    Args:
        name: what it is.
        lanes: on a GPU.
        seeds: runs a config.
        steps: of a run.
        rate: trial-steps a second of a GPU with all its lanes.
        reports: of a config.
        share: of its steps that a config does on average before it is stopped.
    """

    name: str
    lanes: int
    seeds: int
    steps: int
    rate: float
    reports: float
    share: float

    def in_flight(self, gpus: int) -> float:
        return gpus * self.lanes / self.seeds

    def per_second(self, gpus: int) -> float:
        """Configs that end in a second."""
        return gpus * self.rate / (self.steps * self.seeds * self.share)


LOADS = (
    Load("ci_vit, 3 layers, 60,000 steps, 5 seeds, no pruning", 32, 5, 60_000, 14_260, 4, 1.0),
    Load("the same under ASHA", 32, 5, 60_000, 14_260, 1.48, 0.11),
    Load("ci_vit, 12 layers, 60,000 steps, 5 seeds, no pruning", 32, 5, 60_000, 743, 4, 1.0),
    Load("vgg_decay, 78,200 steps, 5 seeds, no pruning", 32, 5, 78_200, 3651, 4, 1.0),
)
"""Under ASHA with three rungs and a factor of three: 1 + 1/3 + 1/9 + 1/27 reports, and 3/27 of the steps."""


def main(
    results: Annotated[Path, typer.Option(help="folder of benchmarks/scaling.py's results")] = RESULTS,
) -> None:
    """Print the tables, and draw the figure beside them."""
    found = [json.loads(path.read_text()) | {"file": path.stem} for path in sorted(results.glob("*.json"))]
    found.sort(key=lambda f: (earlier(f), f["scheduler"], f["concurrent"], f["trials"]))
    text = "\n".join([*measured(found), "", *extrapolated(found)]) + "\n"
    (results.parent / "scaling.md").write_text(text)
    print(text)
    figure(found, results.parent / "scaling.png")


def earlier(found: dict[str, Any]) -> str:
    """ "before" or "between" for results of an earlier state of the code, which their files are named after."""
    return next((state for state in ("before", "between") if found["file"].startswith(state)), "")


def search_of(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The samples between which the driver searched, without its start: a tenth of the configs ended, and the last."""
    work = [s for s in found["samples"] if s["ended"] >= found["trials"] / 10 and "driver" in s["seconds"]]
    last = next(s for s in work if s["ended"] == work[-1]["ended"])
    return work[0], last


def rates(found: dict[str, Any]) -> dict[str, float]:
    first, last = search_of(found)
    done = last["ended"] - first["ended"]
    used = {role: last["seconds"].get(role, 0.0) - first["seconds"].get(role, 0.0) for role in last["seconds"]}
    return {
        "driver": 1000 * used["driver"] / done,
        "trials": 1000 * used.get("trials", 0.0) / done,
        "hosts": 1000 * used.get("hosts", 0.0) / done,
        "pool": 1000 * used.get("pool", 0.0) / done,
        "per_second": done / (last["at"] - first["at"]),
        "MiB": last["MiB"]["driver"],
        "KiB a trial": 1024 * (last["MiB"]["driver"] - first["MiB"]["driver"]) / done,
    }


def measured(found: list[dict[str, Any]]) -> list[str]:
    """One row a sweep."""
    from tuning.provenance import versions

    shown = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("python", "ray"))
    lines = [
        f"{os.cpu_count()} cores, {shown}; processor milliseconds a trial by role, MiB resident, seconds.",
        "",
        "| sweep | trials | reports | in flight | driver ms | trials ms | pool ms | hosts ms | trials/s | driver MiB "
        "| KiB a trial | journal MB | runs.parquet kB | curve files | curve MB | Tune's MB | replay s | report s "
        "| MLflow s | configs/s |",
        "|" + "---|" * 20,
    ]
    for f in found:
        r, files = rates(f), f["files"]
        curves = [files[kind] for kind in ("steps", "epochs") if kind in files]
        delivered = f.get("delivery", {}).get("wall")
        lines.append(
            f"| {earlier(f)} {f['scheduler']} | {f['trials']:,} "
            f"| {f['reports']:,} "
            f"| {f['concurrent'] or 2 * f['nodes']} | {r['driver']:.1f} | {r['trials']:.1f} | {r['pool']:.1f} "
            f"| {r['hosts']:.1f} | {r['per_second']:.1f} | {r['MiB']:.0f} | {r['KiB a trial']:.0f} "
            f"| {files['journal.jsonl']['bytes'] / 1e6:.2f} | {files['runs.parquet']['bytes'] / 1e3:.0f} "
            f"| {sum(c['files'] for c in curves):,} | {sum(c['bytes'] for c in curves) / 1e6:.2f} "
            f"| {files['ray']['bytes'] / 1e6:.1f} | {f['replay']['processor']:.2f} "
            f"| {f['report']['processor']:.1f} "
            + (f"| {delivered:.0f} | {f['trials'] / delivered:.1f} |" if delivered else "| - | - |")
        )
    return lines


def costs(found: list[dict[str, Any]]) -> tuple[float, float]:
    """Driver milliseconds (of a trial, of a report): from the largest ASHA sweep and one with four reports a trial."""
    pruned = [f for f in found if f["scheduler"] == "asha" and not earlier(f)]
    if not pruned:
        raise SystemExit("no sweep of this state of the code here: run benchmarks/scaling.py first")
    few = max(pruned, key=lambda f: f["trials"])
    many = next((f for f in found if f["scheduler"] == "none"), None)
    if many is None:
        raise SystemExit("no sweep without pruning here: run benchmarks/scaling.py --scheduler none first")
    one, four = few["reports"] / few["trials"], many["reports"] / many["trials"]
    report = (rates(many)["driver"] - rates(few)["driver"]) / (four - one)
    return rates(few)["driver"] - one * report, report


def extrapolated(found: list[dict[str, Any]]) -> list[str]:
    """What 1,000 GPUs would ask of one driver."""
    trial, report = costs(found)
    lines = [
        f"Driver: {trial:.1f} ms a trial and {report:.1f} ms a report.",
        "",
        "| sweep | GPUs | configs in flight | configs/s | reports/s | driver's load | GPUs that fill the driver |",
        "|---|---|---|---|---|---|---|",
    ]
    for load in LOADS:
        for gpus in (10, 100, 1000):
            per_second = load.per_second(gpus)
            busy = per_second * (trial + load.reports * report) / 1000
            lines.append(
                f"| {load.name} | {gpus:,} | {load.in_flight(gpus):,.0f} | {per_second:.3g} "
                f"| {per_second * load.reports:.3g} | {busy:.1%} | {gpus / busy:,.0f} |"
            )
    return lines


def figure(found: list[dict[str, Any]], path: Path) -> None:
    """Processor seconds and memory of the driver over the configs that have ended."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for f in found:
        first, last = search_of(f)
        samples = [s for s in f["samples"] if first["at"] <= s["at"] <= last["at"] and "driver" in s["MiB"]]
        ended = [s["ended"] for s in samples]
        name = f"{f['scheduler']}, {f['trials']:,} trials, {f['concurrent'] or 2 * f['nodes']} in flight"
        style = {"linestyle": "--", "label": f"{earlier(f)}: {name}"} if earlier(f) else {"label": name}
        left.plot(ended, [s["seconds"]["driver"] for s in samples], **style)
        right.plot(ended, [s["MiB"]["driver"] for s in samples], **style)
    left.set(xlabel="configs ended", ylabel="processor seconds of the driver", xscale="log", yscale="log")
    right.set(xlabel="configs ended", ylabel="MiB resident in the driver", xscale="log")
    right.set_ylim(bottom=0)
    left.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
