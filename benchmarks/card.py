"""Ceilings and counts: what the device can do, and what one trial-step needs. `python -m benchmarks.card SPEC`.

Ceilings are measured: a large matrix product of random numbers in each precision, and a large copy (bytes read plus
bytes written). Operations are counted by `torch.utils.flop_counter` (matrix products and convolutions, forward and
backward; nothing elementwise) on the ordinary loop's step, attention written out. Least bytes are

* `state`: everything a step changes read and written once, what it only reads read once (the family's state: weights,
  moments, buffers), and the batch as it is stored. No step can move less;
* `saved`: what autograd keeps from forward to backward, each storage once, written and read. A step that recomputes
  activations can move less, at the price of operations; none of ours does.

The floor of a trial-step is the larger of operations / matrix ceiling and (state + saved) / copy bandwidth.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median seconds of a call, timed by device events on a GPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def ceilings(device: str) -> dict[str, float]:
    """bf16, tf32 and fp32 matrix products in FLOP/s, copy in bytes/s. On a CPU tf32 is fp32."""
    side, copied = (8192, 1 << 32) if device == "cuda" else (1024, 1 << 27)
    found = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * side**3 / seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        del a, b, out
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    found["copy"] = 2 * copied / seconds_of(lambda: target.copy_(source), device)
    return found


def counts(family: Any, program: Any, hyper: Any, arrays: Mapping[str, Tensor], device: str) -> dict[str, float]:
    """{"operations", "family_operations", "state_bytes", "saved_bytes"} of one trial-step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.ordinary import loop_of
    from lanes.engine import autocast
    from trainables.draws import counter
    from trainables.family import hyper_tensors

    loop = loop_of(family.name)(program, hyper, arrays, seed=0, device=device)
    loop.before_epoch(0)
    loop.model.train()
    batch = next(loop.batches(0))
    with FlopCounterMode(display=False) as ordinary, sdpa_kernel(SDPBackend.MATH):
        loop.step(batch)
    saved = saved_bytes(loop.model, batch, lambda: loop.loss(batch)[0])

    hypers = hyper_tensors(program, hyper, device)
    state = family.init(program, hypers, counter(0, device))
    row = {name: values[0] for name, values in family.order(program, arrays, 0, 0).items()}
    data = family.batch(program, arrays, row)
    with autocast(program, torch.device(device)), FlopCounterMode(display=False) as ours:
        after, _ = family.step(program, state, hypers, data)
    return {
        "operations": float(ordinary.get_total_flops()),
        "family_operations": float(ours.get_total_flops()),
        "state_bytes": float(_moved(state, after) + _stored(arrays, row, batch)),
        "saved_bytes": 2.0 * saved,
    }


def saved_bytes(model: nn.Module, batch: tuple[Tensor, ...], loss: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, weights and the batch itself left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()  # kept alive until counted, so that no storage is used twice
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del value
    return total


def _moved(before: Any, after: Any) -> int:
    """Bytes of a state: twice where a step made a new tensor, once where it is handed on."""
    if isinstance(before, Mapping):
        return sum(_moved(before[name], after[name]) for name in before)
    return before.numel() * before.element_size() * (1 if before is after else 2)


def _stored(arrays: Mapping[str, Tensor], row: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> int:
    """Bytes of a batch: its elements at the size in which the data set's largest array stores them."""
    element = max(arrays.values(), key=lambda array: array.numel()).element_size()
    return batch[0].numel() * element


def main(spec: dict[str, Any]) -> None:
    from lanes.engine import put
    from trainables.family import load_family
    from tuning.runner import cache_dir

    device = spec["device"]
    found: dict[str, Any] = {}
    if spec["what"] == "ceilings":
        found = ceilings(device)
        found["name"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"  # type: ignore[assignment]
    else:
        family = load_family(spec["family"])
        program, hyper = family.build(spec["values"])
        data_dir = Path(spec["data_dir"]) if spec["data_dir"] else None
        arrays = put(family.load(program, data_dir, cache_dir()), device)
        found = counts(family, program, hyper, arrays, device)
    Path(spec["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
