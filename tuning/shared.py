"""Before a sweep on a cluster writes anything: every node must see its folder, and its data."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainables.family import BadValue
from tuning.demand import await_device
from tuning.storage import Bucket, StorageError, is_url
from tuning.sweep import SweepPlan

ANSWER_SECONDS = 60.0


def check_cluster(plan: SweepPlan) -> None:
    """Join the cluster at `plan.address`, look, leave. `BadValue` names the node and the path it cannot see."""
    check_address(plan.address)
    import ray

    ray.init(address=plan.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        await_device(plan)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1:
            check_folders(plan, {node["NodeID"]: node["NodeManagerAddress"] for node in nodes})
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """A driver needs a Ray node of the cluster on its own machine: without one Ray would wait for ever, in silence."""
    if address.startswith("ray://"):
        raise BadValue(f"--address {address} is for Ray's client: run this on the head, with --address auto")
    processes = Path("/proc")
    if not processes.is_dir() or any(_is_raylet(entry) for entry in processes.iterdir() if entry.name.isdigit()):
        return
    raise BadValue(
        f"--address {address}: no Ray node runs on this machine ({socket.gethostname()}); run this on the head "
        "(`ray submit`, `ray exec`), or join first: `ray start --address=HEAD:6379 --num-cpus=0`"
    )


def _is_raylet(process: Path) -> bool:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text().strip() == "raylet"
    return False


def check_folders(plan: SweepPlan, nodes: dict[str, str]) -> None:
    """Ask every node (id -> address) for what this one wrote, and for the data folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with bucket_marker(plan.bucket) if plan.bucket else marker(plan.storage) as mark:
        look: Any = ray.remote(num_cpus=0, max_retries=0)(find_problem)
        data = str(plan.data_dir) if plan.data_dir else ""
        answers = {
            address: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                mark, data
            )
            for node, address in nodes.items()
        }
        for address, answer in answers.items():
            try:
                problem = ray.get(answer, timeout=ANSWER_SECONDS)
            except (ray.exceptions.RayError, TimeoutError) as error:
                problem = f"does not answer ({type(error).__name__})"
            if problem:
                raise BadValue(f"node {address} {problem}")


@contextlib.contextmanager
def marker(storage: Path) -> Iterator[str]:
    """A file in `storage` for as long as the nodes look for it; folders made for it go again."""
    made = [folder for folder in (storage, *storage.parents) if not folder.exists()]
    storage.mkdir(parents=True, exist_ok=True)
    mark = storage / f".visible-{uuid.uuid4().hex}"
    mark.write_text("of the driver")
    try:
        yield str(mark)
    finally:
        mark.unlink()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def bucket_marker(url: str) -> Iterator[str]:
    """The same in object storage."""
    key = f".visible-{uuid.uuid4().hex}"
    Bucket(url).write(key, b"of the driver")
    try:
        yield f"{url}/{key}"
    finally:
        Bucket(url).remove(key)


def find_problem(mark: str, data: str) -> str:
    """On a node: what it cannot see, or nothing."""
    if is_url(mark):
        return _bucket_problem(*mark.rsplit("/", 1)) or _data_problem(data)
    storage = os.path.dirname(mark)
    with contextlib.suppress(OSError):
        os.listdir(storage)  # an NFS client looks again
    if not os.path.exists(mark):
        return (
            f"does not see the sweeps' folder {storage}: give --storage (or LANEWISE_STORAGE) a folder that all nodes "
            "share, such as an NFS mount"
        )
    if not os.access(storage, os.W_OK):
        return f"cannot write to the sweeps' folder {storage}: let this user write there"
    return _data_problem(data)


def _bucket_problem(url: str, key: str) -> str:
    try:
        Bucket(url).check()
        Bucket(url, patience=0.0).read(key)
    except FileNotFoundError:
        return f"sees another {url} than the driver does: AWS_ENDPOINT_URL should be the same there"
    except StorageError as error:
        return f"cannot use the sweeps' bucket: {error}; its environment (or role) needs the driver's keys and endpoint"
    return ""


def _data_problem(data: str) -> str:
    if data and not os.path.isdir(data):
        return f"does not see the data folder {data}: copy it there, or share it, under the same path"
    return ""
