"""DLN, TDLN, ComputeGate and the minGPT journal: linear recurrences and small transformers on digits and text."""

from trainables.dln.cases import CASES
from trainables.dln.data import batch, load, order, test_order
from trainables.dln.presets import PRESETS
from trainables.dln.program import Hyper, Program, schedule, validate
from trainables.dln.training import evaluate, init, inspect, step, summarize
from trainables.family import Family, Metric

FAMILY = Family(
    name="dln",
    Program=Program,
    Hyper=Hyper,
    metrics={
        "train_loss": Metric("nats/token", "none", "what a step minimises; squared error for images and loss=mse"),
        "train_accuracy": Metric("fraction", "none", "next tokens right, or pixels and bits within 0.2"),
        "train_exact": Metric("fraction", "none", "bytes read back exactly (bits and real targets)"),
        "gradient_norm": Metric("1", "none", "of the lane's whole gradient, before clipping"),
        "learning_rate": Metric("1", "none", "of the step"),
        "held_out_loss": Metric("nats/token", "min", "held-out loss; squared error for images and loss=mse"),
        "held_out_accuracy": Metric("fraction", "max", "held-out next tokens right, or pixels and bits within 0.2"),
        "held_out_exact": Metric("fraction", "max", "held-out bytes read back exactly (bits and real targets)"),
        "best_held_out_loss": Metric("nats/token", "min", "lowest held_out_loss of the run's evaluations"),
    },
    headline="held_out_loss",
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
    presets=PRESETS,
    cases=CASES,
)
