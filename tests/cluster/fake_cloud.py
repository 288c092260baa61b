"""Run on a test host: a head alone, and Ray's fake provider that starts nodes claiming a GPU each. Prints what it saw.

`python -m tests.cluster.fake_cloud LIMIT` asks and releases; with `sweep STORAGE` a sweep runs there, its hosts on the
processor in the GPUs' place.

On a test host, because starting and stopping a head stops every Ray process that can be seen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from search_spaces.sweeps import Sweeps
from tests.toys.sweeps import SWEEPS
from trainables.family import BadValue
from tuning.cli import resolve
from tuning.demand import await_device, has_device, release
from tuning.parts import part_of
from tuning.sweep import SweepPlan

NOTHING_TO_DO = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
CONFIG = {
    "cluster_name": "fake",
    "max_workers": 8,
    "upscaling_speed": 1.0,
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **dict.fromkeys(("cluster_synced_files", "rsync_exclude", "rsync_filter"), ()),
    **{f"{name}_commands": [] for name in NOTHING_TO_DO},
    "idle_timeout_minutes": 0.05,
    # all nodes are on one address: what they do is told apart by their ids
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {"ssh_user": "nobody"},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"GPU": 1, "CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    },
}


def main(limit: int, storage: str = "") -> None:
    CONFIG["available_node_types"]["gpu"]["max_workers"] = limit  # type: ignore[index]
    path = Path(tempfile.mkdtemp()) / "fake.json"
    path.write_text(json.dumps(CONFIG))
    environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    ray_script = Path(sys.executable).parent / "ray"
    start = [
        str(ray_script),
        "start",
        "--head",
        "--num-cpus=0",
        f"--autoscaling-config={path}",
        "--disable-usage-stats",
    ]
    subprocess.run(start, env=environment, check=True, stdout=subprocess.DEVNULL)
    ray.init("auto", log_to_driver=False, logging_level="ERROR")
    print("DEVICE AT FIRST", has_device())
    if storage:
        sweep(limit, Path(storage))
        return
    try:
        await_device(plan(SWEEPS), seconds=60 if limit else 5)
    except BadValue as error:
        print("REFUSED", error)
        return
    print("GPUS", until(lambda: ray.cluster_resources().get("GPU", 0) == limit))
    release()
    print("RELEASED", until(lambda: not has_device()))


def sweep(limit: int, storage: Path) -> None:
    """Short configs that all devices are good for, and one long one that needs a single device."""
    lengths = ",".join(map(str, [*range(20, 50), 40_000]))
    command = (
        f"-m tests.toys.tune_toy grid --quiet --name s --storage {storage} --address auto --engine serial --lanes 2"
    )
    command += f" --scheduler none --set lr=0.01 --space epochs={lengths}"
    environment = {**os.environ, "LANEWISE_DEVICE": "cpu"}
    running = subprocess.Popen([sys.executable, *command.split()], env=environment)
    folder = storage / "s"

    def count(kind: str) -> int:
        path = folder / "journal.jsonl"
        return path.read_text().count(f'"event": "{kind}"') if path.exists() else 0

    def hosts() -> set[str]:
        return {part_of(path).writer for path in (folder / "epochs").glob("*.parquet")}

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print("ALL GPUS", until(lambda: ray.cluster_resources().get("GPU", 0) == limit, 180))
    print("ALL HOSTS", until(lambda: len(hosts()) >= limit, 180))
    print("ONE LEFT", until(lambda: count("end") == 30, 300))
    print("THINNED", until(lambda: ray.cluster_resources().get("GPU", 0) < limit, 120), running.poll() is None)
    running.send_signal(signal.SIGINT)
    print("INTERRUPTED", running.wait(120))
    print("RELEASED", until(lambda: not has_device()))


def plan(sweeps: Sweeps) -> SweepPlan:
    """Six configs of two seeds, one config a device at a time: six GPUs would be used."""
    nothing = dict.fromkeys(
        ("data", "data_dir", "trials", "seeds", "searcher", "scheduler", "metric", "covariates", "name", "tracking_uri")
    )
    return resolve(
        sweeps, "grid", **nothing, seed=0, lanes="off", engine="auto", settings=[], dimensions=[],
        storage=Path("/tmp/x"), address="auto", max_concurrent=0, time_budget=0.0,
    )  # type: ignore[arg-type]  # fmt: skip


def until(reached, seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[3:4])
