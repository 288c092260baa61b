"""Sweeps of the toy family."""

from search_spaces.space import Arms, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps

SWEEPS = Sweeps(
    family="tests.toys.regression",
    default="demo",
    sweeps=(
        Sweep(
            "demo",
            "two widths, a learning rate range",
            "product",
            Space((Choice("width", (3, 8)), Range("lr", 1e-4, 0.3, log=True))),
            seeds=2,
            searcher="optuna",
            scheduler="asha",
            trials=12,
        ),
        Sweep(
            "grid",
            "six learning rates",
            "control",
            Space((Choice("lr", (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)),)),
            seeds=2,
        ),
        Sweep(
            "named",
            "runs with names",
            "notebook",
            Space((Arms("run", {"exp1": {"lr": 0.1}, "exp2": {"lr": 0.01}}, run_names=True),)),
        ),
    ),
)
