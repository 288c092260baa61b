"""A cluster file, read, and commands on its machines by ssh."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainables.family import BadValue

ROOT = Path(__file__).resolve().parent.parent
VENV = "~/.lanewise/venv"
HEAD_KEY = "~/ray_bootstrap_key.pem"
"""Where `ray up` leaves the key on the head."""
UNREACHABLE = 255
"""ssh's own exit code, as opposed to the remote command's."""


@dataclass(frozen=True)
class Done:
    """How a command on a machine ended."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last thing it complained of."""
        lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
        noise = ("Warning: Permanently added", "Shared connection", "Connection to")
        lines = [line for line in lines if not line.startswith(noise)]
        return lines[-1] if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Cluster:
    """A cluster file's machines. `workers` is empty for a cloud: its addresses are the provider's to choose."""

    path: Path
    name: str
    provider: str
    head: str
    workers: tuple[str, ...]
    user: str
    key: str
    storage: str
    config: dict[str, Any]

    @property
    def on_premise(self) -> bool:
        return self.provider == "local"

    @property
    def machines(self) -> tuple[str, ...]:
        return (self.head, *self.workers)

    def run(self, address: str, command: str, seconds: float = 60, stdin: str = "") -> Done:
        """A command on a machine: straight from here or, for a worker that only the head reaches, through the head."""
        done = _ssh(self.user, self.key, address, command, seconds, stdin)
        if done.code == UNREACHABLE and address != self.head:
            inner = shlex.join(_command(self.user, "KEY", address, command)).replace("KEY", HEAD_KEY, 1)
            through = _ssh(self.user, self.key, self.head, inner, seconds, stdin)
            if through.code != UNREACHABLE:
                return through
        return done


def read_cluster(path: Path) -> Cluster:
    """The cluster file at `path`, or `BadValue` saying what is wrong with it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadValue(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise BadValue(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise BadValue(f"{path} is no cluster file: it should have cluster_name and provider")
    try:
        validate_config(prepare_config(dict(config)))
    except BaseException as error:  # Ray ends the process for some mistakes
        if isinstance(error, KeyboardInterrupt):
            raise
        message = getattr(error, "message", None) or str(error) or "Ray refuses it"
        raise BadValue(f"{path} is no valid cluster file: {' '.join(message.split())}") from None
    provider, auth = config["provider"], config.get("auth", {})
    local = provider["type"] == "local"
    return Cluster(
        path=path,
        name=config["cluster_name"],
        provider=provider["type"],
        head=str(provider["head_ip"]) if local else "",
        workers=tuple(map(str, provider["worker_ips"])) if local else (),
        user=auth.get("ssh_user", ""),
        key=auth.get("ssh_private_key", ""),
        storage=_storage(config),
        config=config,
    )


def _storage(config: dict[str, Any]) -> str:
    """What the cluster file exports as LANEWISE_STORAGE; empty where it does not."""
    for command in config.get("initialization_commands", []):
        _, found, rest = command.partition("LANEWISE_STORAGE=")
        if found:
            return rest.split("'")[0].split()[0].strip("\"'")
    return ""


def _command(user: str, key: str, address: str, command: str) -> list[str]:
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=8"]
    flags = [part for option in [*options, "LogLevel=ERROR", "IdentitiesOnly=yes"] for part in ("-o", option)]
    return ["ssh", *flags, "-i", key, f"{user}@{address}", command]


def _ssh(user: str, key: str, address: str, command: str, seconds: float, stdin: str) -> Done:
    words = _command(user, str(Path(key).expanduser()), address, command)
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Done(UNREACHABLE, "", f"no answer within {seconds:.0f} s")
    except FileNotFoundError:
        return Done(UNREACHABLE, "", "ssh is not installed on this machine")
    return Done(done.returncode, done.stdout, done.stderr)
