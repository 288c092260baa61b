"""The LIF recurrence several ways, at the sizes of the notebook's best net: `python benchmarks/lif.py`.

* `loop`: the operators' plain loop over time;
* `compiled loop`: the same through torch.compile, which unrolls every step (takes a minute);
* `kernel`: the Triton kernel (`trainables/snn_delays/lif_kernel.py`; GPU only);
* `spikingjelly`: its LIFNode in multi-step mode, forward and backward by autograd; version 2 chooses by itself how (on
  a GPU a kernel of its own if what that needs is installed, else steps in PyTorch). Left out where it is not installed.

Times are of forward and backward of all five layers of `stem7|bins=1|3-stages|n_C=32` (batch 32, 100 steps of 10 ms),
for LANES lanes at once; spikingjelly has no lanes. The least time is that of reading and writing each value once, at
the measured copy bandwidth. Then whole training steps of the net: ordinary loop, with spikingjelly's neurons, and the
family's step (serial engine). Writes `--out` as Markdown.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.card import ceilings, seconds_of
from benchmarks.workloads import job_of
from lanes.engine import put
from lanes.serial import SerialEngine
from trainables.snn_delays import neurons
from tuning.runner import cache_dir

LAYERS = ((32, 100), (64, 50), (64, 50), (64, 50), (128, 25))
"""Channels and positions along frequency of every LIF layer."""

Step = Callable[[], Any]


def operators(forward: Any, backward: Any, lanes: int, batch: int, steps: int, device: str) -> Step:
    """Forward and backward of all layers by a pair of operators."""
    keep = torch.full((lanes,), 0.5, device=device)
    alpha = torch.full((lanes,), 5.0, device=device)
    inputs = [torch.randn(lanes, batch, steps, n * channels, device=device) for channels, n in LAYERS]
    affines = [[torch.full((lanes, channels), value, device=device) for value in (1.0, 0.0)] for channels, _ in LAYERS]
    grads = [torch.randn_like(x) for x in inputs]

    def step() -> None:
        membranes = [forward(x, *affine, keep)[1] for x, affine in zip(inputs, affines, strict=True)]
        for grad, over, x, (scale, _) in zip(grads, membranes, inputs, affines, strict=True):
            backward(grad, over, x, scale, keep, alpha, False)

    return step


def by_spikingjelly(batch: int, steps: int, device: str) -> Step:
    from spikingjelly.activation_based import functional, neuron, surrogate

    nodes = [
        neuron.LIFNode(
            tau=2.0,
            decay_input=False,
            surrogate_function=surrogate.ATan(5.0),
            detach_reset=True,
            step_mode="m",
        ).to(device)
        for _ in LAYERS
    ]
    inputs = [torch.randn(steps, batch, c, n, device=device, requires_grad=True) for c, n in LAYERS]
    grads = [torch.randn_like(x) for x in inputs]

    def step() -> None:
        for node, x, grad in zip(nodes, inputs, grads, strict=True):
            node(x).backward(grad)
            functional.reset_net(node)
            x.grad = None

    return step


def whole_steps(kind: str, device: str, data_dir: Path | None, seconds: float, small: bool) -> float:
    """Training steps a second of the whole net, one lane, without evaluation."""
    from benchmarks.ordinary.snn_delays import SnnDelays, WithSpikingjelly

    extra = ["channels=4", "blocks=1,1", "kernel_sizes=3,3", "max_delay_ms=50,70"] if small else []
    job = job_of("snn_delays", 1, 100, "float32", extra, data_dir, cache_dir())
    family = job.plan.loaded
    program, hyper = family.build(job.configs[0].values)
    read = family.load(program, data_dir, cache_dir())
    arrays, host_arrays = put(read, device), put(read, "cpu")
    if kind == "family":
        engine = SerialEngine(family, program, arrays, device, host_arrays)
        engine.insert("one", hyper, 0)
        advance = lambda: engine.advance(min(5, engine.until_epoch_end()))
        advance()
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds and engine.lanes["one"].step < engine.schedule.steps:
            before = engine.lanes["one"].step
            advance()
            done += engine.lanes["one"].step - before
        return done / (time.perf_counter() - begun)
    loop = (WithSpikingjelly if kind == "spikingjelly" else SnnDelays)(program, hyper, arrays, 0, device)
    loop.before_epoch(0)
    batches = list(loop.batches(0))
    loop.step(batches[0])[0].item()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        loop.step(batches[done % len(batches)])[0].item()
        done += 1
    return done / (time.perf_counter() - begun)


def main(
    lanes: Annotated[list[int] | None, typer.Option(help="numbers of lanes; repeatable [default: 1 and 8]")] = None,
    batch: Annotated[int, typer.Option(help="samples")] = 32,
    steps: Annotated[int, typer.Option(help="time steps")] = 100,
    seconds: Annotated[float, typer.Option(help="measuring time of each whole net")] = 5.0,
    compiled: Annotated[bool, typer.Option(help="also the compiled loop")] = True,
    small: Annotated[bool, typer.Option(help="a small net for the whole steps: to try the script")] = False,
    data_dir: Annotated[Path | None, typer.Option(envvar="LANEWISE_DATA")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown [default: only printed]")] = None,
) -> None:
    """Measure, print, and write the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spikingjelly = importlib.util.find_spec("spikingjelly") is not None
    card = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    copy = ceilings(device)["copy"]
    values = batch * steps * sum(c * n for c, n in LAYERS)
    lines = [
        "# LIF over time",
        "",
        f"`python benchmarks/lif.py {' '.join(sys.argv[1:])}` on {card}, torch {torch.__version__}, float32; copy "
        f"bandwidth {copy / 1e12:.3f} TB/s. Forward and backward of five layers, batch {batch}, {steps} steps, "
        f"{values / 1e6:.1f} million values a lane.",
        "",
        "| how | lanes | ms | ms a lane | least ms a lane | share of it |",
        "|---|---|---|---|---|---|",
    ]
    least = 28 * values / copy  # forward reads x and writes spikes and h; backward reads three values and writes one

    def measure(name: str, count: int, make: Callable[[], Step]) -> None:
        taken = seconds_of(make(), device, 5)
        lines.append(
            f"| {name} | {count} | {1e3 * taken:.3f} | {1e3 * taken / count:.3f} | {1e3 * least:.3f} "
            f"| {least * count / taken:.1%} |"
        )
        print(lines[-1], flush=True)

    sizes = (batch, steps, device)
    for count in lanes or [1, 8]:
        loops = (neurons.forward_loop, neurons.backward_loop)
        measure("loop", count, lambda loops=loops, count=count: operators(*loops, count, *sizes))
        if compiled:
            made = tuple(torch.compile(loop, dynamic=False) for loop in loops)
            measure("compiled loop", count, lambda made=made, count=count: operators(*made, count, *sizes))
        if device == "cuda":
            from trainables.snn_delays import lif_kernel

            pair = (lif_kernel.forward, lif_kernel.backward)
            measure("kernel", count, lambda pair=pair, count=count: operators(*pair, count, *sizes))
    if spikingjelly:
        try:
            measure("spikingjelly", 1, lambda: by_spikingjelly(*sizes))
        except Exception as error:  # not ours: told, and the rest is measured
            lines.append(f"| spikingjelly | 1 | failed: {type(error).__name__} | | | |")
            spikingjelly = False
    else:
        lines.append("| spikingjelly | | not installed here | | | |")
    lines += ["", "| whole training steps, one lane | steps/s |", "|---|---|"]
    kinds = {
        "ordinary": "ordinary loop",
        "spikingjelly": "ordinary loop, spikingjelly's neurons",
        "family": "family, serial",
    }
    for kind, name in kinds.items():
        if kind != "spikingjelly" or spikingjelly:
            lines.append(f"| {name} | {whole_steps(kind, device, data_dir, seconds, small):.2f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    typer.run(main)
