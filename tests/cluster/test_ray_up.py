"""A real `ray up` on three test hosts: nodes join, sweeps run across them, one is cut off, everything goes down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import lab
from tests.cluster.hosts import NETWORK, Hosts, missing
from tests.test_sweeps import assert_consistent, assert_same_curves
from tests.toy_sweeps import Swept
from tuning.journal import Event, read

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=f"needs test hosts: {missing()}"),
]
SWEEP = "grid --engine serial --set epochs=160 --quiet"
BASE = Path("/var/tmp/lanewise-test-hosts")


@dataclass(frozen=True)
class Lab:
    """Three hosts after `ray up`, and the driver's host."""

    hosts: Hosts
    config: Path
    storage: Path
    up_log: str

    def drive(self, command: str, check: bool = True, seconds: float = 300) -> str:
        """A command in the checkout on the driver's host, which is no part of the cluster."""
        inner = f". ~/.lanewise/env.sh; cd {lab.ROOT} && {command} </dev/null"
        return self.hosts.run(lab.DRIVER, inner, seconds, check)

    def swept(self, name: str) -> Swept:
        return Swept(self.storage / name, 0, "", "")

    def journal(self, name: str) -> list[Event]:
        return [event for event, _ in read(self.storage / name / "journal.jsonl")]

    def until_alive(self, seconds: float = 150) -> str:
        """What `status` says once every node is alive."""
        return self.until(f"python -m tuning.cluster status {self.config} && echo ALL ALIVE", "ALL ALIVE", seconds)

    def until(self, command: str, sign: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while sign not in (told := self.drive(command, check=False)):
            assert time.monotonic() < deadline, told
        return told


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Lab]:
    storage = tmp_path_factory.mktemp("cluster") / "storage"
    storage.mkdir()
    with Hosts(BASE, (lab.DRIVER, lab.HEAD, *lab.WORKERS), lab.shared_folders(storage.parent)) as hosts:
        lab.install(hosts)
        config = lab.write_config(hosts, storage / "cluster.yaml", storage)
        hosts.run(lab.DRIVER, "echo 'export PATH=~/.lanewise/venv/bin:$PATH' > ~/.lanewise/env.sh")
        token = "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token"
        made = Lab(hosts, config, storage, "")
        yield Lab(hosts, config, storage, made.drive(f"{token} && ray up -y {config}"))
    assert not BASE.exists()


@pytest.fixture(scope="module")
def submitted(cluster) -> Swept:
    """A sweep by `ray submit`, undisturbed."""
    cluster.until_alive()
    cluster.drive(f"ray submit {cluster.config} tests/toys/tune_toy.py {SWEEP} --address auto --name submitted")
    return cluster.swept("submitted")


def addresses(events: list[Event]) -> set[str]:
    return {event["device"].rpartition("@")[2] for event in events if event["event"] == "report"}


def test_plain_ray_up_brings_every_node(cluster):
    told = cluster.until_alive()
    assert told.count(" alive ") == 3
    head = next(line for line in told.splitlines() if cluster.hosts.address(lab.HEAD) in line)
    assert "0 CPU, 0 GPU" in head, "a head without a GPU keeps no trials"


def test_doctor_on_a_whole_a_broken_and_a_mended_cluster(cluster):
    cluster.until_alive()
    doctor = f"python -m tuning.doctor {cluster.config}"
    assert " checks passed" in cluster.drive(doctor)
    last = lab.WORKERS[-1]
    cluster.hosts.run(last, "cp ~/.ray/auth_token ~/kept && echo other > ~/.ray/auth_token; mkdir /tmp/away")
    cluster.hosts.run(last, f"mount --bind /tmp/away {cluster.storage}")
    told = cluster.drive(f"{doctor}; echo exit code $?", check=False)
    failed = [line for line in told.splitlines() if line.startswith("FAIL")]
    assert "exit code 1" in told
    assert [line.split()[1:3] for line in failed] == [
        [cluster.hosts.address(last), what] for what in ("token", "storage")
    ]
    assert all(" -> " in line for line in failed), "each with its fix"
    cluster.hosts.run(last, f"umount {cluster.storage} && cp ~/kept ~/.ray/auth_token")
    assert " checks passed" in cluster.drive(doctor)


def test_a_folder_that_a_node_does_not_see_is_refused_before_anything_is_written(cluster):
    cluster.until_alive()
    submit = f"ray submit {cluster.config} tests/toys/tune_toy.py {SWEEP} --address auto --name private"
    told = cluster.drive(f"{submit} --storage /tmp/private; echo exit code $?", check=False)
    assert "exit code 0" not in told
    refused = next(line for line in told.splitlines() if "does not see the sweeps' folder /tmp/private" in line)
    assert any(f"node {cluster.hosts.address(name)} " in refused for name in lab.WORKERS)
    assert not (cluster.hosts.base / lab.HEAD / "tmp" / "private").exists()


def test_a_driver_without_a_node_of_its_own_is_told(cluster):
    cluster.until_alive()
    command = f"python -m tests.toys.tune_toy {SWEEP} --address {cluster.hosts.address(lab.HEAD)}:6379 --name nowhere"
    told = cluster.drive(f"{command}; echo exit code $?", check=False, seconds=60)
    assert "no Ray node runs on this machine" in told
    assert "exit code 2" in told


def test_ray_submit_runs_a_sweep_on_every_worker(cluster, submitted):
    assert_consistent(submitted, NETWORK)
    assert {event["stop_reason"] for event in submitted.events("end")} == {"finished"}
    assert addresses(submitted.journal) == {cluster.hosts.address(name) for name in lab.WORKERS}


def test_a_worker_cut_off_in_the_middle_costs_no_config_and_changes_no_value(cluster, submitted, tmp_path):
    lost, stays = lab.WORKERS[1], lab.WORKERS[0]
    address = cluster.hosts.address(lost)
    command = f"python -m tests.toys.tune_toy {SWEEP} --name cut --address {cluster.hosts.address(lab.HEAD)}:6379"
    log = tmp_path / "log"
    running = cluster.hosts.start(lab.HEAD, f"cd ~/lanewise && {command}", log)
    deadline = time.monotonic() + 240
    while not training_on(cluster.journal("cut"), address):
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.hosts.cut(lost)
    moved = training_on(cluster.journal("cut"), address)
    assert running.wait(400) == 0, log.read_text()
    swept = cluster.swept("cut")
    assert_consistent(swept, NETWORK, lost=True)
    assert {event["stop_reason"] for event in swept.events("end")} == {"finished"}
    assert len(swept.events("end")) == 6
    last = {event["config_key"]: event["device"] for event in swept.events("report")}
    assert {last[key].rpartition("@")[2] for key in moved} == {cluster.hosts.address(stays)}
    assert_same_curves(swept, submitted)
    told = cluster.drive(f"python -m tuning.cluster status {cluster.config}", check=False)
    assert f"{address:<15}  worker  missing  the head cannot log in there by ssh" in told
    cluster.hosts.heal(lost)
    cluster.until_alive(240)


def training_on(events: list[Event], address: str) -> set[str]:
    """Configs that have reported from there and have not ended."""
    over = {event["config_key"] for event in events if event["event"] == "end"}
    return {
        event["config_key"]
        for event in events
        if event["event"] == "report" and event["device"].endswith(address) and not event["done"]
    } - over


def test_down_leaves_no_process_on_any_host(cluster):
    assert "lanewise is down" in cluster.drive(f"python -m tuning.cluster down {cluster.config}")
    deadline = time.monotonic() + 30
    for name in (lab.HEAD, *lab.WORKERS):
        while (left := cluster.hosts.processes(name)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == [], name
    told = cluster.drive(f"python -m tuning.cluster status {cluster.config}; echo exit code $?", check=False)
    assert told.count(" missing ") == 3
    assert "exit code 1" in told
