"""The baseline: Ray Tune over the ordinary loop, ASHA and MLflow on. `python -m benchmarks.tune_arm SPEC`.

What a user who knows Ray writes: `tune.with_resources` at 1/k of a GPU, ASHA with the same rungs, Tune's MLflow
callback on a local database, a report at each rung. The data is decoded before and lies on the device in each trial.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Spec = dict[str, Any]


def reports(config: dict[str, Any], spec: Spec, trial: str) -> Iterator[dict[str, Any]]:
    """Train one trial; yield what is reported at its rungs and its end. Each epoch's end is noted in a file of its own,
    so that the steps of a trial that was stopped in between are counted too."""
    import numpy as np
    import torch

    from benchmarks.ordinary import loop_of
    from lanes.engine import put
    from trainables.family import load_family
    from tuning.runner import cache_dir

    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision("high")
    family = load_family(spec["family"])
    program, hyper = family.build({**spec["base"], **config})
    data_dir = Path(spec["data_dir"]) if spec["data_dir"] else None
    arrays = put(family.load(program, data_dir, cache_dir()), spec["device"])
    loop = loop_of(family.name)(program, hyper, arrays, seed=0, device=spec["device"])
    schedule = family.schedule(program)
    curves: dict[str, list[float]] = {}
    with open(Path(spec["progress"]) / trial, "a") as notes:
        for epoch in range(schedule.epochs):
            for name, value in {**loop.train_epoch(epoch), **loop.evaluate(epoch)}.items():
                curves.setdefault(name, []).append(value)
            done = epoch + 1
            notes.write(f"{time.time()} {done * schedule.steps_per_epoch}\n")
            notes.flush()
            if done in spec["reports"]:
                summary = family.summarize(program, {name: np.array(values) for name, values in curves.items()})
                value = summary[spec["metric"]]
                finite = value if np.isfinite(value) else spec["worst"]
                yield {spec["metric"]: finite, "progress": done * spec["length"] / schedule.epochs}


def train(config: dict[str, Any], spec: Spec) -> None:
    """Tune's function API."""
    from ray import tune

    for report in reports(config, spec, tune.get_context().get_trial_id()):
        tune.report(report)


def reused() -> type:
    """The same as a class, for `reuse_actors`: processes are not started anew for each trial."""
    from ray import tune

    class Reused(tune.Trainable):
        def setup(self, config: dict[str, Any], spec: Spec) -> None:
            self.spec = spec
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.reports = reports(new_config, self.spec, self.trial_id + f"-{time.time_ns()}")
            return True

        def step(self) -> dict[str, Any]:
            report = next(self.reports)
            return {**report, "done": report["progress"] >= self.spec["length"]}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: Tune asks at the end of every trial."""

    return Reused


def main(spec: Spec) -> None:
    begun = time.time()
    os.environ.update(RAY_AIR_NEW_OUTPUT="0", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    os.environ.pop("RAY_ADDRESS", None)
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import ASHAScheduler

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=os.environ.get("LANEWISE_RAY_TEMP") or None,
        _node_ip_address="127.0.0.1",
    )
    share = 1 / spec["per_device"]
    cores, gpus = ray.cluster_resources().get("CPU", 1.0), ray.cluster_resources().get("GPU", 0.0)
    resources = {"cpu": max(0.01, int(100 * cores * share / max(1.0, gpus)) / 100)}
    if spec["device"] == "cuda":
        resources["gpu"] = share
    trainable = tune.with_parameters(reused() if spec["reuse"] else train, spec=spec)
    started = time.time()
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={spec["axis"]: tune.grid_search(spec["values"])},
        tune_config=tune.TuneConfig(
            metric=spec["metric"],
            mode=spec["mode"],
            scheduler=ASHAScheduler(
                time_attr="progress", max_t=spec["length"], grace_period=1, reduction_factor=spec["reduction"]
            ),
            reuse_actors=spec["reuse"],
            time_budget_s=max(1.0, spec["deadline"] - started) if spec["deadline"] else None,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=spec["storage"],
            verbose=0,
            callbacks=[
                MLflowLoggerCallback(tracking_uri=f"sqlite:///{spec['storage']}/mlflow.db", experiment_name="bench")
            ],
        ),
    )
    grid = tuner.fit()
    fitted = time.time()
    found, errors = {}, []
    for result in grid:
        metrics = result.metrics or {}
        if result.error is not None:
            errors.append(str(result.error).strip().splitlines()[-1])
        elif "progress" in metrics:
            found[f"{result.config[spec['axis']]:.6g}"] = {
                "value": metrics[spec["metric"]],
                "finished": metrics["progress"] >= spec["length"],
            }
    ray.shutdown()
    seconds = {"Ray's start": started - begun, "search": fitted - started}
    Path(spec["out"]).write_text(json.dumps({"results": found, "errors": errors, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
