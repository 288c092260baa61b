"""Every sweep of the multi-neuron notebook, its open wishes, the controls it lacks, and ours.

Rows "as coded" keep the original's slips (the sigmoid selector's negated gradient; no causal mask in the multi-neuron
transformer; xavier fans of the 3-D tensor); controls and wishes mend them. docs/multi_neuron.md says which is which.
"""

from __future__ import annotations

from typing import Any

from search_spaces.space import Arms, Axis, Choice, Range, Space
from search_spaces.sweeps import Sweep, Sweeps
from trainables.multi_neuron.mlp import matched_width
from trainables.multi_neuron.presets import PRESETS

Fields = dict[str, Any]

MNIST: Fields = {**PRESETS["notebook_mnist"], "selector": "softmax", "choices": 5}
SIGMOID: Fields = {**PRESETS["notebook_mnist"], "selector": "sigmoid", "choices": 2, "ste_sign": -1.0}
TEXT: Fields = {**PRESETS["notebook_text"], "init": "xavier"}
AS_CODED: Fields = {**TEXT, "custom": "all", "causal": 0.0, "fan_3d": 1.0}
MENDED: Fields = {**TEXT, "custom": "all", "causal": 1.0, "fan_3d": 0.0}
TASKS: Fields = PRESETS["split_mnist"]

GROWING: Fields = {"active": 1.0, "active_2": 2.0, "active_3": 5.0, "grow_1": 2.0, "grow_2": 4.0}

NUMBERS = (1.0, 2.0, 3.0, 4.0, 5.0)
DEPTHS, WIDTHS = (1, 2, 4, 8, 16, 32), (64, 256, 1024, 4096, 16384, 65536)


def one(label: str, **fields: Any) -> Space:
    """A space of a single named point."""
    return arms("net", {label: fields})


def space(*axes: Axis) -> Space:
    return Space(axes)


def arms(name: str, values: dict[str, Fields]) -> Space:
    """A space of one axis of named arms."""
    return space(Arms(name, values))


NOTEBOOK = (
    Sweep(
        "selector_ab",
        "MNIST, two neuron sets A and B, sigmoid selector as written (its gradient negated)",
        "notebook",
        one("A and B"),
        SIGMOID,
        metric="test_acc",
        covariates=("share", "balance", "entropy"),
    ),
    Sweep(
        "cosine",
        "repeat of selector_ab with cosine similarity of A and B, epoch by epoch",
        "notebook",
        one("A and B, cosine"),
        SIGMOID,
        metric="test_acc",
        covariates=("cosine",),
    ),
    Sweep(
        "n_choices",
        "MNIST, 1 to 5 computation neurons, softmax selector (1 = the plain MLP)",
        "notebook",
        space(Choice("N", NUMBERS, sets="active")),
        MNIST,
        metric="test_acc",
    ),
    Sweep(
        "size_descent",
        "plain MLPs of growing depth (128 units) and width (one layer): descent on the first 10 examples",
        "notebook",
        arms(
            "size",
            {
                **{f"depth {depth}": {"widths": (128,) * depth} for depth in DEPTHS},
                **{f"width {width}": {"widths": (width,)} for width in WIDTHS},
            },
        ),
        {**MNIST, "choices": 1, "examples": 10, "batch": 10, "epoch_steps": 10, "epochs": 10},
        metric="train_loss",
    ),
    Sweep("tf_base", "text, plain transformer", "notebook", one("base"), {**TEXT, "choices": 1}),
    Sweep(
        "tf_linear",
        "text, linear layers multi-neuron (N 2), attention plain with its mask, as coded",
        "notebook",
        one("linear"),
        {**AS_CODED, "custom": "linear", "causal": 1.0, "choices": 2},
    ),
    Sweep(
        "tf_attention",
        "text, attention projections multi-neuron too (N 2), as coded: no causal mask",
        "notebook",
        one("attention"),
        {**AS_CODED, "choices": 2},
    ),
    Sweep(
        "tf_n",
        "text, all layers multi-neuron, N 5, 50, 75, as coded",
        "notebook",
        space(Choice("N", (5, 50, 75), sets="choices")),
        AS_CODED,
    ),
    Sweep(
        "tf_monitor",
        "text, N 5: shares, entropy and gradient size of each of the 13 layers, as coded",
        "notebook",
        one("N 5"),
        {**AS_CODED, "choices": 5},
        covariates=("share", "entropy", "balance", "gradient", "cosine"),
    ),
    Sweep(
        "tf_layers16",
        "tf_monitor with 16 layers instead of 2",
        "notebook",
        one("16 layers"),
        {**AS_CODED, "choices": 5, "layers": 16},
        covariates=("share", "entropy", "balance", "gradient", "cosine"),
    ),
    Sweep(
        "backward",
        "text, N 5: what the selector sends upstream, and which outputs it hears of",
        "notebook",
        arms(
            "gradient",
            {
                "comp only": {"upstream": 0.0, "unselected": 1.0},
                "both": {"upstream": 1.0, "unselected": 1.0},
                "selected comp only": {"upstream": 1.0, "unselected": 0.0},
            },
        ),
        {**AS_CODED, "choices": 5},
    ),
    Sweep(
        "cl_base",
        "Split-MNIST, five tasks, one head, no protection, SGD at 1e-5",
        "notebook",
        one("base"),
        TASKS,
        metric="mean_acc",
    ),
    Sweep(
        "cl_ewc",
        "cl_base with EWC as its kept script has it: batch-mean Fisher, all past data (lambda unknown: 1e3)",
        "notebook",
        one("EWC"),
        {**TASKS, "fisher": "batch", "union": True, "ewc_lambda": 1e3},
        metric="mean_acc",
    ),
    Sweep(
        "cl_multi",
        "Split-MNIST, multi-neuron hidden layer (N 2), before and after updating the selection neuron; lr 1e-3",
        "notebook",
        arms("selector", {"not updated": {"selector_lr": 0.0}, "updated": {"selector_lr": 1.0}}),
        {**TASKS, "choices": 2, "lr": 1e-3},
        metric="mean_acc",
    ),
)

WISHES = (
    Sweep(
        "grow_n",
        "MNIST, number of computation neurons changed in training",
        "wish",
        arms(
            "schedule",
            {
                "2": {"active": 2.0},
                "5": {"active": 5.0},
                "1-2-5 copies": {**GROWING, "grow_copies": 1.0},
                "1-2-5 fresh": {**GROWING, "grow_copies": 0.0},
                "5-2 at epoch 2": {"active": 5.0, "active_2": 2.0, "grow_1": 2.0},
                "5-2 at epoch 4": {"active": 5.0, "active_2": 2.0, "grow_1": 4.0},
            },
        ),
        {**MNIST, "growing": True},
        seeds=3,
        metric="test_acc",
    ),
    Sweep(
        "selector_noise",
        "text, N 5: random choices or Gumbel noise in the first fifth of training",
        "wish",
        arms(
            "noise",
            {
                "epsilon 0": {"epsilon": 0.0},
                "epsilon 0.1": {"epsilon": 0.1},
                "epsilon 0.3": {"epsilon": 0.3},
                "Gumbel 1": {"gumbel": 1.0},
                "Gumbel 0.5": {"gumbel": 0.5},
            },
        ),
        {**MENDED, "choices": 5, "explore": True, "explore_until": 0.2},
        seeds=3,
        covariates=("entropy", "balance"),
    ),
    Sweep(
        "cl_multi_ewc",
        "Split-MNIST, plain and multi-neuron (N 2) nets under EWC with the per-sample Fisher, lr 1e-3",
        "wish",
        space(
            Arms("net", {"plain": {"choices": 1}, "multi": {"choices": 2}}),
            Choice("lambda", (0.0, 1e2, 1e3, 1e4), sets="ewc_lambda"),
        ),
        {**TASKS, "fisher": "sample", "lr": 1e-3},
        seeds=3,
        metric="mean_acc",
    ),
    Sweep(
        "cosine_n",
        "n_choices with the mean pairwise cosine, N 2 to 5",
        "wish",
        space(Choice("N", NUMBERS[1:], sets="active")),
        MNIST,
        seeds=3,
        metric="test_acc",
        covariates=("cosine",),
    ),
    Sweep(
        "reverify",
        "selector_ab and n_choices with exact backward: gradient through the selected neuron only, sign corrected",
        "wish",
        arms(
            "net",
            {
                "selector_ab": {"selector": "sigmoid", "choices": 2},
                **{f"N {number:.0f}": {"active": number} for number in NUMBERS},
            },
        ),
        {**MNIST, "unselected": 0.0, "ste_sign": 1.0},
        seeds=3,
        metric="test_acc",
    ),
    Sweep(
        "oom",
        "text, N 75, 150, 300 with every layer but linear_out multi-neuron",
        "wish",
        space(Choice("N", (75, 150, 300), sets="choices")),
        {**MENDED, "custom": "body"},
    ),
)

CONTROLS = (
    Sweep(
        "ste_sign",
        "selector_ab with the selector's gradient as written, corrected, and none (a fixed random selection)",
        "control",
        arms("sign", {"as written": {"ste_sign": -1.0}, "corrected": {"ste_sign": 1.0}, "frozen": {"ste_sign": 0.0}}),
        SIGMOID,
        seeds=5,
        metric="test_acc",
        covariates=("share", "balance", "entropy", "cosine"),
    ),
    Sweep(
        "matched_mlp",
        "plain MLPs: the notebook's width and those with as many parameters as N 2 to 5",
        "control",
        arms(
            "plain",
            {
                "width 64": {"widths": (64, 64)},
                **{
                    f"as N {number}": {"widths": (matched_width(784, (64, 64), number),) * 2} for number in (2, 3, 4, 5)
                },
            },
        ),
        {**MNIST, "choices": 1},
        seeds=5,
        metric="test_acc",
    ),
    Sweep(
        "causal",
        "plain, multi-neuron with the mask and without: held-out loss, fans of each matrix",
        "control",
        arms(
            "net",
            {
                "base": {"choices": 1},
                "multi, mask": {"choices": 2, "causal": 1.0},
                "multi, no mask": {"choices": 2, "causal": 0.0},
            },
        ),
        MENDED,
        seeds=3,
    ),
    Sweep(
        "tf_entropy",
        "where low selector entropy comes from: embedding scale (16 or 1), norm post or pre, selector trained or not",
        "control",
        space(Choice("norm", ("post", "pre")), Choice("embed_scale", (1.0, 0.0625)), Choice("selector_lr", (1.0, 0.0))),
        {**MENDED, "choices": 5},
        seeds=3,
        covariates=("entropy",),
    ),
    Sweep(
        "cl_lambda",
        "plain net, batch-mean or per-sample Fisher, with past data or without, over lr and lambda",
        "control",
        space(
            Choice("fisher", ("batch", "sample")),
            Choice("union", (True, False)),
            Choice("lr", (1e-5, 1e-3)),
            Choice("lambda", (0.0, 1e2, 1e3, 1e4, 1e5), sets="ewc_lambda"),
        ),
        TASKS,
        seeds=3,
        metric="mean_acc",
    ),
)

PRODUCT = (
    Sweep(
        "demo",
        "bundled digits: how many computation neurons, which selector gradient, which learning rate",
        "product",
        space(
            Choice("N", (1.0, 2.0, 3.0, 5.0), sets="active"),
            Range("lr", 0.01, 1.0, log=True),
            Choice("ste_sign", (-1.0, 0.0, 1.0)),
            Range("temperature", 0.3, 3.0, log=True),
        ),
        {"data": "digits", "choices": 5, "widths": (32, 32), "batch": 32, "epochs": 8},
        seeds=2,
        searcher="optuna",
        scheduler="asha",
        trials=16,
        metric="test_acc",
    ),
    Sweep(
        "demo_text",
        "Python's documentation, a small transformer: learning rate and number of computation neurons",
        "product",
        space(Choice("N", (1.0, 2.0, 3.0), sets="active"), Range("lr", 1e-3, 3e-2, log=True)),
        {
            "data": "pydoc",
            "model": "transformer",
            "optimizer": "adamw",
            "init": "xavier",
            "choices": 3,
            "layers": 1,
            "d_model": 32,
            "heads": 2,
            "feedforward": 64,
            "sequence": 24,
            "batch": 8,
            "clip": 1.0,
            "epochs": 4,
            "epoch_steps": 25,
            "eval_windows": 64,
            "eval_batch": 64,
        },
        searcher="optuna",
        scheduler="asha",
        trials=8,
    ),
    Sweep(
        "demo_tasks",
        "bundled digits in five tasks: EWC's lambda, class- and task-incremental",
        "product",
        space(Choice("scenario", ("class", "task")), Choice("lambda", (0.0, 1e2, 1e3, 1e4), sets="ewc_lambda")),
        {
            "data": "digits",
            "widths": (32,),
            "choices": 2,
            "tasks": 5,
            "fisher": "sample",
            "epochs": 4,
            "batch": 16,
            "lr": 0.02,
        },
        seeds=2,
        metric="mean_acc",
    ),
    Sweep(
        "best",
        "MNIST, selected on validation images: ranges around the notebook's softmax nets",
        "product",
        space(
            Choice("N", NUMBERS, sets="active"),
            Range("lr", 0.003, 1.0, log=True),
            Range("momentum", 0.0, 0.95),
            Range("weight_decay", 1e-6, 1e-2, log=True),
            Range("temperature", 0.3, 3.0, log=True),
            Choice("unselected", (0.0, 1.0)),
            Choice("selector_lr", (0.1, 0.3, 1.0)),
        ),
        {**MNIST, "evaluate_on": "valid"},
        seeds=3,
        searcher="optuna",
        scheduler="asha",
        trials=64,
        metric="test_acc",
    ),
)

SWEEPS = Sweeps(family="multi_neuron", default="demo", sweeps=(*PRODUCT, *NOTEBOOK, *WISHES, *CONTROLS))
