"""`sbatch clusters/slurm.sh` on a real Slurm of two nodes: a sweep over both, one that is cancelled and continued."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.cluster.hosts import Hosts
from tests.cluster.lab import ROOT, SITE
from tests.test_sweeps import assert_consistent, assert_same_curves
from tests.toy_sweeps import Swept
from tuning.journal import read

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"needs Slurm on test hosts: {slurm.missing()}"),
]
BASE = Path("/var/tmp/lanewise-test-slurm")
SUBMIT = "sbatch --parsable --gpus-per-node=0 --cpus-per-task=2 clusters/slurm.sh tune_toy.py"
SWEEP = "grid --engine serial --scheduler none --set epochs=1000 --quiet"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The repository and its .venv on a file system that both nodes share, as after `make install`."""
    folder = tmp_path_factory.mktemp("slurm") / "lanewise"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", "sweeps", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / "tune_toy.py").symlink_to(ROOT / "tests" / "toys" / "tune_toy.py")
    return folder


@pytest.fixture(scope="module")
def site(checkout) -> Iterator[Hosts]:
    with slurm.slurm(BASE, checkout) as hosts:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        hosts.run(
            "s1",
            f"cd {checkout} && {Path(sys.base_prefix) / 'bin' / version} -m venv --without-pip .venv"
            f" && printf '%s\\n' {checkout} {SITE} > .venv/lib/{version}/site-packages/lanewise.pth"
            f" && printf '%s\\n' \"#!$PWD/.venv/bin/python\" '{script}' > .venv/bin/ray && chmod +x .venv/bin/ray",
        )
        yield hosts
    assert not BASE.exists()


def submit(hosts: Hosts, checkout: Path, arguments: str) -> str:
    return hosts.run("s1", f"{slurm.setting(hosts)} cd {checkout} && {SUBMIT} {arguments}").split()[-1]


def state(hosts: Hosts, job: str) -> str:
    told = hosts.run("s1", f"{slurm.setting(hosts)} scontrol show job {job}")
    return told.partition("JobState=")[2].split()[0]


def until(hosts: Hosts, checkout: Path, job: str, *states: str, seconds: float = 480) -> str:
    deadline = time.monotonic() + seconds
    while (now := state(hosts, job)) not in states:
        assert time.monotonic() < deadline, log(checkout, job)
        time.sleep(0.3)
    return now


def log(checkout: Path, job: str) -> str:
    path = checkout / f"slurm-{job}.log"
    return path.read_text() if path.exists() else "no log"


def assert_nothing_left(hosts: Hosts) -> None:
    deadline = time.monotonic() + 60
    for name in slurm.NODES:
        while left := [line for line in hosts.processes(name) if "ray" in line or "tune_toy" in line]:
            assert time.monotonic() < deadline, (name, left)
            time.sleep(0.3)


def test_a_job_runs_a_sweep_on_every_node_and_leaves_nothing(site, checkout):
    job = submit(site, checkout, f"{SWEEP} --name whole")
    assert until(site, checkout, job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log(checkout, job)
    swept = Swept(checkout / "sweeps" / "whole", 0, "", "")
    assert_consistent(swept, slurm.NETWORK)
    assert {event["stop_reason"] for event in swept.events("end")} == {"finished"}
    used = {event["device"].rpartition("@")[2] for event in swept.events("report")}
    assert used == {site.address(name) for name in slurm.NODES}
    assert_nothing_left(site)


def test_a_cancelled_job_is_continued_by_the_next(site, checkout):
    job = submit(site, checkout, f"{SWEEP} --name cut")
    journal = checkout / "sweeps" / "cut" / "journal.jsonl"
    deadline = time.monotonic() + 480
    while not any(event["event"] == "end" for event, _ in read(journal)):
        assert state(site, job) in ("PENDING", "RUNNING"), log(checkout, job)
        assert time.monotonic() < deadline, log(checkout, job)
        time.sleep(0.05)
    site.run("s1", f"{slurm.setting(site)} scancel {job}")
    until(site, checkout, job, "CANCELLED")
    assert_nothing_left(site)
    job = submit(site, checkout, "--resume cut")
    assert until(site, checkout, job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log(checkout, job)
    swept, whole = (Swept(checkout / "sweeps" / name, 0, "", "") for name in ("cut", "whole"))
    assert {event["stop_reason"] for event in swept.events("end")} == {"finished"}
    assert len(swept.events("end")) == 6
    assert_same_curves(swept, whole)


def test_a_mistake_in_a_flag_fails_the_job_with_its_line(site, checkout):
    job = submit(site, checkout, "no_such_sweep")
    assert until(site, checkout, job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    assert "no_such_sweep" in log(checkout, job)
