"""The toy family under a bad star: what goes wrong is read from the file that LANEWISE_TEST_FAULT names, at every step
of every program. Its text: `crash`, `crash WIDTH`, `oom WIDTH`, or nothing."""

import os
from dataclasses import replace
from pathlib import Path

from search_spaces.space import Choice, Space
from search_spaces.sweeps import Sweep, Sweeps
from tests.toys.regression import FAMILY as REGRESSION
from tests.toys.regression import step as regression_step
from tuning.cli import main


def step(program, state, hyper, data):
    path = os.environ.get("LANEWISE_TEST_FAULT")
    fault, _, width = (Path(path).read_text() if path else "").partition(" ")
    if fault and (not width or int(width) == program.width):
        if fault == "oom":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes.")
        raise ValueError("a bad star: password=hunter2")
    return regression_step(program, state, hyper, data)


FAMILY = replace(REGRESSION, name="tests.toys.misbehaving", step=step)
SWEEPS = Sweeps(
    family="tests.toys.misbehaving",
    default="widths",
    sweeps=(Sweep("widths", "some fail", "control", Space((Choice("width", (4, 3, 5, 6, 7, 8, 9)),)), seeds=2),),
)

if __name__ == "__main__":
    main(SWEEPS)
