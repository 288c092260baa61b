"""Search convolutional spiking nets with learned delays. `python tune_snn_delays.py --help`"""

from search_spaces.snn_delays import SWEEPS
from tuning.cli import main

if __name__ == "__main__":
    main(SWEEPS)
