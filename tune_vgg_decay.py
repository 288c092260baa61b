"""Search weight-decay variants of a VGG13-like net. `python tune_vgg_decay.py --help`"""

from search_spaces.vgg_decay import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
