"""Multi-neuron models: units whose selector picks one of N computation neurons for each input.

Notebook: sliced-ai/slice-monorepo, "10-15-24 Higher dimensional models". Images (mlp, cnn; tasks in a row with EWC)
and text (transformer).
"""

from trainables.family import Case, Family
from trainables.multi_neuron.data import batch, load, order, test_order
from trainables.multi_neuron.metrics import METRICS, summarize
from trainables.multi_neuron.monitor import inspect
from trainables.multi_neuron.presets import PRESETS
from trainables.multi_neuron.program import COVARIATES, Hyper, Program, schedule, validate
from trainables.multi_neuron.training import evaluate, init, step

_MLP = {"widths": (6, 5), "batch": 8, "epochs": 2, "epoch_steps": 25, "choices": 3, "eval_batch": 120}
_TEXT = {
    "data": "pydoc",
    "model": "transformer",
    "optimizer": "adamw",
    "layers": 1,
    "d_model": 8,
    "heads": 2,
    "feedforward": 12,
    "sequence": 6,
    "batch": 2,
    "epochs": 2,
    "epoch_steps": 12,
    "eval_windows": 8,
    "eval_batch": 5,
}
_TASKS = {"batch": 6, "epochs": 1, "epoch_steps": 4, "tasks": 5, "eval_batch": 120, "fisher_batch": 3}
_CNN = {**_TASKS, "model": "cnn", "channels": (2, 3), "hidden": 5}

CASES = {
    "softmax": Case({**_MLP, "covariates": COVARIATES}, {"lr": 0.1, "active": 2.0}),
    "sigmoid": Case({**_MLP, "choices": 2, "selector": "sigmoid"}, {"lr": 0.1, "ste_sign": -1.0}),
    "plain": Case({**_MLP, "choices": 1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clip": 0.4}),
    "growing": Case(
        {**_MLP, "growing": True},
        {"lr": 0.1, "active": 1.0, "active_2": 2.0, "active_3": 3.0, "grow_1": 0.4, "grow_2": 1.2, "grow_copies": 1.0},
    ),
    "exploring": Case(
        {**_MLP, "explore": True}, {"lr": 0.1, "epsilon": 0.3, "gumbel": 0.8, "explore_until": 0.4, "upstream": 0.0}
    ),
    "transformer": Case(
        {**_TEXT, "choices": 3, "init": "xavier"},
        {"lr": 0.01, "weight_decay": 0.01, "clip": 1.0, "dropout": 0.1, "unselected": 0.0},
    ),
    "transformer-plain": Case({**_TEXT, "choices": 1, "norm": "pre"}, {"lr": 0.01, "dropout": 0.1, "causal": 0.0}),
    "continual": Case({**_CNN, "epochs": 2, "choices": 1, "scenario": "task"}, {"lr": 0.05, "dropout": 0.25}),
    "continual-ewc": Case(
        {**_CNN, "fisher": "sample", "custom": "all"},
        {"lr": 0.05, "momentum": 0.5, "ewc_lambda": 5.0, "dropout": 0.2, "dropout_hidden": 0.4},
    ),
    "continual-batch": Case(
        {**_TASKS, "widths": (6,), "fisher": "batch", "union": True}, {"lr": 0.05, "ewc_lambda": 9.0}
    ),
    "continual-model": Case({**_TASKS, "widths": (6,), "fisher": "model"}, {"lr": 0.05, "ewc_lambda": 9.0}),
}

FAMILY = Family(
    name="multi_neuron",
    Program=Program,
    Hyper=Hyper,
    metrics=METRICS,
    headline="test_loss",
    load=load,
    schedule=schedule,
    init=init,
    order=order,
    batch=batch,
    step=step,
    test_order=test_order,
    evaluate=evaluate,
    inspect=inspect,
    summarize=summarize,
    validate=validate,
    covariates=COVARIATES,
    presets=PRESETS,
    cases=CASES,
)
