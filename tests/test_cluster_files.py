"""cluster.yaml and clusters/: valid by Ray's own schema, and the same where they must be, without any machine."""

from __future__ import annotations

import copy
import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from trainables.family import BadValue
from tuning.remote import read_cluster
from tuning.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "clusters").glob("*.yaml"))]
each_file = pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
START_LISTS = ("head_start_ray_commands", "worker_start_ray_commands")


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_there_is_one_for_each_place():
    assert [path.name for path in FILES] == ["cluster.yaml", "aws.yaml", "gcp.yaml"]
    assert [load(path)["provider"]["type"] for path in FILES] == ["local", "aws", "gcp"]


@each_file
def test_ray_accepts_it(path):
    validate_config(prepare_config(copy.deepcopy(load(path))))


@each_file
def test_versions_are_those_of_the_constraints(path):
    """No version stands in the file: what is installed is as in constraints.txt, never Ray's nightly wheels."""
    prepared = prepare_config(copy.deepcopy(load(path)))
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = [command for name in lists for command in prepared.get(name, [])]
    assert "make -C ~/lanewise VENV=~/.lanewise/venv install" in commands
    assert not [command for command in commands if re.search(r"==|>=|wheels|conda", command)]
    installs = [command for command in commands if "pip install" in command]
    assert all(" -c ~/lanewise/constraints.txt " in command for command in installs)
    types = prepared["available_node_types"].values()
    assert all("wheels" not in str(kind) for kind in types), "defaults of Ray's with nightly wheels"


def test_what_make_installs_is_pinned():
    recipe = (ROOT / "Makefile").read_text()
    assert re.search(r"^PIP := .*-c constraints\.txt$", recipe, re.MULTILINE)
    done = subprocess.run(["make", "-n", "VENV=/nowhere/venv", "install"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "/nowhere/venv/bin/python -m pip install" in done.stdout


@each_file
def test_both_start_lists_use_the_same_ray_and_the_same_authentication(path):
    starts = []
    for name in START_LISTS:
        stop, start = load(path)[name]
        assert stop == "~/.lanewise/venv/bin/ray stop"
        starts.append(start)
    for start in starts:
        assert re.findall(r"\S*/ray(?= start)", start) == ["~/.lanewise/venv/bin/ray"]
        assert re.findall(r"RAY_AUTH_MODE=\w+", start) == ["RAY_AUTH_MODE=token"]
        assert ". ~/.lanewise/env.sh;" in start
    head, worker = starts
    assert "--head --port=6379" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert load(path)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in load(path)["setup_commands"]


@each_file
def test_the_head_keeps_no_trials(path):
    head = load(path)["head_start_ray_commands"][1]
    if load(path)["provider"]["type"] == "local":
        assert "--num-cpus=$(nvidia-smi -L >/dev/null 2>&1 && nproc || echo 0)" in head
    else:
        assert "--num-cpus=0" in head
        assert load(path)["available_node_types"]["head"]["resources"] == {"CPU": 0}


@each_file
def test_the_old_autoscaler_is_used(path):
    """Version 2 leaves out the last of one's own machines, and a cloud's all where more are asked for than allowed."""
    assert (
        " RAY_enable_autoscaler_v2=0 ~/.lanewise/venv/bin/ray start --head" in load(path)["head_start_ray_commands"][1]
    )


@pytest.mark.parametrize("path", FILES[1:], ids=[path.name for path in FILES[1:]])
def test_clouds_start_from_no_gpu_on_spot_and_have_an_upper_limit(path):
    config = load(path)
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert 0 < config["max_workers"] <= 4
    assert 0 < config["idle_timeout_minutes"] <= 10
    node = gpu["node_config"]
    spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    preemptible = any(entry.get("preemptible") for entry in node.get("scheduling", []))
    assert spot or preemptible


@each_file
def test_what_is_shipped_is_the_code_and_nothing_large_or_secret(path):
    config = load(path)
    excluded = config["rsync_exclude"]
    for name in (".git", ".venv", "sweeps", "__pycache__", "lanewise.egg-info", ".mypy_cache", ".data"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in excluded), name
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [
        name for name in tracked for part in Path(name).parts if any(fnmatch.fnmatch(part, p) for p in excluded)
    ], "no code is left behind"
    assert config["file_mounts"]["~/lanewise"] == "."
    assert config["rsync_filter"] == [".gitignore"]


def test_the_shared_storage_is_found_in_it():
    found = [read_cluster(path).storage for path in FILES]
    assert found == ["/mnt/lab/sweeps", "s3://YOUR-BUCKET/sweeps", "gs://YOUR-BUCKET/sweeps"]
    assert [type(open_storage(storage)).__name__ for storage in found] == ["Folder", "Bucket", "Bucket"]


@each_file
def test_every_command_is_shell(path):
    config = load(path)
    lists = [*START_LISTS, "setup_commands", "initialization_commands", "head_setup_commands"]
    for command in (command for name in lists for command in config.get(name, [])):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert " #" not in command, "YAML would cut it there if it were not folded"


def test_what_is_written_to_the_environment_is_what_is_meant(tmp_path):
    (tmp_path / ".lanewise").mkdir()
    config = load(FILES[0])
    lines = [*config["initialization_commands"], *config["setup_commands"][2:], *config["setup_commands"][3:]]
    script = "\n".join([*lines, ". ~/.bashrc", "echo $LANEWISE_STORAGE $LANEWISE_CACHE $RAY_AUTH_MODE ${PATH%%:*}"])
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, text=True, check=True)
    storage, cache, mode, path = shlex.split(done.stdout)
    assert (storage, mode, path) == ("/mnt/lab/sweeps", "token", f"{tmp_path}/.lanewise/venv/bin")
    assert cache.startswith("/var/tmp/lanewise-")
    assert (tmp_path / ".bashrc").read_text().count("lanewise") == 1, "set up twice, written once"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("cluster_name: lanewise", "cluster_nam: x"), "cluster_nam"),
        (lambda text: text.replace("type: local", "type: [local"), "is not YAML"),
        (lambda text: "just words", "is no cluster file"),
        (lambda text: text.replace("  head_ip:", "  heads_ip:"), "is no valid cluster file"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, change, told):
    path = tmp_path / "cluster.yaml"
    path.write_text(change(FILES[0].read_text()))
    with pytest.raises(BadValue, match=re.escape(str(path))) as error:
        read_cluster(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_slurm_script():
    path = ROOT / "clusters" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    told = subprocess.run([str(path)], capture_output=True, text=True)
    assert told.returncode == 2
    assert "usage: sbatch" in told.stderr
    text = path.read_text()
    (flags,) = re.findall(r"ray symmetric-run (.*?) -- ", text.replace("\\\n", " "))
    ray = str(Path(sys.executable).parent / "ray")
    known = subprocess.run([ray, "symmetric-run", "--help"], capture_output=True, text=True, check=False).stdout
    start = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=False).stdout
    for flag in re.findall(r"--[a-z-]+", flags):
        assert flag in known or flag in start, flag
