"""What decides shapes and code (Program), what may differ between lanes (Hyper), and the layers that follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainables.family import BadValue


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is loaded. `mean`, `std`: per channel, of values scaled to [0, 1]."""

    train: int
    test: int
    side: int
    classes: int
    top: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATA_SETS = {
    # the constants of the notebook's own loader, not the set's exact moments
    "cifar10": DataSet(50_000, 10_000, 32, 10, 255.0, (0.469, 0.481, 0.451), (0.239, 0.245, 0.272)),
    # published order: the first 1,437 digits train, the last 360 test
    "digits": DataSet(1_437, 360, 8, 10, 16.0, (0.3053,), (0.3760,)),
}


@dataclass(frozen=True)
class Program:
    """The net, its data and its schedule. Defaults are the notebook's, on the bundled digits.

    Args:
        data: cifar10 or digits.
        precision: float32, float64 or bf16.
        widths: channels of each stage (two 3x3 convolutions and a 2x2 max-pool); fc6 is as wide as the last.
        batch: training examples a step.
        eval_batch: test examples an evaluation batch. Does not change a result.
        epochs: passes over the training images.
        lr_schedule: halving (times `lr_factor` every `halve_every` epochs), cosine or linear (to 0 at the end).
        last_batch: keep (the epoch's short last batch is used, as the original did) or drop.
        padding: what a translated image shows at its edge: reflect or mean (the mean colour).
        optimizer: sgd or adam.
        second_moment: what shares one of Adam's second moments: element, unit or layer.
        train_images, test_images: use only the first so many; 0 means all of the set's own.
        holdout: so many of the last training images are not trained on but measured as `val_acc`.
        covariates: what else to measure; does not change a result. layers: what `inspect` returns and nothing more;
            train: accuracy on the training images, not augmented, in evaluation mode; batch_stats: test accuracy with
            each test batch's own BatchNorm statistics; grouping: the topographic indices; all.
    """

    data: str = "digits"
    precision: str = "float32"
    widths: tuple = (32, 64, 128, 256, 256)
    batch: int = 128
    eval_batch: int = field(default=128, metadata={"identity": False})
    epochs: int = 200
    lr_schedule: str = "halving"
    last_batch: str = "keep"
    padding: str = "reflect"
    optimizer: str = "sgd"
    second_moment: str = "element"
    train_images: int = 0
    test_images: int = 0
    holdout: int = 0
    covariates: tuple = field(default=(), metadata={"identity": False})


@dataclass(frozen=True)
class Hyper:
    """One lane's numbers. A flag is off at 0 and on at 1. One `step` computes both paths of every flag.

    Learning rate: lr; lr_factor and halve_every (epochs) of the halving schedule; warmup: epochs of linear rise.
    Momentum: momentum, nesterov (flag), in torch.optim.SGD's form. beta1, beta2, adam_eps: Adam's.

    Decay (see `.decay`): wd: base rate; inverse_variance: p in rate = wd / Var(W_init)^p, 0 flat, 1 the notebook's
    (0.5 its unused 'std' mode); dup_mult: the rate is divided by it at every max-pool; stage1_mult..stage5_mult,
    last2_mult (fc6 and logit), last1_mult (logit): factors; logit_wd: the logit layer's rate itself where >= 0;
    bn_decay, bias_decay: factors on BatchNorm's gamma and beta, and on biases.
    l1: L1 rate of the parts chosen by l1_front (flag: every stage but the last) and l1_back (flag: the last stage, fc6
    and logit), in place of their L2; l1_clamp (flag): what changes sign in a step becomes 0.
    topo_a, topo_b (flags): topographic decay on fc6's or the last convolution's weight; topo_base; topo_uniform
    (flag): the mean multiplier everywhere instead; topo_frozen_beta (flag): as coded in the original, where those
    layers' BatchNorm beta was never updated.

    Normalised updates (see `.updates`): normalize (flag), norm_ema, by_weight (flag), norm_floor, decay_outside
    (flag).

    Augmentation: flip: probability of a mirror image; translate: largest shift in pixels; cutout: side of the blanked
    square in pixels; label_smoothing.
    """

    lr: float = 0.1
    lr_factor: float = 0.5
    halve_every: float = 20.0
    warmup: float = 0.0
    momentum: float = 0.0
    nesterov: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    wd: float = 0.0005
    inverse_variance: float = 0.0
    dup_mult: float = 1.0
    stage1_mult: float = 1.0
    stage2_mult: float = 1.0
    stage3_mult: float = 1.0
    stage4_mult: float = 1.0
    stage5_mult: float = 1.0
    last2_mult: float = 1.0
    last1_mult: float = 1.0
    logit_wd: float = -1.0
    bn_decay: float = 1.0
    bias_decay: float = 1.0
    l1: float = 0.0
    l1_front: float = 0.0
    l1_back: float = 0.0
    l1_clamp: float = 1.0
    topo_a: float = 0.0
    topo_b: float = 0.0
    topo_base: float = 2.0
    topo_uniform: float = 0.0
    topo_frozen_beta: float = 0.0
    normalize: float = 0.0
    norm_ema: float = 0.98
    by_weight: float = 0.0
    norm_floor: float = 0.0
    decay_outside: float = 0.0
    flip: float = 0.5
    translate: float = 0.0
    cutout: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One convolution. `stage` counts from 1 and is 0 for fc6 and logit; `pools` max-pools stand before it."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stage: int
    pools: int
    pool_after: bool
    norm: bool

    @property
    def fan_in(self) -> int:
        return self.inputs * self.kernel**2

    @property
    def tensors(self) -> tuple[str, ...]:
        kinds = ("weight", "bias", "gamma", "beta") if self.norm else ("weight", "bias")
        return tuple(f"{self.name}.{kind}" for kind in kinds)


def layers(program: Program) -> tuple[Layer, ...]:
    """The net from input to output: conv1_1, conv1_2, ..., fc6, logit."""
    info = DATA_SETS[program.data]
    net: list[Layer] = []
    channels = len(info.mean)
    for stage, width in enumerate(program.widths, start=1):
        for part in (1, 2):
            net.append(Layer(f"conv{stage}_{part}", channels, width, 3, stage, stage - 1, part == 2, True))
            channels = width
    pools = len(program.widths)
    net.append(Layer("fc6", channels, channels, 1, 0, pools, False, True))
    net.append(Layer("logit", channels, info.classes, 1, 0, pools, False, False))
    return tuple(net)


def last_conv(program: Program) -> str:
    """Name of the last 3x3 convolution: conv5_2 in the notebook's net."""
    return f"conv{len(program.widths)}_2"


def side_of(program: Program) -> int:
    """Pixels along an image's edge. Digits are 8x8, and magnified where the net has more than three pools."""
    side = DATA_SETS[program.data].side
    return max(side, 2 ** len(program.widths)) if program.data == "digits" else side


def sizes(program: Program) -> tuple[int, int]:
    """(images trained on in an epoch, test images)."""
    info = DATA_SETS[program.data]
    return (program.train_images or info.train) - program.holdout, program.test_images or info.test


def steps_per_epoch(program: Program) -> int:
    train, _ = sizes(program)
    return train // program.batch if program.last_batch == "drop" else -(-train // program.batch)


def has_short_batch(program: Program) -> bool:
    return program.last_batch == "keep" and sizes(program)[0] % program.batch != 0


def asked(program: Program, name: str) -> bool:
    """Was this covariate asked for?"""
    return name in program.covariates or "all" in program.covariates


CHOICES = {
    "data": tuple(DATA_SETS),
    "lr_schedule": ("halving", "cosine", "linear"),
    "last_batch": ("keep", "drop"),
    "padding": ("reflect", "mean"),
    "optimizer": ("sgd", "adam"),
    "second_moment": ("element", "unit", "layer"),
}
COVARIATES = ("layers", "train", "batch_stats", "grouping", "all")


def validate(program: Program) -> None:
    """Raises `BadValue` where a field is not one of its values, or fields contradict one another."""
    for name, allowed in CHOICES.items():
        if getattr(program, name) not in allowed:
            raise BadValue(f"{name} '{getattr(program, name)}' is not one of {', '.join(allowed)}")
    for name in program.covariates:
        if name not in COVARIATES:
            raise BadValue(f"covariate '{name}' is not one of {', '.join(COVARIATES)}")
    _validate_widths(program)
    _validate_counts(program)


def _validate_widths(program: Program) -> None:
    stages, side = len(program.widths), side_of(program)
    if not 1 <= stages <= 5 or any(type(width) is not int or width < 1 for width in program.widths):
        raise BadValue(f"widths = {program.widths} should be one to five whole numbers above 0, one a stage")
    if side % 2**stages:
        raise BadValue(f"widths = {program.widths} halve an image of {side} pixels {stages} times: give fewer stages")


def _validate_counts(program: Program) -> None:
    info = DATA_SETS[program.data]
    for name, most in (("train_images", info.train), ("test_images", info.test)):
        if not 0 <= getattr(program, name) <= most:
            raise BadValue(
                f"{name} = {getattr(program, name)} should be 0 (all) to {most}, as many as {program.data} has"
            )
    for name in ("batch", "eval_batch", "epochs"):
        if getattr(program, name) < 1:
            raise BadValue(f"{name} = {getattr(program, name)} should be at least 1")
    train, _ = sizes(program)
    if program.holdout < 0 or train < 2:
        raise BadValue(f"holdout = {program.holdout} leaves {train} images to train on: it should leave at least 2")
    if program.last_batch == "drop" and train < program.batch:
        raise BadValue(f"batch = {program.batch} is more than the {train} training images: no batch is full")
    if min(program.batch, train) < 2 or (program.last_batch == "keep" and train % program.batch == 1):
        raise BadValue(
            f"batch = {program.batch} leaves one image alone in a batch of {train}, which BatchNorm cannot normalise: "
            "take another batch or last_batch drop"
        )
