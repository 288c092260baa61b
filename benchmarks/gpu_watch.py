"""How busy the GPU is while something else runs: NVML (or nvidia-smi) sampled from outside.

NVML's utilisation is the share of the last sample period (a sixth of a second to a second) in which at least one kernel
ran. So idle time is seen; a kernel that fills a hundredth of the card counts as busy.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

PERIOD = 0.2
Sample = tuple[float, list[float], list[float]]
"""(time, utilisation of each GPU in 0..1, memory in use on each in MiB)."""


def visible_gpus() -> list[str]:
    """Names by which a child process can be left a GPU: what CUDA_VISIBLE_DEVICES leaves this one, else all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def reader() -> tuple[str, Callable[[], tuple[list[float], list[float]]] | None]:
    """How to read the GPUs, and its name; ("none", None) where nothing can."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

        def by_nvml() -> tuple[list[float], list[float]]:
            used = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in handles]
            return used, [pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20 for handle in handles]

        by_nvml()
        return "nvml", by_nvml
    except Exception:  # not installed, no driver, or not allowed here: the next way
        pass

    def by_smi() -> tuple[list[float], list[float]]:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        rows = [[float(part) for part in line.split(",")] for line in done.stdout.strip().splitlines()]
        return [row[0] / 100 for row in rows], [row[1] for row in rows]

    try:
        by_smi()
        return "nvidia-smi", by_smi
    except (OSError, ValueError, subprocess.SubprocessError):
        return "none", None


class Watch:
    """`with Watch() as watch: ...` samples in a thread; `watch.summary(first, last)` afterwards."""

    def __init__(self, gpus: list[int]) -> None:
        self.source, self._read = reader()
        self.samples: list[Sample] = []
        self._gpus = gpus  # as the driver counts them, whatever CUDA_VISIBLE_DEVICES says
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._read is not None:
            self._thread.join()

    def _sample(self) -> None:
        assert self._read is not None
        while not self._stop.wait(PERIOD):
            used, memory = self._read()
            self.samples.append((time.time(), [used[i] for i in self._gpus], [memory[i] for i in self._gpus]))

    def summary(self, first: float | None, last: float | None) -> dict[str, Any]:
        """Idle share over the whole time and from `first` to `last`; largest memory in use on a GPU."""
        if not self.samples:
            return {"source": self.source}

        def idle(samples: list[Sample]) -> float | None:
            values = [value for _, used, _ in samples for value in used]
            return 1 - sum(values) / len(values) if values else None

        warm = [s for s in self.samples if first is not None and last is not None and first <= s[0] <= last]
        return {
            "source": self.source,
            "samples": len(self.samples),
            "idle": idle(self.samples),
            "warm_samples": len(warm),
            "idle_warm": idle(warm),
            "peak_MiB": max(value for _, _, memory in self.samples for value in memory),
        }
