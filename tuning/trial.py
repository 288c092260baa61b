"""The Tune trial: one config with all its seeds, attached to a device host. Imports no torch: it starts fast."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from lanes.job import Job, Report


class ConfigTrial(tune.Trainable):
    """Waits for its config's next report and hands it to Tune; the lanes train on the host.

    Every attachment has a fresh token: Tune may bring one trial up twice (a cached actor is reused while the new one
    still starts), and the loser's clean-up must not free the winner's lanes.
    """

    def setup(self, config: dict[str, Any], pool: Any = None, settings: Mapping[str, Any] | None = None) -> None:
        self._pool, self._settings = pool, dict(settings or {})
        self._token = ""
        self._attach(config)

    def _attach(self, config: dict[str, Any], parent: Mapping[int, tuple[str, int]] | None = None) -> None:
        self._config = config
        self._told = 0
        self._worst: dict[str, float] = {}
        token = uuid.uuid4().hex
        runs = {int(seed): key for seed, key in config["runs"].items()}
        program = json.dumps(config["program"], sort_keys=True)
        self._host, self._device = ray.get(self._pool.place.remote(token, program, len(runs)))
        job = Job(
            token=token,
            family=self._settings["family"],
            values=config["values"],
            config_key=config["config_key"],
            runs=runs,
            reports=tuple(config["reports"]),
            covariates=self._settings["covariates"],
            parent=parent or {},
        )
        ray.get(self._host.attach.remote(job))
        self._token = token

    def step(self) -> dict[str, Any]:
        report: Report = ray.get(self._host.next_report.remote(self._token, self._told > 0))
        self._told += 1
        if report.error:
            raise RuntimeError(report.error)
        self._epoch = report.epoch
        return summarize(report, self._config, self._settings, self._worst)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer: the states themselves are in the sweep's checkpoint store, written by the host."""
        ray.get(self._host.save.remote(self._token))
        pointer = {"runs": self._config["runs"], "epoch": self._epoch, "config_key": self._config["config_key"]}
        Path(checkpoint_dir, "pointer.json").write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Continue from where the pointer says: this config's own past, or (PBT) another's."""
        pointer = json.loads(Path(checkpoint_dir, "pointer.json").read_text())
        if pointer["config_key"] == self._config["config_key"]:
            return  # attaching already took the newest checkpoint
        donor = {
            int(seed): (key, pointer["epoch"])
            for seed, key in zip(self._config["runs"], pointer["runs"].values(), strict=True)
        }
        self._leave()
        self._attach(self._exploited(pointer), donor)

    def _exploited(self, pointer: Mapping[str, Any]) -> dict[str, Any]:
        """The config that PBT made: the point it perturbed, resolved anew, continuing at the donor's epoch."""
        from trainables.family import run_key
        from tuning.sweep import SweepPlan, clamp

        plan = SweepPlan.load(Path(self._settings["folder"]))
        point = clamp(plan.space, self._config["point"])
        config = plan.resolve(point)
        lineage = f"{config.key}<{pointer['config_key']}@{pointer['epoch']}"
        return {
            **self._config,
            "config_key": config.key,
            "label": config.label,
            "algorithm": config.algorithm,
            "epochs": config.epochs,
            "point": point,
            "values": config.values,
            "program": config.program,
            "hyper": config.hyper,
            "runs": {seed: run_key(lineage, int(seed)) for seed in self._config["runs"]},
            "reports": [epoch for epoch in config.reports if epoch > pointer["epoch"]],
            "exploited": True,
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._attach(new_config)
        return True

    def cleanup(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._token:
            ray.get(self._host.release.remote(self._token))
            self._pool.leave.remote(self._token)
            self._token = ""


def summarize(
    report: Report, config: Mapping[str, Any], settings: Mapping[str, Any], worst: dict[str, float]
) -> dict[str, Any]:
    """One Tune result of a report: means and spreads over seeds, a diverged seed counting as the worst value seen.

    Args:
        report: of the host.
        config: the trial's.
        settings: the sweep's; `modes` says which way each metric is better.
        worst: metric -> the worst finite value that any of the config's runs has reported; brought up to date.
    """
    modes = settings["modes"]
    alive = [seed for seed in report.seeds.values() if seed.status != "diverged"]
    diverged = len(report.seeds) - len(alive)
    for seed in report.seeds.values():
        for name, value in seed.values.items():
            if math.isfinite(value) and modes[name] != "none":
                pick = min if modes[name] == "max" else max
                worst[name] = pick(value, worst.get(name, value))
    names = sorted({name for seed in report.seeds.values() for name in seed.values})
    values, spread = {}, {}
    for name in names:
        if modes[name] == "none":
            numbers = [seed.values[name] for seed in alive if name in seed.values]
        else:
            numbers = [
                worst.get(name, math.nan) if seed.status == "diverged" else seed.values[name]
                for seed in report.seeds.values()
            ]
        if numbers:
            mean = sum(numbers) / len(numbers)
            values[name] = mean
            spread[name] = math.sqrt(sum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1))
    lost = diverged * 2 > len(report.seeds)
    done = report.done or lost
    reason = "diverged" if lost else "finished" if report.done else ""
    result = {
        settings["metric"]: values.get(settings["metric"], math.nan),
        "values": values,
        "spread": spread,
        "per_seed": {
            str(number): {
                "run_key": seed.run_key,
                "status": seed.status,
                "epoch": seed.epoch,
                "step": seed.step,
                "values": seed.values,
                "device_seconds": seed.device_seconds,
            }
            for number, seed in report.seeds.items()
        },
        "epoch": report.epoch,
        "progress": report.epoch * settings["length"] / config["epochs"],
        "engine": report.engine,
        "lanes": report.lanes,
        "device": report.device,
        "config_key": config["config_key"],
        "stop_reason": reason,
        "done": done,
    }
    if config.get("exploited"):
        made = ("label", "algorithm", "point", "values", "program", "hyper", "epochs")
        result["config_made"] = {key: config[key] for key in made}
    return result
