"""The repository's cluster.yaml, its first block filled in for test hosts that need no network to be set up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ray
import yaml

from tests.cluster.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(ray.__file__).resolve().parents[1]
DRIVER, HEAD, WORKERS = "ctl", "h1", ("h2", "h3")


def shared_folders(base: Path) -> list[Path]:
    """What every host must see of this machine: the Python in use, the checkout, the sweeps' storage."""
    return [Path(sys.base_prefix), SITE, ROOT, base / "storage"]


def write_config(hosts: Hosts, path: Path, storage: Path | str) -> Path:
    """cluster.yaml with what its comments tell a user to change, and a cache that vanishes with the host.

    The hosts are the driver's, the head and the workers, in this order.
    """
    _, head, *workers = hosts.names
    text = (ROOT / "cluster.yaml").read_text()
    for old, new in (
        ("192.168.1.10 ", f"{hosts.address(head)} "),
        ("[192.168.1.11, 192.168.1.12]", f"[{', '.join(map(hosts.address, workers))}]"),
        ("ssh_user: me ", "ssh_user: root "),
        ("~/.ssh/id_ed25519", "~/.ssh/key"),
        ("/mnt/lab/sweeps", str(storage)),
        ("/var/tmp/lanewise-", "/tmp/lanewise-"),
    ):
        assert old in text, f"cluster.yaml has no {old!r} any more"
        text = text.replace(old, new)
    yaml.safe_load(text)
    path.write_text(text)
    return path


def install(hosts: Hosts, names: Sequence[str] = ()) -> None:
    """What `make install` would leave on each host, made of the packages installed here: a host has no network."""
    files = ("pyproject.toml", "constraints.txt", "requirements-reference.txt")
    pins = b"".join((ROOT / name).read_bytes() for name in files)
    key = (
        subprocess.run(["cksum"], input=pins, capture_output=True, check=True).stdout.decode().strip().replace(" ", "-")
    )
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    scripts = {
        "ray": "import sys; from ray.scripts.scripts import main; sys.exit(main())",
        "pip": "import sys; from pip._internal.cli.main import main; sys.exit(main())",
    }
    for name in names or hosts.names:
        venv = "~/.lanewise/venv"
        steps = [
            f"{Path(sys.base_prefix) / 'bin' / version} -m venv --without-pip {venv}",
            f"printf '%s\\n' ~/lanewise {SITE} > {venv}/lib/{version}/site-packages/lanewise.pth",
            *(
                f"printf '%s\\n' \"#!$(echo {venv})/bin/python\" '{line}' > {venv}/bin/{script}"
                f" && chmod +x {venv}/bin/{script}"
                for script, line in scripts.items()
            ),
            f"touch {venv}/.made {venv}/.installed-{key}",
        ]
        hosts.run(name, " && ".join(steps))
