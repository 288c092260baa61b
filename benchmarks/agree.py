"""Do both sides train the same thing? One config on several seeds each way, and how long a freed lane stays empty.

The ordinary loop draws its weights and orders from torch's generators, lanewise from its own, so that values differ by
the noise of seeds and by nothing else: the difference of the means is told with its 95% interval (Welch).
`python -m benchmarks.agree SPEC`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def ordinary(family: Any, program: Any, hyper: Any, arrays: Any, seed: int, device: str, metric: str) -> float:
    from benchmarks.ordinary import loop_of

    loop = loop_of(family.name)(program, hyper, arrays, seed=seed, device=device)
    curves: dict[str, list[float]] = {}
    for epoch in range(family.schedule(program).epochs):
        for name, value in {**loop.train_epoch(epoch), **loop.evaluate(epoch)}.items():
            curves.setdefault(name, []).append(value)
    return family.summarize(program, {name: np.array(values) for name, values in curves.items()})[metric]


def lanes(engine: Any, hyper: Any, seeds: int, metric: str) -> list[float]:
    """The metric of every seed after a whole run, all in one engine."""
    keys = [f"seed{seed}" for seed in range(seeds)]
    for seed, key in enumerate(keys):
        engine.insert(key, hyper, seed)
    curves: dict[str, dict[str, list[float]]] = {key: {} for key in keys}
    for _ in range(engine.schedule.epochs):
        trained = engine.advance(engine.schedule.steps_per_epoch)
        tested = engine.evaluate(keys)
        for lane, key in enumerate(keys):
            means = {name: float(values[:, lane].mean()) for name, values in trained.items()}
            for name, value in {**means, **tested[key]}.items():
                curves[key].setdefault(name, []).append(value)
    return [
        engine.family.summarize(engine.program, {name: np.array(v) for name, v in curves[key].items()})[metric]
        for key in keys
    ]


def refill(engine: Any, hyper: Any, repeats: int = 5) -> float:
    """Median seconds from a lane's release until the next run has its slot, weights and first epoch's order."""
    times = []
    for i in range(repeats):
        victim = next(iter(engine.lanes))
        _wait(engine)
        begun = time.perf_counter()
        engine.remove([victim])
        engine.insert(f"next{i}", hyper, 100 + i)
        _wait(engine)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _wait(engine: Any) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def difference(one: list[float], two: list[float]) -> dict[str, float]:
    """Mean of `two` minus mean of `one`, with half the width of Welch's 95% interval."""
    from scipy import stats

    means = [statistics.fmean(values) for values in (one, two)]
    parts = [statistics.variance(values) / len(values) for values in (one, two)]
    spread = sum(parts)
    if spread == 0:
        return {"difference": means[1] - means[0], "half_width": 0.0}
    freedom = spread**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (one, two), strict=True))
    return {
        "difference": means[1] - means[0],
        "half_width": float(stats.t.ppf(0.975, freedom)) * math.sqrt(spread),
    }


def main(spec: dict[str, Any]) -> None:
    from lanes.engine import put
    from lanes.probe import make_engine, resolve_engine
    from trainables.family import load_family
    from tuning.runner import cache_dir

    torch.backends.cudnn.allow_tf32 = False  # as hosts do
    family, device, seeds = load_family(spec["family"]), spec["device"], spec["seeds"]
    program, hyper = family.build(spec["values"])
    data_dir = Path(spec["data_dir"]) if spec["data_dir"] else None
    read = family.load(program, data_dir, cache_dir())
    arrays, host_arrays = put(read, device), put(read, "cpu")
    begun = time.perf_counter()
    plain = []
    for seed in range(seeds):
        plain.append(ordinary(family, program, hyper, arrays, seed, device, spec["metric"]))
        if spec["cap"] and time.perf_counter() - begun > spec["cap"] / 2 and len(plain) > 1:
            break
    between = time.perf_counter()
    engine = make_engine(resolve_engine("stacked", device), seeds, family, program, arrays, device, host_arrays)
    stacked = lanes(engine, hyper, seeds, spec["metric"])
    ended = time.perf_counter()
    engine.remove([key for key in engine.lanes if key != "seed0" and key != "seed1"])
    steps = family.schedule(program).steps
    found = {
        "ordinary": plain,
        "lanewise": stacked,
        "engine": engine.name,
        "ordinary_steps_per_s": len(plain) * steps / (between - begun),
        "lanewise_steps_per_s": seeds * steps / (ended - between),
        "refill_s": refill(engine, hyper),
        **difference(plain, stacked),
    }
    Path(spec["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
