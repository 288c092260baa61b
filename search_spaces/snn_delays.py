"""Sweeps of convolutional spiking nets with learned delays: the CSNN-1D-Delays notebook, its wishes, and controls.

Labels are the notebook's own run names, with "SSC " or "GSC " before those it lists under such a heading. Where the
notebook gives no value, the original repository's configs were asked; docs/snn_delays.md lists those places.
"""

from __future__ import annotations

from typing import Any

from search_spaces.space import Arms, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps

Fields = dict[str, Any]

SHD: Fields = {"data": "shd", "dropout": 0.75, "epochs": 100, "batch": 32}
SSC: Fields = {**SHD, "data": "ssc", "dropout": 0.5}
GSC: Fields = {**SHD, "data": "gsc", "dropout": 0.5}
THREE: Fields = {"blocks": (1, 3, 1), "kernel_sizes": (7, 7, 7), "max_delay_ms": (70.0, 90.0, 110.0)}
THREE_LATE: Fields = {**THREE, "blocks": (1, 1, 3)}
FOUR: Fields = {"blocks": (1, 1, 3, 1), "kernel_sizes": (7, 7, 5, 5), "max_delay_ms": (70.0, 90.0, 110.0, 110.0)}
RM: Fields = {"right_most": 1.0}
NO_DELAYS: Fields = {"right_most": 1.0, "sigma": 0.0, "lr_pos": 0.0}
# the notebook's last layer is "70 instead of 50" there; the others are taken as 50
SMALL_DELAYS: Fields = {"delay_ms_1": 50.0, "delay_ms_2": 50.0, "delay_ms_3": 70.0}
# the repository's last SHD config: delays 70, 70, 90 and sigma 1/4, 1/4, 1/3; the fourth stage as the third
SMALLER_FOUR: Fields = {
    "kernel_sizes": (7, 7, 7, 7),
    "delay_ms_1": 70.0,
    "delay_ms_2": 70.0,
    "delay_ms_3": 90.0,
    "delay_ms_4": 90.0,
    "sigma_1": 1 / 4,
    "sigma_2": 1 / 4,
    "sigma_3": 1 / 3,
    "sigma_4": 1 / 3,
}
BEST: Fields = {**SHD, **THREE, "stem": 7, "channels": 32}
# the repository's own "Light" config: 16 channels, 30 epochs
LIGHT: Fields = {**BEST, "channels": 16, "epochs": 30}


def _net(stem: int, stages: Fields, channels: int, **more: Any) -> Fields:
    return {"stem": stem, **stages, "channels": channels, **more}


def _runs(runs: dict[str, Fields]) -> Space:
    return Space((Arms("run", runs, run_names=True),))


NOTEBOOK = (
    Sweep(
        "bins",
        "set 1: channels summed by 1, 2 or 5",
        "notebook",
        _runs({f"bins={b} best_config_shd(3stages)": {"bins": b} for b in (1, 2, 5)}),
        {**SHD, **_net(5, THREE, 64)},
    ),
    Sweep(
        "stages4",
        "set 2: a fourth stage",
        "notebook",
        _runs(
            {
                "4-stages bins=2": {"bins": 2},
                "4-stages bins=1": {"bins": 1},
                "bins=1 (bigKS in last stages 5->7, smaller MD and smaller sigInit)": {"bins": 1, **SMALLER_FOUR},
            }
        ),
        {**SHD, **_net(5, FOUR, 64)},
    ),
    Sweep(
        "set3",
        "set 3: half the channels with 4 stages; half the timestep with 3",
        "notebook",
        _runs(
            {
                "bins = 1, 4 stages, n_C/2": _net(5, FOUR, 32),
                "bins = 1, 3 stages, timestep/2": _net(5, THREE, 64, dt_ms=5.0),
                "bins = 2, 3 stages, timestep/2": _net(5, THREE, 64, dt_ms=5.0, bins=2),
            }
        ),
        SHD,
    ),
    Sweep(
        "rm",
        "set 4: all delays zero at first; smaller maximum delays",
        "notebook",
        _runs(
            {
                "RM|bins=1|4-stages|n_C=32": _net(5, FOUR, 32, **RM),
                "RM|bins=1|3-stages|n_C=64": _net(5, THREE, 64, **RM),
                "SmallMD|bins=1|3-stages|n_C=64": _net(5, THREE, 64, **SMALL_DELAYS),
            }
        ),
        SHD,
    ),
    Sweep(
        "stem7_rm",
        "set 5: stem 7, all delays zero at first",
        "notebook",
        _runs(
            {
                "stem7|RM|bins=1|4-stages|n_C=32": _net(7, FOUR, 32, **RM),
                "stem7|RM|bins=1|3-stages|n_C=64": _net(7, THREE, 64, **RM),
                "stem7|RM|bins=1|3-stages|n_C=32": _net(7, THREE, 32, **RM),
            }
        ),
        SHD,
    ),
    Sweep(
        "stem7",
        "set 5: stem 7, delays uniform at first",
        "notebook",
        _runs(
            {
                "stem7|bins=1|4-stages|n_C=32": _net(7, FOUR, 32),
                "stem7|bins=1|3-stages|n_C=64": _net(7, THREE, 64),
                "stem7|bins=1|3-stages|n_C=32": _net(7, THREE, 32),
            }
        ),
        SHD,
    ),
    Sweep(
        "stem5_small",
        "set 5: the smallest net with stem 5",
        "notebook",
        _runs({"stem5|bins=1|3-stages|n_C=32": _net(5, THREE, 32)}),
        SHD,
    ),
    Sweep(
        "sigma0",
        "set 5: no decreasing sigma",
        "notebook",
        _runs(
            {
                "stem5|bins=1|3-stages|n_C=32|sig=0": _net(5, THREE, 32, sigma=0.0),
                "stem7|bins=1|3-stages|n_C=32|sig=0": _net(7, THREE, 32, sigma=0.0),
            }
        ),
        SHD,
    ),
    Sweep(
        "ssc",
        "set 6: Spiking Speech Commands, 4 and 3 stages",
        "notebook",
        _runs(
            {
                "SSC stem7|bins=1|4-stages|n_C=32": _net(7, FOUR, 32),
                "SSC stem7|bins=1|3-stages|n_C=32": _net(7, THREE, 32),
            }
        ),
        SSC,
    ),
    Sweep(
        "stem10",
        "set 6: stem 10",
        "notebook",
        _runs({"stem10|bins=1|3-stages|n_C=32": _net(10, THREE, 32)}),
        SHD,
    ),
    Sweep(
        "ssc_wide",
        "after set 6: SSC with 64 channels, blocks [1, 1, 3]",
        "notebook",
        _runs(
            {
                "SSC stem7|bins=1|4-stages|n_C=64": _net(7, FOUR, 64),
                "SSC stem7|bins=1|3-stages|n_C=64": _net(7, THREE_LATE, 64),
            }
        ),
        SSC,
    ),
    Sweep(
        "plif",
        "after set 6: learned tau in every layer",
        "notebook",
        _runs({"stem7|bins=1|3-stages|n_C=32|plif": _net(7, THREE_LATE, 32, neuron="plif")}),
        SHD,
        covariates=("tau",),
    ),
    Sweep(
        "no_delays",
        "after set 6: the same net with every delay zero",
        "notebook",
        _runs({"stem7|bins=1|3-stages|n_C=32|No-Delays": _net(7, THREE, 32, **NO_DELAYS)}),
        SHD,
    ),
    Sweep(
        "gsc",
        "Google Speech Commands: bins and window together",
        "notebook",
        _runs(
            {
                "GSC train1: bins=1|3-stages|nc=64": {"bins": 1, "window": 1024},
                "GSC train2: bins=2|windwsize/2|3-stages|nc=64": {"bins": 2, "window": 512},
            }
        ),
        {**GSC, **_net(7, THREE_LATE, 64)},
    ),
    Sweep(
        "inverted",
        "inverted bottleneck; the second arm with the pointwise weights out of the optimiser, as once coded",
        "notebook",
        _runs(
            {
                "train3: nc=32|shd": SHD,
                "train4: nc=32|ssc": {**SSC, "pointwise_rate": 0.0},
                "inverted bottleneck nc=32": SSC,
            }
        ),
        {**SHD, **_net(7, THREE_LATE, 32), "bottleneck": "one_bn"},
    ),
    Sweep(
        "inverted_bn",
        "inverted bottleneck: one BN, or another after the second convolution",
        "notebook",
        _runs({"1 BN": {"bottleneck": "one_bn"}, "2 BNs": {"bottleneck": "two_bn"}}),
        {**SHD, **_net(7, THREE_LATE, 32)},
    ),
)

WISHES = (
    Sweep(
        "light",
        "the five runs listed last: one change each to a light net",
        "wish",
        _runs(
            {
                "train1: Baseline-Light": {},
                "train2: Baseline + 4-stages": FOUR,
                "train3: Baseline + V1": {"kernel": "v1"},
                "train4: Baseline + RM_init": RM,
                "train5: Baseline + PLIF": {"neuron": "plif"},
            }
        ),
        LIGHT,
    ),
    Sweep(
        "blocks113",
        "'Test blocks = [1, 1, 3]'",
        "wish",
        Space((Choice("blocks", ((1, 3, 1), (1, 1, 3))),)),
        BEST,
    ),
    Sweep(
        "fc_delays",
        "'Add delays to the FC layer ?'",
        "wish",
        Space((Choice("fc_delay_ms", (0.0, 110.0)),)),
        BEST,
    ),
    Sweep(
        "sigma_per_batch",
        "'Decrease Sig during batches instead of epochs', to the same end",
        "wish",
        Space((Choice("sigma_by_step", (0.0, 1.0)),)),
        BEST,
    ),
    Sweep(
        "init_weights",
        "'Add weights initialization for Conv layers and for final FC layer'",
        "wish",
        Space(
            (
                Choice("conv_init", ("kaiming_uniform", "kaiming_normal", "orthogonal")),
                Choice("fc_scale", (1.0, 0.1)),
            )
        ),
        BEST,
    ),
    Sweep(
        "stem7_long",
        "'maybe need to give it more epochs ?'",
        "wish",
        Space((Choice("epochs", (100, 200)),)),
        {**SHD, **_net(7, THREE, 64, **RM)},
    ),
    Sweep(
        "more_rm",
        "'need more tests to decide': uniform against right-most delays over five nets, five seeds",
        "wish",
        Space(
            (
                Choice("right_most", (0.0, 1.0)),
                Arms(
                    "net",
                    {
                        "stem5|3-stages|n_C=32": _net(5, THREE, 32),
                        "stem7|3-stages|n_C=32": _net(7, THREE, 32),
                        "stem5|4-stages|n_C=32": _net(5, FOUR, 32),
                        "stem7|4-stages|n_C=32": _net(7, FOUR, 32),
                        "stem5|3-stages|n_C=64": _net(5, THREE, 64),
                    },
                ),
            )
        ),
        SHD,
        seeds=5,
    ),
)

CONTROLS = (
    Sweep(
        "delays_ladder",
        "what delays are worth: none, random and fixed, learned, learned under a falling sigma",
        "control",
        Space(
            (
                Arms(
                    "delays",
                    {
                        "none": NO_DELAYS,
                        "random fixed": {"sigma": 0.0, "lr_pos": 0.0},
                        "learned": {"sigma": 0.0},
                        "learned + sigma": {},
                    },
                ),
            )
        ),
        BEST,
        seeds=5,
    ),
    Sweep(
        "seeds_null",
        "the best run again, eight seeds, selected on data held out of the training set",
        "control",
        Space((Arms("net", {"stem7|3-stages|n_C=32": {}}),)),
        BEST,
        seeds=8,
    ),
)

PRODUCT = (
    Sweep(
        "demo",
        "a small net on the bundled digits, turned into spikes",
        "product",
        Space(
            (
                Range("lr", 5e-3, 5e-2, log=True),
                Range("lr_pos", 1e-2, 1.0, log=True),
                Range("tau_ms", 25.0, 100.0, log=True),
                Arms("delays", {"learned": {}, "none": NO_DELAYS}),
            )
        ),
        {
            "data": "digits",
            "dt_ms": 20.0,
            "channels": 12,
            "blocks": (1, 1),
            "stem": 8,
            "kernel_sizes": (7, 5),
            "max_delay_ms": (100.0, 140.0),
            "dropout": 0.1,
            "train_examples": 512,
            "epochs": 6,
            "batch": 16,
        },
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=12,
    ),
    Sweep(
        "best",
        "ranges around the notebook's best SHD run",
        "product",
        Space(
            (
                Range("lr", 1e-3, 2e-2, log=True),
                Range("lr_pos", 1e-2, 1.0, log=True),
                Range("weight_decay", 1e-6, 1e-3, log=True),
                Range("dropout", 0.3, 0.85),
                Range("sigma", 0.0, 2.0),
                Range("sigma_epochs", 0.1, 0.8),
                Range("tau_ms", 12.0, 60.0, log=True),
                Choice("right_most", (0.0, 1.0)),
            )
        ),
        BEST,
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=64,
    ),
)

SWEEPS = Sweeps(family="snn_delays", default="demo", sweeps=(*NOTEBOOK, *WISHES, *CONTROLS, *PRODUCT))
