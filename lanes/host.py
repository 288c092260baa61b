"""The device host: one Ray actor a device owns every lane on it. `lanes.pool` starts hosts and places configs on them.

A host holds its device whole (one GPU, or one processor core), so that
Ray's accounting is exact; the trials that attach to it hold next to nothing. Each program on the device has its own
`Stack`; stacks with work take turns. Nothing heavy is imported before the actor runs, because every trial process
imports this module.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanes.job import Job, Report, program_name
from lanes.placement import Slot
from lanes.records import OnceRecorder, StorageLost, StoredCheckpoints
from lanes.writer import Writer

if TYPE_CHECKING:
    from lanes.stack import Stack
    from lanes.writer import Checkpoints, Recorder

log = logging.getLogger(__name__)
SWITCH_SECONDS = 0.0005
"""How long a thread of a host's may keep Python to itself: at the usual 5 ms, the one that feeds the device waits for
the one that writes files, call after call."""


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
        make_log: device label -> the file that its host logs to, asked for on the host's node.
        make_formatter: format -> what formats the host's log.
        device: torch device of every host; "" is the one that Ray gave it.
    """

    engine: str
    lanes: int
    wanted: int
    expected_steps: float
    data_dir: Path | None
    cache_dir: Path
    make_recorder: Callable[[str], Recorder]
    make_checkpoints: Callable[[], Checkpoints]
    make_log: Callable[[str], str] = lambda label: os.devnull
    make_formatter: Callable[[str], logging.Formatter] = logging.Formatter
    device: str = ""


class Host:
    """All lanes of one device, without Ray: `HostActor` drives it, tests may too."""

    def __init__(
        self,
        settings: HostSettings,
        device: str,
        label: str,
        on_rate: Callable[[str, float, int], None] = lambda program, rate, lanes: None,
    ):
        self.settings = settings
        self._on_rate = on_rate  # told (program, trial-steps a second, lanes) of every program that was probed
        self.device = device
        self.label = label
        self._writer = Writer(
            OnceRecorder(settings.make_recorder(label)), StoredCheckpoints(settings.make_checkpoints())
        )
        self._stacks: dict[str, Stack] = {}
        self._stack_of: dict[str, str] = {}  # token -> program key
        self._arrays: dict[tuple, Any] = {}  # part of a memory-mapped file -> tensor on the device, for all programs
        self._notices: list[str] = []  # for the user, with the next report
        self._ended_here: list[Report] = []  # of configs for which there was no memory

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
            make_engine = lambda: self._make_engine(family, program, hyper, self._stacks[key].most)
            self._stacks[key] = Stack(family, program, make_engine, self._writer)
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
        if key is not None and key in self._stacks:
            self._with_memory(key, lambda: self._stacks[key].release(token))
            self._stacks[key].release(token)  # again, where memory ran out half-way; nothing otherwise

    def save(self, token: str) -> None:
        """Checkpoint a config now."""
        if token in self._stack_of:
            key = self._stack_of[token]
            self._with_memory(key, lambda: self._stacks[key].save(token))

    def save_all(self) -> None:
        """Checkpoint everything now: the sweep is about to stop."""
        for key in list(self._stacks):
            self._with_memory(key, self._stacks[key].save_all)

    def flush(self) -> None:
        self._writer.flush()
        self._writer.settle()

    def tick(self) -> list[Report]:
        """One turn of every stack with work. A family that raises takes only its own stack down; a lack of memory
        takes lanes away, of its own stack or of the largest other, until one lane alone does not fit."""
        reports: list[Report] = []
        for key, stack in list(self._stacks.items()):
            try:
                reports += self._with_memory(key, stack.tick) or ()
            except StorageLost as error:
                reports += self._give_up(key, str(error), "storage")
            except Exception:
                reports += self._give_up(key, traceback.format_exc(), "crashed")
        reports += self._ended_here
        self._ended_here = []
        if reports and self._notices:
            reports[0] = replace(reports[0], notice="; ".join(self._notices))
            self._notices = []
        return [replace(report, device=self.label) for report in reports]

    def _give_up(self, key: str, error: str, reason: str) -> list[Report]:
        """Every config of a stack ends."""
        log.error("%s: a program failed\n%s", self.label, error)
        tokens = [token for token, owner in self._stack_of.items() if owner == key]
        for token in tokens:
            del self._stack_of[token]
        del self._stacks[key]
        return [Report(token, 0, True, {}, "", 0, error, reason=reason) for token in tokens]

    # --- memory ---

    def _with_memory(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` of a stack returns; None where memory ran out, and there is more of it for the next turn."""
        from lanes.memory import give_back, is_out_of_memory

        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = traceback.format_exc()
        # the error is gone, and with it the frames that held what there was no memory for
        self._make_room(key, told)
        give_back(self.device)
        return None

    def _make_room(self, key: str, error: str) -> None:
        """Halve the stack's lanes, or, where it has one, those of the largest other; at last end its config."""
        stack = self._stacks[key]
        others = [other for name, other in self._stacks.items() if name != key]
        for other in others:
            other.rest()
        largest = max(others, key=lambda other: other.in_memory, default=stack)
        smaller = stack if stack.crowd > 1 or largest.in_memory <= 1 else largest
        if smaller.crowd > 1:
            before = smaller.crowd
            smaller.shrink()
            notice = f"{self.label}: out of memory with {before} lanes, going on with {smaller.most}"
            log.warning("%s", notice)
            self._notices.append(notice)
            return
        token = stack.out_of_memory()
        stack.shrink()
        log.error("%s: out of memory with one lane\n%s", self.label, error)
        if token:
            stack.release(token)
            self._stack_of.pop(token, None)
            self._ended_here.append(Report(token, 0, True, {}, "", 0, error, reason="oom"))

    # --- engines ---

    def _make_engine(self, family: Any, program: Any, hyper: Any, most: int | None = None) -> tuple[Any, int]:
        """`most`: the lanes that fit into memory, once it has run out."""
        from lanes.engine import put
        from lanes.probe import compile_kernels, make_engine, probe, resolve_engine
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
                wanted=min(self.settings.lanes or self.settings.wanted, most or self.settings.wanted),
                expected_steps=self.settings.expected_steps,
                engines=None if name == "auto" else (name,),
                cache=self.settings.cache_dir / "probes",
            )
            log.info("%s: probe of %s\n%s", self.label, program_key(family.name, program), "\n".join(choice.lines()))
            self._on_rate(program_name(asdict(program)), max(row.rate for row in choice.table), choice.lanes)
            name, lanes = choice.engine, self.settings.lanes or choice.lanes
        elif self.device.startswith("cuda"):  # a probe does the same
            compile_kernels(make_engine("serial", 1, family, program, arrays, self.device, host_arrays), hyper)
        lanes = min(lanes, most or lanes)
        return make_engine(name, lanes, family, program, arrays, self.device, host_arrays), lanes

    def _put(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """On the device, once for all programs that read the same part of a memory-mapped file."""
        from lanes.engine import put

        placed = {}
        for name, array in arrays.items():
            part = _part(array)
            if part is None:
                placed[name] = put({name: array}, self.device)[name]
                continue
            if part not in self._arrays:
                self._arrays[part] = put({name: array}, self.device)[name]
            placed[name] = self._arrays[part]
        return placed


def _part(array: Any) -> tuple | None:
    """Which part of which file a memory-mapped array shows; None for an array in memory."""
    if not getattr(array, "filename", None):
        return None
    whole = array
    while hasattr(whole.base, "filename"):
        whole = whole.base
    return str(array.filename), array.ctypes.data - whole.ctypes.data, array.shape, array.strides, array.dtype.str


def described(label: str, device: str) -> str:
    """A device with its model, for readers who wonder about times: `cuda:0@10.0.0.2 NVIDIA H200`."""
    if device != "cuda":
        return label
    import torch

    return f"{label} {torch.cuda.get_device_name()}"


class HostActor:
    """The host behind Ray: calls are queued, a thread of its own trains, reports wake whoever waits for them."""

    def __init__(self, settings: HostSettings, device: str, slot: Slot, threads: int | None, pool: Any):
        import torch

        label = slot.label
        handler = logging.FileHandler(settings.make_log(label))
        handler.setFormatter(settings.make_formatter(f"%(asctime)s {label} %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        sys.setswitchinterval(SWITCH_SECONDS)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32; programs that want less say bf16
        if threads is not None:
            torch.set_num_threads(threads)
        if node_cache := os.environ.get("LANEWISE_CACHE"):
            settings = replace(settings, cache_dir=Path(node_cache))  # this node's, not the driver's
        self._settings, self._device, self._label = settings, device, label
        self._on_rate = lambda program, rate, lanes: pool.measured.remote(slot, program, rate, lanes)
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

    async def save_all(self) -> None:
        await self._ask("save_all")

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
                        label = described(self._label, self._device)
                        host = Host(self._settings, self._device, label, self._on_rate)
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
