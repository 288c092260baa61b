"""Work that was given to a thread and is not done yet, with the bytes it is about."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from typing import Any


class Underway:
    """Futures of one thread, which does them in their order."""

    def __init__(self) -> None:
        self._all: deque[tuple[Future[Any], int]] = deque()

    def add(self, work: Future[Any], size: int) -> None:
        self._all.append((work, size))

    @property
    def bytes(self) -> int:
        """Of all that is not done."""
        while self._all and self._all[0][0].done():
            self._all.popleft()
        return sum(size for _, size in self._all)

    def wait_for_oldest(self) -> None:
        wait([self._all.popleft()[0]])
