"""The Tune trial: one config with all its seeds, attached to a device host. Imports no torch: it starts fast."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from lanes.job import Job, Report

log = logging.getLogger(__name__)
LOSSES = 3
"""A config whose host died this often without a report in between is `crashed`: it may be what kills them."""
WAIT_SECONDS = 5.0
PACKED = ("values", "spread", "per_seed", "engine", "lanes", "device")
"""Parts of a result that only the journal reads."""


class ConfigTrial(tune.Trainable):
    """Waits for its config's next report and hands it to Tune; the lanes train on the host.

    Every attachment has a fresh token: Tune may bring one trial up twice (a cached actor is reused while the new one
    still starts), and the loser's clean-up must not free the winner's lanes.

    What a program raises ends the config as `crashed`, as a result and not as an exception: exceptions are left to what
    is no fault of the config, a process or node that died, and Tune tries those again (`tuning.runner`). A host that
    dies is replaced here: the config attaches to another one and continues from its newest checkpoints.
    """

    def setup(self, config: dict[str, Any], pool: Any = None, settings: Mapping[str, Any] | None = None) -> None:
        self._pool, self._settings = pool, dict(settings or {})
        self._token = ""
        self._attach(config)

    def _attach(self, config: dict[str, Any], after: int = 0) -> None:
        """Take lanes for a config; reports up to the epoch `after` have been made before."""
        self._config = config
        self._told = 0
        self._epoch = after
        self._losses = 0
        self._worst: dict[str, float] = dict(config.get("worst", {}))
        self._place(after)

    def _place(self, after: int) -> None:
        config = self._config
        self._error, self._reason = "", "crashed"
        token = uuid.uuid4().hex
        runs = {int(seed): key for seed, key in config["runs"].items()}
        node = ray.get_runtime_context().get_node_id()
        while (placed := ray.get(self._pool.place.remote(token, config["program"], len(runs), node))) is None:
            time.sleep(WAIT_SECONDS)  # every device is gone: until one comes back
        self._host, self._device = placed
        job = Job(
            token=token,
            family=self._settings["family"],
            values=config["values"],
            config_key=config["config_key"],
            runs=runs,
            reports=tuple(epoch for epoch in config["reports"] if epoch > after),
            stops=self._settings["scheduler"] != "none",
            donates=self._settings["scheduler"] == "pbt",
            covariates=self._settings["covariates"],
            parent={int(seed): (key, epoch) for seed, (key, epoch) in config["parent"].items()},
        )
        self._token = token
        try:
            ray.get(self._host.attach.remote(job))
        except ray.exceptions.RayActorError:
            pass  # `step` will find it dead too
        except ray.exceptions.RayTaskError as error:
            self._error = str(error)

    def step(self) -> dict[str, Any]:
        report = self._next_report()
        if self._error:
            lost = crash(self._error, self._reason, self._epoch, self._config, self._settings)
            return lost | {"notice": report.notice if report else ""}
        assert report is not None
        self._epoch = report.epoch
        return pack(summarize(report, self._config, self._settings, self._worst)) | {"notice": report.notice}

    def _next_report(self) -> Report | None:
        """The next report, from another host where the one before died; None with `_error` set where there is none."""
        while not self._error:
            try:
                report: Report = ray.get(self._host.next_report.remote(self._token, self._told > 0))
            except ray.exceptions.RayActorError as error:
                self._losses += 1
                if self._losses == LOSSES:
                    self._error = f"its host died {LOSSES} times without a report: {error}"
                    if "memory" in str(error).lower():  # the kernel, or Ray's monitor, killed it for what it took
                        self._reason = "oom"
                    return None
                log.warning("%s: lost %s (%s)", self._config["config_key"], self._device, error)
                if isinstance(error, ray.exceptions.ActorDiedError):
                    self._pool.lost.remote(self._token)
                self._leave()
                self._told = 0
                self._place(after=self._epoch)
                continue
            self._told += 1
            self._losses = 0
            self._error, self._reason = report.error or "", report.reason
            return report
        return None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer: the states themselves are in the sweep's checkpoint store, written by the host."""
        ray.get(self._host.save.remote(self._token))
        pointer = {"runs": self._config["runs"], "epoch": self._epoch}
        Path(checkpoint_dir, "pointer.json").write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Attaching already took the newest states, or the parent's where PBT says so (`tuning.schedulers.Pbt`); what
        a pause of Tune's adds is how far this config has reported."""
        pointer = json.loads(Path(checkpoint_dir, "pointer.json").read_text())
        if pointer["runs"] == self._config["runs"]:
            self._leave()
            self._attach(self._config, after=pointer["epoch"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._attach(new_config)
        return True

    def cleanup(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._token:
            with contextlib.suppress(ray.exceptions.RayActorError):  # a host that died holds nothing
                ray.get(self._host.release.remote(self._token))
            self._pool.leave.remote(self._token)
            self._token = ""


def crash(
    error: str, reason: str, epoch: int, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The last Tune result of a config whose program raised, or for which there was no memory; `epoch` is the last it
    reported."""
    return {
        **dict.fromkeys(settings["objectives"], math.nan),
        "epoch": epoch,
        "progress": epoch * settings["length"] / config["epochs"],
        "config_key": config["config_key"],
        "stop_reason": reason,
        "error": error,
        "done": True,
    }


def pack(result: dict[str, Any]) -> dict[str, Any]:
    """The result with what is for the journal alone as one text: Tune flattens everything nested, keeps windows over
    every number of it, and all that of every trial for good."""
    detail = {name: result[name] for name in PACKED}
    return {**{name: value for name, value in result.items() if name not in PACKED}, "packed": json.dumps(detail)}


def unpack(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `pack` put away."""
    return json.loads(result["packed"])


def summarize(
    report: Report, config: Mapping[str, Any], settings: Mapping[str, Any], worst: dict[str, float]
) -> dict[str, Any]:
    """One Tune result of a report: means and spreads over seeds, a diverged seed counting as the worst value seen.

    A config ends as `diverged` when more than half its seeds have, or when the objective is not finite.

    Args:
        report: of the host.
        config: the trial's.
        settings: the sweep's; `modes` says which way each metric is better, `objectives` what is optimised. What a run
            cost is the mean over the seeds that did not diverge.
        worst: metric -> the worst finite value that any of the config's runs has reported; brought up to date.
    """
    modes = settings["modes"]
    alive = [seed for seed in report.seeds.values() if seed.status != "diverged"]
    diverged = len(report.seeds) - len(alive)
    for seed in report.seeds.values():
        note_worst(worst, seed.values, modes)
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
    if "device_seconds" in settings["objectives"] and alive:
        values["device_seconds"] = sum(seed.device_seconds for seed in alive) / len(alive)
    objectives = {name: values.get(name, math.nan) for name in settings["objectives"]}
    lost = diverged * 2 > len(report.seeds) or not all(map(math.isfinite, objectives.values()))
    done = report.done or lost
    reason = "diverged" if lost else "finished" if report.done else ""
    result = {
        **objectives,
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
    return result


def note_worst(worst: dict[str, float], values: Mapping[str, float], modes: Mapping[str, str]) -> None:
    """Bring `worst` up to date with what one run reported: what a diverged seed of its config counts as."""
    for name, value in values.items():
        if math.isfinite(value) and modes[name] != "none":
            pick = min if modes[name] == "max" else max
            worst[name] = pick(value, worst.get(name, value))
