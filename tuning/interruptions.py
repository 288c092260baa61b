"""Ctrl-C once: in order. Twice: now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any


class Interruptions:
    """Ctrl-C (and SIGTERM, which clusters send before they take a machine away) once: in order; twice: now.

    Args:
        say: writes a line to the terminal.
        last_words: said before the process ends at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None], last_words: str):
        self._say, self._last_words = say, last_words
        self._before: dict[int, Any] = {}
        self._asked = False
        self.on_first: Callable[[], None] | None = None
        """While the sweep searches: asks it to stop. At other times the first is a KeyboardInterrupt."""

    def catch(self) -> None:
        """Take the signals; again after Ray's start, which takes SIGTERM for itself."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def release(self) -> None:
        """Give the signals back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked:
            self._say(self._last_words)
            os._exit(130)
        self._asked = True
        if self.on_first is None:
            raise KeyboardInterrupt
        self.on_first()
        self._say("stopping: checkpoints, then the report; once more to stop now")
