"""Bring a cluster up and down: `python -m tuning.cluster up|status|down cluster.yaml`.

`ray up` returns when the head runs, whether or not a worker ever joins, and `ray down` stops Ray on the head alone
where the machines are yours. This waits, says who is missing and why, and stops everybody.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from trainables.family import BadValue
from tuning.remote import HEAD_KEY, ROOT, UNREACHABLE, VENV, Cluster, read_cluster

POLL_SECONDS = 3.0
TOKEN = Path("~/.ray/auth_token")
ALIVE = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print("NODES " + json.dumps([[n["NodeManagerAddress"], n["Resources"]] for n in ray.nodes() if n["Alive"]]))
"""
WHY = f"""
test -x {VENV}/bin/ray || {{ echo "{VENV} is not there: its set-up has not finished, or failed"; exit; }}
pgrep -x raylet >/dev/null || {{ echo "Ray does not run there"; exit; }}
timeout 5 bash -c "exec 3<>/dev/tcp/HEAD/6379" 2>/dev/null || {{ echo "it cannot reach port 6379 of the head"; exit; }}
[ "$(cksum < ~/.ray/auth_token)" = "TOKEN" ] || {{ echo "its ~/.ray/auth_token is not the head's"; exit; }}
echo "Ray runs there but has not joined (yet)"
"""
Nodes = dict[str, dict[str, float]]
app = typer.Typer(add_completion=False, rich_markup_mode=None, help=__doc__)
File = Annotated[Path, typer.Argument(help="the cluster file")]


@app.command()
def up(
    file: File = Path("cluster.yaml"),
    timeout: Annotated[float, typer.Option(help="seconds to wait for every node once the head runs")] = 1200.0,
) -> None:
    """Start the cluster and wait until every node is alive."""
    cluster = read_cluster(file)
    make_token()
    if ray("up", "-y", str(file)):
        local = f"`python -m tuning.doctor {file}` may say why"
        cloud = f"machines that it started cost until `python -m tuning.cluster down {file}`"
        raise BadValue(f"`ray up {file}` failed, see above; {local if cluster.on_premise else cloud}")
    deadline, said = time.monotonic() + timeout, -1
    while True:
        nodes = alive(cluster)
        missing = absent(cluster, nodes)
        if len(nodes) != said:
            said = len(nodes)
            typer.echo(f"{len(nodes)} of {len(nodes) + len(missing)} nodes alive")
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    raise typer.Exit(show(cluster, nodes))


@app.command()
def status(file: File = Path("cluster.yaml")) -> None:
    """Say which nodes are alive, and why the others are not. Exit code 1 where one is not."""
    cluster = read_cluster(file)
    raise typer.Exit(show(cluster, alive(cluster)))


@app.command()
def down(file: File = Path("cluster.yaml")) -> None:
    """Stop Ray on every node; a cloud's machines are given back."""
    cluster = read_cluster(file)
    code = ray("down", "-y", str(file))
    left = []
    if cluster.on_premise:
        # the head first: it would start a worker again that stops
        left = [line for line in [stop(cluster, cluster.head)] if line]
        with ThreadPoolExecutor(16) as pool:
            left += [line for line in pool.map(lambda address: stop(cluster, address), cluster.workers) if line]
    for line in left:
        typer.echo(line, err=True)
    if not left and not code:
        typer.echo(f"{cluster.name} is down")
    raise typer.Exit(1 if left or code else 0)


def stop(cluster: Cluster, address: str) -> str:
    """Stop Ray on a machine. Why not, or nothing."""
    command = f"{VENV}/bin/ray stop --force >/dev/null 2>&1; ! pgrep -x 'raylet|gcs_server' >/dev/null"
    done = cluster.run(address, command, seconds=90)
    if done.code == UNREACHABLE:
        return f"{address}: cannot be reached ({done.reason}): what runs there goes on; `ray stop` on it ends it"
    return f"{address}: Ray still runs after `ray stop`" if done.code else ""


def alive(cluster: Cluster) -> Nodes:
    """Address -> resources of the nodes that the head counts; empty where there is no head."""
    # no here-document: `ray exec` writes ")" behind its last line
    command = f"RAY_AUTH_MODE=token {VENV}/bin/python -c {shlex.quote(ALIVE)}"
    if cluster.on_premise:
        out = cluster.run(cluster.head, command).out
    else:
        words = [_ray(), "exec", str(cluster.path), command]
        out = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL).stdout
    for line in out.splitlines():
        if line.startswith("NODES "):
            return dict(json.loads(line.removeprefix("NODES ")))
    return {}


def absent(cluster: Cluster, nodes: Nodes) -> list[str]:
    """Machines that should be alive and are not. A cloud's minimum has no addresses yet: it is counted."""
    if cluster.on_premise:
        return [address for address in cluster.machines if address not in nodes]
    types: dict[str, Any] = cluster.config.get("available_node_types", {})
    wanted = 1 + sum(kind.get("min_workers", 0) for kind in types.values())
    return ["a node the provider has not given"] * max(0, wanted - len(nodes))


def show(cluster: Cluster, nodes: Nodes) -> int:
    """One line a node. Returns the exit code."""
    missing = absent(cluster, nodes)
    for address, resources in nodes.items():
        role = "head" if address == cluster.head or "node:__internal_head__" in resources else "worker"
        has = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        typer.echo(f"{address:<15}  {role:<6}  alive    {has}")
    with ThreadPoolExecutor(16) as pool:
        reasons = pool.map(lambda address: why(cluster, address), missing)
        for address, reason in zip(missing, reasons, strict=True):
            role = "head" if address == cluster.head else "worker"
            typer.echo(f"{address:<15}  {role:<6}  missing  {reason}")
    return 1 if missing else 0


def why(cluster: Cluster, address: str) -> str:
    """Why a machine is not part of the cluster."""
    if not cluster.on_premise:
        return f"`ray monitor {cluster.path}` shows what the provider answers"
    head = cluster.run(
        cluster.head, "cksum < ~/.ray/auth_token; cat /tmp/ray/session_latest/logs/monitor.* | tail -n 400"
    )
    if head.code == UNREACHABLE:
        return f"the head {cluster.head} cannot be reached by ssh: {head.reason}"
    if address == cluster.head:
        return "Ray does not answer on the head: `ray up` has not finished there, or failed"
    direct = "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    login = cluster.run(
        cluster.head, f"{direct} -o ConnectTimeout=8 -o IdentitiesOnly=yes -i {HEAD_KEY} {cluster.user}@{address} true"
    )
    if login.code:
        return f"the head cannot log in there by ssh: {login.reason}"
    token, *monitor = head.out.splitlines() or [""]
    reason = cluster.run(address, WHY.replace("HEAD", cluster.head).replace("TOKEN", token.strip())).out.strip()
    told = [line.strip() for line in monitor if address in line and ("rror" in line or "ailed" in line)]
    return reason + (f"; the head's log: {told[-1][:200]}" if told else "")


def make_token() -> None:
    """The cluster's token is this user's ~/.ray/auth_token: made once."""
    if not TOKEN.expanduser().exists():
        subprocess.run([_ray(), "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    TOKEN.expanduser().chmod(0o600)  # Ray leaves it readable for everybody


def ray(*arguments: str) -> int:
    """A command of Ray's, from the folder that the cluster file ships; its output is shown. Returns its exit code."""
    absolute = [str(Path(word).resolve()) if word.endswith((".yaml", ".yml")) else word for word in arguments]
    return subprocess.run([_ray(), *absolute], cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def _ray() -> str:
    beside = Path(sys.executable).parent / "ray"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("ray") or "ray"


def main(arguments: list[str] | None = None) -> None:
    """Run and exit: 0 all alive, 1 not, 2 a mistake in the file (one line)."""
    try:
        app(args=arguments, prog_name="python -m tuning.cluster")
    except BadValue as error:
        print(str(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
