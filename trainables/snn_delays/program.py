"""What decides shapes and code (Program), what may differ between lanes (Hyper), and what follows from them.

The net is CSnnNext of github.com/Thvnvtos/CSNN-1D-Delays (csnnext_delays.py); defaults are its run
`stem7|bins=1|3-stages|n_C=32`, on the bundled digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainables.family import BadValue, Schedule

SETS = {
    # name: (training examples, validation examples of its own, test examples, classes, channels)
    "digits": (1437, 0, 360, 10, 64),
    "shd": (8156, 0, 2264, 20, 700),
    "ssc": (75466, 9981, 20382, 35, 700),
    "gsc": (84843, 9981, 11005, 35, 700),
    "fsdd": (2700, 0, 300, 10, 700),
    "fsdd_speaker": (2500, 0, 500, 10, 700),
}
"""The published sizes. fsdd: recordings 0-4 of every speaker and digit are the test set (the set's own rule);
fsdd_speaker: the sixth speaker is the test set."""

KERNELS = ("max", "gauss", "v1")
NEURONS = ("lif", "plif")
BOTTLENECKS = ("none", "one_bn", "two_bn")
INITS = ("kaiming_uniform", "kaiming_normal", "orthogonal")
PADDINGS = ("batch", "own", "set")
SELECTIONS = ("validation", "test")
STAGES = 4


@dataclass(frozen=True)
class Program:
    """Everything that separates stacks.

    Args:
        data: one of `SETS`.
        precision: "float32", "float64" or "bf16".
        dt_ms: length of a frame in ms; "timestep/2" is 5.
        bins: neighbouring channels summed into one input; channels // bins inputs (a remainder is dropped).
        max_ms: samples are cut after so many ms; 0 keeps them whole.
        window: samples of one Fourier window at 8 kHz (gsc only); "windowsize/2" is 512.
        train_examples: 0 is the published training set; a number trains on just so many of it.
        valid_fraction: share of the training set held out for selection, where the set has no validation split.
        selection: "validation" selects on held-out data and evaluates the test set once, after the last epoch; "test"
            (as the original did on SHD) trains on the whole training set and calls the test set validation.
        channels: n_C; stage i has n_C * 2^i channels.
        blocks: blocks in each stage; its length is the number of stages (at most 4).
        stem: kernel and stride of the stem's convolution over frequency.
        kernel_sizes: of the dense frequency kernel, one a stage.
        max_delay_ms: length of the delay kernel, one a stage; ms // dt_ms steps, made odd.
        kernel: shape around a delay: "max" (triangle), "gauss" (as Dcls2_1d, width |sigma| + 1) or "v1" (linear
            interpolation, no sigma).
        neuron: "lif", or "plif" with one learned tau a layer.
        bottleneck: "none"; "one_bn": delay, C -> 4C, BN, neurons, 4C -> C; "two_bn": with a BN after the second too.
        fc_delay_ms: 0, or the length of a learned-delay kernel in the last layer, one delay a synapse.
        conv_init: first values of stem, delay, pointwise and downsampling weights.
        epochs, batch: as they say; the last batch of an epoch may be short.
        padding: which frames count for batch statistics and loss: "batch" up to the longest sample of the batch (as the
            original pads), "own" up to each sample's own end, "set" all up to the longest of the data set.
        grads: keep the last gradients' norms in the state, for `inspect`.
    """

    data: str = "digits"
    precision: str = "float32"
    dt_ms: float = 10.0
    bins: int = 1
    max_ms: float = 0.0
    window: int = 1024
    train_examples: int = 0
    valid_fraction: float = 0.1
    selection: str = "validation"
    channels: int = 32
    blocks: tuple = (1, 3, 1)
    stem: int = 7
    kernel_sizes: tuple = (7, 7, 7)
    max_delay_ms: tuple = (70.0, 90.0, 110.0)
    kernel: str = "max"
    neuron: str = "lif"
    bottleneck: str = "none"
    fc_delay_ms: float = 0.0
    conv_init: str = "kaiming_uniform"
    epochs: int = 100
    batch: int = 32
    padding: str = "batch"
    grads: bool = field(default=False, metadata={"identity": False})


@dataclass(frozen=True)
class Hyper:
    """Everything that may differ between lanes of a stack.

    Args:
        lr: highest learning rate of the weights: one cycle from lr / 25 up to lr and down to lr / 250,000, a step an
            epoch (torch's OneCycleLR).
        lr_pos: learning rate of the delay positions, falling as a cosine over the epochs; 0 freezes delays.
        pointwise_rate, fc_rate, bn_rate, tau_rate: multiply lr for those parameters; pointwise_rate 0 is the original's
            inverted bottleneck as coded (see the docs), tau_rate 0 makes "plif" a "lif".
        weight_decay: L2 term added to the gradient of every weight but BN's and the positions'.
        momentum_cycle: 1 cycles Adam's beta1 from .95 to .85 and back as OneCycleLR does; 0 keeps .9.
        dropout: probability that a feature is silenced for a whole sample before the last layer.
        tau_ms: membrane time constant (at first, for plif).
        alpha: steepness of the ATan surrogate.
        right_most: 1 starts every position at zero delay ("RM"), 0 uniformly.
        sigma: multiplies every stage's starting width; 0 is "sig=0".
        sigma_1 .. sigma_4: starting width of each stage, as a share of its kernel length.
        sigma_epochs: share of the epochs over which the width falls.
        sigma_by_step: 1 lowers it every step, 0 every epoch, to the same end.
        delay_ms_1 .. delay_ms_4: shorten a stage's delays below max_delay_ms; 0 leaves them.
        fc_scale: multiplies the first weights of the last layer.
    """

    lr: float = 5e-3
    lr_pos: float = 0.1
    pointwise_rate: float = 1.0
    fc_rate: float = 1.0
    bn_rate: float = 1.0
    tau_rate: float = 1.0
    weight_decay: float = 2e-5
    momentum_cycle: float = 1.0
    dropout: float = 0.75
    tau_ms: float = 20.0
    alpha: float = 5.0
    right_most: float = 0.0
    sigma: float = 1.0
    sigma_1: float = 1 / 3
    sigma_2: float = 1 / 3
    sigma_3: float = 1 / 2
    sigma_4: float = 1 / 2
    sigma_epochs: float = 1 / 3
    sigma_by_step: float = 0.0
    delay_ms_1: float = 0.0
    delay_ms_2: float = 0.0
    delay_ms_3: float = 0.0
    delay_ms_4: float = 0.0
    fc_scale: float = 1.0


# --- what follows from a program --------------------------------------------------------------------------------------


def kernel_steps(delay_ms: float, dt_ms: float) -> int:
    """Time steps of a delay kernel: delay_ms // dt_ms, made odd. Delays run from 0 to this less one."""
    steps = int(delay_ms // dt_ms)
    return steps + 1 - steps % 2


def inputs(program: Program) -> int:
    """Input channels after binning."""
    return SETS[program.data][4] // program.bins


def positions(program: Program) -> list[int]:
    """Positions along frequency in each stage: after the stem, then halved between stages."""
    counts = [inputs(program) // program.stem]
    for _ in program.blocks[1:]:
        counts.append(counts[-1] // 2)
    return counts


def classes(program: Program) -> int:
    return SETS[program.data][3]


def split_sizes(program: Program) -> tuple[int, int]:
    """(training, validation) examples. The validation set is the same at any `train_examples`."""
    published, own_valid, test, _, _ = SETS[program.data]
    if program.selection == "test":
        train, valid = published, test
    elif own_valid:
        train, valid = published, own_valid
    else:
        valid = int(published * program.valid_fraction)
        train = published - valid
    return (min(program.train_examples, train) if program.train_examples else train), valid


def schedule(program: Program) -> Schedule:
    train, _ = split_sizes(program)
    return Schedule(math.ceil(train / program.batch), program.epochs, program.epochs)


def validate(program: Program) -> None:
    """Raises `BadValue` where fields contradict one another."""
    _one_of("data", program.data, tuple(SETS))
    _one_of("kernel", program.kernel, KERNELS)
    _one_of("neuron", program.neuron, NEURONS)
    _one_of("bottleneck", program.bottleneck, BOTTLENECKS)
    _one_of("conv_init", program.conv_init, INITS)
    _one_of("padding", program.padding, PADDINGS)
    _one_of("selection", program.selection, SELECTIONS)
    for name in ("bins", "channels", "stem", "epochs", "batch", "window"):
        if getattr(program, name) < 1:
            raise BadValue(f"{name} = {getattr(program, name)} must be at least 1")
    for name in ("max_ms", "fc_delay_ms", "train_examples"):
        if getattr(program, name) < 0:
            raise BadValue(f"{name} = {getattr(program, name)} must not be negative")
    if program.dt_ms <= 0:
        raise BadValue(f"dt_ms = {program.dt_ms} must be above 0")
    stages = len(program.blocks)
    if not 1 <= stages <= STAGES or min(program.blocks) < 1:
        raise BadValue(f"blocks = {program.blocks} should give 1 to {STAGES} stages at least one block each")
    for name in ("kernel_sizes", "max_delay_ms"):
        if len(getattr(program, name)) != stages:
            raise BadValue(f"{name} = {getattr(program, name)} needs one value a stage: blocks has {stages}")
        if min(getattr(program, name)) <= 0:
            raise BadValue(f"{name} = {getattr(program, name)} must be above 0")
    if positions(program)[-1] < 1:
        raise BadValue(
            f"stem = {program.stem} on {inputs(program)} inputs leaves no position for stage {stages}: "
            "take a smaller stem, fewer bins or fewer stages"
        )
    if not SETS[program.data][1] and program.selection == "validation" and split_sizes(program)[1] < 1:
        raise BadValue(
            f"valid_fraction = {program.valid_fraction} leaves nothing to select on: give a share above 0, or "
            "selection = test to select on the test set as the original did"
        )
    if program.valid_fraction >= 1:
        raise BadValue(f"valid_fraction = {program.valid_fraction} leaves nothing to train on")
    if program.data == "gsc" and program.window > 8000:
        raise BadValue(f"window = {program.window} is longer than one second at 8 kHz")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadValue(f"{name} '{value}' is not one of {', '.join(allowed)}")
