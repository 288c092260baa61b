"""Trial-steps per second of the engines alone: `python benchmarks/kernels.py --family ci_vit --set preset=L3 ...`.

One process, one device, data resident, no Ray: what the engines do when nothing else is in the way. `plain` is the
serial engine, uncompiled: the family's own step in ordinary PyTorch calls.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from lanes.engine import Engine, put
from lanes.job import Job
from lanes.probe import make_engine
from lanes.stack import Stack
from lanes.writer import Writer
from trainables.family import load_family
from tuning.curves import CurveWriter, metadata
from tuning.runner import cache_dir
from tuning.values import parse_field, split

SEEDS = 4
"""Of a config. Orders are worked out once a seed, so lanes that all had seeds of their own would wait for the host."""


def main(
    family: Annotated[str, typer.Option(help="model family")] = "ci_vit",
    set_: Annotated[list[str] | None, typer.Option("--set", help="program or hyper field, NAME=VALUE")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="ENGINE:LANES, repeatable")] = None,
    seconds: Annotated[float, typer.Option(help="measuring time of one row")] = 3.0,
    data_dir: Annotated[Path | None, typer.Option(envvar="LANEWISE_DATA")] = None,
    out: Annotated[Path | None, typer.Option(help="append JSON lines here")] = None,
    profile: Annotated[int, typer.Option(help="also print so many kernels of an epoch, the longest first")] = 0,
) -> None:
    """Measure one program under several engines and lane counts."""
    loaded = load_family(family)
    fields = dict(split("--set", text) for text in set_ or [])
    values = dict(loaded.presets[fields.pop("preset")]) if "preset" in fields else {}
    values |= {name: parse_field(loaded, name, text) for name, text in fields.items()}
    program, hyper = loaded.build(values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    read = loaded.load(program, data_dir, cache_dir())
    arrays, host_arrays = put(read, device), put(read, "cpu")
    for choice in engine or ["serial:1", "stacked:8"]:
        name, _, lanes = choice.rpartition(":")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        made = make_engine(name, int(lanes), loaded, program, arrays, device, host_arrays)
        begun = time.perf_counter()
        for i in range(int(lanes)):
            made.insert(f"lane{i}", hyper, i % SEEDS)
        chunk = made.until_epoch_end()
        made.advance(chunk)
        made.evaluate(list(made.lanes))
        setup = time.perf_counter() - begun
        done, evaluating, begun = 0, 0.0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            made.advance(chunk)
            done += chunk
            before = time.perf_counter()
            made.evaluate(list(made.lanes))
            evaluating += time.perf_counter() - before
        elapsed = time.perf_counter() - begun
        if profile:
            print(profiled(made, profile), flush=True)
        made.remove(list(made.lanes))
        stacked = in_stack(made, hyper, int(lanes), seconds)
        row = {
            "family": family,
            "program": values,
            "engine": name,
            "lanes": int(lanes),
            "trial_steps_per_s": done * int(lanes) / (elapsed - evaluating),
            "with_evaluation": done * int(lanes) / elapsed,
            "in_stack": stacked,
            "setup_s": setup,
            "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        print(
            f"{family} {name} x{lanes}: {row['trial_steps_per_s']:.0f} trial-steps/s "
            f"({row['with_evaluation']:.0f} with evaluation, {stacked:.0f} in a stack), set-up {setup:.1f} s, "
            f"peak {row['peak_GiB'] or 0:.1f} GiB",
            flush=True,
        )
        if out is not None:
            with open(out, "a") as file:
                file.write(json.dumps(row) + "\n")
        del made
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def profiled(engine: Engine, count: int) -> str:
    """A table of the kernels (on a CPU: operators) of one chunk of training, those in CUDA graphs included."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = engine.device.type == "cuda"
    chunk = engine.until_epoch_end()
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        engine.advance(chunk)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=count, max_name_column_width=80)
    return f"{chunk} steps of {len(engine.lanes)} lanes:\n{table}"


class Nowhere:
    """No checkpoints."""

    def save(self, *_: Any) -> None: ...

    def load(self, *_: Any) -> None: ...


def in_stack(engine: Engine, hyper: Any, lanes: int, seconds: float) -> float:
    """Trial-steps a second of configs of SEEDS seeds each as a host trains them, curves to Parquet."""
    values = {**asdict(engine.program), **asdict(hyper)}
    jobs = [
        Job(
            f"job{first}",
            engine.family.name,
            values,
            f"config{first}",
            {seed: f"run{first + seed}" for seed in range(min(SEEDS, lanes - first))},
            (engine.schedule.epochs,),
        )
        for first in range(0, lanes, SEEDS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        recorder = CurveWriter(Path(folder), "kernels", metadata("kernels", engine.family.name, {}))
        stack = Stack(engine.family, engine.program, lambda: (engine, lanes), Writer(recorder, Nowhere()))
        for job in jobs:
            stack.attach(job)
        for _ in range(8):
            stack.tick()
        if not engine.lanes:
            raise typer.BadParameter(f"{engine.schedule.steps} steps end before they can be timed: --set longer runs")
        first, begun = next(iter(engine.lanes.values())).step, time.perf_counter()
        while time.perf_counter() - begun < seconds and stack.busy:
            stack.tick()
        done = next(iter(engine.lanes.values())).step - first if engine.lanes else engine.schedule.steps - first
        return done * lanes / (time.perf_counter() - begun)


if __name__ == "__main__":
    typer.run(main)
