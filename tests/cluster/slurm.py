"""A Slurm of two nodes on two test hosts: munge, slurmctld on the first, slurmd on both; no GPU."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import hosts as test_hosts
from tests.cluster.hosts import Hosts
from tests.cluster.lab import ROOT, SITE

NODES = ("s1", "s2")
NETWORK, BRIDGE = "10.83.8", "lwbr1"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONFIG = """\
ClusterName=lab
SlurmctldHost=s1({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
MpiDefault=none
ReturnToService=2
KillWait=5
{nodes}
PartitionName=all Nodes={names} Default=YES State=UP MaxTime=INFINITE
"""


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    return test_hosts.missing() or (f"not installed: {', '.join(lacking)} (slurm-wlm munge)" if lacking else "")


@contextmanager
def slurm(base: Path, shared: Path) -> Iterator[Hosts]:
    """Hosts on which `sbatch` works; `shared` is a folder that both see."""
    folders = [Path(sys.base_prefix), SITE, ROOT, shared]
    with Hosts(base, NODES, folders, NETWORK, BRIDGE) as made:
        _configure(made)
        for name in NODES:
            made.run(name, _start(made, name))
        deadline = time.monotonic() + 60
        while made.run(NODES[0], f"{setting(made)} sinfo -h -N -o '%T'", check=False).split() != ["idle"] * len(NODES):
            assert time.monotonic() < deadline, (base / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield made


def setting(hosts: Hosts) -> str:
    return f"export SLURM_CONF={hosts.base}/slurm.conf;"


def _configure(hosts: Hosts) -> None:
    (hosts.base / "munge.key").write_bytes(os.urandom(128))
    (hosts.base / "munge.key").chmod(0o400)
    (hosts.base / "state").mkdir()
    nodes = [f"NodeName={name} NodeAddr={hosts.address(name)} CPUs=2 RealMemory=2000" for name in NODES]
    text = CONFIG.format(head=hosts.address(NODES[0]), base=hosts.base, nodes="\n".join(nodes), names=",".join(NODES))
    (hosts.base / "slurm.conf").write_text(text)
    addresses = [f"{hosts.address(name)} {name}" for name in NODES]
    (hosts.base / "etc-hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses]) + "\n")


def _start(hosts: Hosts, name: str) -> str:
    base = hosts.base
    lines = [
        f"mount --bind {base}/etc-hosts /etc/hosts",
        "mkdir -p -m 755 /run/munge",
        f"munged --force --key-file={base}/munge.key --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid "
        f"--log-file={base}/munge-{name}.log --seed-file={base}/seed-{name}",
        setting(hosts).rstrip(";"),
        *(["slurmctld"] if name == NODES[0] else []),
        f"slurmd -N {name}",
    ]
    return " && ".join(lines)
