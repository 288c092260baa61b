"""lanewise against ordinary Ray Tune on the same trials: `python benchmarks/lanes.py --workload ci_vit_l3`.

Arms, each a process of its own, start-up included, ASHA and MLflow on:

* `tune1`: Ray Tune, one trial a GPU, the family as an ordinary eager PyTorch loop (`benchmarks/ordinary/`);
* `tune2`, `tune4`, `tune8`, `tune16`: the same with so many trials a GPU;
* `lanewise`: `python tune_X.py ... --lanes auto`, with nothing compiled or probed before;
* `lanewise_again`: the same sweep once more, what the first one compiled and probed being on disk.

And what the numbers are held against: `ceilings` of the card, `count` of operations and bytes a trial-step needs
(`benchmarks/card.py`), `kernels` (engines alone), `agree` (the same metrics within seed noise; `benchmarks/agree.py`).

An arm that reaches `--cap` seconds is stopped there, and its rate is of the trial-steps done by then. Every arm appends
a line to `--out`, so that arms can be run one by one; `--report` makes the table and the figure of all lines.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.gpu_watch import Watch, visible_gpus
from benchmarks.lanes_report import probed, write
from benchmarks.workloads import WORKLOADS, Job, job_of, text_of
from trainables.family import BadValue

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = ("tune1", "tune2", "tune4", "tune8", "tune16", "lanewise", "lanewise_again")
ARMS = ("ceilings", "count", *SWEEPS, "kernels", "agree")
RESULTS = ROOT / "benchmarks" / "results"
GRACE = 60.0
"""Seconds an arm has beyond its cap to write down what it did, before it is ended."""

LONGER = 200

Row = dict[str, Any]


def main(
    workload: Annotated[str, typer.Option(help=f"one of {', '.join(WORKLOADS)}")] = "ci_vit_l3",
    arm: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(ARMS)}; repeatable [default: all]")] = None,
    configs: Annotated[int, typer.Option(help="number of configs, one seed each")] = 64,
    steps: Annotated[int, typer.Option(help="update steps of a whole trial, about")] = 500,
    cap: Annotated[float, typer.Option(help="seconds an arm may take; 0: no limit")] = 0.0,
    precision: Annotated[str, typer.Option(help="float32 or bf16 [default: bf16 on a GPU]")] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu [default: what is there]")] = "",
    gpus: Annotated[int, typer.Option(help="GPUs to use")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="further program or hyper field")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="of arm kernels: ENGINE:LANES, repeatable")] = None,
    seconds: Annotated[float, typer.Option(help="of arm kernels: measuring time of a row")] = 3.0,
    seeds: Annotated[int, typer.Option(help="of arm agree")] = 5,
    reuse_actors: Annotated[bool, typer.Option(help="of arms tune*: keep trial processes")] = False,
    bundled: Annotated[bool, typer.Option(help="the bundled data, also where the real set is there")] = False,
    data_dir: Annotated[Path | None, typer.Option(envvar="LANEWISE_DATA", help="folder of data sets")] = None,
    work: Annotated[Path | None, typer.Option(help="scratch folder, kept [default: under the temporary one]")] = None,
    out: Annotated[Path, typer.Option(help="JSON lines, appended")] = RESULTS / "lanes.jsonl",
    note: Annotated[str, typer.Option(help="what else to say of the machine, kept with the results")] = "",
    report: Annotated[
        bool, typer.Option("--report", help="write OUT's table (.md) and figure (.png), then stop")
    ] = False,
) -> None:
    """Run arms and append their results, or report."""
    if report:
        write(out)
        return
    arms = arm or list(ARMS)
    try:
        for name in arms:
            if name not in ARMS:
                raise BadValue(f"there is no arm '{name}'; there are: {', '.join(ARMS)}")
        bench = Bench(workload, configs, steps, cap, precision, device, gpus, set_ or [], bundled, data_dir, work)
    except BadValue as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    # told to end, take the arm's processes along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench.common["note"] = note
    bench.kernel_rows, bench.seconds, bench.seeds, bench.reuse = engine or [], seconds, seeds, reuse_actors
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arms:
        row = bench.run(name)
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")
        failed |= bool(row.get("error"))
        print(f"{workload} {name}: {summary(row)}", flush=True)
    raise typer.Exit(1 if failed else 0)


def summary(row: Row) -> str:
    """One line of an arm's result."""
    if row.get("error"):
        return f"failed: {row['error']}"
    if "trial_steps_per_s" in row:
        idle = (row.get("gpu") or {}).get("idle_warm")
        return (
            f"{row['trial_steps_per_s']:.1f} trial-steps/s over {row['wall_s']:.0f} s"
            + (" (capped)" if row["capped"] else "")
            + f", {row['reported']} of {row['configs']} configs reported, {row['trial_steps']:.0f} trial-steps"
            + (f", GPU idle {100 * idle:.0f}% once warm" if idle is not None else "")
        )
    return json.dumps(row["found"])[:2000]


class Bench:
    """A workload at a size on a device, and the scratch folder its arms share."""

    kernel_rows: list[str]
    seconds: float
    seeds: int
    reuse: bool

    def __init__(
        self,
        workload: str,
        configs: int,
        steps: int,
        cap: float,
        precision: str,
        device: str,
        gpus: int,
        settings: list[str],
        bundled: bool,
        data_dir: Path | None,
        work: Path | None,
    ):
        self.cap, self.gpus = cap, gpus
        self.work = (work or Path(tempfile.gettempdir()) / f"lanewise-bench-{os.getuid()}").resolve()
        os.environ["LANEWISE_CACHE"] = str(self.work / "cache")
        self.device = device or ("cuda" if _has_gpu() else "cpu")
        self.visible = [int(name) for name in visible_gpus()[:gpus]] if self.device == "cuda" else []
        precision = precision or ("bf16" if self.device == "cuda" else "float32")
        self.data_dir = data_dir.resolve() if data_dir else None
        before = self._cached()
        self.job: Job = job_of(
            workload, configs, steps, precision, settings, self.data_dir, self.work / "sweeps", bundled
        )
        self._keep(self._cached() - before)
        self.common: Row = {
            "workload": workload,
            "device": self.device,
            "gpus": gpus if self.device == "cuda" else 0,
            "precision": precision,
            "configs": configs,
            "steps": self.job.steps,
            "data": self.job.plan.values_at(self.job.configs[0].point).get("data"),
            "metric": self.job.plan.metric,
            "settings": settings,
            "command": shlex.join(["python", "benchmarks/lanes.py", *sys.argv[1:]]),
        }

    def run(self, arm: str) -> Row:
        """One arm's row."""
        row = {"arm": arm, **self.common, "time": datetime.now(UTC).isoformat(timespec="seconds"), **_versions()}
        if arm.startswith("tune"):
            return row | self.tune(int(arm.removeprefix("tune")))
        if arm.startswith("lanewise"):
            return row | self.lanewise(again=arm == "lanewise_again")
        if arm == "kernels":
            return row | self.kernels()
        module = "benchmarks.agree" if arm == "agree" else "benchmarks.card"
        config = self.job.configs[len(self.job.configs) // 2]
        spec = {
            "what": arm,
            "family": self.job.plan.family,
            "values": config.values,
            "device": self.device,
            "data_dir": self._data_dir,
            "metric": self.job.plan.metric,
            "seeds": self.seeds,
            "cap": self.cap,
        }
        found, error, wall = self._module(module, spec)
        return row | {"found": found, "error": error, "wall_s": wall}

    # --- arms -------------------------------------------------------------------------------------------------------

    def tune(self, per_device: int) -> Row:
        plan, axis = self.job.plan, self.job.workload.axis
        configs = self.job.configs
        base = {name: value for name, value in configs[0].values.items() if name != axis}
        progress = self._fresh("progress")
        cores = os.cpu_count() or 1
        spec = {
            "family": plan.family,
            "base": base,
            "axis": axis,
            "values": [config.values[axis] for config in configs],
            "metric": plan.metric,
            "mode": plan.objective.mode,
            "worst": -1e9 if plan.objective.mode == "max" else 1e9,
            "length": plan.length,
            "reduction": plan.to_plain()["scheduler"]["reduction_factor"],
            "reports": list(plan.reference.reports),
            "per_device": per_device,
            "threads": max(1, cores // per_device) if self.device == "cpu" else 1,
            "device": self.device,
            "data_dir": self._data_dir,
            "storage": str(self._fresh("tune")),
            "progress": str(progress),
            "reuse": self.reuse,
            "deadline": time.time() + self.cap if self.cap else 0.0,
        }
        with Watch(self.visible) as watch:
            found, error, wall = self._module("benchmarks.tune_arm", spec)
        notes = [[line.split() for line in path.read_text().splitlines()] for path in progress.iterdir()]
        done = sum(float(lines[-1][1]) for lines in notes if lines)
        times = sorted(float(at) for lines in notes for at, _ in lines)
        found = found or {"results": {}, "errors": [], "seconds": {}}
        error = error or (found["errors"][0] if found["errors"] else "")
        return self._sweep_row(wall, done, found["results"], times, watch, error) | {
            "seconds": found["seconds"],
            "reuse_actors": self.reuse,
        }

    def lanewise(self, again: bool) -> Row:
        import pandas as pd

        cache, storage = self.work / "cache", self._fresh("sweeps")
        if not again:
            self._forget()
        command = [sys.executable, str(ROOT / f"tune_{self.job.plan.family}.py"), *self.job.flags]
        command += ["--lanes", "auto", "--quiet", "--name", "bench", "--storage", str(storage)]
        if self.cap:  # a sweep's own limit counts from the search; starting and reporting take the rest
            command += ["--time-budget", str(self._search_cap)]
        with Watch(self.visible) as watch:
            error, wall = self._process(command)
        folder = storage / "bench"
        timing = folder / "timing.json"
        if not timing.exists():
            return {"error": error or "the sweep left no timing.json", "wall_s": wall, "log": _tail(folder / "log.txt")}
        steps, epochs = _columns(folder / "steps", "run_key", "step"), _columns(folder / "epochs", "time")
        table = pd.read_parquet(folder / "runs.parquet")
        name, axis = f"final.{self.job.plan.metric}", f"axis.{self.job.workload.axis}"
        results = {
            f"{record[axis]:.6g}": {"value": record[name], "finished": record["config_stop_reason"] == "finished"}
            for record in table.to_dict("records")
            if name in record and record[name] == record[name]  # no such column: stopped before the first report
        }
        times = sorted(time.timestamp() for time in epochs["time"])
        done = float(steps.groupby("run_key")["step"].max().sum())
        ended = [r["stop_reason"] for r in table.to_dict("records")]
        probes = [json.loads(path.read_text()) for path in sorted((cache / "probes").glob("*.json"))]
        seconds = json.loads(timing.read_text())
        return self._sweep_row(wall, done, results, times, watch, error) | {
            "capped": bool(self.cap) and seconds["search"] > self._search_cap,
            "seconds": seconds,
            "probes": probes,
            "compile_s": sum(row.get("setup", 0.0) for row in probed(probes)),
            "engines": sorted({f"{r.engine} x{r.lanes:.0f}" for r in table[table["lanes"] > 0].itertuples()}),
            "stop_reasons": {reason: ended.count(reason) for reason in sorted(set(ended))},
        }

    def kernels(self) -> Row:
        """Engines alone, by `benchmarks/kernels.py`."""
        choices = self.kernel_rows
        if not choices:
            cuda = self.device == "cuda"
            choices = ["serial:1"] + (["stacked, compiled:8", "stacked, compiled:32"] if cuda else ["stacked:8"])
        lines = self._fresh("kernels") / "rows.jsonl"
        command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--family", self.job.plan.family]
        config = self.job.configs[len(self.job.configs) // 2]
        long = "tasks" if "tasks" in config.values else "epochs"
        values = {**config.values, long: LONGER * config.values[long]}  # no run ends while it is measured
        for name, value in values.items():
            command += ["--set", f"{name}={text_of(value)}"]
        command += [part for choice in choices for part in ("--engine", choice)]
        command += ["--seconds", str(self.seconds), "--out", str(lines)]
        command += ["--data-dir", str(self.data_dir)] if self.data_dir else []
        error, wall = self._process(command)
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        kept = ("engine", "lanes", "trial_steps_per_s", "with_evaluation", "in_stack", "setup_s", "peak_GiB")
        found = [{name: row[name] for name in kept} for row in rows]
        return {"found": found, "error": "" if found else error, "stopped_early": error, "wall_s": wall}

    # --- the cache: decoded data is kept, what was probed and compiled can be forgotten -----------------------------

    def _cached(self) -> set[str]:
        cache = self.work / "cache"
        return {path.name for path in cache.iterdir()} if cache.is_dir() else set()

    def _kept(self) -> set[str]:
        notes = self.work / "decoded.json"
        return set(json.loads(notes.read_text())) if notes.exists() else set()

    def _keep(self, names: set[str]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "decoded.json").write_text(json.dumps(sorted(self._kept() | names)))

    def _forget(self) -> None:
        for name in self._cached() - self._kept():
            path = self.work / "cache" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- parts ------------------------------------------------------------------------------------------------------

    def _sweep_row(self, wall: float, done: float, results: Row, times: list[float], watch: Watch, error: str) -> Row:
        ended = sum(1 for result in results.values() if result["finished"])
        warm = (times[0], times[-1]) if len(times) > 1 else (None, None)
        return {
            "wall_s": wall,
            "capped": bool(self.cap) and wall >= self.cap - 30 and ended < len(self.job.configs),
            "trial_steps": done,
            "trial_steps_per_s": done / wall,
            "warm_steps_per_s": done / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None,
            "reported": len(results),
            "finished": ended,
            "results": results,
            "gpu": watch.summary(*warm) if self.device == "cuda" else None,
            "error": error,
        }

    @property
    def _search_cap(self) -> float:
        return max(5.0, self.cap - 25)

    @property
    def _data_dir(self) -> str:
        return str(self.data_dir) if self.data_dir else ""

    def _fresh(self, name: str) -> Path:
        """An empty folder of that name in the scratch folder."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / name).mkdir(parents=True)
        return self.work / name

    def _module(self, module: str, spec: Row) -> tuple[Any, str, float]:
        """Run a module of ours on a spec. (what it wrote or None, error, wall seconds)."""
        folder = self._fresh("spec")
        path, out = folder / "spec.json", folder / "out.json"
        path.write_text(json.dumps({**spec, "out": str(out)}))
        error, wall = self._process([sys.executable, "-m", module, str(path)])
        return (json.loads(out.read_text()) if out.exists() else None), error, wall

    def _process(self, command: list[str]) -> tuple[str, float]:
        """Run a command to its end, or to GRACE beyond the cap. (error in one line or "", wall seconds)."""
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        cache = self.work / "cache"
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        if self.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        else:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.visible))
        log = self.work / "last.log"
        begun = time.perf_counter()
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(self.cap + GRACE if self.cap else None)
                error = "" if code == 0 else f"code {code}: {_tail(log)}"
            except BaseException as stop:
                # first as Ctrl-C, so that Ray's own processes go with it; then all of this session's group
                for signal_number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
                    if process.poll() is None:
                        os.killpg(process.pid, signal_number)
                        try:
                            process.wait(patience)
                        except subprocess.TimeoutExpired:
                            continue
                if not isinstance(stop, subprocess.TimeoutExpired):
                    raise
                error = f"ended {GRACE:.0f} s after its cap of {self.cap:.0f} s: {_tail(log)}"
        return error, time.perf_counter() - begun


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _versions() -> Row:
    from tuning.provenance import versions

    return {"versions": {k: v for k, v in versions().items() if k in ("python", "torch", "ray", "mlflow")}}


def _columns(folder: Path, *names: str) -> Any:
    """These columns of a folder's Parquet files; none of them where nothing was written."""
    import pandas as pd

    files = sorted(folder.glob("*.parquet"))
    empty = pd.DataFrame(columns=list(names))
    return pd.concat([pd.read_parquet(path, columns=list(names)) for path in files]) if files else empty


def _tail(path: Path, count: int = 12) -> str:
    """The last lines of a log, as one."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return " | ".join(line.strip() for line in lines[-count:])[-1500:]


if __name__ == "__main__":
    typer.run(main)
