"""The pool: starts a host on every device, finds devices that join, and says which host a config trains on.

The only module of `lanes` that imports Ray, and nothing heavy: the driver imports it too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lanes.host import HostActor, HostSettings
from lanes.placement import Placement, Rule, Slot

ACCELERATOR = "accelerator_type:"


class Pool:
    """Starts a host a device and says which one a config should attach to. A Ray actor; holds no lanes itself.

    GPUs only, where there are any: a host a GPU; else a host a core. Nodes that join later are found; hosts that died,
    and trials whose node died without a word, are let go. Which device a config gets is `lanes.placement`'s rule; with
    the packed rule a host is started when the others are full. Once the sweep thins out, hosts without lanes end, so
    that their nodes are idle and an autoscaler may take them back.
    """

    def __init__(self, settings: HostSettings, most_hosts: int, cpu_share: float, rule: Rule = "spread"):
        self._settings = settings
        self._most_hosts = most_hosts
        self._cpu_share = cpu_share
        self._rule = rule
        self._placement = Placement(rule, settings.lanes or settings.wanted)
        self._hosts: dict[Slot, Any] = {}
        self._resting: dict[str, float] = {}  # labels of hosts that were let go -> seconds they had trained
        self._thinning = False
        self._looked = 0.0
        self._look()

    def place(self, token: str, program: str, lanes: int, node: str = "") -> tuple[Any, str] | None:
        """(host, its label) for a config of `lanes` lanes whose trial runs on `node`; None while no device is left."""
        self._look()
        if self._rule == "packed" and self._placement.full(program, lanes):
            self._start_hosts(1)
        slot = self._placement.place(token, program, lanes, node)
        if slot is None and self._thinning:  # the last one was let go, and somebody comes back
            self._start_hosts(1)
            slot = self._placement.place(token, program, lanes, node)
        return None if slot is None else (self._hosts[slot], slot.label)

    def leave(self, token: str) -> None:
        """A config has left the host it was placed on."""
        self._placement.leave(token)

    def lost(self, token: str) -> None:
        """The host that a config was placed on has died: nothing is placed there again. Its device gets a new host when
        its node is still there."""
        if token in self._placement.placed:
            self._drop(self._placement.placed[token].slot)

    def measured(self, slot: Slot, program: str, rate: float, lanes: int) -> None:
        """A host says how fast its device is."""
        self._placement.measured(slot, program, rate, lanes)

    def grow(self, most_hosts: int) -> None:
        """There are more configs in flight now: so many hosts may be of use."""
        self._most_hosts = max(self._most_hosts, most_hosts)

    async def thin_out(self) -> int:
        """No more configs will come: let the hosts go that have nothing to train. Returns how many are in use."""
        self._thinning = True
        for slot, host in list(self._hosts.items()):
            if self._placement.loads[slot]:
                continue
            self._placement.drop(slot)  # before anything is waited for: nobody is placed there any more
            del self._hosts[slot]
            with contextlib.suppress(ray.exceptions.ActorDiedError):
                self._resting[slot.label] = self._resting.get(slot.label, 0.0) + await host.flush.remote()
            ray.kill(host)
        return len(self._hosts)

    async def flush(self) -> dict[str, float]:
        """Everything every host has recorded is on disk. Returns {host label: seconds spent training}."""
        seconds = dict(self._resting)
        for slot, host in list(self._hosts.items()):
            try:
                seconds[slot.label] = seconds.get(slot.label, 0.0) + await host.flush.remote()
            except ray.exceptions.ActorDiedError:
                self._drop(slot)
        return seconds

    async def save(self) -> None:
        """Every host checkpoints what it trains."""
        for slot, host in list(self._hosts.items()):
            try:
                await host.save_all.remote()
            except ray.exceptions.ActorDiedError:
                self._drop(slot)

    def _look(self) -> None:
        """Find devices that have no host yet and nodes that have gone, at most every ten seconds."""
        if self._hosts and time.monotonic() - self._looked < 10:
            return
        self._looked = time.monotonic()
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for slot in [slot for slot in self._hosts if slot.node not in nodes]:
            self._drop(slot)
        for token, placed in list(self._placement.placed.items()):
            if placed.node and placed.node not in nodes:
                # the trial cannot let go any more; it is tried again under another token
                self._hosts[placed.slot].release.remote(token)
                self.leave(token)
        if self._rule == "packed" or self._thinning:
            self._start_hosts(0 if self._hosts else 1)
        else:
            self._start_hosts(self._most_hosts)

    def _start_hosts(self, more: int) -> None:
        """Start hosts on up to so many devices that have none."""
        for slot in find_slots() if more else ():
            if more and slot not in self._hosts and len(self._hosts) < self._most_hosts:
                self._hosts[slot] = self._start(slot)
                self._placement.add(slot)
                more -= 1

    def _drop(self, slot: Slot) -> None:
        """Forget a host that has died, and who was on it."""
        self._hosts.pop(slot, None)
        self._placement.drop(slot)

    def _start(self, slot: Slot) -> Any:
        gpu = slot.kind == "cuda"
        actor = ray.remote(HostActor).options(
            num_cpus=0 if gpu else self._cpu_share,
            num_gpus=1 if gpu else 0,
            max_concurrency=10_000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        )
        device = self._settings.device or ("cuda" if gpu else "cpu")
        me = ray.get_runtime_context().current_actor
        return actor.remote(self._settings, device, slot, 1 if device == "cpu" else None, me)


def find_slots() -> list[Slot]:
    """Every device of the cluster that may have a host."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for kind, resource in (("cuda", "GPU"), ("cpu", "CPU")):
        slots = [
            Slot(node["NodeID"], node.get("NodeName") or node["NodeManagerAddress"], kind, i, _model(node))
            for node in nodes
            for i in range(int(node["Resources"].get(resource, 0)))
        ]
        if slots:
            return slots
    return []


def _model(node: Mapping[str, Any]) -> str:
    """What Ray says a node's accelerators are, "" for processors."""
    names = (name for name in node["Resources"] if name.startswith(ACCELERATOR))
    return next(names, "").removeprefix(ACCELERATOR)
