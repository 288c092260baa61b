"""Search plasticity methods of a continual vision transformer. `python tune_ci_vit.py --help`"""

from search_spaces.ci_vit import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
