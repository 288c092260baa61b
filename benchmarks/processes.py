"""What a command costs with every process it starts: wall time, processor time, peak memory. Reads /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
LOOK_SECONDS = 0.25
MEMORY_EVERY = 8
"""Memory is read at every so-manieth look: the kernel walks all pages for it."""


@dataclass(frozen=True)
class Cost:
    """A command and all its descendants, together.

    Args:
        wall: seconds from its start to its end.
        cpu: processor seconds, user and system; a process's last LOOK_SECONDS may be missing.
        peak: the most bytes of memory seen at once (PSS: a page that n processes share counts 1/n in each).
    """

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str], env: Mapping[str, str]) -> Cost:
    """Run a command to its end. Raises `CalledProcessError` where it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=dict(env))
    cpu: dict[tuple[int, str], float] = {}
    peak, looks = 0, 0
    while process.poll() is None:
        family = _descendants(process.pid)
        cpu.update({(pid, started): used for pid, (started, used) in family.items()})
        if looks % MEMORY_EVERY == 0:
            peak = max(peak, sum(_pss(pid) for pid in family))
        looks += 1
        time.sleep(LOOK_SECONDS)
    wall = time.perf_counter() - begun
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(wall, sum(cpu.values()), peak)


def _descendants(root: int) -> dict[int, tuple[str, float]]:
    """{pid: (start time, processor seconds so far)} of a process and everything below it."""
    table: dict[int, tuple[int, str, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            table[int(entry.name)] = (int(fields[1]), fields[19], (int(fields[11]) + int(fields[12])) / TICK)
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(pid)
    found, queue = {}, [root]
    while queue:
        pid = queue.pop()
        if pid in table:
            found[pid] = table[pid][1:]
            queue += children.get(pid, [])
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
