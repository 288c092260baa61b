"""A finished sweep of any size without training: made-up curves through the product's own journal and writers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from search_spaces import ci_vit
from tuning.cli import resolve
from tuning.curves import CurveWriter, metadata
from tuning.journal import Journal, read
from tuning.runner import write_sweep_json
from tuning.runs import RunTable, load_plain
from tuning.searchers import Proposer, make_source

RUNG = 8
"""Epoch at which two of three configs are stopped."""


def write(storage: Path, name: str, configs: int, seeds: int, epochs: int = 24, steps_per_epoch: int = 0) -> Path:
    """Writes the sweep's folder and returns it. Scores depend on the learning rate, the seed and noise."""
    flags = dict.fromkeys(("sweep", "data", "data_dir", "metric", "covariates", "tracking_uri"))
    plan = resolve(
        ci_vit.SWEEPS,
        **flags,
        trials=configs,
        seeds=seeds,
        seed=0,
        searcher="random",
        scheduler="asha",
        lanes="auto",
        engine="auto",
        settings=[f"tasks={epochs // 3}", "window=1"],
        dimensions=[],
        name=name,
        storage=storage,
        address="",
        max_concurrent=0,
        time_budget=0.0,
    )
    write_sweep_json(plan, Path(__file__).parent)
    plain = load_plain(plan.folder)
    journal = Journal(plan.folder / "journal.jsonl")
    journal.write("begin", versions={}, resumed=False)
    table, rng = RunTable(plain), np.random.default_rng(0)
    writer = CurveWriter(plan.folder, "made-up", metadata(name, plan.family, plain["metrics"]))
    proposer = Proposer(plan, make_source(plan), journal, lambda event: None)
    for index in range(configs):
        proposer.suggest(f"t{index:06d}")
    seed_effect = rng.normal(0, 0.01, seeds)
    proposals = [event for event, _ in read(plan.folder / "journal.jsonl") if event["event"] == "proposed"]
    for index, event in enumerate(proposals):
        ended = epochs if index % 3 == 0 else RUNG
        quality = 0.95 - 0.05 * abs(np.log10(event["hyper"]["lr"]) + 2.3)
        identity = {"trial": event["trial"], "config_key": event["config_key"]}
        per_seed = {}
        for place, (seed, key) in enumerate(event["runs"].items()):
            way = 1 - np.exp(-np.arange(1, epochs + 1) / 5)
            curve = 0.5 + (quality - 0.5) * way + seed_effect[place] + rng.normal(0, 0.01, epochs)
            for epoch in range(1, ended + 1):
                row = {"config_key": event["config_key"], "seed": int(seed), "epoch": epoch, "task": (epoch - 1) // 3}
                values = {"test_acc": curve[epoch - 1], "train_acc": curve[epoch - 1] + 0.02}
                values |= {"test_loss": 1 - curve[epoch - 1], "train_loss": 0.9 - curve[epoch - 1]}
                writer.epoch(key, {**row, "step": epoch * 10}, {k: float(v) for k, v in values.items()})
            if steps_per_epoch:
                steps = rng.random(ended * steps_per_epoch).astype(np.float32)
                writer.steps(key, 1, {"train_loss": steps, "train_acc": 1 - steps})
            writer.flush()
            last = float(curve[ended - 1])
            values = {"test_acc_last": last, "train_acc_last": last + 0.02, "test_loss_last": 1 - last}
            status = "finished" if ended == epochs else "training"
            spent = {"epoch": ended, "step": ended * 10, "values": values, "device_seconds": 0.5 * ended}
            per_seed[seed] = {"run_key": key, "status": status, **spent}
        mean = float(np.mean([run["values"]["test_acc_last"] for run in per_seed.values()]))
        done = ended == epochs
        report = {"epoch": ended, "progress": 9.0, "values": {plan.metric: mean}, "spread": {}, "per_seed": per_seed}
        journal.write("report", **identity, **report, engine="stacked", lanes=8, device="cuda:0@node", done=done)
        journal.write("decision", **identity, epoch=ended, decision="STOP")
        reason = "finished" if done else "stopped"
        journal.write("end", **identity, stop_reason=reason, epoch=ended, error=None)
    journal.write("finish", reason="done")
    journal.close()
    writer.flush(force=True)
    for event, _ in read(plan.folder / "journal.jsonl"):
        table.apply(event)
    table.write(plan.folder)
    return plan.folder
