"""One driver a sweep, where the sweep is in object storage: a claim that is renewed, and who may take it over.

Only writing, listing and the storage's own clock are used, which every kind of object storage has. A driver writes
`<sweep>/driver/<generation>-<id>.json` and renews it every RENEW_SECONDS. A claim that is not renewed for STALE_SECONDS
is of a driver that is gone; the next driver's claim has a higher generation, and whoever sees a higher one than its own
writes nothing more. Of two that begin at once each sees the other's claim, or one of them does: those give up.
What this does not protect from: a driver stopped for longer than STALE_SECONDS between its last look and the arrival
of one write (seconds, on a machine that was suspended) may write one entry beside its successor's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import replace
from typing import Any

from trainables.family import BadValue
from tuning.storage import Bucket, StorageError

RENEW_SECONDS = 10.0
STALE_SECONDS = 40.0
log = logging.getLogger(__name__)


class Lease:
    """Held from `take` to `release`."""

    def __init__(self, store: Bucket):
        self._store = store
        self._key = ""
        self._generation = 0
        self._content = json.dumps({"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}).encode()
        self._renewed = 0.0
        self._lost = False
        self._ended = threading.Event()

    def take(self) -> None:
        """Claim the sweep; waits where a claim may be of a driver that is gone. `BadValue` where one is at work."""
        claims = self._wait_for_the_dead()
        self._generation = 1 + max((_generation(key) for key in claims), default=0)
        self._key = f"driver/{self._generation:06d}-{uuid.uuid4().hex}.json"
        self._put()
        rivals = [key for key in self._claims() if _generation(key) >= self._generation and key != self._key]
        if rivals:
            self._store.remove(self._key)
            raise BadValue(f"another driver began on {self._store} at the same time: this one leaves it alone")
        for key in claims:
            self._store.remove(key)
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises `StorageError` where the sweep may have become another driver's."""
        if not self._lost and time.monotonic() - self._renewed > STALE_SECONDS * 0.75:
            self._look()
        if self._lost:
            raise StorageError(f"another driver has taken over {self._store}: this one stops")

    def release(self) -> None:
        self._ended.set()
        if not self._lost:
            with contextlib.suppress(StorageError):  # it goes stale by itself
                replace(self._store, patience=10.0).remove(self._key)

    # --- inside ---

    def _claims(self) -> dict[str, float]:
        return self._store.times("driver")

    def _put(self) -> None:
        began = time.monotonic()
        self._store.write(self._key, self._content)
        self._renewed = began

    def _look(self) -> None:
        """Renew, unless a later driver is there."""
        if any(_generation(key) > self._generation for key in self._claims()):
            self._lost = True
            return
        self._put()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self._lost:
            try:
                self._look()
            except Exception as error:
                log.warning("the claim on %s could not be renewed: %s", self._store, error)

    def _wait_for_the_dead(self) -> dict[str, float]:
        """Claims of drivers that are gone; waits until that can be said of all."""
        first, told = self._claims(), False
        deadline = time.monotonic() + STALE_SECONDS
        while True:
            claims = self._claims()
            alive = {key for key in claims if not self._is_dead(key)}
            renewed = [key for key in alive if claims[key] > first.get(key, 0.0)]
            if renewed or not alive or time.monotonic() > deadline:
                if renewed:
                    who = self._who(renewed[0])
                    raise BadValue(f"{self._store} is being written by another driver, {who}: wait for it, or end it")
                return claims
            if not told:
                told = True
                print(
                    f"the last driver, {self._who(min(alive))}, did not say that it ended: waiting up to "
                    f"{STALE_SECONDS:.0f} s to be sure that it is gone",
                    file=sys.stderr,
                )
            time.sleep(1.0)

    def _is_dead(self, key: str) -> bool:
        """Certainly: it ran on this machine, and its process is gone."""
        claim = self._read(key)
        if claim.get("host") != socket.gethostname() or claim.get("boot") != _boot():
            return False
        try:
            os.kill(int(claim["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _who(self, key: str) -> str:
        claim = self._read(key)
        return f"process {claim.get('pid', '?')} on {claim.get('host', 'a machine unknown')}"

    def _read(self, key: str) -> dict[str, Any]:
        try:
            return json.loads(self._store.read(key))
        except (FileNotFoundError, ValueError):
            return {}


def _generation(key: str) -> int:
    return int(key.rpartition("/")[2].split("-")[0])


def _boot() -> str:
    """This boot of this machine's kernel, and the processes that can be seen: where a process id means something."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
