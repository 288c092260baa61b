"""The benchmarks measure what they say: ordinary loops learn, counts are right, arms run and are reported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import card, tune_arm
from benchmarks.agree import difference
from benchmarks.lanes_report import write
from benchmarks.ordinary import loop_of
from benchmarks.workloads import WORKLOADS, job_of, text_of
from lanes.engine import put
from tuning.values import parse_field

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "ci_vit_l3": ["hidden=12", "depth=2"],
    "ci_vit_l12": ["hidden=12", "depth=2"],
    "vgg_decay": ["widths=8,16", "lr=0.02"],
    "snn_delays": ["channels=4", "blocks=1,1", "kernel_sizes=3,3", "max_delay_ms=50,70", "dropout=0.1"],
    "multi_neuron": [],
    "multi_neuron_plain": [],
    "dln": ["channels=50"],
    "nanogpt": ["layers=1", "width=32", "heads=2", "length=16", "batch=8", "eval_windows=16", "warmup=1"],
}


def prepared(name: str, cache_dir: Path, steps: int = 30, precision: str = "float32"):
    """A small job of the workload on bundled data, its family, program, hyper and arrays."""
    job = job_of(name, 3, steps, precision, SMALL[name], None, cache_dir, bundled=True)
    family = job.plan.loaded
    program, hyper = family.build(job.configs[1].values)
    return job, family, program, hyper, put(family.load(program, None, cache_dir), "cpu")


@pytest.mark.parametrize("name", WORKLOADS)
def test_ordinary_loop_learns_what_the_family_learns(name, cache_dir):
    job, family, program, hyper, arrays = prepared(name, cache_dir)
    assert len({config.key for config in job.configs}) == 3
    loop = loop_of(family.name)(program, hyper, arrays, seed=0, device="cpu")
    curves: dict[str, list[float]] = {}
    for epoch in range(min(4, family.schedule(program).epochs)):
        for metric, value in {**loop.train_epoch(epoch), **loop.evaluate(epoch)}.items():
            curves.setdefault(metric, []).append(value)
    assert curves["train_loss"][-1] < curves["train_loss"][0]
    import numpy as np

    summary = family.summarize(program, {metric: np.array(values) for metric, values in curves.items()})
    assert math.isfinite(summary[job.plan.metric])


@pytest.mark.parametrize("name", WORKLOADS)
def test_fields_survive_the_command_line(name, cache_dir):
    job, family, *_ = prepared(name, cache_dir)
    program, hyper = family.build(job.configs[0].values)
    read = {field: parse_field(family, field, text_of(value)) for field, value in job.configs[0].values.items()}
    assert family.build(read) == (program, hyper)


def test_operations_and_bytes_of_a_plain_mlp_are_what_paper_says(cache_dir):
    _, family, program, hyper, arrays = prepared("multi_neuron_plain", cache_dir)
    found = card.counts(family, program, hyper, arrays, "cpu")
    sizes, batch = [(64, 64), (64, 64), (64, 10)], program.batch
    forward = sum(2 * batch * a * b for a, b in sizes)
    to_inputs = sum(2 * batch * a * b for a, b in sizes[1:])  # the images need no gradient
    assert found["operations"] == 2 * forward + to_inputs
    assert found["family_operations"] == found["operations"]
    weights = 4 * sum(a * b + b for a, b in sizes)
    # weights and velocity read and written, step counter read and written, seed handed on; uint8 pixels
    assert found["state_bytes"] == 2 * 2 * weights + 2 * 4 + 4 + batch * 64
    hidden = 2 * batch * 64 * 4
    assert found["saved_bytes"] >= 2 * hidden


def test_reports_come_at_rungs_and_every_epoch_is_noted(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LANEWISE_CACHE", str(cache_dir))
    job, family, program, _, _ = prepared("multi_neuron_plain", cache_dir)
    values = dict(job.configs[1].values)
    lr = values.pop("lr")
    spec = {
        "family": family.name,
        "base": values,
        "data_dir": "",
        "device": "cpu",
        "progress": str(tmp_path),
        "reports": list(job.plan.reference.reports),
        "length": job.plan.length,
        "metric": "test_acc",
        "worst": 0.0,
        "threads": torch.get_num_threads(),
    }
    told = list(tune_arm.reports({"lr": lr}, spec, "trial"))
    schedule = family.schedule(program)
    assert [r["progress"] * schedule.epochs / job.plan.length for r in told] == spec["reports"]
    notes = [line.split() for line in (tmp_path / "trial").read_text().splitlines()]
    assert [int(steps) for _, steps in notes] == [(e + 1) * schedule.steps_per_epoch for e in range(schedule.epochs)]


def test_difference_of_means_by_hand():
    found = difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert found["difference"] == 1.0
    assert found["half_width"] == pytest.approx(2.7764 * math.sqrt(2 / 3), rel=1e-4)  # t(4 degrees of freedom)


def row(arm: str, **more) -> dict:
    common = {
        "workload": "ci_vit_l3",
        "device": "cuda",
        "gpus": 1,
        "precision": "bf16",
        "data": "digits",
        "configs": 4,
        "steps": 100,
        "settings": [],
        "metric": "test_acc_last",
        "versions": {"torch": "2"},
        "time": "2026-01-01T00:00:00",
        "command": f"python benchmarks/lanes.py --arm {arm}",
        "error": "",
    }
    sweep = {
        "wall_s": 10.0,
        "capped": False,
        "trial_steps": 100.0,
        "warm_steps_per_s": None,
        "reported": 4,
        "gpu": None,
    }
    if arm.startswith(("tune", "lanewise")):
        common |= {**sweep, "results": {}, "seconds": {"search": 5.0}, "engines": ["stacked x4"], "compile_s": 3.0}
    return {**common, "arm": arm, **more}


def test_report_compares_with_the_best_sharing_arm_and_takes_the_newest_line(tmp_path):
    lines = [
        row("tune1", trial_steps_per_s=1.0),
        row("tune1", trial_steps_per_s=10.0, warm_steps_per_s=20.0),
        row("tune4", trial_steps_per_s=30.0),
        row("tune8", trial_steps_per_s=20.0),
        row("tune16", error="it broke"),
        row("lanewise", trial_steps_per_s=300.0),
        row("ceilings", found={"bf16": 1e14, "tf32": 5e13, "fp32": 1e13, "copy": 1e12, "name": "a card"}),
        row("count", found={"operations": 1e9, "family_operations": 1e9, "state_bytes": 1e6, "saved_bytes": 19e6}),
        row(
            "kernels",
            found=[
                {
                    "engine": "stacked, compiled",
                    "lanes": 8,
                    "trial_steps_per_s": 10_000.0,
                    "with_evaluation": 9_000.0,
                    "in_stack": 8_000.0,
                    "setup_s": 30.0,
                    "peak_GiB": 1.0,
                }
            ],
        ),
    ]
    out = tmp_path / "lanes.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(out)
    text = out.with_suffix(".md").read_text()
    assert "| lanewise | 10 | 4/4 | 100 | 300.0 |  | 30.0 | 15.0 | 10.0 |  |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| arm", "| tune", "| lanewise"))]
    assert {line.count("|") for line in rows} == {13}, rows
    assert "| tune 16 | failed: it broke |" in text
    assert "Floor: 10.0 µs by operations, 20.0 µs by bytes (1.0 µs" in text
    assert "| stacked, compiled | 8 | 10,000 | 9,000 | 8,000 | 10.0% | 20.0% |" in text
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "lanes.py"), "--arm", "tune3", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no arm 'tune3'")
    assert not (tmp_path / "o").exists()


SCRIPTS = [
    path.name
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if f"python benchmarks/{path.name}" in (text := path.read_text()) and "__main__" in text
]


@pytest.mark.heavy
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_from_anywhere(tmp_path, script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.heavy
def test_all_arms_end_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "lanes.py"), "--workload", "multi_neuron_plain", "--bundled"]
    command += [
        "--configs",
        "3",
        "--steps",
        "50",
        "--seeds",
        "2",
        "--seconds",
        "0.2",
        "--cap",
        "240",
        "--device",
        "cpu",
    ]
    arms = ("count", "tune2", "lanewise", "lanewise_again", "kernels", "agree")
    out = tmp_path / "lanes.jsonl"
    command += ["--work", str(tmp_path / "work"), "--out", str(out), *(p for arm in arms for p in ("--arm", arm))]
    subprocess.run(command, check=True)
    rows = {line["arm"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == list(arms)
    for arm in ("tune2", "lanewise", "lanewise_again"):
        assert rows[arm]["reported"] == 3
        assert rows[arm]["trial_steps"] >= 3 * 50 / 3
    write(out)
    assert "within the noise of seeds" in out.with_suffix(".md").read_text() or rows["agree"]["found"]["half_width"] > 0
