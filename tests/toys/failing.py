"""The toy family with a bug in it: a net of three units raises as soon as it is trained."""

from dataclasses import replace

from search_spaces.space import Choice, Space
from search_spaces.sweeps import Sweep, Sweeps
from tests.toys.regression import FAMILY as REGRESSION
from tests.toys.regression import step as regression_step
from tuning.cli import main


def step(program, state, hyper, data):
    if program.width == 3:
        raise ValueError("three units are not enough")
    return regression_step(program, state, hyper, data)


FAMILY = replace(REGRESSION, name="tests.toys.failing", step=step)
SWEEPS = Sweeps(
    family="tests.toys.failing",
    default="widths",
    sweeps=(Sweep("widths", "one of three fails", "control", Space((Choice("width", (4, 3, 5)),)), seeds=2),),
)

if __name__ == "__main__":
    main(SWEEPS)
