"""Asking an autoscaled cluster for devices: whole GPUs, as many as the lanes fill, never a machine a trial."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from trainables.family import BadValue
from tuning.sweep import SweepPlan

GPU_LANES = 128
GPU_CONFIGS = 64
"""Configs in flight a GPU, at most: each is a process of Tune's, of some seconds of a core and 200 MB."""
WAIT_SECONDS = 1200.0
"""A spot machine is given, booted and set up in minutes; where none is to be had, it never is."""
POLL_SECONDS = 2.0
log = logging.getLogger(__name__)


def wanted_gpus(plan: SweepPlan) -> int:
    """GPUs that the sweep's runs fill."""
    return -(-plan.budget // configs_a_gpu(plan))


def configs_a_gpu(plan: SweepPlan) -> int:
    """How many configs of a plan fill a GPU's lanes."""
    if plan.lanes.isdigit():
        return max(1, int(plan.lanes) // plan.seeds)
    return max(1, min(GPU_CONFIGS, GPU_LANES // plan.seeds)) if plan.lanes == "auto" else 1


def await_device(plan: SweepPlan, seconds: float = WAIT_SECONDS) -> None:
    """Where the cluster has no device for trials (a cloud's head without workers), ask for GPUs and wait for the first.

    Raises `BadValue` when none comes. The demand stands until `release`.
    """
    if has_device():
        return
    gpus = wanted_gpus(plan)
    print(f"no device yet: asking the cluster for {gpus} GPU{'s' * (gpus > 1)}, waiting for the first", file=sys.stderr)
    ask(gpus)
    deadline = time.monotonic() + seconds
    while not has_device():
        if time.monotonic() > deadline:
            release()
            raise BadValue(
                f"the cluster at {plan.address} has no processor or GPU for trials, and got none in {seconds:.0f} s: "
                "`python -m tuning.cluster status` says which nodes are missing, `ray monitor` what a cloud answers"
            )
        time.sleep(POLL_SECONDS)


def has_device() -> bool:
    import ray

    resources: dict[str, Any] = ray.cluster_resources()
    return any(resources.get(kind, 0) for kind in ("CPU", "GPU"))


def ask(gpus: int) -> None:
    """Say how many GPUs the sweep can use, those it has included; machines beyond that may go when they are idle."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU": 1}] * gpus)


def release() -> None:
    """Ask for nothing any more: idle machines may go."""
    ask(0)
