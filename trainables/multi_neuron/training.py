"""One lane of multi-neuron training: initial state, an update step, an evaluation batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from trainables.family import Hypers, State, dtype_of
from trainables.multi_neuron import continual, monitor, nets
from trainables.multi_neuron.neurons import Gate, Params, Pass, gate_of, grown
from trainables.multi_neuron.program import Program, active_choices, clock_of
from trainables.multi_neuron.sets import IMAGE_SETS
from trainables.optimizers import adam, clip_by_global_norm, sgd, zeros_like


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    """params, moments (`velocity`, or `mu` and `nu`), and where the program asks for them `monitor` and `ewc`."""
    params = nets.init(program, hyper, seed, dtype_of(program))
    state: State = {"seed": seed, "step": torch.zeros_like(seed), "params": params}
    if program.optimizer == "sgd":
        state["velocity"] = zeros_like(params)
    else:
        state |= {"mu": zeros_like(params), "nu": zeros_like(params)}
    if monitor.sums_up(program):
        state["monitor"] = monitor.empty(program, params)
    if program.fisher != "none":
        state["ewc"] = continual.empty(params)
    return state


def step(program: Program, state: State, hyper: Hypers, batch: Mapping[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """One update; in a Fisher epoch the same work, with the parameters and moments held still."""
    clock = clock_of(program, state["step"], dtype_of(program))
    gate = gate_of(program, hyper, clock, state["seed"])
    params = state["params"]
    if program.growing:
        params = grown(program, params, hyper, clock, nets.multi_layers(program))

    def loss(p: Params) -> tuple[Tensor, tuple[Tensor, dict]]:
        net = Pass(program, p, hyper, gate, (state["seed"], clock.updates))
        each, right = judged(program, nets.forward(net, batch["x"]), batch["y"])
        return mean(each, batch["real"]), (mean(right, batch["real"]), monitor.records(net.choices, batch["real"]))

    grads, (value, (accuracy, chosen)) = grad_and_value(loss, has_aux=True)(params)
    metrics = {"train_loss": value, "train_acc": accuracy}
    new: State = {"seed": state["seed"], "step": state["step"] + 1}
    metrics |= monitor.metrics(chosen)
    if monitor.sums_up(program):
        new["monitor"] = monitor.accumulated(state["monitor"], chosen, grads, clock)
    if program.fisher != "none":
        ewc = continual.folded(program, state["ewc"], params, clock)
        metrics["ewc_penalty"], slope = continual.penalty(ewc, params, hyper["ewc_lambda"])
        grads = {name: g + slope[name] for name, g in grads.items()}
        new["ewc"] = continual.with_squares(program, state, ewc, clock, batch, quiet_logits(program, hyper, gate))
    updated, metrics["grad_norm"] = updates(program, state, params, grads, hyper, clock.updates + 1)
    if program.fisher != "none":
        updated = {
            part: {name: torch.where(clock.fisher, state[part][name], value) for name, value in values.items()}
            for part, values in updated.items()
        }
    return new | updated, metrics


def updates(
    program: Program, state: State, params: Params, grads: Params, hyper: Hypers, count: Tensor
) -> tuple[State, Tensor]:
    """({"params", moments}, gradient norm before clipping) after the optimiser's `count`-th update."""
    limit = torch.where(hyper["clip"] > 0, hyper["clip"], torch.full_like(hyper["clip"], torch.inf))
    grads, norm = clip_by_global_norm(grads, limit)
    rates = {name: hyper["lr"] * hyper["selector_lr"] if "/selector_" in name else hyper["lr"] for name in grads}
    if program.optimizer == "sgd":
        decayed = {name: g + hyper["weight_decay"] * params[name] for name, g in grads.items()}
        params, velocity = sgd(params, decayed, state["velocity"], rates, hyper["momentum"])
        return {"params": params, "velocity": velocity}, norm
    params, mu, nu = adam(params, grads, state["mu"], state["nu"], count, rates, decoupled_decay=hyper["weight_decay"])
    return {"params": params, "mu": mu, "nu": nu}, norm


def quiet_logits(program: Program, hyper: Hypers, gate: Gate) -> continual.Logits:
    """The net without dropout and exploration."""

    def logits(params: Params, x: Tensor) -> Tensor:
        return nets.forward(Pass(program, params, hyper, Gate(gate.active)), x)

    return logits


def judged(program: Program, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) and correctness of each example [B]; of text the mean over its places."""
    logits = logits.to(dtype_of(program))
    if program.scenario == "task":
        logits = torch.where(continual.allowed_classes(program, labels), logits, -torch.inf)
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").reshape(labels.shape)
    right = (logits.argmax(-1) == labels).to(each.dtype)
    return each.flatten(1).mean(1) if each.dim() > 1 else each, right.flatten(1).mean(1) if right.dim() > 1 else right


def mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean over the real examples of a batch."""
    weight = real.to(values.dtype)
    return (values * weight).sum() / weight.sum()


def evaluate(program: Program, state: State, hyper: Hypers, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the real examples of a held-out batch, without dropout and exploration.

    `test_acc_task{k}` is scaled by all held-out images over those of task k, so that the engine's division by the total
    count leaves each task's own accuracy. Entropies of shares are taken batch by batch.
    """
    # the growth schedule as of the last step done
    clock = clock_of(program, state["step"] - 1, dtype_of(program))
    gate = gate_of(program, hyper, clock)
    net = Pass(program, state["params"], hyper, gate)
    each, right = judged(program, nets.forward(net, batch["x"]), batch["y"])
    weight = batch["real"].to(each.dtype)
    count = weight.sum()
    sums = {"test_loss": (each * weight).sum(), "test_acc": (right * weight).sum(), "count": count}
    if program.tasks > 1:
        sums |= task_accuracies(program, right * weight, batch["y"])
    if program.choices > 1:
        found = {
            **monitor.metrics(monitor.records(net.choices, batch["real"]), "test_"),
            **monitor.cosines(program, state["params"], active_choices(program, hyper, clock.epochs)),
        }
        sums |= {name: value * count for name, value in found.items()}
    return sums


def task_accuracies(program: Program, right: Tensor, labels: Tensor) -> dict[str, Tensor]:
    sizes = IMAGE_SETS[program.data].held_out_task_sizes(program.evaluate_on, program.tasks)
    width = 10 // program.tasks
    return {
        f"test_acc_task{task}": torch.where(torch.div(labels, width, rounding_mode="floor") == task, right, 0.0).sum()
        * (sum(sizes) / size)
        for task, size in enumerate(sizes)
    }
