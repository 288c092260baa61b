"""The device host: one Ray actor a device owns every lane on it; the pool starts hosts and places configs on them.

The only module of `lanes` that imports Ray. A host holds its device whole (one GPU, or one processor core), so that
Ray's accounting is exact; the trials that attach to it hold next to nothing. Each program on the device has its own
`Stack`; stacks with work take turns. Nothing heavy is imported before the actor runs, because every trial process
imports this module.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lanes.job import Job, Report

if TYPE_CHECKING:
    from lanes.stack import Checkpoints, Recorder, Stack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSettings:
    """How hosts run lanes.

    Args:
        engine: "auto" probes; or "serial", "stacked".
        lanes: slots a program; 0 lets the probe choose.
        wanted: the most lanes that may be on one device at once; bounds the probe.
        expected_steps: trial-steps ahead a device, for the question whether compiling pays.
        data_dir: folder of data sets, or None.
        cache_dir: the node's cache of decoded data and probe results.
        make_recorder: device label -> Recorder.
        make_checkpoints: () -> Checkpoints.
    """

    engine: str
    lanes: int
    wanted: int
    expected_steps: float
    data_dir: Path | None
    cache_dir: Path
    make_recorder: Callable[[str], Recorder]
    make_checkpoints: Callable[[], Checkpoints]


class Host:
    """All lanes of one device, without Ray: `HostActor` drives it, tests may too."""

    def __init__(self, settings: HostSettings, device: str, label: str):
        self.settings = settings
        self.device = device
        self.label = label
        self._recorder = settings.make_recorder(label)
        self._checkpoints = settings.make_checkpoints()
        self._stacks: dict[str, Stack] = {}
        self._stack_of: dict[str, str] = {}  # token -> program key
        self._arrays: dict[str, Any] = {}  # memory-mapped file -> tensor on the device, shared by programs

    @property
    def busy(self) -> bool:
        return any(stack.busy for stack in self._stacks.values())

    def attach(self, job: Job) -> None:
        """Start or continue a config. Raises what the family raises for values that make no program."""
        from lanes.stack import Stack
        from trainables.family import load_family, program_key

        family = load_family(job.family)
        program, hyper = family.build(job.values)
        key = program_key(family.name, program)
        if key not in self._stacks:
            make_engine = lambda: self._make_engine(family, program, hyper)
            self._stacks[key] = Stack(family, program, make_engine, self._recorder, self._checkpoints)
        self._stacks[key].attach(job)
        self._stack_of[job.token] = key

    def proceed(self, token: str) -> None:
        """Go on after a report."""
        if token in self._stack_of:
            self._stacks[self._stack_of[token]].proceed(token)

    def release(self, token: str) -> None:
        """Let a config go; its lanes are free at once. The stack stays: an empty one costs next to nothing, and the
        next config of the same program finds its engine chosen and compiled."""
        key = self._stack_of.pop(token, None)
        if key is not None:
            self._stacks[key].release(token)

    def save(self, token: str) -> None:
        """Checkpoint a config now."""
        if token in self._stack_of:
            self._stacks[self._stack_of[token]].save(token)

    def flush(self) -> None:
        self._recorder.flush(force=True)

    def tick(self) -> list[Report]:
        """One turn of every stack with work. A family that raises takes only its own stack down."""
        reports: list[Report] = []
        for key, stack in list(self._stacks.items()):
            try:
                reports += stack.tick()
            except Exception:
                error = traceback.format_exc()
                log.error("%s: a program failed\n%s", self.label, error)
                for token in [token for token, owner in self._stack_of.items() if owner == key]:
                    reports.append(Report(token, 0, True, {}, "", 0, error))
                    del self._stack_of[token]
                del self._stacks[key]
        return [replace(report, device=self.label) for report in reports]

    def _make_engine(self, family: Any, program: Any, hyper: Any) -> tuple[Any, int]:
        from lanes.engine import put
        from lanes.probe import make_engine, probe, resolve_engine
        from trainables.family import program_key

        loaded = family.load(program, self.settings.data_dir, self.settings.cache_dir)
        arrays, host_arrays = self._put(loaded), put(loaded, "cpu")
        name, lanes = resolve_engine(self.settings.engine, self.device), self.settings.lanes
        if name == "auto" or not lanes:
            choice = probe(
                family,
                program,
                hyper,
                arrays,
                self.device,
                host_arrays,
                wanted=self.settings.lanes or self.settings.wanted,
                expected_steps=self.settings.expected_steps,
                engines=None if name == "auto" else (name,),
                cache=self.settings.cache_dir / "probes",
            )
            log.info("%s: probe of %s\n%s", self.label, program_key(family.name, program), "\n".join(choice.lines()))
            name, lanes = choice.engine, self.settings.lanes or choice.lanes
        return make_engine(name, lanes, family, program, arrays, self.device, host_arrays), lanes

    def _put(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """On the device, once for all programs that read the same memory-mapped file."""
        from lanes.engine import put

        placed = {}
        for name, array in arrays.items():
            file = str(getattr(array, "filename", None) or "")
            if file not in self._arrays:
                tensor = put({name: array}, self.device)[name]
                if not file:
                    placed[name] = tensor
                    continue
                self._arrays[file] = tensor
            placed[name] = self._arrays[file]
        return placed


def described(label: str, device: str) -> str:
    """A device with its model, for readers who wonder about times: `cuda:0@10.0.0.2 NVIDIA H200`."""
    if device != "cuda":
        return label
    import torch

    return f"{label} {torch.cuda.get_device_name()}"


class HostActor:
    """The host behind Ray: calls are queued, a thread of its own trains, reports wake whoever waits for them."""

    def __init__(self, settings: HostSettings, device: str, label: str, log_file: str, threads: int | None):
        import torch

        logging.basicConfig(
            filename=log_file, level=logging.INFO, format=f"%(asctime)s {label} %(message)s", force=True
        )
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32; programs that want less say bf16
        if threads is not None:
            torch.set_num_threads(threads)
        if node_cache := os.environ.get("LANEWISE_CACHE"):
            settings = replace(settings, cache_dir=Path(node_cache))  # this node's, not the driver's
        self._settings, self._device, self._label = settings, device, label
        self._commands: queue.SimpleQueue[tuple[str, tuple, asyncio.Future | None]] = queue.SimpleQueue()
        self._reports: dict[str, asyncio.Queue[Report]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy_seconds = 0.0
        threading.Thread(target=self._work, name="lanes", daemon=True).start()

    async def attach(self, job: Job) -> None:
        self._loop = asyncio.get_running_loop()
        self._reports[job.token] = asyncio.Queue()
        await self._ask("attach", job)

    async def next_report(self, token: str, proceed: bool) -> Report:
        """The config's next report; `proceed` says that the one before was accepted."""
        if proceed:
            self._commands.put(("proceed", (token,), None))
        return await self._reports[token].get()

    async def release(self, token: str) -> None:
        await self._ask("release", token)
        self._reports.pop(token, None)

    async def save(self, token: str) -> None:
        await self._ask("save", token)

    async def flush(self) -> float:
        """Everything recorded is on disk. Returns the seconds this host spent training so far."""
        await self._ask("flush")
        return self._busy_seconds

    async def _ask(self, name: str, *args: Any) -> None:
        self._loop = asyncio.get_running_loop()
        done = self._loop.create_future()
        self._commands.put((name, args, done))
        await done

    def _work(self) -> None:
        host = None
        while True:
            while host is None or not host.busy or not self._commands.empty():
                name, args, done = self._commands.get()
                try:
                    if host is None:
                        host = Host(self._settings, self._device, described(self._label, self._device))
                    getattr(host, name)(*args)
                    self._tell(_settle, done, None)
                except Exception as error:
                    self._tell(_settle, done, error)
                if self._commands.empty():
                    break
            started = time.perf_counter()
            for report in host.tick() if host else ():
                self._tell(self._deliver, report)
            self._busy_seconds += time.perf_counter() - started

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None  # every command came through it
        self._loop.call_soon_threadsafe(call, *args)

    def _deliver(self, report: Report) -> None:
        if report.token in self._reports:
            self._reports[report.token].put_nowait(report)


def _settle(done: asyncio.Future | None, error: Exception | None) -> None:
    """On the event loop: tell whoever asked that their command was carried out, or why not."""
    if done is None or done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


@dataclass(frozen=True)
class Slot:
    """A device that can have a host: one GPU or one core of a node."""

    node: str
    address: str
    kind: str  # "cuda" or "cpu"
    index: int

    @property
    def label(self) -> str:
        return f"{self.kind}:{self.index}@{self.address}"


class Pool:
    """Starts a host a device and says which one a config should attach to. A Ray actor; holds no lanes itself.

    GPUs only, where there are any: a host a GPU; else a host a core. Nodes that join later are found; hosts that died,
    and trials whose node died without a word, are let go.
    """

    def __init__(self, settings: HostSettings, log_file: str, most_hosts: int, cpu_share: float):
        self._settings = settings
        self._log_file = log_file
        self._most_hosts = most_hosts
        self._cpu_share = cpu_share
        self._hosts: dict[Slot, Any] = {}
        self._loads: dict[Slot, int] = {}
        self._programs: dict[Slot, dict[str, int]] = {}
        self._placed: dict[str, tuple[Slot, str, int, str]] = {}
        self._looked = 0.0
        self._look()

    def place(self, token: str, program: str, lanes: int, node: str = "") -> tuple[Any, str] | None:
        """(host, its label) for a config of `lanes` lanes whose trial runs on `node`; None while no device is left.
        Prefers a host that runs the program already, unless another is less than half as loaded."""
        self._look()
        if not self._hosts:
            return None
        least = min(self._loads, key=lambda slot: self._loads[slot])
        same = [slot for slot in self._hosts if self._programs[slot].get(program)]
        slot = min(same, key=lambda s: self._loads[s], default=least)
        if self._loads[slot] > 2 * self._loads[least] + lanes:
            slot = least
        self._loads[slot] += lanes
        self._programs[slot][program] = self._programs[slot].get(program, 0) + 1
        self._placed[token] = (slot, program, lanes, node)
        return self._hosts[slot], slot.label

    def leave(self, token: str) -> None:
        """A config has left the host it was placed on."""
        if token in self._placed:
            slot, program, lanes, _ = self._placed.pop(token)
            if slot in self._hosts:
                self._loads[slot] -= lanes
                self._programs[slot][program] -= 1

    def lost(self, token: str) -> None:
        """The host that a config was placed on has died: nothing is placed there again. Its device gets a new host when
        its node is still there."""
        if token in self._placed:
            self._drop(self._placed[token][0])

    async def flush(self) -> dict[str, float]:
        """Everything every host has recorded is on disk. Returns {host label: seconds spent training}."""
        seconds = {}
        for slot, host in list(self._hosts.items()):
            try:
                seconds[slot.label] = await host.flush.remote()
            except ray.exceptions.ActorDiedError:
                self._drop(slot)
        return seconds

    def _look(self) -> None:
        """Find devices that have no host yet and nodes that have gone, at most every ten seconds."""
        if self._hosts and time.monotonic() - self._looked < 10:
            return
        self._looked = time.monotonic()
        slots, nodes = find_slots(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for slot in [slot for slot in self._hosts if slot.node not in nodes]:
            self._drop(slot)
        for token, (slot, _, _, node) in list(self._placed.items()):
            if node and node not in nodes:  # the trial cannot let go any more; it is tried again under another token
                self._hosts[slot].release.remote(token)
                self.leave(token)
        for slot in slots:
            if slot not in self._hosts and len(self._hosts) < self._most_hosts:
                self._hosts[slot] = self._start(slot)
                self._loads[slot] = 0
                self._programs[slot] = {}

    def _drop(self, slot: Slot) -> None:
        """Forget a host that has died, and who was on it."""
        for table in (self._hosts, self._loads, self._programs):
            table.pop(slot, None)
        self._placed = {token: placed for token, placed in self._placed.items() if placed[0] != slot}

    def _start(self, slot: Slot) -> Any:
        gpu = slot.kind == "cuda"
        actor = ray.remote(HostActor).options(
            num_cpus=0 if gpu else self._cpu_share,
            num_gpus=1 if gpu else 0,
            max_concurrency=10_000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        )
        device = "cuda" if gpu else "cpu"
        return actor.remote(self._settings, device, slot.label, self._log_file, None if gpu else 1)


def find_slots() -> list[Slot]:
    """Every device of the cluster that may have a host."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = [
        Slot(node["NodeID"], node["NodeManagerAddress"], "cuda", i)
        for node in nodes
        for i in range(int(node["Resources"].get("GPU", 0)))
    ]
    if gpus:
        return gpus
    return [
        Slot(node["NodeID"], node["NodeManagerAddress"], "cpu", i)
        for node in nodes
        for i in range(int(node["Resources"].get("CPU", 0)))
    ]
