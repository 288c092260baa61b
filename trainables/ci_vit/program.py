"""What a ci_vit run is made of: program, hypers, the data sets' shapes, and the derived sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainables.family import BadValue, Schedule

ALGORITHMS = ("vanilla", "shrink_perturb", "cbp", "redo", "snr", "snr_v2")
"""Which code runs after the Adam update. L2 and L2Init are hypers of all of them (`l2`, `l2_init`)."""

RESETTING = ("cbp", "redo", "snr", "snr_v2")

COVARIATES = ("ages", "resets", "entropy", "norms", "dead")

MAX_DEPTH = 24
"""Most blocks a net may have: every layer's metrics are declared by name."""


@dataclass(frozen=True)
class DataSet:
    """Shape of a set of labelled images, known without reading it.

    Args:
        classes: number of classes.
        train, test: images of each class used unless the program says otherwise.
        most_train, most_test: images of each class there are.
        side, channels: images are side x side x channels.
        patch: side of a patch unless the program says otherwise.
        scale: integer images are divided by it.
        permuted: whether each task shows its images under a pixel permutation of its own.
    """

    classes: int
    train: int
    test: int
    most_train: int
    most_test: int
    side: int = 32
    channels: int = 3
    patch: int = 4
    scale: float = 255.0
    permuted: bool = False


DATA: dict[str, DataSet] = {
    "digits": DataSet(10, 140, 34, 140, 34, side=8, channels=1, patch=2, scale=16.0, permuted=True),
    "imagenet32": DataSet(1000, 600, 50, 600, 50),
    "lop": DataSet(1000, 600, 100, 600, 100),
    "tinyimagenet32": DataSet(200, 500, 50, 500, 50),
    "cifar10": DataSet(10, 600, 100, 5000, 1000),
}


@dataclass(frozen=True)
class Program:
    """Everything about a run that decides shapes or code. A 0 means: the data set's or the notebook's own rule.

    Args:
        data: one of `DATA`.
        precision: "float32", "float64" or "bf16".
        algorithm: one of `ALGORITHMS`.
        depth: transformer blocks.
        hidden: width of the tokens; 0 = 16 * depth, the notebook's rule.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden units of each block's MLP per unit of width (`neurons` = mlp_ratio * width).
        patch: side of a patch in pixels; 0 = the data set's.
        classes: classes of each task, and outputs of the head, which no task resets.
        tasks: length of the stream; 0 = one pass over the classes. A longer stream pairs the classes anew each pass.
        epochs_per_task, batch: epochs of each task, images of each step (a rest shorter than a batch is left out).
        train_per_class, test_per_class: images of each class, the first in file order; 0 = the data set's.
        pixels: "own" (the data set's), "plain", or "permuted": one fresh fixed pixel permutation for each task.
        window: tasks that the summary averages over, the last ones; 0 = a tenth of the stream, at least 1, at most 50.
        train_acc_after: also measure the accuracy on each batch after the update and resets, as the original does; a
            second forward pass.
        covariates: what else to record, of `COVARIATES`.
    """

    data: str = "digits"
    precision: str = "float32"
    algorithm: str = "vanilla"
    depth: int = 3
    hidden: int = 0
    heads: int = 3
    mlp_ratio: int = 4
    patch: int = 0
    classes: int = 2
    tasks: int = 0
    epochs_per_task: int = 10
    batch: int = 100
    train_per_class: int = 0
    test_per_class: int = 0
    pixels: str = "own"
    window: int = field(default=0, metadata={"identity": False})
    train_acc_after: bool = field(default=False, metadata={"identity": False})
    covariates: tuple[str, ...] = field(default=(), metadata={"identity": False})

    @property
    def set(self) -> DataSet:
        return DATA[self.data]

    @property
    def width(self) -> int:
        return self.hidden or 16 * self.depth

    @property
    def neurons(self) -> int:
        """Hidden units of each block's MLP: derived, never set by hand."""
        return self.mlp_ratio * self.width

    @property
    def patch_side(self) -> int:
        return self.patch or self.set.patch

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.set.side // self.patch_side) ** 2 + 1

    @property
    def train(self) -> int:
        return self.train_per_class or self.set.train

    @property
    def test(self) -> int:
        return self.test_per_class or self.set.test

    @property
    def permuted(self) -> bool:
        return self.set.permuted if self.pixels == "own" else self.pixels == "permuted"

    @property
    def tasks_per_pass(self) -> int:
        return self.set.classes // self.classes

    @property
    def length(self) -> int:
        """Tasks of the stream."""
        return self.tasks or self.tasks_per_pass

    @property
    def averaged(self) -> int:
        """Tasks that the summary averages over."""
        return self.window or min(50, max(1, self.length // 10))


@dataclass(frozen=True)
class Hyper:
    """Everything that may differ between lanes of one stack. Flags are 0 or 1.

    Args:
        lr: Adam's learning rate (b1 .9, b2 .999, eps 1e-7).
        l2: adds l2 * sum(p^2) to the loss, no 1/2; over all leaves unless the next three say otherwise.
        l2_mlp_in, l2_qkv, l2_other: factors of l2 on each block's first MLP kernel and bias, on the query-key-value
            kernels, on everything else. (1, 1, 1) is L2; (0, 1, 1) is L2* of autumn 2024 (all but the resettable
            units); (0, 1, 0) is L2* of January 2025 (query-key-value kernels only).
        l2_init: adds l2_init * sum((p - p0)^2), p0 being the run's own initial weights (L2Init).
        shrink, sigma: of `shrink_perturb`: after every update p <- shrink * p + sigma * (a fresh initial net).
        perturb_key_epoch: 1 draws that net once an epoch and not anew each step, as the original did by mistake.
        fresh_start: of `shrink_perturb`: 1 starts every task from fresh weights and a fresh optimiser.
        reset_freq: `cbp`: fraction of a layer's units replaced each step; `redo`: probability that a step resets;
            `snr`, `snr_v2`: probability that a step renews the thresholds.
        cbp_age: batches before a unit may be replaced.
        cbp_decay: decay of the running utility and mean activation.
        cbp_ties: 1 also replaces every unit that ties with the last one chosen, as the original does.
        redo_threshold: a unit whose score is at most this is reset.
        redo_mean: 0 divides scores by the layer's sum, as the original does; 1 by its mean, as the paper does.
        snr_percentile: eta; a unit is reset where its silence is rarer than 1 - eta under its own history.
        snr_threshold: age of reset before the first renewal: batches (`snr`), inputs (`snr_v2`).
        snr_epsilon: fraction of a batch's inputs on which a silent unit counts as silent (1: on all of them).
    """

    lr: float = 1e-3
    l2: float = 0.0
    l2_mlp_in: float = 1.0
    l2_qkv: float = 1.0
    l2_other: float = 1.0
    l2_init: float = 0.0
    shrink: float = 1.0
    sigma: float = 0.0
    perturb_key_epoch: float = 0.0
    fresh_start: float = 0.0
    reset_freq: float = 0.01
    cbp_age: float = 100.0
    cbp_decay: float = 0.99
    cbp_ties: float = 0.0
    redo_threshold: float = 0.01
    redo_mean: float = 0.0
    snr_percentile: float = 0.6
    snr_threshold: float = 10.0
    snr_epsilon: float = 1.0


def schedule(program: Program) -> Schedule:
    return Schedule(
        steps_per_epoch=program.classes * program.train // program.batch,
        epochs=program.length * program.epochs_per_task,
        epochs_per_task=program.epochs_per_task,
    )


def validate(program: Program) -> None:
    """Raises `BadValue` where fields contradict one another or name what does not exist."""
    _one_of("data", program.data, tuple(DATA))
    _one_of("algorithm", program.algorithm, ALGORITHMS)
    _one_of("pixels", program.pixels, ("own", "plain", "permuted"))
    for name in program.covariates:
        _one_of("covariates", name, COVARIATES)
    for name in ("depth", "heads", "mlp_ratio", "classes", "epochs_per_task", "batch"):
        if getattr(program, name) < 1:
            raise BadValue(f"{name} = {getattr(program, name)} must be at least 1")
    for name in ("hidden", "patch", "tasks", "train_per_class", "test_per_class", "window"):
        if getattr(program, name) < 0:
            raise BadValue(f"{name} = {getattr(program, name)} must not be negative (0 takes the default)")
    if program.depth > MAX_DEPTH:
        raise BadValue(f"depth = {program.depth} is more than the {MAX_DEPTH} blocks that have metrics of their own")
    if program.width % program.heads:
        raise BadValue(f"hidden = {program.width} cannot be split into heads = {program.heads} equal parts")
    if program.set.side % program.patch_side:
        raise BadValue(f"patch = {program.patch_side} does not divide {program.data}'s {program.set.side} pixels")
    if not 2 <= program.classes <= program.set.classes:
        raise BadValue(f"classes = {program.classes} a task: {program.data} allows 2 to {program.set.classes}")
    if program.train > program.set.most_train:
        raise BadValue(f"train_per_class = {program.train}: {program.data} has {program.set.most_train} of each class")
    if program.test > program.set.most_test:
        raise BadValue(f"test_per_class = {program.test}: {program.data} has {program.set.most_test} of each class")
    if program.batch > program.classes * program.train:
        raise BadValue(f"batch = {program.batch} is more than a task's {program.classes * program.train} train images")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadValue(f"{name} '{value}' is not one of {', '.join(allowed)}")


NET: Mapping[str, Any] = {"epochs_per_task": 10, "batch": 100, "tasks": 500, "train_acc_after": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "L3": {**NET, "depth": 3, "lr": 1e-3},
    "L12": {**NET, "depth": 12, "lr": 1e-4},
    "L12@1e-3": {**NET, "depth": 12, "lr": 1e-3},
}
"""The notebook's three nets in its own protocol, on whatever data set is chosen."""
