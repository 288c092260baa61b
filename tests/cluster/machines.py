"""Test hosts as the machines behind moto's EC2, and clusters/aws.yaml for them.

moto answers the API and starts nothing. Here every instance that it says is running becomes a test host with the
instance's private and public address, that lets its key pair's owner in; terminated, the host loses its power.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests.aws_commands import call_of
from tests.cluster import lab
from tests.cluster.hosts import Hosts
from tests.cluster.metadata import ADDRESS
from tests.objects import BUCKET, KEY, SECRET

REGION = "us-east-1"
PORT = 5000
STRICT = (
    "MOTO_ENABLE_AMI_VALIDATION",
    "MOTO_ENABLE_KEYPAIR_VALIDATION",
    "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION",
    "MOTO_IAM_LOAD_MANAGED_POLICIES",
)
"""Without them moto takes any image, key pair and instance type."""
IMAGE = "ami-03cf127a"
"""One that moto knows."""
ACCOUNT = "123456789012"
"""moto's."""


class Cloud:
    """moto's EC2, IAM, S3 and metadata on the host `name`, and its machines as further hosts."""

    def __init__(self, hosts: Hosts, name: str):
        self.hosts = hosts
        self.endpoint = f"http://{hosts.address(name)}:{PORT}"
        self.names: dict[str, str] = {}
        """Instance -> its host."""
        self._booted = 0
        self._over = threading.Event()
        hosts.join()
        strict = " ".join(f"{variable}=true" for variable in STRICT)
        python = "~/.lanewise/venv/bin/python"
        moto = f"{strict} {python} -m moto.server -H {hosts.address(name)} -p {PORT}"
        hosts.start(name, moto, hosts.base / "moto.log")
        hosts.run(name, f"ip addr add {ADDRESS}/32 dev eth0")
        metadata = f"cd {lab.ROOT} && {python} -m tests.cluster.metadata {self.endpoint} {KEY} {SECRET}"
        hosts.start(name, metadata, hosts.base / "metadata.log")
        self.ec2, self.iam, self.s3 = (self.client(service) for service in ("ec2", "iam", "s3"))
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(Exception):
                self.s3.list_buckets()
                break
            assert time.monotonic() < deadline, (hosts.base / "moto.log").read_text()
            time.sleep(0.2)

    def ask(self, words: Sequence[str]) -> None:
        """A command of AWS's command line out of docs/cluster.md, with this account and bucket in it."""
        mine = [word.replace("YOUR-BUCKET", BUCKET).replace("000000000000", ACCOUNT) for word in words]
        service, method, arguments = call_of(mine)
        getattr(self.client(service), method)(**arguments)

    def client(self, service: str) -> Any:
        return boto3.client(
            service, region_name=REGION, endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    @contextlib.contextmanager
    def machines(self) -> Iterator[None]:
        """Boot what is launched and switch off what is terminated, for as long as the block lasts."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """What EC2 lists, in these states or in any."""
        pages = self.ec2.get_paginator("describe_instances").paginate()
        found = [instance for page in pages for entry in page["Reservations"] for instance in entry["Instances"]]
        return [instance for instance in found if not states or instance["State"]["Name"] in states]

    def workers(self, *states: str) -> list[dict[str, Any]]:
        return [instance for instance in self.instances(*states) if tags(instance)["ray-node-type"] == "worker"]

    def _look(self) -> None:
        while not self._over.wait(0.5):
            for instance in self.instances():
                known = instance["InstanceId"] in self.names
                if instance["State"]["Name"] == "running" and not known:
                    self._boot(instance)
                elif instance["State"]["Name"] == "terminated" and known:
                    self.hosts.remove(self.names.pop(instance["InstanceId"]))

    def _boot(self, instance: dict[str, Any]) -> None:
        self._booted += 1
        name = f"ec2-{self._booted}"
        self.hosts.add(name, instance["PrivateIpAddress"], instance["PublicIpAddress"])
        lab.install(self.hosts, (name,))
        (pair,) = self.ec2.describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)["KeyPairs"]
        (self.hosts.home(name) / ".ssh" / "authorized_keys").write_text(pair["PublicKey"] + "\n")
        self.names[instance["InstanceId"]] = name


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def write_config(path: Path, endpoint: str, workers: int) -> Path:
    """clusters/aws.yaml with what docs/cluster.md tells a user to fill in, and then what test hosts force."""
    text = (lab.ROOT / "clusters" / "aws.yaml").read_text()
    filled_in = (
        ("max_workers: 4 ", f"max_workers: {workers} "),
        ("ami-00000000000000000", IMAGE),
        ("000000000000", ACCOUNT),
        ("YOUR-BUCKET", BUCKET),
    )
    forced = (
        ("idle_timeout_minutes: 5", "idle_timeout_minutes: 0.25"),
        ("ssh_user: ubuntu", "ssh_user: root"),
        # no network to install from, no GPU to train on
        ("  - sudo apt-get update -qq && sudo apt-get install -qq -y make python3-venv rsync\n", ""),
        (f"AWS_REGION={REGION}'", f"AWS_REGION={REGION} AWS_ENDPOINT_URL={endpoint} LANEWISE_DEVICE=cpu'"),
        ("/var/tmp/lanewise-", "/tmp/lanewise-"),
    )
    for old, new in (*filled_in, *forced):
        assert text.count(old) == 1, f"clusters/aws.yaml has no {old!r} any more"
        text = text.replace(old, new)
    yaml.safe_load(text)
    path.write_text(text)
    return path
