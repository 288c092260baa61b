"""What epochs read, worked out once for every lane of the same seed, and on a GPU ahead of need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from trainables.family import Arrays, Family

KEPT = 128
"""Orders kept at least, the newest: a config that starts later reads what those before it have read."""


class Orders:
    """`order` and `test_order` of a family, which depend on seed and epoch alone: all configs of a sweep share them.

    Args:
        family, program, arrays: what works them out, on the arrays' device.
        ahead: in a thread, on being told `expect`; else only on being asked.
    """

    def __init__(self, family: Family, program: Any, arrays: Arrays, ahead: bool):
        self._family, self._program, self._arrays = family, program, arrays
        self._thread = ThreadPoolExecutor(1, "orders") if ahead else None
        self._known: OrderedDict[tuple[str, int, int], Future] = OrderedDict()

    def expect(self, kind: str, seed: int, epoch: int) -> None:
        """`get` will be asked for this."""
        wanted = kind, seed, epoch
        if wanted in self._known:
            self._known.move_to_end(wanted)
        elif self._thread is not None:
            make = getattr(self._family, kind)
            self._known[wanted] = self._thread.submit(make, self._program, self._arrays, seed, epoch)

    def get(self, kind: str, seed: int, epoch: int) -> Mapping[str, Tensor]:
        """The family's `kind` ("order" or "test_order") of an epoch; shared, not to be changed."""
        self.expect(kind, seed, epoch)
        wanted = kind, seed, epoch
        if wanted not in self._known:
            self._known[wanted] = Future()
            self._known[wanted].set_result(getattr(self._family, kind)(self._program, self._arrays, seed, epoch))
        return self._known[wanted].result()

    def trim(self, lanes: int) -> None:
        """Keep what so many lanes may ask for next, and what was asked for last."""
        while len(self._known) > max(KEPT, 4 * lanes):
            self._known.popitem(last=False)
