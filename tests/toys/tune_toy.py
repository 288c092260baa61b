"""Search the toy family. `python -m tests.toys.tune_toy --help`"""

from tests.toys.sweeps import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
