"""What to try on the toy family."""

from search_spaces.space import Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps

SWEEPS = Sweeps(
    family="toy",
    default="rates",
    sweeps=(
        Sweep("rates", "two learning rates", "product", Space((Choice("lr", (0.1, 0.001)),)), seeds=2),
        Sweep(
            "range",
            "a range of learning rates",
            "product",
            Space((Range("lr", 1e-4, 0.3, log=True),)),
            searcher="random",
            trials=8,
        ),
    ),
)
