"""Search multi-neuron models: images, tasks in a row, text. `python tune_multi_neuron.py --help`"""

from search_spaces.multi_neuron import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
