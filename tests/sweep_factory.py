"""Writes sweep folders exactly as docs/storage.md says, with known truth: what the analysis must find again.

The scores follow `value[config, seed] = mean[config] + seed_effect[seed] + noise`, so that seeds are paired as they are
where a seed fixes initial weights and data order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

START = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)

METRICS = {
    "test_acc": {"unit": "fraction", "mode": "max", "doc": "on held-out data, after each epoch"},
    "train_acc": {"unit": "fraction", "mode": "max", "doc": "on the batch, before the update"},
    "train_loss": {"unit": "nats", "mode": "min", "doc": "on the batch, before the update"},
    "last_test_acc": {"unit": "fraction", "mode": "max", "doc": "test_acc after the last epoch"},
    "last_train_acc": {"unit": "fraction", "mode": "max", "doc": "train_acc of the last epoch"},
}


@dataclass(frozen=True)
class Arm:
    """One config and the truth about it.

    Args:
        mean: true mean of the final score.
        sd: standard deviation of one run around mean + seed effect.
        tau: epochs in which the curve covers 63% of its way.
        gap: train minus test accuracy at the end.
        stop_epoch: where the scheduler stops all its runs (None: never).
        diverges: seeds whose runs turn NaN half-way.
    """

    label: str
    mean: float
    axis: dict[str, Any] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    sd: float = 0.002
    tau: float = 3.0
    gap: float = 0.02
    stop_epoch: int | None = None
    diverges: tuple[int, ...] = ()
    running_at: int | None = None
    device: str = "cuda:0@node1"

    @property
    def key(self) -> str:
        return _digest(self.label, json.dumps(self.axis, sort_keys=True, default=str))


@dataclass(frozen=True)
class Written:
    """What was written, for tests to compare with."""

    storage: Path
    name: str
    runs: pd.DataFrame
    finals: dict[str, dict[int, float]]
    """label -> seed -> final score."""


def _digest(*parts: Any) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:12]


def write_sweep(
    storage: Path,
    arms: list[Arm],
    name: str = "demo",
    family: str = "toy",
    seeds: int = 5,
    seed_sd: float = 0.004,
    epochs: int = 9,
    steps_per_epoch: int = 10,
    epochs_per_task: int | None = None,
    space: list[dict[str, Any]] | None = None,
    scheduler: dict[str, Any] | None = None,
    covariates: dict[str, Any] | None = None,
    parts: int = 2,
    rng_seed: int = 0,
    steps: bool = True,
    seconds_per_epoch: float = 2.0,
    **info: Any,
) -> Written:
    """Writes one sweep; `covariates`: name -> function(arm, seed, epoch) -> array; `info` overrides sweep.json keys."""
    rng = np.random.default_rng(rng_seed)
    folder = Path(storage) / name
    for part in ("epochs", "steps", "report"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    seed_effect = rng.normal(0, seed_sd, seeds)
    seed_effect -= seed_effect.mean()
    runs, epoch_rows, step_rows, covariate_rows, finals = [], [], [], [], {}
    events: list[dict[str, Any]] = []
    for index, arm in enumerate(arms):
        finals[arm.label] = {}
        trial = f"trial_{index:05d}"
        began = START + timedelta(seconds=seconds_per_epoch * index)
        events.append(_event("proposed", began, trial, arm, point=arm.axis))
        done = arm.stop_epoch or arm.running_at or epochs
        curves = {}
        for seed in range(seeds):
            final = arm.mean + seed_effect[seed] + rng.normal(0, arm.sd)
            finals[arm.label][seed] = final
            curves[seed] = _curves(arm, final, epochs, rng)
            run_key = _digest(arm.key, seed)
            diverged = seed in arm.diverges
            ended_epoch = epochs // 2 if diverged else done
            curve = {metric: values[:ended_epoch].copy() for metric, values in curves[seed].items()}
            if diverged:
                curve["train_loss"][-1] = np.nan
                curve["test_acc"][-1] = np.nan
            reason = "diverged" if diverged else _reason(arm)
            last_test = curve["test_acc"][-1]
            ended = reason != "running"
            runs.append(
                {
                    "sweep": info.get("sweep", "demo"),
                    "family": family,
                    "label": arm.label,
                    "config_key": arm.key,
                    "run_key": run_key,
                    "seed": seed,
                    "stop_reason": reason,
                    "config_stop_reason": "diverged" if len(arm.diverges) > seeds / 2 else _reason(arm),
                    "rung": arm.stop_epoch,
                    "epoch": ended_epoch,
                    "step": ended_epoch * steps_per_epoch,
                    "epochs_total": epochs,
                    "engine": "stacked",
                    "lanes": seeds,
                    "device": arm.device,
                    "device_seconds": ended_epoch * seconds_per_epoch / seeds,
                    "started_at": began,
                    "ended_at": began + timedelta(seconds=ended_epoch * seconds_per_epoch) if ended else None,
                    "error": None,
                    **{f"axis.{k}": v for k, v in arm.axis.items()},
                    **{f"program.{k}": v for k, v in arm.program.items()},
                    **{f"hyper.{k}": float(v) for k, v in arm.hyper.items()},
                    "final.last_test_acc": last_test,
                    "final.last_train_acc": curve["train_acc"][-1],
                    "best.last_test_acc": np.nanmax(curve["test_acc"]),
                    "best.last_train_acc": np.nanmax(curve["train_acc"]),
                }
            )
            for epoch in range(1, ended_epoch + 1):
                time = began + timedelta(seconds=epoch * seconds_per_epoch)
                values = {metric: curve[metric][epoch - 1] for metric in ("test_acc", "train_acc", "train_loss")}
                task = (epoch - 1) // (epochs_per_task or epochs)
                epoch_rows.append(
                    {
                        "run_key": run_key,
                        "config_key": arm.key,
                        "seed": seed,
                        "epoch": epoch,
                        "task": task,
                        "step": epoch * steps_per_epoch,
                        "time": time,
                        **values,
                    }
                )
                if steps:
                    for step in range((epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch + 1):
                        step_rows.append(
                            {
                                "run_key": run_key,
                                "step": step,
                                "train_acc": values["train_acc"],
                                "train_loss": values["train_loss"],
                            }
                        )
                for covariate, measure in (covariates or {}).items():
                    array = np.asarray(measure(arm, seed, epoch), dtype=np.float32)
                    covariate_rows.append(
                        {
                            "run_key": run_key,
                            "epoch": epoch,
                            "name": covariate,
                            "shape": list(array.shape),
                            "values": array.ravel().tolist(),
                        }
                    )
        for epoch in range(1, done + 1):
            time = began + timedelta(seconds=epoch * seconds_per_epoch)
            per_seed = {str(s): {"last_test_acc": curves[s]["test_acc"][epoch - 1]} for s in range(seeds)}
            mean = float(np.mean([v["last_test_acc"] for v in per_seed.values()]))
            events.append(
                _event("report", time, trial, arm, epoch=epoch, values={"last_test_acc": mean}, per_seed=per_seed)
            )
            if epoch == arm.stop_epoch:
                events.append(_event("decision", time, trial, arm, epoch=epoch, decision="STOP"))
        if arm.running_at is None:
            end = began + timedelta(seconds=done * seconds_per_epoch)
            events.append(_event("end", end, trial, arm, epoch=done, stop_reason=_reason(arm)))
    sweep = {
        "name": name,
        "family": family,
        "sweep": info.pop("sweep", "demo"),
        "doc": info.pop("doc", "what the learning rate does"),
        "metric": "last_test_acc",
        "headline": "last_test_acc",
        "mode": "max",
        "space": space if space is not None else _space(arms),
        "base": {"width": 16},
        "seeds": list(range(seeds)),
        "searcher": "grid",
        "scheduler": scheduler
        or {"name": "none", "grace": None, "reduction_factor": None, "max_t": epochs, "rungs": []},
        "trials": len(arms),
        "started_at": START.isoformat(),
        "command": ["python", "tune_toy.py", "demo", "--seeds", str(seeds)],
        "versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "git": {"commit": "0123abc", "dirty": False},
        "tracking_uri": None,
        "schedule": {
            "steps_per_epoch": steps_per_epoch,
            "epochs": epochs,
            "epochs_per_task": epochs_per_task or epochs,
        },
        "metrics": METRICS,
        **info,
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    with (folder / "journal.jsonl").open("w") as file:
        for event in sorted(events, key=lambda e: e["time"]):
            file.write(json.dumps(event) + "\n")
    frame = pd.DataFrame(runs).astype({"seed": "int32", "lanes": "int32", "rung": "Int32"})
    _write(folder / "runs.parquet", frame, sweep)
    _write_parts(folder / "epochs", pd.DataFrame(epoch_rows), sweep, parts)
    if steps:
        curves32 = pd.DataFrame(step_rows).astype({"train_acc": "float32", "train_loss": "float32"})
        _write_parts(folder / "steps", curves32, sweep, parts)
    if covariate_rows:
        (folder / "covariates").mkdir(exist_ok=True)
        _write_parts(folder / "covariates", pd.DataFrame(covariate_rows), sweep, parts)
    return Written(Path(storage), name, frame, finals)


def _curves(arm: Arm, final: float, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    epoch = np.arange(1, epochs + 1)
    way = (1 - np.exp(-epoch / arm.tau)) / (1 - np.exp(-epochs / arm.tau))
    wobble = rng.normal(0, arm.sd, epochs) * (1 - epoch / epochs)
    test = 0.1 + (final - 0.1) * way + wobble
    train = test + arm.gap * way
    return {"test_acc": test, "train_acc": train, "train_loss": -np.log(np.clip(train, 1e-3, 0.999))}


def _reason(arm: Arm) -> str:
    if arm.running_at is not None:
        return "running"
    return "stopped" if arm.stop_epoch is not None else "finished"


def _event(kind: str, time: datetime, trial: str, arm: Arm, **more: Any) -> dict[str, Any]:
    return {"event": kind, "time": time.isoformat(), "trial": trial, "config_key": arm.key, **more}


def _space(arms: list[Arm]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for arm in arms for name in arm.axis))
    return [
        {
            "name": name,
            "kind": "choice",
            "values": list(dict.fromkeys(arm.axis[name] for arm in arms if name in arm.axis)),
        }
        for name in names
    ]


def _write(path: Path, frame: pd.DataFrame, sweep: dict[str, Any]) -> None:
    meta = {k: sweep[k] for k in ("sweep", "family", "metrics", "headline", "mode")}
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({b"lanewise": json.dumps({"schema_version": 1, **meta}).encode()})
    pq.write_table(table, path)


def _write_parts(folder: Path, frame: pd.DataFrame, sweep: dict[str, Any], parts: int) -> None:
    for index, rows in enumerate(np.array_split(np.arange(len(frame)), parts)):
        _write(folder / f"{index:06d}.parquet", frame.iloc[rows], sweep)


def lr_arms(**common: Any) -> list[Arm]:
    """Five learning rates; 0.01 and 0.03 truly equal, the others clearly apart."""
    means = {0.001: 0.80, 0.003: 0.86, 0.01: 0.90, 0.03: 0.90, 0.1: 0.70}
    return [
        Arm(f"lr={lr:g}", mean, axis={"lr": lr}, hyper={"lr": lr}, program={"algorithm": "vanilla"}, **common)
        for lr, mean in means.items()
    ]


def grid_arms(methods: dict[str, float] | None = None, **common: Any) -> list[Arm]:
    """Methods x learning rates: a method's best is at lr 0.01; the value is the method's score there."""
    methods = methods or {"vanilla": 0.85, "l2": 0.88, "cbp": 0.92}
    return [
        Arm(
            f"{method} lr={lr:g}",
            score - 0.03 * abs(np.log10(lr) + 2),
            axis={"method": method, "lr": lr},
            hyper={"lr": lr},
            program={"algorithm": method},
            **common,
        )
        for method, score in methods.items()
        for lr in (0.001, 0.01, 0.1)
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what is in it: to assert that nothing was written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
