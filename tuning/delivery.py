"""The processes beside the driver: MLflow's recorder while a sweep runs and the report at its end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from tuning.sweep import SweepPlan

LOOK_SECONDS = 5.0
log = logging.getLogger(__name__)


class Delivery:
    """`tuning.sync` beside a running sweep. The driver never waits for it while it searches; where it dies it is
    started again, and goes on where it was."""

    def __init__(self, plan: SweepPlan):
        self._plan = plan
        self._looked = time.monotonic()
        self._process = self._start()

    def check(self) -> None:
        """Start it again if it has died; to be called often."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if self._process.poll() is not None:
                log.warning("MLflow's recorder ended with code %s: it is started again", self._process.returncode)
                self._process = self._start()

    def finish(self) -> None:
        """Wait until everything is delivered, or given up for now."""
        if self._process.wait() < 0:  # killed, so that it could not even say that the server is away
            self._process = self._start()
        if self._process.wait() != 0:
            log.error(
                "MLflow's recorder ended with code %s; `python -m tuning.sync %s` delivers later",
                self._process.returncode,
                self._plan.name,
            )

    def _start(self) -> subprocess.Popen:
        plan = self._plan
        command = [sys.executable, "-m", "tuning.sync", plan.name, "--storage", plan.where, "--follow"]
        # a session of its own: Ctrl-C in the terminal is for the driver, which then waits for the delivery
        return subprocess.Popen(
            [*command, str(os.getpid())], stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True
        )


def report(plan: SweepPlan) -> None:
    """Write the sweep's HTML report."""
    command = [sys.executable, "-m", "analysis", "report", plan.name, "--storage", plan.where]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=_environment(), check=False)
    if done.returncode:
        log.error("the report ended with code %s; `%s` writes it again", done.returncode, " ".join(command[1:]))


def _environment() -> dict[str, str]:
    """Subprocesses find the code where this process found it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
