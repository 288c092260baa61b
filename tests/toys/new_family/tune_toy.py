"""Search the toy family. `python tune_toy.py --help`"""

from search_spaces.toy import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
