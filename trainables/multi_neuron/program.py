"""What a multi-neuron trial is made of: the fields that decide code and shapes, the numbers that lanes may differ in.

Also the run's clock: which update, task and phase a step belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainables.family import BadValue, Hypers, Schedule
from trainables.multi_neuron.sets import IMAGE_SETS

CLASSES = 10
COVARIATES = ("share", "balance", "entropy", "gradient", "cosine")


@dataclass(frozen=True)
class Program:
    """Architecture, data and algorithm.

    Args:
        data: "digits", "mnist" (models mlp, cnn); "pydoc", "shakespeare", "wikitext2" or a text file's path
            (transformer).
        precision: "float32", "float64" or "bf16".
        model: "mlp", "cnn" or "transformer".
        optimizer: "sgd" or "adamw".
        batch: examples (images, or windows of text) a step.
        epochs: epochs of training, for each task where there are several.
        epoch_steps: steps an epoch; 0 = once through the images. Text has no epoch of its own, so there 0 = 1,000.
        examples: train on the first so many images only; 0 = all.
        evaluate_on: held-out data: "valid" (images: the last sixth of the training images, which then train nothing;
            text: the loader's validation part) or "test".
        eval_batch: examples in one evaluation batch.
        choices: computation neurons of each unit (N; with the hyper `active` the largest of the stack). 1 = plain
            layers without selectors.
        selector: "softmax" (N choices, argmax) or "sigmoid" (two choices, threshold).
        custom: which layers are multi-neuron. mlp: "all" (the hidden ones; the output layer is always plain). cnn:
            "linear" (the fully connected hidden layer) or "all" (convolutions too). transformer: "linear" (linear1,
            linear2, linear_out), "all" (the attention projections too) or "body" (all but linear_out).
        explore: with selector noise (hypers epsilon, gumbel, explore_until).
        growing: with a schedule of the number of choices (hypers active_2, active_3, grow_1, grow_2, grow_copies).
        covariates: what else to record of every multi-neuron layer, of `COVARIATES` (not part of a config's identity).
        widths: hidden layers of the mlp.
        layers, d_model, heads, feedforward, sequence: the transformer.
        norm: "post" (as the notebook) or "pre" layer norm.
        init: comp weights of multi-neuron layers: "linear" (torch's Linear) or "xavier" (biases 0; see hyper `fan_3d`).
        eval_windows: windows of held-out text evaluated, evenly spaced; 0 = all.
        channels, hidden: the cnn's two convolutions and its fully connected layer.
        tasks: 1, or the number of tasks (2, 5) that the ten classes are split into, in label order.
        scenario: "class" (one head, all outputs compete) or "task" (a task's own outputs only, in training and test).
        fisher: "none", or the Fisher estimate of EWC: "sample" (per-sample gradients, labels of the data), "model"
            (per-sample, labels drawn from the model) or "batch" (squares of batch-mean gradients, as the original
            code). With EWC every task ends with one more epoch, in which the parameters hold still while the Fisher
            is estimated.
        fisher_batch: per-sample gradients a step of that epoch ("sample", "model").
        union: train each task on all data so far (the original EWC script did).
    """

    data: str = "digits"
    precision: str = "float32"
    model: str = "mlp"
    optimizer: str = "sgd"
    batch: int = 64
    epochs: int = 5
    epoch_steps: int = 0
    examples: int = 0
    evaluate_on: str = "valid"
    eval_batch: int = 500
    choices: int = 2
    selector: str = "softmax"
    custom: str = "all"
    explore: bool = False
    growing: bool = False
    covariates: tuple[str, ...] = field(default=(), metadata={"identity": False})
    widths: tuple[int, ...] = (64, 64)
    layers: int = 2
    d_model: int = 256
    heads: int = 4
    feedforward: int = 512
    sequence: int = 64
    norm: str = "post"
    init: str = "linear"
    eval_windows: int = 500
    channels: tuple[int, ...] = (32, 64)
    hidden: int = 128
    tasks: int = 1
    scenario: str = "class"
    fisher: str = "none"
    fisher_batch: int = 8
    union: bool = False


@dataclass(frozen=True)
class Hyper:
    """Numbers of one lane.

    Args:
        lr, momentum, weight_decay: SGD (L2 added to the gradient) or AdamW (decoupled; betas .9, .999, eps 1e-8).
        clip: largest global gradient norm; 0 = no clipping.
        dropout: rate in the transformer, and after the cnn's pooling. dropout_hidden: after the cnn's hidden layer.
        active: computation neurons in use, the first `active` of `choices`; 0 = all.
        ste_sign: 1 = straight-through gradient; -1 = negated (as the notebook's sigmoid); 0 = none (frozen selector).
        selector_lr: multiplies the selectors' learning rate; 0 = selectors are not updated.
        upstream: 1 = the selector passes gradient on to the layer's input; 0 = it sees the detached input.
        unselected: 1 = the selector's gradient hears of all outputs; 0 = of the selected neuron's only.
        temperature: of the selector's softmax or sigmoid. threshold: sigmoid selector chooses A below it.
        active_2, active_3: `active` from `grow_1` and `grow_2` on (in epochs done; 0 = never).
        grow_copies: 1 = neurons that join start as copies of those there; 0 = with their own fresh initial weights.
        epsilon: probability that a unit chooses at random while exploring.
        gumbel: temperature of Gumbel noise on the selector while exploring; 0 = none.
        explore_until: fraction of the run's updates that explores.
        causal: 1 = causal attention mask; 0 = none.
        fan_3d: 1 = xavier bound from the fans of the 3-D weight tensor, as the original; 0 = of each matrix.
        embed_scale: multiplies the embedding, besides sqrt(d_model).
        ewc_lambda: EWC penalty lambda / 2 sum_k F_k (theta - theta_k)^2.
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    dropout: float = 0.0
    dropout_hidden: float = 0.0
    active: float = 0.0
    ste_sign: float = 1.0
    selector_lr: float = 1.0
    upstream: float = 1.0
    unselected: float = 1.0
    temperature: float = 1.0
    threshold: float = 0.5
    active_2: float = 0.0
    active_3: float = 0.0
    grow_1: float = 0.0
    grow_2: float = 0.0
    grow_copies: float = 0.0
    epsilon: float = 0.0
    gumbel: float = 0.0
    explore_until: float = 0.0
    causal: float = 1.0
    fan_3d: float = 0.0
    embed_scale: float = 1.0
    ewc_lambda: float = 0.0


ALLOWED = {
    "model": ("mlp", "cnn", "transformer"),
    "optimizer": ("sgd", "adamw"),
    "evaluate_on": ("valid", "test"),
    "selector": ("softmax", "sigmoid"),
    "norm": ("post", "pre"),
    "init": ("linear", "xavier"),
    "scenario": ("class", "task"),
    "fisher": ("none", "sample", "model", "batch"),
    "tasks": (1, 2, 5),
}
CUSTOM = {"mlp": ("all",), "cnn": ("linear", "all"), "transformer": ("linear", "all", "body")}


def validate(program: Program) -> None:
    """Raises `BadValue` where fields are out of range or contradict one another."""
    for name, allowed in ALLOWED.items():
        value = getattr(program, name)
        if value not in allowed:
            raise BadValue(f"{name} = {value!r} is not one of {', '.join(map(str, allowed))}")
    for name in ("batch", "epochs", "eval_batch", "choices", "layers", "d_model", "heads", "feedforward", "sequence"):
        _at_least(program, name, 1)
    for name in ("hidden", "fisher_batch"):
        _at_least(program, name, 1)
    for name in ("epoch_steps", "examples", "eval_windows"):
        _at_least(program, name, 0)
    if not program.widths or min(program.widths) < 1:
        raise BadValue(f"widths = {program.widths} must name one hidden layer or more, each of one unit or more")
    if len(program.channels) != 2 or min(program.channels) < 1:
        raise BadValue(f"channels = {program.channels} must be two numbers, one for each convolution")
    if program.custom not in CUSTOM[program.model]:
        raise BadValue(
            f"custom = '{program.custom}' does not go with model = {program.model}, which has "
            f"{', '.join(CUSTOM[program.model])} (choices=1 makes every layer plain)"
        )
    if program.selector == "sigmoid" and program.choices != 2:
        raise BadValue(f"the sigmoid selector chooses between 2 neurons, not choices = {program.choices}: use softmax")
    if program.choices == 1 and (program.explore or program.growing):
        raise BadValue("explore and growing need choices above 1")
    for name in program.covariates:
        if name not in COVARIATES:
            raise BadValue(f"covariate '{name}' is not one of {', '.join(COVARIATES)}")
    if program.model == "transformer":
        _validate_text(program)
    else:
        _validate_images(program)


def _at_least(program: Program, name: str, low: int) -> None:
    if getattr(program, name) < low:
        raise BadValue(f"{name} = {getattr(program, name)} must be {low} or more")


def _validate_text(program: Program) -> None:
    if program.data in IMAGE_SETS:
        raise BadValue(f"model = transformer reads text, but data = {program.data} are images: try data=pydoc")
    if program.d_model % program.heads:
        raise BadValue(f"d_model = {program.d_model} is not a multiple of heads = {program.heads}")
    if program.d_model % 2:
        raise BadValue(f"d_model = {program.d_model} must be even for sine and cosine positions")
    if program.tasks > 1 or program.fisher != "none" or program.examples:
        raise BadValue("tasks, fisher and examples are for images: leave them out with model = transformer")


def _validate_images(program: Program) -> None:
    if program.data not in IMAGE_SETS:
        raise BadValue(
            f"model = {program.model} reads images: data = {program.data!r} is not one of {', '.join(IMAGE_SETS)}"
        )
    if program.tasks == 1 and (program.fisher != "none" or program.union or program.scenario == "task"):
        raise BadValue("fisher, union and scenario=task need several tasks: set tasks=5")
    if program.tasks > 1 and program.examples:
        raise BadValue("examples cannot be limited with several tasks: leave it 0")
    if program.examples > (most := IMAGE_SETS[program.data].train_size(program.evaluate_on)):
        raise BadValue(f"examples = {program.examples}, but {program.data} has {most} to train on")
    if program.fisher_batch > program.batch:
        raise BadValue(f"fisher_batch = {program.fisher_batch} exceeds batch = {program.batch}")
    if steps_per_epoch(program) < 1:
        raise BadValue(f"batch = {program.batch} exceeds the smallest task of {program.data}: make it smaller")


def steps_per_epoch(program: Program) -> int:
    """Updates an epoch.

    One pass over the images, the last batch short; with several tasks the full batches of the smallest task, so that
    all tasks train equally long.
    """
    if program.epoch_steps:
        return program.epoch_steps
    if program.model == "transformer":
        return 1000
    images = IMAGE_SETS[program.data]
    if program.tasks > 1:
        return min(images.task_sizes(program.evaluate_on, program.tasks)) // program.batch
    return -(-(program.examples or images.train_size(program.evaluate_on)) // program.batch)


def schedule(program: Program) -> Schedule:
    """`epochs` of training for each task, and one more where EWC estimates its Fisher."""
    per_task = program.epochs + (program.fisher != "none")
    return Schedule(steps_per_epoch(program), per_task * program.tasks, per_task)


@dataclass(frozen=True)
class Clock:
    """Where a step stands in the run, as 0-d tensors.

    Args:
        updates: updates of the parameters done before this step. Steps of the Fisher epochs are none, so that learning
            rates, draws and growth are the same with and without EWC.
        epochs: updates in epochs, float.
        progress: fraction of the run's updates done, float.
        fisher: bool, the step belongs to a Fisher epoch.
        new_task: bool, the first step of a task other than the first.
        new_epoch: bool, the first step of an epoch.
    """

    updates: Tensor
    epochs: Tensor
    progress: Tensor
    fisher: Tensor
    new_task: Tensor
    new_epoch: Tensor


def clock_of(program: Program, step: Tensor, dtype: torch.dtype) -> Clock:
    """The clock at `step` (0-d int32, steps done before)."""
    plan = schedule(program)
    per_epoch = plan.steps_per_epoch
    training = per_epoch * program.epochs
    per_task = per_epoch * plan.epochs_per_task
    task = torch.div(step, per_task, rounding_mode="floor")
    position = step - task * per_task
    updates = task * training + torch.clamp(position, max=training)
    return Clock(
        updates=updates,
        epochs=updates.to(dtype) / per_epoch,
        progress=updates.to(dtype) / (training * plan.tasks),
        fisher=position >= training,
        new_task=(position == 0) & (task > 0),
        new_epoch=position - torch.div(position, per_epoch, rounding_mode="floor") * per_epoch == 0,
    )


def active_choices(program: Program, hyper: Hypers, epochs: Tensor) -> Tensor:
    """Number of computation neurons in use (0-d float) after `epochs` of training."""

    def number(field: str) -> Tensor:
        value = hyper[field]
        return torch.where(value > 0, value, torch.full_like(value, program.choices))

    active = number("active")
    if program.growing:
        for value, start in (("active_2", "grow_1"), ("active_3", "grow_2")):
            begun = (hyper[start] > 0) & (epochs >= hyper[start])
            active = torch.where(begun, number(value), active)
    return active
