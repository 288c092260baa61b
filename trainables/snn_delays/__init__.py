"""Convolutional spiking nets with learned delays (CSnnNext of the CSNN-1D-Delays notebook). See docs/snn_delays.md."""

from __future__ import annotations

from trainables.family import Case, Family, Metric
from trainables.snn_delays.data import batch, load, order, test_order
from trainables.snn_delays.model import init
from trainables.snn_delays.program import Hyper, Program, schedule, validate
from trainables.snn_delays.training import evaluate, inspect, step, summarize

TINY = {
    "dt_ms": 40.0,
    "bins": 4,
    "channels": 3,
    "blocks": (1, 1),
    "stem": 2,
    "kernel_sizes": (3, 3),
    "max_delay_ms": (120.0, 200.0),
    "epochs": 3,
    "batch": 4,
    "train_examples": 14,
    "valid_fraction": 0.01,
}
QUICK = {"dropout": 0.25, "lr": 0.02, "tau_ms": 100.0}  # longer than TINY's steps

FAMILY = Family(
    name="snn_delays",
    Program=Program,
    Hyper=Hyper,
    metrics={
        "train_loss": Metric("nats", "min", "cross-entropy of the batch, before the update, with dropout"),
        "train_accuracy": Metric("fraction", "max", "of the batch, before the update, with dropout"),
        "valid_loss": Metric("nats", "min", "cross-entropy on the validation split, whole delays"),
        "valid_accuracy": Metric("fraction", "max", "on the validation split, whole delays"),
        "best_valid_accuracy": Metric("fraction", "max", "best epoch of valid_accuracy"),
        "test_loss": Metric("nats", "min", "cross-entropy on the test set, after the last epoch only"),
        "test_accuracy": Metric("fraction", "max", "on the test set, after the last epoch only"),
    },
    headline="valid_accuracy",
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
    presets={},
    cases={
        "max": Case(TINY, QUICK),
        "gauss_plif": Case({**TINY, "kernel": "gauss", "neuron": "plif", "grads": True}, QUICK),
        "v1_inverted": Case({**TINY, "kernel": "v1", "bottleneck": "two_bn", "padding": "own"}, QUICK),
        "fc_delays": Case(
            {**TINY, "fc_delay_ms": 120.0, "conv_init": "orthogonal", "bottleneck": "one_bn", "padding": "set"},
            {**QUICK, "sigma_by_step": 1.0, "delay_ms_2": 120.0},
        ),
    },
)
