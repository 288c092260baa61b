"""Tasks in a row: the classes of each, elastic weight consolidation (EWC), and the accuracy matrix.

EWC (Kirkpatrick et al. 2017) adds lambda / 2 sum_k sum_i F_ki (theta_i - theta_ki)^2 for every past task k, with
theta_k the parameters at the end of task k and F_k the diagonal of their Fisher information there.

The Fisher needs work at the end of a task, which a step cannot branch to. So each task ends with one more epoch (the
schedule has it, `Clock.fisher` marks it) in which the parameters hold still at theta_k while every step adds its
squared gradients to a sum; the first step of the next task folds the mean into the terms of the penalty. Everywhere
else these are masked by `torch.where`. The sum of quadratics is kept as one: with A = sum F_k, m = sum F_k theta_k /
A and a constant C,

    sum_k F_k (theta - theta_k)^2 = A (theta - m)^2 + C

exactly, so memory does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from trainables import draws
from trainables.family import State
from trainables.multi_neuron.neurons import Params
from trainables.multi_neuron.program import CLASSES, Clock, Program, schedule
from trainables.optimizers import zeros_like

Logits = Callable[[Params, Tensor], Tensor]
"""(params, images [B, ...]) -> logits [B, 10], without dropout or exploration."""


def allowed_classes(program: Program, labels: Tensor) -> Tensor:
    """Bool [B, 10]: outputs that compete for an example; a task's own in the task-incremental scenario, else all."""
    width = CLASSES // program.tasks if program.scenario == "task" else CLASSES
    classes = torch.arange(CLASSES, device=labels.device)
    task = torch.div(labels, width, rounding_mode="floor").unsqueeze(-1)
    return torch.div(classes, width, rounding_mode="floor") == task


# --- elastic weight consolidation -------------------------------------------------------------------------------------


def empty(params: Params) -> State:
    """EWC terms before any task has ended."""
    return {
        "squares": zeros_like(params),  # sums of squared gradients of the task at hand
        "fisher": zeros_like(params),  # A
        "anchor": zeros_like(params),  # m
        "constant": torch.zeros_like(next(iter(params.values())).flatten()[0]),  # C
    }


def folded(program: Program, ewc: State, params: Params, clock: Clock) -> State:
    """The terms at the start of a step: at a new task's first step, with the task that has just ended."""
    steps = schedule(program).steps_per_epoch
    samples = steps if program.fisher == "batch" else steps * program.fisher_batch
    fisher, anchor, squares, constant = {}, {}, {}, ewc["constant"]
    for name, theta in params.items():
        old, new = ewc["fisher"][name], ewc["squares"][name] / samples
        total = old + new
        share = torch.where(total > 0, new / torch.where(total > 0, total, torch.ones_like(total)), 0.0)
        distance = theta - ewc["anchor"][name]
        constant = constant + torch.where(clock.new_task, (old * share * distance.square()).sum(), 0.0)
        fisher[name] = torch.where(clock.new_task, total, old)
        anchor[name] = torch.where(clock.new_task, ewc["anchor"][name] + share * distance, ewc["anchor"][name])
        squares[name] = torch.where(clock.new_task, torch.zeros_like(new), ewc["squares"][name])
    return {"squares": squares, "fisher": fisher, "anchor": anchor, "constant": constant}


def penalty(ewc: State, params: Params, strength: Tensor) -> tuple[Tensor, Params]:
    """lambda / 2 (A (theta - m)^2 + C) summed over parameters, and its gradient lambda A (theta - m)."""
    value, slope = ewc["constant"], {}
    for name, theta in params.items():
        distance = theta - ewc["anchor"][name]
        slope[name] = strength * ewc["fisher"][name] * distance
        value = value + (ewc["fisher"][name] * distance.square()).sum()
    return strength / 2 * value, slope


def with_squares(
    program: Program, state: State, ewc: State, clock: Clock, batch: Mapping[str, Tensor], logits: Logits
) -> State:
    """The terms after a step of a Fisher epoch: with the squared log-likelihood gradients of its batch.

    "sample" and "model" take the first `fisher_batch` examples and square each one's gradient; "batch" squares the mean
    gradient of the whole batch, as the original code did, which is smaller by about the batch size. `state` is the
    lane's at the start of the step.
    """
    params = state["params"]
    if program.fisher == "batch":
        squares = {name: g.square() for name, g in _gradient(program, params, batch["x"], batch["y"], logits).items()}
    else:
        x, y = batch["x"][: program.fisher_batch], batch["y"][: program.fisher_batch]
        if program.fisher == "model":
            y = drawn_labels(program, state, x, y, logits)
        each = vmap(lambda one, label: _gradient(program, params, one[None], label[None], logits))(x, y)
        squares = {name: g.square().sum(0) for name, g in each.items()}
    added = {
        name: old + torch.where(clock.fisher, squares[name], torch.zeros_like(old))
        for name, old in ewc["squares"].items()
    }
    return {**ewc, "squares": added}


def _gradient(program: Program, params: Params, x: Tensor, y: Tensor, logits: Logits) -> Params:
    """Gradient of the mean negative log-likelihood of labels y."""

    def loss(p: Params) -> Tensor:
        scores = torch.where(allowed_classes(program, y), logits(p, x).to(next(iter(p.values())).dtype), -torch.inf)
        return F.cross_entropy(scores, y)

    return grad(loss)(params)


def drawn_labels(program: Program, state: State, x: Tensor, y: Tensor, logits: Logits) -> Tensor:
    """Labels drawn from the model's own predictions (Gumbel-max): the true Fisher instead of the empirical one."""
    scores = logits(state["params"], x)
    # keyed by the step: the count of updates stands still in a Fisher epoch
    u = draws.uniform(state["seed"], state["step"], "fisher/labels", tuple(scores.shape), scores.dtype)
    noise = -torch.log(-torch.log(u))
    return torch.where(allowed_classes(program, y), scores + noise, -torch.inf).argmax(-1)


# --- the accuracy matrix ----------------------------------------------------------------------------------------------


def accuracy_matrix(program: Program, epochs: Mapping[str, np.ndarray]) -> np.ndarray:
    """R[i, j], accuracy on task j after training on task i, for the tasks that have ended: [ended, tasks]."""
    per_task = schedule(program).epochs_per_task
    curves = np.stack([epochs[f"test_acc_task{task}"] for task in range(program.tasks)], axis=1)
    return curves[per_task - 1 :: per_task]


def summary(program: Program, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The matrix as `acc_after{i}_task{j}`, and what it comes to.

    mean_acc: mean over all tasks at the last evaluation. learned_acc: mean of R[i, i], each task when it has just been
    learned. forgetting: mean over the tasks before the last ended one of max over earlier i of R[i, j] - R[last, j]
    (Chaudhry et al. 2018).
    """
    matrix = accuracy_matrix(program, epochs)
    ended = len(matrix)
    values = {f"acc_after{i}_task{j}": float(matrix[i, j]) for i in range(ended) for j in range(program.tasks)}
    values["mean_acc"] = float(np.mean([epochs[f"test_acc_task{task}"][-1] for task in range(program.tasks)]))
    if ended:
        values["learned_acc"] = float(np.mean(np.diag(matrix)))
    if ended > 1:
        values["forgetting"] = float(np.mean(matrix[:-1, : ended - 1].max(0) - matrix[-1, : ended - 1]))
    return values
