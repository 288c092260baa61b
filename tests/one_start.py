"""Begin to train as a sweep does, and say what had to be compiled: `python -m tests.one_start FAMILY DEVICE [probe]`.

With `probe` a serial engine goes first, as in the first sweep of a program; later ones know its rate. Only the family
that is asked for is imported: what is compiled is looked up by, among other things, what a process has imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from lanes.engine import put
from lanes.probe import compile_kernels, make_engine
from trainables.family import load_family


def main(name: str, device: str, probe: bool) -> None:
    """Print {"programs": looked up, "compiled": of them, "kernels": of the program's own, compiled}."""
    kernels: list[str] = []
    if device == "cuda":
        import triton

        def listen(*, src, cache_hit, **_) -> None:
            if not cache_hit and src.fn.module.startswith("trainables."):
                kernels.append(src.name)

        triton.knobs.compilation.listener = listen
    family = load_family(name)
    case = next(iter(family.cases.values()))
    program, hyper = family.build({**case.program, **case.hyper, "precision": "bf16"})
    with tempfile.TemporaryDirectory() as cache:
        arrays = put(family.load(program, None, Path(cache)), device)
    if probe:
        serial = make_engine("serial", 1, family, program, arrays, device)
        if device == "cuda":
            compile_kernels(serial, hyper)
        serial.insert("first", hyper, 0)
        serial.advance(1)
    stack = make_engine("stacked, compiled", 2, family, program, arrays, device)
    for seed in range(2):
        stack.insert(f"lane {seed}", hyper, seed)
    stack.advance(stack.until_epoch_end())
    stack.evaluate(list(stack.lanes))
    from torch._dynamo.utils import counters

    found = counters["aot_autograd"]
    missed = found["autograd_cache_miss"] + found["autograd_cache_bypass"]
    print(json.dumps({"programs": missed + found["autograd_cache_hit"], "compiled": missed, "kernels": kernels}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], "probe" in sys.argv)
