"""The table and the figure of `benchmarks/lanes.py`'s lines: OUT.jsonl -> OUT.md and OUT.png beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
SHOWN = {"lanewise": "lanewise", "lanewise_again": "lanewise, second sweep"}
PEAK = {"bf16": "bf16", "float32": "fp32"}

HEAD = """# Lanes against ordinary Ray Tune

Every arm is a process of its own with ASHA and MLflow on; wall time is from its start to its end, start-up and report
included. `tune K`: Ray Tune, K trials a device, the family as an ordinary eager PyTorch loop (`benchmarks/ordinary/`).
`lanewise`: `--lanes auto`, nothing compiled or probed before; `second sweep`: with what the first left on disk.

A capped arm was stopped there: its rate is of the trial-steps it had done. ASHA stops other configs in other arms, so
that rates compare and wall times only roughly do; a config has reported once it reached its first rung. `warm`: between
the first and the last end of an epoch; `x warm tune 1`: a whole sweep's rate against the warm rate of `tune 1`, whose
start-up is forgiven (the longer a sweep, the nearer the two columns). `GPU idle`: NVML's share of time without any
kernel, meanwhile; a small kernel counts as busy.
"""


def write(out: Path) -> None:
    """Write both files. The newest line of each (workload, device, GPUs, precision, arm) counts."""
    rows: dict[tuple, dict[str, Row]] = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        place = (row["workload"], row["device"], row["gpus"], row["precision"])
        rows.setdefault(place, {})[row["arm"]] = row
    ceilings = {device: row for (_, device, _, _), arms in rows.items() if (row := arms.get("ceilings"))}
    text = [HEAD]
    for device, row in ceilings.items():
        found = row["found"]
        rates = ", ".join(f"{name} {found[name] / 1e12:,.1f} TFLOP/s" for name in ("bf16", "tf32", "fp32"))
        text += [f"Measured on {found['name']} ({device}): {rates}, copy {found['copy'] / 1e12:,.3f} TB/s.", ""]
    for (workload, device, gpus, precision), arms in sorted(rows.items()):
        text += section(workload, device, gpus, precision, arms, ceilings.get(device))
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    figure(rows, out.with_suffix(".png"))
    text_path = out.with_suffix(".md")
    print(f"{text_path}\n{out.with_suffix('.png')}")


def section(
    workload: str, device: str, gpus: int, precision: str, arms: Mapping[str, Row], ceilings: Row | None
) -> list[str]:
    some = next((row for name, row in arms.items() if name.startswith("lanewise")), next(iter(arms.values())))
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    settings = f", with {', '.join(some['settings'])}" if some["settings"] else ""
    noted = sorted({row["note"] for row in arms.values() if row.get("note")})
    notes = "".join(f"; {note}" for note in noted if not any(note in other for other in noted if other != note))
    lines = [
        f"## {workload}",
        "",
        f"{precision}, {where(device, gpus)}, data {some['data']}, {sizes(arms.values())} configs of {some['steps']} "
        f"steps{settings}; {versions}; {some['time'][:10]}{notes}.",
        "",
    ]
    sweeps = {name: row for name, row in arms.items() if name.startswith(("tune", "lanewise"))}
    if sweeps:
        lines += sweep_table(sweeps)
    lines += kernel_table(arms, device, precision, ceilings)
    if "agree" in arms:
        lines += agreement(arms["agree"], sweeps)
    commands = sorted({row["command"] for row in arms.values()})
    return [*lines, *(f"`{command}`  " for command in commands), ""]


def sizes(arms: Iterable[Row]) -> str:
    """How many configs the sweeps had: "512", or "512 or 2,048" where arms differ."""
    counts = {row["configs"] for row in arms if row["arm"].startswith(("tune", "lanewise"))}
    return " or ".join(f"{count:,}" for count in sorted(counts))


def sweep_table(sweeps: Mapping[str, Row]) -> list[str]:
    good = {name: row for name, row in sweeps.items() if "trial_steps_per_s" in row and not row["error"]}
    alone = good.get("tune1")
    shared = [row for name, row in good.items() if name.startswith("tune") and name != "tune1"]
    best = max(shared, key=lambda row: row["trial_steps_per_s"], default=None)
    lines = [
        "| arm | wall s | configs reported | trial-steps | trial-steps/s | warm | x tune 1 | x warm tune 1 "
        "| x best shared | x its warm | GPU idle | peak GiB |",
        f"{'|---' * 12}|",
    ]
    for name, row in sorted(sweeps.items(), key=lambda item: order(item[0])):
        label = SHOWN.get(name, name.replace("tune", "tune "))
        if name not in good:
            lines.append(f"| {label} | failed: {row['error'][:120]} {'| ' * 10}|")
            continue
        rate, gpu = row["trial_steps_per_s"], row.get("gpu") or {}
        cells = [
            label,
            f"{row['wall_s']:.0f}{' (capped)' if row['capped'] else ''}",
            f"{row['reported']}/{row['configs']}",
            f"{row['trial_steps']:,.0f}",
            f"{rate:,.1f}",
            number(row["warm_steps_per_s"], "{:,.1f}"),
            times(rate, alone, "trial_steps_per_s"),
            times(rate, alone, "warm_steps_per_s"),
            times(rate, best, "trial_steps_per_s"),
            times(rate, best, "warm_steps_per_s"),
            number(gpu.get("idle_warm"), "{:.0%}"),
            number(gpu.get("peak_MiB") and gpu["peak_MiB"] / 1024, "{:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name in ("lanewise", "lanewise_again"):
        if name in good:
            row = good[name]
            seconds = ", ".join(f"{what} {value:.1f}" for what, value in row["seconds"].items())
            lines += [
                f"{SHOWN[name]}: engine {engines(row['engines'])}; set-up of compiled rows in its probes "
                f"{row['compile_s']:.0f} s; seconds: {seconds}.",
                "",
            ]
    return lines


def engines(used: list[str]) -> str:
    """["stacked x8", "stacked x32"] -> "stacked, up to 32 lanes"."""
    most: dict[str, int] = {}
    for each in used:
        name, _, lanes = each.rpartition(" x")
        most[name] = max(most.get(name, 0), int(lanes))
    return "; ".join(f"{name}, up to {lanes} lanes" for name, lanes in most.items()) or "none came to a report"


def kernel_table(arms: Mapping[str, Row], device: str, precision: str, ceilings: Row | None) -> list[str]:
    count = (arms.get("count") or {}).get("found")
    lines: list[str] = []
    floor = None
    if count:
        lines += [
            f"One trial-step: {count['operations'] / 1e9:,.3f} GFLOP (the family's own step "
            f"{count['family_operations'] / 1e9:,.3f}), {count['state_bytes'] / 1e6:,.2f} MB of state and batch, "
            f"{count['saved_bytes'] / 1e6:,.2f} MB saved for the backward pass, written and read "
            "(`benchmarks/card.py` says how counted).",
        ]
    if count and ceilings:
        peak = ceilings["found"]
        work = count["operations"] / peak[PEAK[precision]]
        state = count["state_bytes"] / peak["copy"]
        moved = (count["state_bytes"] + count["saved_bytes"]) / peak["copy"]
        floor, least = max(work, moved), max(work, state)
        lines.append(
            f"Floor: {work * 1e6:,.1f} µs by operations, {moved * 1e6:,.1f} µs by bytes ({state * 1e6:,.1f} µs by "
            f"state and batch alone): {1 / floor:,.0f} trial-steps/s ({1 / least:,.0f} if activations were never "
            "stored)."
        )
    if floor:
        lines += [
            f"The probe of lanewise's arm: {row['engine']} with {row['lanes']} lanes {row['rate']:,.0f} trial-steps/s, "
            f"{row['rate'] * floor:.1%} of the floor."
            for row in probed((arms.get("lanewise") or {}).get("probes", ()))
            if row["rate"]
        ]
    if lines:
        lines.append("")
    kernels = (arms.get("kernels") or {}).get("found")
    if not kernels:
        return lines
    lines += [
        f"| engine alone | lanes | trial-steps/s | with evaluation | in a stack "
        f"| share of {precision} ceiling | share of floor | set-up s | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in kernels:
        rate = row["trial_steps_per_s"]
        ceiling = count and ceilings and rate * count["operations"] / ceilings["found"][PEAK[precision]]
        cells = [
            row["engine"],
            str(row["lanes"]),
            f"{rate:,.0f}",
            f"{row['with_evaluation']:,.0f}",
            f"{row['in_stack']:,.0f}",
            number(ceiling, "{:.1%}"),
            number(floor and rate * floor, "{:.1%}"),
            f"{row['setup_s']:.1f}",
            number(row["peak_GiB"], "{:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def probed(probes: Iterable[Row]) -> list[Row]:
    """The rows of probes that are of engines that compile."""
    return [row for probe in probes for row in probe["table"] if row["engine"] not in ("serial", "stacked")]


def agreement(agree: Row, sweeps: Mapping[str, Row]) -> list[str]:
    found = agree.get("found")
    if not found:
        return [f"The arms' agreement was not measured: {agree['error']}", ""]
    ordinary, ours = found["ordinary"], found["lanewise"]
    inside = abs(found["difference"]) <= found["half_width"]
    lines = [
        f"The same config to its end, {agree['metric']}: ordinary loop {mean(ordinary):.4f} (n={len(ordinary)}), "
        f"lanewise {mean(ours):.4f} (n={len(ours)}, {found['engine']}); difference {found['difference']:+.4f} ± "
        f"{found['half_width']:.4f} (95%, Welch): {'within' if inside else 'OUTSIDE'} the noise of seeds. A freed lane "
        f"was filled again in {1e3 * found['refill_s']:.1f} ms.",
        "",
    ]
    finished = {
        name: {axis: result["value"] for axis, result in row.get("results", {}).items() if result["finished"]}
        for name, row in sweeps.items()
    }
    ours_finished = finished.get("lanewise") or finished.get("lanewise_again") or {}
    noise = deviation(ours) * math.sqrt(2)
    for name, theirs in sorted(finished.items()):
        shared = sorted(set(theirs) & set(ours_finished), key=float)
        if name.startswith("tune") and shared:
            gaps = [ours_finished[axis] - theirs[axis] for axis in shared]
            lines.append(
                f"Configs that ended in both `{name}` and lanewise: {len(shared)}; mean difference {mean(gaps):+.4f}, "
                f"largest {max(gaps, key=abs):+.4f}; a difference of two seeds of the config above has a standard "
                f"deviation of {noise:.4f}."
            )
    return [*lines, ""]


def figure(rows: Mapping[tuple, Mapping[str, Row]], path: Path) -> None:
    """Trial-steps/s of every arm, a panel a workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    for place, arms in sorted(rows.items()):
        bars = {name: row["trial_steps_per_s"] for name, row in arms.items() if row.get("trial_steps_per_s")}
        if any(name.startswith("lanewise") for name in bars):
            panels.append((place, bars, (arms.get("kernels") or {}).get("found") or []))
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.9 + 1.9 * len(panels)), squeeze=False)
    for axis, ((workload, device, gpus, precision), bars, kernels) in zip(axes[:, 0], panels, strict=True):
        names = sorted(bars, key=order, reverse=True)
        labels = [SHOWN.get(name, name.replace("tune", "Ray Tune, ")) for name in names]
        colours = ["#1b6ca8" if name.startswith("lanewise") else "#b0b0b0" for name in names]
        axis.barh(labels, [bars[name] for name in names], color=colours)
        for place, name in enumerate(names):
            axis.annotate(f" {bars[name]:,.0f}", (bars[name], place), va="center", fontsize=8)
        best = max((row["trial_steps_per_s"] for row in kernels), default=None)
        if best:
            axis.axvline(best, color="#c0504d", linestyle="--", linewidth=1, label=f"best engine alone: {best:,.0f}")
            axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.7, 1.0), frameon=False)
        axis.set_xscale("log")
        axis.set_xlim(min(bars.values()) / 3, 3 * max(best or 0, *bars.values()))
        axis.set_title(f"{workload} ({precision}, {where(device, gpus)})", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("trial-steps a second over the whole sweep, start-up included", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def where(device: str, gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else device


def number(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def order(arm: str) -> tuple[bool, int, str]:
    """Ray Tune's arms first, by their trials a device."""
    return arm.startswith("lanewise"), len(arm), arm


def times(rate: float, baseline: Row | None, which: str) -> str:
    """How many times a baseline's rate; empty where that has none, or did nothing."""
    return f"{rate / baseline[which]:.1f}" if baseline and baseline[which] else ""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / max(1, len(values) - 1))
