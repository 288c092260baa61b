"""Three hosts that share no folder: sweeps go to a bucket on a fourth, by `ray up` and `ray submit`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import lab
from tests.cluster.hosts import Hosts, missing
from tests.objects import BUCKET, KEY, SECRET
from tests.test_sweeps import assert_consistent
from tests.toy_sweeps import Swept

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=f"needs test hosts: {missing()}"),
]
BASE = Path("/var/tmp/lanewise-test-bucket")
NAMES = ("o0", "o1", "o2", "o3")
DRIVER, HEAD, *WORKERS = NAMES
NETWORK, BRIDGE, PORT = "10.83.9", "lwbr2", 9000
URL = f"s3://{BUCKET}/lab"
SWEEP = "grid --engine serial --set epochs=160 --quiet"


@dataclass(frozen=True)
class Lab:
    """Hosts after `ray up`, and what `doctor` said before."""

    hosts: Hosts
    config: Path
    before: str

    def drive(self, command: str, check: bool = True) -> str:
        """A command in the checkout on the driver's host."""
        return self.hosts.run(DRIVER, f". ~/.lanewise/env.sh; cd {lab.ROOT} && {command} </dev/null", 300, check)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("bucket")
    with Hosts(BASE, NAMES, lab.shared_folders(folder)[:-1], NETWORK, BRIDGE) as hosts:
        lab.install(hosts)
        endpoint = f"http://{hosts.address(DRIVER)}:{PORT}"
        config = lab.write_config(hosts, hosts.home(DRIVER) / "cluster.yaml", URL)
        # as docs/cluster.md says: keys in each machine's ~/.aws/credentials, the rest beside the URL
        setting = f"AWS_ENDPOINT_URL={endpoint} AWS_REGION=us-east-1"
        config.write_text(config.read_text().replace(f"LANEWISE_STORAGE={URL}", f"LANEWISE_STORAGE={URL} {setting}"))
        hosts.run(DRIVER, f"echo 'export PATH=~/.lanewise/venv/bin:$PATH {setting}' > ~/.lanewise/env.sh")
        for name in NAMES:
            (hosts.home(name) / ".aws").mkdir()
            keys = f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
            (hosts.home(name) / ".aws" / "credentials").write_text(keys)
        python = "~/.lanewise/venv/bin/python"
        hosts.start(DRIVER, f"{python} -m moto.server -H {hosts.address(DRIVER)} -p {PORT}", BASE / "moto.log")
        until(hosts, f"{python} -c \"import socket; socket.create_connection(('{hosts.address(DRIVER)}', {PORT}))\"")
        make = "import boto3, sys; boto3.client('s3', endpoint_url=sys.argv[1]).create_bucket(Bucket=sys.argv[2])"
        hosts.run(DRIVER, f'{python} -c "{make}" {endpoint} {BUCKET}')
        made = Lab(hosts, Path("~/cluster.yaml"), "")
        before = made.drive(f"python -m tuning.doctor {made.config}", check=False)
        made.drive("ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token")
        made.drive(f"python -m tuning.cluster up {made.config}")
        yield Lab(hosts, made.config, before)
        made.drive(f"python -m tuning.cluster down {made.config}")
    assert not BASE.exists()


def until(hosts: Hosts, command: str) -> None:
    deadline = time.monotonic() + 60
    while hosts.run(DRIVER, f"{command} && echo REACHED", check=False).find("REACHED") < 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_doctor_before_broken_and_mended(cluster):
    print(cluster.before)
    doctor = f"python -m tuning.doctor {cluster.config}"
    whole = cluster.drive(doctor)
    print(whole)
    assert " checks passed" in whole
    assert whole.count(f"{URL} is shared and can be written") == 3
    last = WORKERS[-1]
    credentials = cluster.hosts.home(last) / ".aws" / "credentials"
    kept = credentials.read_text()
    cluster.hosts.run(last, "sed -i s/9000/9001/ ~/.lanewise/storage.sh")
    told = cluster.drive(doctor, check=False)
    print(told)
    failed = [line for line in told.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1:3] for line in failed] == [[cluster.hosts.address(last), "storage"]]
    cluster.hosts.run(last, "sed -i s/9001/9000/ ~/.lanewise/storage.sh")
    credentials.write_text(kept)
    assert " checks passed" in cluster.drive(doctor)


def test_a_sweep_over_hosts_that_share_nothing_but_a_bucket(cluster):
    cluster.drive(f"ray submit {cluster.config} tests/toys/tune_toy.py {SWEEP} --address auto --name lab")
    read = f"python -m analysis report lab --storage {URL}"
    page = Path(cluster.drive(read).split()[-1].replace(str(Path.home()), str(cluster.hosts.home(DRIVER))))
    assert page.is_file()
    folder = page.parent.parent
    logs = "import boto3, os, sys; s = boto3.client('s3', endpoint_url=os.environ['AWS_ENDPOINT_URL'])\n" + (
        "for o in s.list_objects_v2(Bucket=sys.argv[1], Prefix='lab/lab/logs/')['Contents']:\n"
        "    print(s.get_object(Bucket=sys.argv[1], Key=o['Key'])['Body'].read().decode())"
    )
    (folder / "log.txt").write_text(cluster.drive(f'python -c "{logs}" {BUCKET}'))
    swept = Swept(folder, 0, "", "")
    assert_consistent(swept, NETWORK)
    assert {event["stop_reason"] for event in swept.events("end")} == {"finished"}
    used = {event["device"].rpartition("@")[2] for event in swept.events("report")}
    assert used == {cluster.hosts.address(name) for name in WORKERS}
    assert json.loads((folder / "sweep.json").read_text())["tracking_uri"] == ""


def test_a_node_that_cannot_use_the_bucket_is_named_before_anything_is_written(cluster):
    last = WORKERS[-1]
    cluster.hosts.run(last, "mv ~/.aws ~/.aws-away")
    submit = f"ray submit {cluster.config} tests/toys/tune_toy.py {SWEEP} --address auto --name refused"
    told = cluster.drive(f"{submit}; echo exit code $?", check=False)
    cluster.hosts.run(last, "mv ~/.aws-away ~/.aws")
    assert "exit code 0" not in told
    assert f"node {cluster.hosts.address(last)} cannot use the sweeps' bucket" in told
    listed = cluster.drive(f"python -m analysis list --storage {URL}")
    assert "refused" not in listed
