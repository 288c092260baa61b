"""The processes beside the driver: MLflow's recorder (`tuning.sync`) and the report.

Both are started with the sweep, so that what they import is ready when they are needed: while Ray starts there is
nothing else to do, and a short sweep would spend as long on importing MLflow and matplotlib as on its training. Each
hangs on a pipe of the driver's and knows by its end that the driver is gone. Where the recorder dies it is started
again, and goes on where it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time

from tuning.sweep import SweepPlan

LOOK_SECONDS = 5.0
log = logging.getLogger(__name__)


class Delivery:
    """Both processes of one sweep. The driver waits for neither while it searches."""

    def __init__(self, plan: SweepPlan):
        self._plan = plan
        of_sweep = [plan.name, "--storage", plan.where]
        self._recorder = [sys.executable, "-m", "tuning.sync", *of_sweep, "--follow", str(os.getpid())]
        self._sync, self._looked = _start(self._recorder), time.monotonic()
        # the report goes to MLflow with the recorder's other files: it need not load MLflow, too
        self._command = [sys.executable, "-m", "analysis", "report", *of_sweep, "--journal", "--tracking-uri", "none"]
        self._report = _start([*self._command, "--when-told"])

    def check(self) -> None:
        """Start the recorder again if it has died; to be called often."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if self._sync.poll() is not None:
                log.warning("MLflow's recorder ended with code %s: it is started again", self._sync.returncode)
                self._sync = _start(self._recorder)

    def search_is_over(self) -> None:
        """The journal is complete: deliver it and write the report, both at once."""
        _tell(self._sync)
        _tell(self._report)

    def wait_for_report(self) -> None:
        """Until the report is written. One that was killed while it waited is started again."""
        _hang_up(self._report)
        code = self._report.wait()
        if code < 0:
            code = subprocess.run(self._command, stdin=subprocess.DEVNULL, env=_environment(), check=False).returncode
        if code:
            command = f"python -m analysis report {self._plan.name} --storage {self._plan.where}"
            log.error("the report ended with code %s; `%s` writes it again", code, command)

    def finish(self) -> None:
        """Wait until everything is in MLflow, the report too, or given up for now."""
        _hang_up(self._sync)
        if self._sync.wait() < 0:  # killed, so that it could not even say that the server is away
            self._sync = _start(self._recorder)
            _hang_up(self._sync)
        if self._sync.wait() != 0:
            log.error(
                "MLflow's recorder ended with code %s; `python -m tuning.sync %s` delivers later",
                self._sync.returncode,
                self._plan.name,
            )


def _start(command: list[str]) -> subprocess.Popen:
    # a session of its own: Ctrl-C in the terminal is for the driver, which then waits for the delivery
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment(), start_new_session=True)


def _tell(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which whoever waits for it finds out
        process.stdin.write(b"\n")
        process.stdin.flush()


def _hang_up(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _environment() -> dict[str, str]:
    """Subprocesses find the code where this process found it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
