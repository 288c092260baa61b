"""Test hosts on one machine: each has its own addresses, processes, home, /tmp, /dev/shm and sshd.

A host is a set of Linux namespaces (network, pid, mount, uts, ipc) around a shell that is its process 1. They hang on a
bridge without a way out, so that only their own addresses exist. Needs root and the tools in `missing`.

    with Hosts(Path("/var/tmp/x"), ("ctl", "h1", "h2"), shared=[venv]) as hosts:
        hosts.run("h1", "hostname -I")
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NETWORK = "10.83.7"
BRIDGE = "lwbr0"
TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "ps", "unshare", "nsenter", "setpriv", "make", "uptime")
SSHD = """\
HostKey /run/hostkey
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
MaxStartups 100:30:200
MaxSessions 100
"""
INIT = r"""
set -e
cd /
mount --rbind $ROOM/home "$HOME"
mount --rbind $ROOM/tmp /tmp
mount -t tmpfs -o size=12g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
install -m 600 $BASE/hostkey /run/hostkey
cp $BASE/sshd_config /run/sshd_config
hostname $NAME
cd "$HOME"
env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 /usr/sbin/sshd -D -e -f /run/sshd_config &
while :; do wait -n || sleep 1; done
"""


def missing() -> str:
    """Why there can be no hosts on this machine; empty where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if os.geteuid():
        return "not root: network namespaces need it"
    if lacking:
        return f"not installed: {', '.join(lacking)} (openssh-server rsync iproute2 procps util-linux make)"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True).returncode:
        return "this kernel or container forbids new namespaces"
    return ""


class Hosts:
    """Named hosts, addresses NETWORK.10 and on in their order.

    Args:
        base: a new folder outside /tmp and the home folder; all of the hosts' files are below it.
        names: one host each.
        shared: folders under /tmp or the home folder that every host sees; the rest of these two is each host's own.
        network, bridge: of its own for each set of hosts that may be there at the same time.
    """

    def __init__(
        self,
        base: Path,
        names: Sequence[str],
        shared: Sequence[Path] = (),
        network: str = NETWORK,
        bridge: str = BRIDGE,
    ):
        self.base, self.names, self.shared = base, tuple(names), tuple(shared)
        self.network, self.bridge = network, bridge
        self._addresses = {name: f"{network}.{10 + number}" for number, name in enumerate(self.names)}
        self._shells: dict[str, subprocess.Popen] = {}
        self._first: dict[str, int] = {}

    def address(self, name: str) -> str:
        return self._addresses[name]

    def home(self, name: str) -> Path:
        """The host's home folder as this machine sees it."""
        return self.base / name / "home"

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, name: str, command: str, seconds: float = 300, check: bool = True) -> str:
        """Output (both streams) of a login shell's command on the host."""
        done = subprocess.run(self._enter(name, command), capture_output=True, text=True, timeout=seconds)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, name: str, command: str, log: Path) -> subprocess.Popen:
        """The same in the background, its output into a file."""
        with open(log, "wb") as file:
            return subprocess.Popen(
                self._enter(name, command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def add(self, name: str, address: str, *others: str) -> None:
        """One more host, with addresses of any network; the first is where its own connections come from."""
        self._addresses[name] = address
        self._plug(name, *others)
        self._await_sshd(name)

    def remove(self, name: str) -> None:
        """Power off, and nothing of it is left."""
        del self._addresses[name]
        self._power_off(name)
        _ip(f"link del v-{name}", check=False)
        _ip(f"netns del {name}")
        self._delete(self.base / name)

    def join(self) -> str:
        """This machine gets an address on the hosts' bridge, until they close."""
        address = f"{self.network}.1"
        _ip(f"addr add {address}/24 dev {self.bridge}")
        return address

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        _ip(f"link set v-{name} down")

    def heal(self, name: str) -> None:
        _ip(f"link set v-{name} up")

    def processes(self, name: str) -> list[str]:
        """Command lines of everything on the host but its process 1 and sshd."""
        namespace = os.readlink(f"/proc/{self._first[name]}/ns/pid")
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and os.readlink(folder / "ns/pid") == namespace:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if (
                        line
                        and int(folder.name) != self._first[name]
                        and not line.startswith(("sshd:", "/usr/sbin/sshd"))
                    ):
                        found.append(line)
        return [line for line in found if line != "sleep 1"]

    # --- making and unmaking ---

    def _make(self) -> None:
        self._clear()
        self.base.mkdir(mode=0o700)
        (self.base / "sshd_config").write_text(SSHD)
        for key in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / key)], check=True)
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"link set {self.bridge} up")
        for name in self.names:
            self._plug(name)
        for name in self.names:
            self._await_sshd(name)

    def _plug(self, name: str, *others: str) -> None:
        _ip(f"netns add {name}")
        _ip(f"link add v-{name} type veth peer name eth0 netns {name}")
        _ip(f"link set v-{name} master {self.bridge} up")
        for address in (f"{self.address(name)}/24", *(f"{other}/32" for other in others)):
            _ip(f"-n {name} addr add {address} dev eth0")
        _ip(f"-n {name} link set eth0 up")
        _ip(f"-n {name} link set lo up")
        # to the hosts and no further; Ray finds a host's own address by asking for the route to an outer one
        _ip(f"-n {name} route add default dev eth0 src {self.address(name)}")
        self._furnish(name)
        self._boot(name)

    def _furnish(self, name: str) -> None:
        home = self.home(name)
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (self.base / name / "tmp").mkdir()
        (self.base / name / "tmp").chmod(0o1777)
        shutil.copy(self.base / "key.pub", home / ".ssh" / "authorized_keys")
        shutil.copy(self.base / "key", home / ".ssh" / "key")
        (home / ".ssh" / "key").chmod(0o600)
        (home / ".bashrc").write_text("")
        (home / ".profile").write_text(". ~/.bashrc\n")

    def _boot(self, name: str) -> None:
        binds = []
        for folder in self.shared:
            for outer, room in ((Path.home(), "home"), (Path("/tmp"), "tmp")):
                if folder.is_relative_to(outer):
                    target = self.base / name / room / folder.relative_to(outer)
                    target.mkdir(parents=True, exist_ok=True)
                    binds.append(f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(target))}")
                    break
        script = "\n".join([*binds, INIT])
        environment = {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "HOME": str(Path.home()),
            "ROOM": str(self.base / name),
            "BASE": str(self.base),
            "NAME": name,
        }
        log = open(self.base / f"{name}.log", "wb")  # noqa: SIM115  # the shell's, from now on
        self._shells[name] = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # a test that is killed takes its hosts along
                *("nsenter", f"--net=/run/netns/{name}", "unshare", "--pid", "--fork", "--kill-child", "--mount"),
                *("--mount-proc", "--uts", "--ipc", "--propagation", "private", "bash", "-c", script),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def _await_sshd(self, name: str) -> None:
        deadline = time.monotonic() + 20
        shell = self._shells[name]
        while time.monotonic() < deadline:
            assert shell.poll() is None, (self.base / f"{name}.log").read_text()
            children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
            if children and _listens(name, 22):
                self._first[name] = int(children[0])
                return
            time.sleep(0.05)
        raise AssertionError(f"{name}: sshd does not answer: {(self.base / f'{name}.log').read_text()}")

    def _enter(self, name: str, command: str) -> list[str]:
        inner = [
            "env",
            "-i",
            f"PATH={os.environ['PATH']}:/usr/sbin:/sbin",
            f"HOME={Path.home()}",
            "LANG=C.UTF-8",
            "USER=root",
        ]
        return [
            *("nsenter", "-t", str(self._first[name]), "-n", "-p", "-m", "-u", "-i"),
            *inner,
            *("bash", "-lc", f"cd; {command}"),
        ]

    def close(self) -> None:
        """Kill every process of every host, take links and files away. Nothing of the hosts is left."""
        for name in [*self._shells]:
            self._power_off(name)
        self._clear()

    def _power_off(self, name: str) -> None:
        shell = self._shells.pop(name)
        with contextlib.suppress(OSError, KeyError):
            first = self._first.pop(name)
            if os.readlink(f"/proc/{first}/ns/pid") != os.readlink("/proc/self/ns/pid"):
                os.kill(first, signal.SIGKILL)  # the end of process 1 is the end of its namespace
        if shell.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.wait(5)
        if shell.poll() is None:
            shell.kill()
            shell.wait(10)

    def _clear(self) -> None:
        """Links and files, whoever made them: a test that was killed leaves them behind."""
        links = subprocess.run(["ip", "-o", "link", "show", "master", self.bridge], capture_output=True, text=True)
        plugged = [line.split()[1].partition("@")[0].removeprefix("v-") for line in links.stdout.splitlines()]
        for name in {*self._addresses, *plugged}:
            _ip(f"link del v-{name}", check=False)
            _ip(f"netns del {name}", check=False)
        _ip(f"link del {self.bridge}", check=False)
        self._delete(self.base)

    def _delete(self, folder: Path) -> None:
        mounts = Path("/proc/mounts").read_text()
        assert f" {folder}/" not in mounts, f"mounts are left under {folder}: not deleting through them"
        shutil.rmtree(folder, ignore_errors=True)


def _ip(arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {arguments}: {done.stderr}"


def _listens(name: str, port: int) -> bool:
    """Whether something on the host listens there, asked from inside its network."""
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{name}", "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True
    )
    return done.returncode == 0
