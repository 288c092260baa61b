"""clusters/aws.yaml against a mocked AWS: moto answers the API, test hosts are the machines that it says it launched.

From a head alone: a sweep asks for GPUs, spot machines come, one is taken away, idle ones are given back, none is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import lab
from tests.cluster.hosts import Hosts, missing
from tests.cluster.machines import IMAGE, REGION, Cloud, tags, write_config
from tests.objects import BUCKET, KEY, SECRET
from tests.test_docs import commands
from tests.test_sweeps import assert_consistent
from tests.toy_sweeps import Swept
from tuning.journal import Event

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing()), reason=f"needs test hosts: {missing()}"),
]
BASE = Path("/var/tmp/lanewise-test-aws")
AWS, DRIVER = "aws", "ctl"
URL = f"s3://{BUCKET}/sweeps"
CONFIG = "~/aws.yaml"
LIMIT = 2
SWEEP = "grid --engine serial --lanes 4 --set epochs=600 --quiet"
"""Six configs of two seeds, two configs a GPU: it asks for three GPUs and gets LIMIT."""


@dataclass
class Lab:
    """A head that runs, and the computer from which it was started."""

    hosts: Hosts
    cloud: Cloud
    up: str = ""
    _segments: dict[str, str] = field(default_factory=dict)

    def drive(self, command: str, check: bool = True) -> str:
        return self.hosts.run(DRIVER, f". ~/.lanewise/env.sh; cd {lab.ROOT} && {command} </dev/null", 300, check)

    def journal(self, name: str) -> list[Event]:
        """Of a sweep in the bucket, an entry more than once where segments were merged."""
        pages = self.cloud.s3.get_paginator("list_objects_v2")
        listed = pages.paginate(Bucket=BUCKET, Prefix=f"sweeps/{name}/journal/")
        for key in (entry["Key"] for page in listed for entry in page.get("Contents", [])):
            if key not in self._segments:
                self._segments[key] = self.cloud.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
        return [json.loads(line) for key in sorted(self._segments) for line in self._segments[key].splitlines()]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with Hosts(BASE, (AWS, DRIVER), lab.shared_folders(BASE)[:-1], "10.83.11", "lwbr3") as hosts:
        lab.install(hosts)
        cloud = Cloud(hosts, AWS)
        home = hosts.home(DRIVER)
        write_config(home / "aws.yaml", cloud.endpoint, LIMIT)
        (home / ".lanewise" / "env.sh").write_text(
            f"export PATH=~/.lanewise/venv/bin:$PATH AWS_ENDPOINT_URL={cloud.endpoint} AWS_REGION={REGION}\n"
        )
        (home / ".aws").mkdir()  # what `aws configure` leaves
        keys = f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
        (home / ".aws" / "credentials").write_text(keys)
        made = Lab(hosts, cloud)
        told = commands((lab.ROOT / "docs" / "cluster.md").read_text())
        *before, after = [words for words in told if words[0] == "aws"]
        with cloud.machines():
            for words in before:
                cloud.ask(words)
            made.up = made.drive(f"python -m tuning.cluster up {CONFIG}")
            cloud.ask(after)
            yield made
    assert not BASE.exists()


def until(reached: Callable[[], Any], seconds: float, told: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


def test_up_launches_a_head_alone_that_may_launch_more(cluster):
    assert "1 of 1 nodes alive" in cluster.up
    (head,) = cluster.cloud.instances("running", "pending")
    assert f"{head['PrivateIpAddress']:<15}  head    alive    0 CPU, 0 GPU" in cluster.up
    assert "InstanceLifecycle" not in head, "a spot head would end every sweep"
    assert (head["InstanceType"], head["ImageId"]) == ("m6i.xlarge", IMAGE)
    assert tags(head)["ray-cluster-name"] == "lanewise-aws"
    role = head["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    (attached,) = cluster.cloud.iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]
    rights = cluster.cloud.iam.list_attached_role_policies(RoleName=attached["RoleName"])["AttachedPolicies"]
    assert {right["PolicyName"] for right in rights} == {"AmazonEC2FullAccess", "AmazonS3FullAccess"}
    status = cluster.drive(f"python -m tuning.cluster status {CONFIG}")
    assert status.count(" alive ") == 1


def test_a_sweep_asks_for_spot_machines_and_survives_that_one_is_taken(cluster, tmp_path):
    cloud = cluster.cloud
    command = f"ray submit {CONFIG} tests/toys/tune_toy.py {SWEEP} --address auto --name first"
    log = tmp_path / "log"
    running = cluster.hosts.start(DRIVER, f". ~/.lanewise/env.sh; cd {lab.ROOT} && {command}", log)

    def training() -> dict[str, set[str]]:
        """Address -> configs that report from there and have not ended."""
        events = cluster.journal("first")
        over = {event["config_key"] for event in events if event["event"] == "end"}
        found: dict[str, set[str]] = {}
        for event in events:
            if event["event"] == "report" and event["config_key"] not in over:
                found.setdefault(event["device"].rpartition("@")[2], set()).add(event["config_key"])
        return found

    def both() -> bool:
        assert running.poll() is None, log.read_text()[-5000:]
        return len(training()) == LIMIT

    until(both, 240, lambda: log.read_text()[-5000:])
    workers = cloud.workers("running")
    assert len(workers) == LIMIT, "max_workers holds although the sweep could use more"
    for worker in workers:
        assert worker["InstanceLifecycle"] == "spot"
        assert worker["InstanceType"] == "g6.xlarge"
        assert worker["IamInstanceProfile"]["Arn"].endswith("/lanewise-workers")
        assert tags(worker)["ray-cluster-name"] == "lanewise-aws"
    taken = workers[0]
    moved = training()[taken["PrivateIpAddress"]]
    cloud.ec2.terminate_instances(InstanceIds=[taken["InstanceId"]])
    assert running.wait(400) == 0, log.read_text()[-5000:]
    assert len(cloud.workers()) == LIMIT + 1, "another one in its place"

    page = Path(cluster.drive(f"python -m analysis report first --storage {URL}").split()[-1])
    folder = cluster.hosts.home(DRIVER) / page.relative_to(Path.home()).parent.parent
    (folder / "log.txt").write_text("")
    swept = Swept(folder, 0, "", "")
    assert_consistent(swept, "172.31.", lost=True)
    assert [event["stop_reason"] for event in swept.events("end")] == ["finished"] * 6
    last = {event["config_key"]: event["device"].rpartition("@")[2] for event in swept.events("report")}
    assert moved
    assert taken["PrivateIpAddress"] not in {last[key] for key in moved}


def test_idle_machines_are_given_back_and_the_head_stays(cluster):
    until(lambda: not cluster.cloud.workers("running", "pending"), 240, lambda: cluster.cloud.instances("running"))
    assert len(cluster.cloud.instances("running")) == 1


def test_down_leaves_no_machine(cluster):
    told = cluster.drive(f"python -m tuning.cluster down {CONFIG}")
    assert "lanewise-aws is down" in told
    assert cluster.cloud.instances("running", "pending", "stopping", "stopped") == []
    until(lambda: not cluster.cloud.names, 30)
