"""Which device a config trains on: the rule, without Ray. `lanes.pool.Pool` starts hosts and asks here.

A device's load is counted in lanes over its speed, the trial-steps a second that its host measured for the program. So
devices of different kinds get lanes in proportion to their speeds. Two rules:

* spread (default): the device that would be done first, but one that runs the program already is kept unless another
  would be done in less than half the time: a program that is compiled there and whose stack grows is worth that much;
* packed: the fullest device that still has room for the config's lanes, one that runs the program first; a further
  device only when none has room. Fewer devices are in use, and an autoscaled cluster stays smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

Rule = Literal["spread", "packed"]


@dataclass(frozen=True)
class Slot:
    """A device that can have a host: one GPU or one core of a node.

    Args:
        node: Ray's id of it.
        address: what people call it.
        kind: "cuda" or "cpu".
        index: which of the node's devices.
        model: what Ray says the accelerator is; devices of one model are taken to be equally fast until measured.
    """

    node: str
    address: str
    kind: str
    index: int
    model: str = ""

    @property
    def label(self) -> str:
        return f"{self.kind}:{self.index}@{self.address}"


@dataclass(frozen=True)
class Placed:
    """A config on a device, and the node where its trial's process is ("" unknown)."""

    slot: Slot
    program: str
    lanes: int
    node: str


class Placement:
    """Loads of devices, and the rule.

    Args:
        rule: see the module.
        room: lanes that fill a device, until its host has told how many it trains of a program.
    """

    def __init__(self, rule: Rule = "spread", room: int = 1):
        self._rule = rule
        self._room = room
        self.loads: dict[Slot, int] = {}
        self.placed: dict[str, Placed] = {}
        self._programs: dict[Slot, dict[str, int]] = {}
        self._rates: dict[tuple[Slot, str], float] = {}
        self._lanes: dict[tuple[Slot, str], int] = {}

    def add(self, slot: Slot) -> None:
        """A device that may be used."""
        self.loads.setdefault(slot, 0)
        self._programs.setdefault(slot, defaultdict(int))

    def drop(self, slot: Slot) -> None:
        """A device is gone, and with it who was on it. What was measured of it stays known."""
        self.loads.pop(slot, None)
        self._programs.pop(slot, None)
        self.placed = {token: placed for token, placed in self.placed.items() if placed.slot != slot}

    def measured(self, slot: Slot, program: str, rate: float, lanes: int) -> None:
        """A host's trial-steps a second of a program with all its `lanes`."""
        if rate > 0:
            self._rates[slot, program] = rate
            self._lanes[slot, program] = lanes

    def place(self, token: str, program: str, lanes: int, node: str = "") -> Slot | None:
        """The device for a config of `lanes` lanes; None while there is none."""
        if not self.loads:
            return None
        slot = self._choose(program, lanes)
        self.loads[slot] += lanes
        self._programs[slot][program] += 1
        self.placed[token] = Placed(slot, program, lanes, node)
        return slot

    def leave(self, token: str) -> None:
        """A config has left its device."""
        placed = self.placed.pop(token, None)
        if placed is not None and placed.slot in self.loads:
            self.loads[placed.slot] -= placed.lanes
            self._programs[placed.slot][placed.program] -= 1

    def full(self, program: str, lanes: int) -> bool:
        """Whether no device has room for a config."""
        return not any(self._has_room(slot, program, lanes) for slot in self.loads)

    def _choose(self, program: str, lanes: int) -> Slot:
        if self._rule == "packed":
            roomy = [slot for slot in self.loads if self._has_room(slot, program, lanes)]
            if roomy:
                return max(roomy, key=lambda slot: (self._programs[slot][program] > 0, self.loads[slot]))
        least = min(self.loads, key=lambda slot: self._cost(slot, program, lanes))
        same = [slot for slot in self.loads if self._programs[slot][program]]
        if self._rule == "spread" and same:
            kept = min(same, key=lambda slot: self._cost(slot, program, lanes))
            # on a GPU another host of the program means compiling it again; on a core it costs next to nothing
            idle = kept.kind == "cpu" and self.loads[kept] and not self.loads[least]
            if not idle and self._cost(kept, program, lanes) <= 2 * self._cost(least, program, lanes):
                return kept
        return least

    def _has_room(self, slot: Slot, program: str, lanes: int) -> bool:
        return not self.loads[slot] or self.loads[slot] + lanes <= self._lanes.get((slot, program), self._room)

    def _cost(self, slot: Slot, program: str, lanes: int) -> float:
        """How long the device's lanes take for a step each, this config's among them."""
        return (self.loads[slot] + lanes) / self.rate(slot, program)

    def rate(self, slot: Slot, program: str) -> float:
        """Its own, else that of its model, else the mean of all devices for the program; 1 where nobody measured."""
        if (slot, program) in self._rates:
            return self._rates[slot, program]
        known = [(other, rate) for (other, name), rate in self._rates.items() if name == program]
        alike = [rate for other, rate in known if other.model == slot.model and slot.model]
        return _mean(alike or [rate for _, rate in known])


def _mean(rates: Iterable[float]) -> float:
    rates = list(rates)
    return fmean(rates) if rates else 1.0
