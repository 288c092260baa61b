"""What `tuning.doctor` finds wrong with a machine, what `tuning.shared` refuses, and how they say it; no cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainables.family import BadValue
from tuning import doctor, node_facts
from tuning.cluster import absent
from tuning.remote import Cluster, Done
from tuning.shared import check_address, find_problem, marker

ROOT = Path(__file__).resolve().parent.parent
GIB = {"home": 100.0, "/tmp": 100.0}


def facts(**changed) -> dict:
    pins = doctor.constraints()
    return {
        "python": [3, 11, 9],
        "executable": "python",
        "packages": {name: pins[name] for name in doctor.NEEDED},
        "gpus": [["H200", "580.1", "143771"]],
        "cuda": 1,
        "disk": GIB,
        "files": 65536,
        **changed,
    }


def failed(findings) -> list[str]:
    return [finding.subject for finding in findings if finding.fix]


def test_nothing_is_wrong_with_a_good_machine():
    assert failed([*doctor.about_python("x", facts()), *doctor.about_machine("x", facts())]) == []
    built = {**facts()["packages"], "torch": doctor.constraints()["torch"] + "+cu130"}
    assert failed(doctor.about_python("x", facts(packages=built))) == [], "a build tag is no other version"


@pytest.mark.parametrize(
    ("changed", "subject", "text"),
    [
        ({"python": [3, 9, 2]}, "python", "3.9.2"),
        ({"packages": {}}, "packages", "none installed"),
        ({"packages": {**dict.fromkeys(doctor.NEEDED, ""), "ray": "2.50.0"}}, "packages", "ray 2.50.0 (pinned 2.60.0)"),
        ({"gpus": "NVIDIA-SMI has failed"}, "gpu", "NVIDIA-SMI has failed"),
        ({"cuda": 0}, "gpu", "torch can use 0"),
        ({"disk": {**GIB, "/tmp": 2.4}}, "disk", "/tmp 2 GiB"),
        ({"files": 1024}, "files", "1024"),
    ],
)
def test_each_defect_is_one_line_with_its_fix(changed, subject, text):
    findings = [*doctor.about_python("10.0.0.9", facts(**changed)), *doctor.about_machine("10.0.0.9", facts(**changed))]
    assert failed(findings) == [subject]
    (line,) = [str(finding) for finding in findings if finding.fix]
    assert line.startswith("FAIL  10.0.0.9")
    assert text in line
    assert " -> " in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("token", "bad"),
    [
        ({"there": False}, True),
        ({"there": True, "digest": "a", "open": True}, True),
        ({"there": True, "digest": "b", "open": False}, True),
        ({"there": True, "digest": "a", "open": False}, False),
    ],
)
def test_token(token, bad):
    assert bool(doctor.about_token("x", token, {"there": True, "digest": "a", "open": False}).fix) == bad


@pytest.mark.parametrize(("port", "bad"), [("open", False), ("refused", False), ("timed out", True)])
def test_port(port, bad):
    assert bool(doctor.about_port("x", "10.0.0.1", port).fix) == bad


def test_facts_of_this_machine(tmp_path):
    """In a Python of its own, as on a remote machine: no package of ours is imported."""
    asked = {"packages": ["ray", "no-such-package"], "head": "127.0.0.1", "storage": str(tmp_path), "mark": "m"}
    command = [sys.executable, "-I", "-", json.dumps({**asked, "write": True, "uri": "http://127.0.0.1:9"})]
    program = Path(node_facts.__file__).read_text()
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=True, cwd="/")
    found = json.loads(done.stdout.removeprefix("FACTS "))
    assert found["python"] == list(sys.version_info[:3])
    assert found["packages"] == {"ray": doctor.constraints()["ray"], "no-such-package": ""}
    assert found["port"] in ("open", "refused")
    assert found["storage"] == ""
    assert (tmp_path / "m").read_text() == "m"
    assert "does not answer" in found["mlflow"]


def test_a_folder_that_is_not_shared_is_seen(tmp_path):
    assert node_facts.storage(str(tmp_path / "no"), "m", False) == "is not there"
    assert node_facts.storage(str(tmp_path), "m", False) == "does not show what the head wrote"
    assert node_facts.storage(str(tmp_path), "m", True) == ""
    assert node_facts.storage(str(tmp_path), "m", False) == ""
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(("ready", "code"), [(False, 1), (True, 0)])
def test_doctor_of_this_machine_ends_with_1_where_something_fails(tmp_path, ready, code):
    folder = tmp_path / "file" / "sweeps"
    (tmp_path / "file").mkdir() if ready else (tmp_path / "file").write_text("in the way")
    environment = {**os.environ, "LANEWISE_STORAGE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "tuning.doctor"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if "  storage " in line]
    assert [line.split()[0] for line in lines] == ["ok" if ready else "FAIL"], done.stdout + done.stderr
    assert done.returncode >= code


# --- what is refused before a sweep ---


def test_a_node_says_what_it_does_not_see(tmp_path):
    with marker(tmp_path / "new" / "sweeps") as mark:
        assert find_problem(mark, "") == ""
        assert find_problem(mark, str(tmp_path)) == ""
        assert f"does not see the data folder {tmp_path}/data" in find_problem(mark, str(tmp_path / "data"))
        assert f"does not see the sweeps' folder {tmp_path}/other" in find_problem(str(tmp_path / "other" / "mark"), "")
    assert os.listdir(tmp_path) == [], "looking leaves nothing behind"


def test_ray_client_addresses_are_refused():
    with pytest.raises(BadValue, match="run this on the head"):
        check_address("ray://10.0.0.1:10001")


# --- the cluster wrapper ---


def cluster(**changed) -> Cluster:
    fields = {
        "path": Path("cluster.yaml"), "name": "x", "provider": "local", "head": "10.0.0.1",
        "workers": ("10.0.0.2", "10.0.0.3"), "user": "me", "key": "k", "storage": "", "config": {},
    }  # fmt: skip
    return Cluster(**{**fields, **changed})


def test_who_is_absent():
    assert absent(cluster(), {"10.0.0.1": {}, "10.0.0.3": {}}) == ["10.0.0.2"]
    cloud = cluster(provider="aws", workers=(), config={"available_node_types": {"gpu": {"min_workers": 2}}})
    assert len(absent(cloud, {"172.31.0.1": {}})) == 2
    assert absent(cloud, {name: {} for name in "abc"}) == []


def test_the_reason_is_the_last_thing_that_was_complained_of():
    assert (
        Done(255, "", "Warning: Permanently added 'x'\nssh: no route\nConnection to x closed.\n").reason
        == "ssh: no route"
    )
    assert Done(3, "", "").reason == "exit code 3"
