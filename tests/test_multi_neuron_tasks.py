"""Tasks in a row: EWC against a plain loop with a list of past tasks, scenarios, the accuracy matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lanes.engine import put
from lanes.serial import SerialEngine
from trainables.multi_neuron import FAMILY, continual, nets
from trainables.multi_neuron.neurons import Gate, Pass
from trainables.multi_neuron.sets import IMAGE_SETS

DOUBLE = torch.float64
STEPS = 6
TASKS = {
    "model": "cnn",
    "channels": [3, 4],
    "hidden": 8,
    "choices": 2,
    "custom": "linear",
    "batch": 8,
    "epochs": 2,
    "epoch_steps": STEPS,
    "tasks": 5,
    "fisher_batch": 3,
    "lr": 0.05,
    "momentum": 0.5,
    "precision": "float64",
}


def engine_of(cache_dir, seed=2, **values):
    program, hyper = FAMILY.build({**TASKS, **values})
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, cache_dir), "cpu"))
    engine.insert("me", hyper, seed)
    return engine


def finish(engine, epochs):
    """Train for `epochs`. {metric: [epochs]} as the summary sees them."""
    curves: dict[str, list] = {}
    for _ in range(epochs):
        for name, values in engine.advance(engine.until_epoch_end()).items():
            curves.setdefault(name, []).append(values[:, 0].mean())
        for name, value in engine.evaluate(["me"])["me"].items():
            curves.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in curves.items()}


class PlainLoop:
    """SGD over the same batches, the EWC terms kept as a list and differentiated by autograd."""

    def __init__(self, engine):
        self.engine, self.program = engine, engine.program
        self.hyper = engine.hypers("me")
        self.theta = {k: v.clone().requires_grad_() for k, v in engine.state("me")["params"].items()}
        self.velocity = {k: torch.zeros_like(v) for k, v in self.theta.items()}
        self.past: list[tuple[dict, dict]] = []
        self.penalties: list[float] = []

    def loss(self, x, y):
        gate = Gate(torch.tensor(2.0, dtype=DOUBLE))
        return F.cross_entropy(nets.forward(Pass(self.program, self.theta, self.hyper, gate), x), y)

    def gradient(self, loss):
        return dict(zip(self.theta, torch.autograd.grad(loss, list(self.theta.values())), strict=True))

    def batches(self, epoch):
        for index in FAMILY.order(self.program, self.engine.arrays, 2, epoch)["index"]:
            data = FAMILY.batch(self.program, self.engine.arrays, {"index": index})
            yield data["x"], data["y"]

    def train(self, epoch):
        for x, y in self.batches(epoch):
            penalty = sum(
                (fisher[k] * (self.theta[k] - anchor[k]) ** 2).sum() for fisher, anchor in self.past for k in fisher
            )
            penalty = float(self.hyper["ewc_lambda"]) / 2 * penalty
            self.penalties.append(float(torch.as_tensor(penalty).detach()))
            slopes = self.gradient(self.loss(x, y) + penalty)
            with torch.no_grad():
                for k, p in self.theta.items():
                    self.velocity[k] = 0.5 * self.velocity[k] + slopes[k]
                    p -= 0.05 * self.velocity[k]

    def remember(self, epoch):
        squares = {k: torch.zeros_like(v) for k, v in self.theta.items()}
        count = 0
        for x, y in self.batches(epoch):
            per_sample = self.program.fisher == "sample"
            parts = [(x[i : i + 1], y[i : i + 1]) for i in range(3)] if per_sample else [(x, y)]
            for one, label in parts:
                count += 1
                for k, g in self.gradient(self.loss(one, label)).items():
                    squares[k] += g**2
        anchor = {k: v.detach().clone() for k, v in self.theta.items()}
        self.past.append(({k: v / count for k, v in squares.items()}, anchor))


@pytest.mark.parametrize(("fisher", "strength"), [("sample", 20.0), ("batch", 100.0)])
def test_ewc_equals_a_plain_loop_over_past_tasks(cache_dir, fisher, strength):
    """Four tasks, three terms in the penalty; the mask, the fold and the one quadratic change nothing."""
    engine = engine_of(cache_dir, fisher=fisher, ewc_lambda=strength)
    loop = PlainLoop(engine)
    for task in range(4):
        loop.train(3 * task)
        loop.train(3 * task + 1)
        loop.remember(3 * task + 2)
    penalties = []
    for epoch in range(11):
        values = engine.advance(STEPS)["ewc_penalty"][:, 0]
        penalties += [] if epoch % 3 == 2 else list(values)
    assert loop.penalties[-1] > 0.01
    np.testing.assert_allclose(penalties, loop.penalties, rtol=1e-7, atol=1e-12)
    state = engine.state("me")
    for name, value in loop.theta.items():
        torch.testing.assert_close(state["params"][name], value.detach(), rtol=1e-8, atol=1e-10)
    engine.advance(STEPS)  # the fourth Fisher epoch
    assert all(torch.equal(state["params"][k], v) for k, v in engine.state("me")["params"].items())
    engine.advance(1)
    total = engine.state("me")["ewc"]["fisher"]
    for name, value in total.items():
        expected = sum(fisher_k[name] for fisher_k, _ in loop.past)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-14)


def test_lambda_zero_is_the_plain_net_bit_for_bit(cache_dir):
    """EWC's Fisher epochs shift neither order, nor draws, nor moments."""
    plain = engine_of(cache_dir, dropout=0.2, dropout_hidden=0.4)
    ewc = engine_of(cache_dir, dropout=0.2, dropout_hidden=0.4, fisher="model")
    for _ in range(3):
        finish(plain, 2)
        finish(ewc, 2)
        a, b = plain.state("me"), ewc.state("me")
        for part in ("params", "velocity"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
        finish(ewc, 1)


def test_ewc_slows_forgetting(cache_dir):
    """On the task-incremental digits, with enough training to forget."""
    values = {
        "model": "mlp",
        "custom": "all",
        "widths": [24],
        "epochs": 1,
        "epoch_steps": 50,
        "momentum": 0.5,
        "scenario": "task",
        "fisher": "sample",
        "batch": 16,
        "fisher_batch": 16,
    }
    free, held = (engine_of(cache_dir, **values, ewc_lambda=strength) for strength in (0.0, 200.0))
    a, b = (FAMILY.summarize(engine.program, finish(engine, 10)) for engine in (free, held))
    assert a["learned_acc"] > 0.9
    assert b["learned_acc"] > 0.9
    assert a["forgetting"] > b["forgetting"] + 0.02


def test_model_fisher_draws_labels_from_the_model(cache_dir):
    """Over many draws their shares are the model's probabilities."""
    engine = engine_of(cache_dir, fisher="model")
    state = engine.state("me")
    scores = torch.tensor([0.0, 1.0, 2.0, -1, 0, 0, 0, 0, 0, 0], dtype=DOUBLE)
    x, y = torch.zeros(20000, 1), torch.zeros(20000, dtype=torch.int64)

    def drawn(program):
        labels = continual.drawn_labels(program, state, x, y, lambda p, images: scores.expand(len(images), 10))
        return torch.bincount(labels, minlength=10) / 20000

    torch.testing.assert_close(drawn(engine.program), torch.softmax(scores, 0).float(), rtol=0, atol=0.012)
    own, _ = FAMILY.build({**TASKS, "fisher": "model", "scenario": "task"})
    expected = torch.cat([torch.softmax(scores[:2], 0), torch.zeros(8)]).float()
    torch.testing.assert_close(drawn(own), expected, rtol=0, atol=0.012)


@pytest.mark.parametrize("tasks", [2, 5])
def test_a_task_trains_on_its_own_classes_or_on_all_so_far(cache_dir, tasks):
    width = 10 // tasks
    for union in (False, True):
        engine = engine_of(cache_dir, tasks=tasks, union=union, epoch_steps=40, epochs=1)
        for task in range(tasks):
            index = FAMILY.order(engine.program, engine.arrays, 2, task)["index"]
            labels = set(engine.arrays["train_labels"][index].flatten().tolist())
            assert labels == set(range(0 if union else task * width, (task + 1) * width))


def test_an_epoch_of_a_task_is_the_smallest_task_s_full_batches(cache_dir):
    engine = engine_of(cache_dir, epoch_steps=0, batch=10)
    assert engine.schedule.steps_per_epoch == 23  # 2-3 has 238 images, the fewest
    for task in range(5):
        index = FAMILY.order(engine.program, engine.arrays, 2, 2 * task)["index"].flatten()
        assert len(set(index.tolist())) == 230


def test_scenarios_differ_in_which_outputs_compete():
    labels = torch.tensor([0, 1, 4, 9])
    single, _ = FAMILY.build({**TASKS, "scenario": "class"})
    own, _ = FAMILY.build({**TASKS, "scenario": "task"})
    assert continual.allowed_classes(single, labels).all()
    assert [row.nonzero().flatten().tolist() for row in continual.allowed_classes(own, labels)] == [
        [0, 1],
        [0, 1],
        [4, 5],
        [8, 9],
    ]


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_task_accuracies_equal_a_count_by_hand(cache_dir, scenario):
    engine = engine_of(cache_dir, scenario=scenario, eval_batch=50)  # 239 images: the last batch is padded
    curves = finish(engine, 3)
    gate = Gate(torch.tensor(2.0, dtype=DOUBLE))
    images = FAMILY.batch(engine.program, engine.arrays, {"held_out": torch.arange(239)})
    net = Pass(engine.program, engine.state("me")["params"], engine.hypers("me"), gate)
    logits = nets.forward(net, images["x"])
    for task, size in enumerate(IMAGE_SETS["digits"].held_out_task_sizes("valid", 5)):
        mine = images["y"] // 2 == task
        assert mine.sum() == size
        if scenario == "task":
            guess = logits[mine][:, 2 * task : 2 * task + 2].argmax(1) + 2 * task
        else:
            guess = logits[mine].argmax(1)
        expected = (guess == images["y"][mine]).double().mean().item()
        assert curves[f"test_acc_task{task}"][-1] == pytest.approx(expected, abs=1e-12)
    assert any(0 < curves[f"test_acc_task{task}"][-1] < 1 for task in range(5))


def test_accuracy_matrix_and_what_it_comes_to():
    """Two epochs a task and a Fisher epoch; the third of each three is the end of the task."""
    program, _ = FAMILY.build({**TASKS, "fisher": "sample", "tasks": 2})
    epochs = {
        "test_acc_task0": np.array([0.5, 0.8, 0.9, 0.4, 0.2, 0.3]),
        "test_acc_task1": np.array([0.0, 0.1, 0.0, 0.7, 0.8, 0.6]),
    }
    summary = FAMILY.summarize(program, epochs)
    assert [summary[f"acc_after{i}_task{j}"] for i in (0, 1) for j in (0, 1)] == [0.9, 0.0, 0.3, 0.6]
    assert summary["mean_acc"] == pytest.approx(0.45)
    assert summary["learned_acc"] == pytest.approx(0.75)
    assert summary["forgetting"] == pytest.approx(0.6)
    early = FAMILY.summarize(program, {name: curve[:2] for name, curve in epochs.items()})
    assert "acc_after0_task0" not in early
    assert "forgetting" not in early
    assert early["mean_acc"] == pytest.approx(0.45)
