"""Say what would keep a sweep from running: `python -m tuning.doctor [cluster.yaml]`.

Without a cluster file it looks at this machine alone. One line a finding, each that fails with its fix.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trainables.family import BadValue
from tuning.remote import ROOT, UNREACHABLE, VENV, Cluster, read_cluster
from tuning.storage import Bucket, is_url

NEEDED = ("torch", "ray", "optuna", "hyperopt", "mlflow", "numpy", "pandas", "pyarrow", "safetensors")
OLDEST = (3, 11)
SKEW_SECONDS = 5.0
FREE_GIB = 10.0
FILES = 4096
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, where, how it is; `fix` is empty where all is well."""

    place: str
    subject: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{'FAIL' if self.fix else 'ok':<4}  {self.place:<15}  {self.subject:<8}  {self.text}"
        return f"{line} -> {self.fix}" if self.fix else line


def main(
    file: Annotated[Path | None, typer.Argument(help="cluster file; without it, this machine")] = None,
    tracking_uri: Annotated[
        str, typer.Option(help="MLflow server that sweeps will use", envvar="MLFLOW_TRACKING_URI")
    ] = "",
) -> None:
    """Check ssh, Python, packages, port, token, storage, GPUs, clocks, disks, MLflow. Exit code 1: some failed."""
    try:
        findings = list(examine(read_cluster(file), tracking_uri) if file else examine_here(tracking_uri))
    except BadValue as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for finding in findings:
        typer.echo(str(finding))
    failed = sum(bool(finding.fix) for finding in findings)
    typer.echo(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    raise typer.Exit(1 if failed else 0)


def examine_here(uri: str) -> Iterator[Finding]:
    """This machine alone."""
    mark = f".doctor-{uuid.uuid4().hex}"
    folder = os.environ.get("LANEWISE_STORAGE", "")
    facts = json.loads(_facts_line(_here(_asked("", folder, mark, True, uri))))
    _remove(folder, mark)
    yield from about_python("here", facts)
    yield from about_machine("here", facts)
    if folder:
        yield about_storage("here", folder, facts["storage"])
    yield about_mlflow("here", uri, facts["mlflow"])


def examine(cluster: Cluster, uri: str) -> Iterator[Finding]:
    """Every machine of a cluster of one's own."""
    if not cluster.on_premise:
        raise BadValue(
            f"{cluster.path} asks {cluster.provider} for machines: there are none to examine before `ray up`"
        )
    key = Path(cluster.key).expanduser()
    if not key.is_file():
        yield Finding(
            "here", "ssh", f"the key {cluster.key} is not there", "name yours in the cluster file's ssh_private_key"
        )
        return
    mark = f".doctor-{uuid.uuid4().hex}"
    if not cluster.storage and cluster.workers:
        yield Finding(
            "here", "storage", "the cluster file names no shared folder", "export LANEWISE_STORAGE in its first block"
        )
    first = _look(cluster, cluster.head, mark, True, uri)
    with ThreadPoolExecutor(16) as pool:
        rest = list(pool.map(lambda address: _look(cluster, address, mark, False, ""), cluster.workers))
    if cluster.storage and not is_url(cluster.storage):
        cluster.run(cluster.head, f"rm -f {shlex.quote(cluster.storage)}/{mark}*")
    elif cluster.storage:
        forget = f"from tuning.storage import Bucket; Bucket({cluster.storage!r}, 0.0).remove({mark!r})"
        cluster.run(cluster.head, f". ~/.lanewise/env.sh; {VENV}/bin/python -c {shlex.quote(forget)}")
    head_facts = first[2]
    for address, findings, facts in (first, *rest):
        yield from findings
        if facts is None:
            continue
        yield from about_python(address, facts)
        yield from about_machine(address, facts)
        yield about_token(address, facts["token"], head_facts["token"] if head_facts else None)
        if address != cluster.head:
            yield about_port(address, cluster.head, facts["port"])
        if cluster.storage:
            yield about_storage(address, cluster.storage, facts["storage"])
    yield about_mlflow(cluster.head, uri, head_facts["mlflow"] if head_facts else "")


def _look(cluster: Cluster, address: str, mark: str, write: bool, uri: str) -> tuple[str, list[Finding], Facts | None]:
    """(address, what ssh and the clock say, the machine's facts)."""
    head = "" if address == cluster.head else cluster.head
    asked = shlex.quote(json.dumps(_asked(head, cluster.storage, mark, write, uri)))
    pick = (
        f"P={VENV}/bin/python; [ -x $P ] || P=$(command -v python3.12 || command -v python3.11 || command -v python3)"
    )
    program = Path(__file__).with_name("node_facts.py").read_text()
    before = time.time()
    done = cluster.run(address, f". ~/.lanewise/env.sh 2>/dev/null; {pick}; $P - {asked}", 120, program)
    after = time.time()
    if done.code == UNREACHABLE:
        fix = f"`ssh -i {cluster.key} {cluster.user}@{address}` should log in without a question"
        return address, [Finding(address, "ssh", done.reason, fix)], None
    line = _facts_line(done.out)
    found = [Finding(address, "ssh", f"logs in as {cluster.user}")]
    if not line:
        fix = "install Python 3.11 or newer"
        return address, [*found, Finding(address, "python", f"cannot run: {done.reason}", fix)], None
    facts = json.loads(line)
    skew = max(before - facts["time"], facts["time"] - after, 0.0)
    fix = "turn on time synchronisation there (`timedatectl set-ntp true`)" if skew > SKEW_SECONDS else ""
    found.append(
        Finding(address, "clock", f"{skew:.1f} s off this machine's" if skew else "agrees with this machine's", fix)
    )
    return address, found, facts


def about_python(place: str, facts: Facts) -> Iterator[Finding]:
    version, pins = tuple(facts["python"]), constraints()
    text = f"{'.'.join(map(str, version))} ({facts['executable']})"
    old = version[:2] < OLDEST
    yield Finding(place, "python", text, "install Python 3.11 or newer, with venv" if old else "")
    absent = [name for name, found in facts["packages"].items() if not found]
    other = [
        f"{name} {found} (pinned {pins[name]})"
        for name, found in facts["packages"].items()
        if found and found.partition("+")[0] != pins[name]
    ]
    if len(absent) == len(NEEDED) or not facts["packages"]:
        yield Finding(place, "packages", "none installed", _install(place))
    elif absent or other:
        missing = [f"no {name}" for name in absent]
        yield Finding(place, "packages", ", ".join([*missing, *other]), _install(place))
    else:
        yield Finding(place, "packages", f"{len(NEEDED)} as in constraints.txt; ray {facts['packages']['ray']}")


def _install(place: str) -> str:
    return "make install" if place == "here" else "`ray up` installs them: its output says why it did not"


def about_machine(place: str, facts: Facts) -> Iterator[Finding]:
    gpus, usable = facts["gpus"], facts["cuda"]
    if isinstance(gpus, str):
        yield Finding(place, "gpu", gpus, "repair or reinstall the NVIDIA driver; `nvidia-smi` should list the GPUs")
    elif not gpus:
        yield Finding(place, "gpu", "none: runs on its processors")
    else:
        text = f"{len(gpus)} x {gpus[0][0]}, driver {gpus[0][1]}"
        fix = "install a torch built for CUDA, or a driver new enough for it" if 0 <= usable < len(gpus) else ""
        yield Finding(place, "gpu", f"{text}; torch can use {usable}" if fix else text, fix)
    short = {name: free for name, free in facts["disk"].items() if free < FREE_GIB}
    shown = ", ".join(f"{name} {free:.0f} GiB" for name, free in (short or facts["disk"]).items())
    fix = f"free some, or set LANEWISE_CACHE to a larger disk: {FREE_GIB:.0f} GiB are needed" if short else ""
    yield Finding(place, "disk", f"free: {shown}", fix)
    few = 0 <= facts["files"] < FILES
    fix = f"raise the hard limit of open files to {FILES} or more (/etc/security/limits.conf)" if few else ""
    yield Finding(place, "files", f"{facts['files']} may be open at once", fix)


def about_token(place: str, token: Facts, head: Facts | None) -> Finding:
    if not token["there"]:
        return Finding(place, "token", "no ~/.ray/auth_token", "`python -m tuning.cluster up` makes and ships it")
    if token["open"]:
        return Finding(place, "token", "others may read ~/.ray/auth_token", "chmod 600 ~/.ray/auth_token")
    if head and head["there"] and head["digest"] != token["digest"]:
        return Finding(place, "token", "is not the head's: this node cannot join", "`ray up` ships the head's")
    return Finding(place, "token", f"{token['digest']}")


def about_port(place: str, head: str, port: str) -> Finding:
    if port == "open":
        return Finding(place, "port", f"reaches {head}:6379")
    if port == "refused":
        return Finding(place, "port", f"reaches {head}; nothing listens on 6379 until `ray up`")
    fix = "let the cluster's machines through each other's firewall on all TCP ports (Ray uses 6379 and random ones)"
    return Finding(place, "port", f"does not reach {head}:6379 ({port})", fix)


def about_storage(place: str, folder: str, problem: str) -> Finding:
    fix = f"mount one shared folder at {folder} on every machine, writable by this user" if problem else ""
    if problem.endswith("installed"):
        fix = "`ray up` installs them"
    elif problem and is_url(folder):
        fix = "give this machine the bucket's keys (~/.aws/credentials, or a role), AWS_REGION and AWS_ENDPOINT_URL"
    return Finding(place, "storage", f"{folder} {problem or 'is shared and can be written'}", fix)


def about_mlflow(place: str, uri: str, problem: str) -> Finding:
    if not uri.startswith("http"):
        return Finding(place, "mlflow", f"{uri or 'a database beside the sweeps'}: needs no server")
    fix = "start it, open its port to this machine, and see its --allowed-hosts" if problem else ""
    return Finding(place, "mlflow", f"{uri} {problem or 'answers'}", fix)


def constraints() -> dict[str, str]:
    """Package -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def _asked(head: str, storage: str, mark: str, write: bool, uri: str) -> dict[str, Any]:
    return {"packages": NEEDED, "head": head, "storage": storage, "mark": mark, "write": write, "uri": uri}


def _here(asked: dict[str, Any]) -> str:
    program = Path(__file__).with_name("node_facts.py")
    return subprocess.run([sys.executable, str(program), json.dumps(asked)], capture_output=True, text=True).stdout


def _facts_line(out: str) -> str:
    return next((line.removeprefix("FACTS ") for line in out.splitlines() if line.startswith("FACTS ")), "")


def _remove(folder: str, mark: str) -> None:
    if is_url(folder):
        with contextlib.suppress(OSError):
            Bucket(folder, 0.0).remove(mark)
    elif folder:
        with contextlib.suppress(OSError):  # a folder that could not be written has been told of
            (Path(folder) / mark).unlink()


if __name__ == "__main__":
    typer.run(main)
