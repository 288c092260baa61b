"""Search weight-decay variants of a VGG13-like net. `python tune_vgg_decay.py --help`"""

from tuning.cli import main

from search_spaces.vgg_decay import SWEEPS

if __name__ == "__main__":
    main(SWEEPS)
