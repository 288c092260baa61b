"""What lanewise costs around the training, against bare Ray Tune on the same trials: `python benchmarks/overhead.py`.

Two jobs, each done by both, one after the other in fresh processes on the same machine, start-up included:

* trivial: 40 configs of a few steps, so that everything but training is what is measured;
* demo: 16 configs of the ci_vit demo's programs, trained to the end (no pruning), 2 seeds each.

The baseline is what a careful user writes: a class Trainable with reused actors, one trial a core, Tune's loggers off,
the family's own step in plain calls (the serial engine), all seeds of a config in one trial. It writes no curves, no
checkpoints and no MLflow runs; lanewise does all of it. A second baseline is the first with Tune's own loggers and its
MLflow callback on a local database: the nearest that stock Ray Tune comes to a record.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script is imported from its own folder; the packages stand one above
from benchmarks.processes import Cost, measure  # noqa: E402

TINY = {"data": "digits", "tasks": 2, "epochs_per_task": 1, "depth": 1, "hidden": 6, "batch": 50}
JOBS: dict[str, dict[str, Any]] = {
    "trivial": {"base": TINY, "axes": {"lr": [10 ** (-1 - i / 13) for i in range(40)]}, "seeds": 1},
    "demo": {
        "base": {},
        "axes": {"algorithm": ["vanilla", "cbp", "snr_v2", "shrink_perturb"], "lr": [1e-2, 3e-3, 1e-3, 3e-4]},
        "seeds": 2,
    },
}


def main(
    job: Annotated[str, typer.Option(help="trivial or demo; default: both")] = "",
    out: Annotated[Path, typer.Option(help="table, as Markdown")] = ROOT / "benchmarks" / "results" / "overhead.md",
    side: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run both sides of each job and write the table."""
    if side:
        bare_tune(JOBS[job], recorded=side == "recorded")
        return
    text = table([measure_job(name) for name in ([job] if job else JOBS)])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


def demo_base() -> dict[str, Any]:
    """The program of the demo sweep."""
    from search_spaces.ci_vit import SWEEPS

    return dict(SWEEPS.find("demo").base)


def fields(job: dict[str, Any]) -> dict[str, Any]:
    return {**(job["base"] or demo_base())}


@dataclass(frozen=True)
class Result:
    """All sides of a job; `seconds` is lanewise's timing.json."""

    name: str
    configs: int
    runs: int
    bare: Cost
    recorded: Cost
    ours: Cost
    seconds: dict[str, float]


def measure_job(name: str) -> Result:
    """All sides, one after the other, each in a fresh process."""
    job = JOBS[name]
    configs = math.prod(len(values) for values in job["axes"].values())
    bare, recorded = (
        measure([sys.executable, __file__, "--job", name, "--side", side], environment())
        for side in ("tune", "recorded")
    )
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, str(ROOT / "tune_ci_vit.py"), "lr", "--quiet", "--name", "bench"]
        command += ["--storage", storage, "--scheduler", "none", "--searcher", "grid", "--seeds", str(job["seeds"])]
        for axis, values in job["axes"].items():
            command += ["--space", f"{axis}={','.join(map(str, values))}"]
        base = {"depth": 3, "train_acc_after": "false", **fields(job)}
        for field, value in base.items():
            command += ["--set", f"{field}={value}"]
        ours = measure(command, environment())
        seconds = json.loads((Path(storage) / "bench" / "timing.json").read_text())
    return Result(name, configs, configs * job["seeds"], bare, recorded, ours, seconds)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bare_tune(job: dict[str, Any], recorded: bool) -> None:
    """The baseline: stock Ray Tune, reused actors, one trial a core; with its loggers and MLflow, or bare."""
    os.environ.update(RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="0" if recorded else "1")
    import ray
    from ray import tune

    cores = os.cpu_count() or 1
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    space = {name: tune.grid_search(values) for name, values in job["axes"].items()}
    with tempfile.TemporaryDirectory() as storage:
        trainable = tune.with_parameters(plain_trial(), base=fields(job), seeds=job["seeds"])
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=cores),
            run_config=tune.RunConfig(
                storage_path=storage,
                name="bare",
                verbose=0,
                callbacks=[mlflow_callback(storage)] if recorded else [],
            ),
        )
        failed = [result.error for result in tuner.fit() if result.error]
    ray.shutdown()
    if failed:
        raise failed[0]


def mlflow_callback(storage: str) -> Any:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(tracking_uri=f"sqlite:///{storage}/mlflow.db", experiment_name="bench")


def plain_trial() -> type:
    from ray import tune

    class PlainTrial(tune.Trainable):
        """All seeds of a config, one after the other, to the end."""

        def setup(self, config: dict[str, Any], base: Any = None, seeds: int = 1) -> None:
            import torch

            from lanes.engine import put
            from trainables.family import load_family
            from tuning.runner import cache_dir

            torch.set_num_threads(1)
            self.family, self.base, self.seeds, self.values = load_family("ci_vit"), base, seeds, config
            program, _ = self.family.build({**base, **config})
            self.arrays = put(self.family.load(program, None, cache_dir()), "cpu")

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.values = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: Tune asks at the end of every trial."""

        def step(self) -> dict[str, Any]:
            from lanes.serial import SerialEngine

            program, hyper = self.family.build({**self.base, **self.values})
            results = []
            for seed in range(self.seeds):
                engine = SerialEngine(self.family, program, self.arrays)
                engine.insert("run", hyper, seed)
                for _ in range(engine.schedule.epochs):
                    engine.advance(engine.schedule.steps_per_epoch)
                    results.append(engine.evaluate(["run"])["run"]["test_acc"])
            return {"test_acc": results[-1], "done": True}

    return PlainTrial


def table(results: list[Result]) -> str:
    from tuning.provenance import versions

    shown = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("python", "ray", "torch"))
    lines = [
        "# Overhead against bare Ray Tune",
        "",
        f"`python {' '.join(['benchmarks/overhead.py', *sys.argv[1:]])}` on {os.cpu_count()} cores; {shown}; load of "
        f"the machine {os.getloadavg()[2]:.1f} at the end (mean of 15 minutes).",
        "Whole processes, start-up included, with everything they start; what each side does is in the script's",
        "docstring. Memory is the peak of the sum of PSS over the processes.",
        "",
        "| job | configs | runs | side | wall s | processor s | peak MB | configs/min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        sides = {"bare Tune": result.bare, "Tune, recorded": result.recorded, "lanewise": result.ours}
        for side, cost in sides.items():
            lines.append(
                f"| {result.name} | {result.configs} | {result.runs} | {side} | {cost.wall:.1f} | {cost.cpu:.1f} "
                f"| {cost.peak / 1e6:.0f} | {60 * result.configs / cost.wall:.1f} |"
            )
    lines += ["", "Wall time of lanewise over that of bare Tune: " + "; ".join(map(_ratio, results)) + "."]
    lines += [
        "",
        "Over that of Tune with its own loggers and MLflow callback: " + "; ".join(map(_recorded, results)) + ".",
    ]
    names = [f"{result.name} s" for result in results]
    lines += ["", "Where lanewise's wall time went:", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    phases = [_phases(result) for result in results]
    lines += [f"| {phase} | {' | '.join(f'{each[phase]:.1f}' for each in phases)} |" for phase in phases[0]]
    return "\n".join(lines) + "\n"


def _ratio(result: Result) -> str:
    return f"{result.name} {result.ours.wall / result.bare.wall:.2f}"


def _recorded(result: Result) -> str:
    return f"{result.name} {result.ours.wall / result.recorded.wall:.2f}"


def _phases(result: Result) -> dict[str, float]:
    """Parts of the wall time, in order; the third lies within the second and the fifth is for comparison."""
    seconds = result.seconds
    starting = result.ours.wall - seconds["search"] - seconds["report and MLflow"]
    return {
        "start-up: command line, imports, Ray's start and end": starting,
        "search: from Ray's start to the last result": seconds["search"],
        "of this, until the first result (hosts and trials import)": seconds["first result"],
        "logging: report and MLflow after the search": seconds["report and MLflow"],
        "training, of each device": seconds["training, all devices"] / seconds["devices"],
    }


if __name__ == "__main__":
    typer.run(main)
