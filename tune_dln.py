"""Search linear recurrences and small transformers on digits and text. `python tune_dln.py --help`"""

from search_spaces.dln import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
