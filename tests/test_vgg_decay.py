"""vgg_decay's net and update rules against ordinary PyTorch in float64, on batches that include a short one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lanes.engine import put
from lanes.serial import SerialEngine
from tests.vgg_decay_reference import (
    Net,
    assert_equal,
    build,
    halving,
    specific_sgd,
    train_both,
    var_rates,
)
from trainables.draws import counter
from trainables.family import BadValue, hyper_tensors
from trainables.vgg_decay import FAMILY
from trainables.vgg_decay.model import forward_eval, forward_train
from trainables.vgg_decay.packing import vector_lengths
from trainables.vgg_decay.program import has_short_batch, layers
from trainables.vgg_decay.updates import learning_rate

STEPS = 9
VAR = {"wd": 1e-3, "inverse_variance": 1.0, "dup_mult": 2.0, "last1_mult": 10.0, "flip": 0.5}


def scrambled(state, seed=0):
    """Every parameter and running statistic random, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for group in ("params", "running"):
        for name, value in state[group].items():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            state[group][name] = noise.abs() + 0.5 if name.endswith((".var", ".gamma")) else noise / 2
    return state


def notebook_state():
    program, hyper = FAMILY.build(FAMILY.presets["notebook"])
    return program, FAMILY.init(program, hyper_tensors(program, hyper, "cpu"), counter(0))


def test_notebook_net_has_its_parameters_and_initial_spread():
    program, state = notebook_state()
    assert sum(value.numel() for value in state["params"].values()) == 2_424_234
    assert [layer.name for layer in layers(program)][-4:] == ["conv5_1", "conv5_2", "fc6", "logit"]
    for layer in layers(program):
        weight = state["params"][f"{layer.name}.weight"]
        expected = math.sqrt(2 / layer.fan_in)
        assert weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))
        assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel())
        assert not state["params"][f"{layer.name}.bias"].any()
        if layer.norm:
            assert (state["params"][f"{layer.name}.gamma"] == 1).all()
            assert not state["params"][f"{layer.name}.beta"].any()


def test_forward_and_statistics_equal_batchnorm2d():
    program, _, tensors = build()
    assert has_short_batch(program)
    state = scrambled(FAMILY.init(program, tensors, counter(3)))
    net = Net(program, state)
    images = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    real = torch.arange(16) < 11
    net.eval()
    logits, _ = forward_eval(program, state["params"], state["running"], images)
    torch.testing.assert_close(logits, net(images), rtol=1e-11, atol=1e-11)
    net.train()
    logits, running = forward_train(program, state["params"], state["running"], images, real)
    torch.testing.assert_close(logits[:11], net(images[:11]), rtol=1e-11, atol=1e-11)
    for name, value in net.running().items():
        torch.testing.assert_close(running[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("nesterov", [0.0, 1.0])
def test_sgd_equals_torch_with_parameter_groups(nesterov):
    """Variance-inverse rates as groups of torch.optim.SGD, momentum, smoothing, and the halving schedule."""

    def update(net, step, memory):
        if "sgd" not in memory:
            rates = var_rates(net, memory, 1e-3, 2.0, last1=10.0, last2=3.0)
            groups = [
                {"params": [net.tensors()[name] for name in spec.tensors], "weight_decay": rates[spec.name]}
                for spec in net.specs
            ]
            memory["sgd"] = torch.optim.SGD(groups, 0.05, momentum=0.9, nesterov=bool(nesterov))
        for group in memory["sgd"].param_groups:
            group["lr"] = halving(0.05, step, 3, 1)
        memory["sgd"].step()

    state, net, _, losses = train_both(
        STEPS, update, lr=0.05, halve_every=1.0, momentum=0.9, nesterov=nesterov, last2_mult=3.0, **VAR
    )
    assert_equal(state, net)
    np.testing.assert_allclose(*np.array(losses).T, rtol=1e-11)


def test_label_smoothing_equals_torch():
    def update(net, step, memory):
        specific_sgd(net, memory, 0.1, dict.fromkeys((s.name for s in net.specs), 0.0))

    state, net, _, _ = train_both(4, update, wd=0.0, label_smoothing=0.2, translate=1.0, cutout=3.0)
    assert_equal(state, net)


@pytest.mark.parametrize("clamp", [1.0, 0.0])
@pytest.mark.parametrize("back", [0.0, 1.0])
def test_l1_follows_the_original_loop(clamp, back):
    def update(net, step, memory):
        with torch.no_grad():
            for spec in net.specs:
                l1 = spec.name.startswith("conv1_") or back
                for name in spec.tensors:
                    p = net.tensors()[name]
                    before = p.sign()
                    p.sub_(0.1 * (p.grad + (0.05 * before if l1 else 0.016 * p)))
                    if l1 and clamp:
                        crossed = before * p.sign() == -1
                        p.mul_((~crossed).double())
                        memory["crossed"] = memory.get("crossed", 0) + int(crossed.sum())

    # six steps: then a beta at 0 whose exact gradient is 0 moves by rounding noise, and L1 goes by the noise's sign
    state, net, memory, _ = train_both(
        6, update, l1=0.05, l1_front=1.0, l1_back=back, l1_clamp=clamp, wd=0.016, prepare=scrambled_weights
    )
    assert_equal(state, net)
    if clamp:
        assert memory["crossed"] > 20
        assert (state["params"]["conv1_2.weight"] == 0).any()


def scrambled_weights(state):
    state["params"] = {name: value + 0.0107 for name, value in state["params"].items()}


FORMS = {
    "jxp": ({"normalize": 1.0, "norm_ema": 0.0, "by_weight": 1.0}, {"ema": 0.0, "by_weight": True}),
    "kxp": ({"normalize": 1.0, "norm_ema": 0.98, "by_weight": 1.0}, {"ema": 0.98, "by_weight": True}),
    "lxp": ({"normalize": 1.0, "norm_ema": 0.98, "by_weight": 0.0}, {"ema": 0.98, "by_weight": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_normalised_updates_follow_the_original_loop(form):
    ours, theirs = FORMS[form]

    def update(net, step, memory):
        specific_sgd(net, memory, 0.02, var_rates(net, memory, 1e-3, 2.0, last1=10.0), **theirs)

    state, net, memory, _ = train_both(STEPS, update, lr=0.02, **VAR, **ours)
    assert_equal(state, net)
    averages = {**state["memory"]["norm"]}
    averages.update(zip(vector_lengths(build()[0]), averages.pop("vectors")[:, 0], strict=True))
    for name, norm in memory["norms"].items():
        assert averages[name].item() == pytest.approx(norm.item(), rel=1e-9, abs=1e-15)
    still = [name for name, value in state["params"].items() if not value.any()]
    # what starts at 0 has the norm 0 and, multiplied by it, never moves
    starts_at_zero = [name for name in state["params"] if name.endswith((".bias", ".beta"))]
    assert set(still) == (set(starts_at_zero) if form != "lxp" else {n for n in still if n != "logit.bias"})


def test_norm_floor_lets_zeros_move():
    state, _, _, _ = train_both(3, lambda *a: None, lr=0.02, norm_floor=0.1, **VAR, **FORMS["kxp"][0])
    assert state["params"]["conv1_1.beta"].any()


def test_decay_outside_the_norm():
    def update(net, step, memory):
        rates = var_rates(net, memory, 1e-3, 2.0, last1=10.0)
        with torch.no_grad():
            shrunk = {s.name: [net.tensors()[n] * 0.1 * rates[s.name] for n in s.tensors] for s in net.specs}
            specific_sgd(net, memory, 0.1, dict.fromkeys(rates, 0.0), ema=0.98, by_weight=False)
            for spec in net.specs:
                for name, part in zip(spec.tensors, shrunk[spec.name], strict=True):
                    net.tensors()[name].sub_(part)

    state, net, _, _ = train_both(STEPS, update, decay_outside=1.0, **VAR, **FORMS["lxp"][0])
    assert_equal(state, net)


@pytest.mark.parametrize("outside", [0.0, 1.0])
def test_element_adam_equals_torch(outside):
    def update(net, step, memory):
        if "adam" not in memory:
            rates = var_rates(net, memory, 1e-3, 2.0, last1=10.0)
            groups = [
                {"params": [net.tensors()[name] for name in spec.tensors], "weight_decay": rates[spec.name]}
                for spec in net.specs
            ]
            memory["adam"] = (torch.optim.AdamW if outside else torch.optim.Adam)(groups, lr=1e-3, eps=1e-6)
        memory["adam"].step()

    state, net, _, _ = train_both(STEPS, update, optimizer="adam", lr=1e-3, adam_eps=1e-6, decay_outside=outside, **VAR)
    assert_equal(state, net)


@pytest.mark.parametrize("shared", ["unit", "layer"])
def test_shared_second_moments_follow_a_plain_loop(shared):
    def update(net, step, memory):
        rates = var_rates(net, memory, 1e-3, 2.0, last1=10.0)
        with torch.no_grad():
            for spec in net.specs:
                for name in spec.tensors:
                    p = net.tensors()[name]
                    g = p.grad + rates[spec.name] * p
                    m, v = memory.get(name, (0.0, 0.0))
                    rows = (g * g).reshape(len(g), -1)
                    pooled = rows.mean(1).reshape(-1, *[1] * (g.dim() - 1)) if shared == "unit" else rows.mean()
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * pooled
                    memory[name] = m, v
                    t = step + 1
                    p.sub_(0.01 * (m / (1 - 0.9**t)) / (torch.sqrt(v / (1 - 0.999**t)) + 1e-8))

    state, net, _, _ = train_both(STEPS, update, optimizer="adam", second_moment=shared, lr=0.01, **VAR)
    assert_equal(state, net)


def test_training_accuracy_counts_every_example_once():
    """The mean of the epoch's step values is correct / examples, short batch included."""
    program, hyper, _ = build(lr=0.0, flip=0.0)
    arrays = put(FAMILY.load(program, None, None), "cpu")
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("me", hyper, 2)
    index = FAMILY.order(program, arrays, 2, 0)["index"]
    assert sorted(index[index >= 0].tolist()) == list(range(40))
    curve = engine.advance(3)
    state, correct = engine.state("me"), 0
    for row in index:
        data = FAMILY.batch(program, arrays, {"index": row[row >= 0]})
        net = Net(program, state).train()
        images = (data["images"].double() - 0.3053 * 16) / (0.3760 * 16)
        correct += int((net(images).argmax(1) == data["labels"]).sum())
    assert 0 < correct < 40
    assert curve["train_acc"].mean() * 40 == pytest.approx(correct)
    summary = FAMILY.summarize(
        program, {"train_acc": np.array([curve["train_acc"].mean()]), "test_acc": np.array([0.5])}
    )
    assert summary["train_correct"] == correct


def test_evaluation_is_of_all_images_and_of_no_padding():
    program, hyper, _ = build(covariates=("train", "batch_stats"), holdout=6, test_images=37, wd=0.01)
    arrays = put(FAMILY.load(program, None, None), "cpu")
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("me", hyper, 2)
    engine.advance(3)
    found = engine.evaluate(["me"])["me"]
    net = Net(program, engine.state("me")).eval()

    def accuracy(images, labels):
        x = (images.movedim(-1, 1).double() - 0.3053 * 16) / (0.3760 * 16)
        logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits, labels.long())
        return (logits.argmax(1) == labels).double().mean().item(), loss.item()

    acc, loss = accuracy(arrays["test_images"], arrays["test_labels"])
    assert found["test_acc"] == pytest.approx(acc, abs=1e-12)
    assert found["test_loss"] == pytest.approx(loss, rel=1e-10)
    assert found["val_acc"] == pytest.approx(accuracy(arrays["train_images"][34:], arrays["train_labels"][34:])[0])
    assert found["train_eval_acc"] == pytest.approx(
        accuracy(arrays["train_images"][:34], arrays["train_labels"][:34])[0]
    )
    net.train()
    own = [
        accuracy(arrays["test_images"][i : i + 16], arrays["test_labels"][i : i + 16])[0]
        * len(arrays["test_labels"][i : i + 16])
        for i in (0, 16, 32)
    ]
    assert found["test_acc_batch_stats"] == pytest.approx(sum(own) / 37)


def test_notebook_geometry():
    program, _ = FAMILY.build(FAMILY.presets["notebook"])
    schedule = FAMILY.schedule(program)
    assert (schedule.steps_per_epoch, schedule.steps) == (391, 78_200)
    rows = FAMILY.test_order(program, {"test_labels": torch.zeros(10_000)}, 0, 0)["index"]
    assert rows.shape == (79, 128)
    assert (rows >= 0).sum() == 10_000


def test_learning_rate_schedules():
    program, _, tensors = build(lr=0.1, halve_every=20.0, epochs=200)
    lr = [learning_rate(program, tensors, torch.tensor(s), 391).item() for s in (0, 7819, 7820, 78_199)]
    assert lr == pytest.approx([0.1, 0.1, 0.05, 0.1 / 2**9])
    program, _, tensors = build(lr=0.1, lr_schedule="cosine", warmup=1.0, epochs=11)
    lr = [learning_rate(program, tensors, torch.tensor(s), 10).item() for s in (0, 9, 10, 60, 109)]
    assert lr == pytest.approx([0.01, 0.1, 0.1, 0.05, 0.05 * (1 + math.cos(math.pi * 0.99))])
    program, _, tensors = build(lr=0.1, lr_schedule="linear", epochs=10)
    lr = [learning_rate(program, tensors, torch.tensor(s), 10).item() for s in (0, 50, 99)]
    assert lr == pytest.approx([0.1, 0.05, 0.001])


def test_bf16_keeps_float32_masters_and_learns():
    program, hyper = FAMILY.build(
        {**FAMILY.presets["small"], "precision": "bf16", "epochs": 2, "train_images": 640, "wd": 1e-3}
    )
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, None), "cpu"))
    engine.insert("me", hyper, 0)
    loss = engine.advance(engine.until_epoch_end())["train_loss"][:, 0]
    assert {value.dtype for value in engine.state("me")["params"].values()} == {torch.float32}
    assert np.isfinite(loss).all()
    assert loss[-1] < 0.8 * loss[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "mnist"}, "data 'mnist' is not one of cifar10, digits"),
        ({"widths": (4, 0)}, "widths = "),
        ({"data": "cifar10", "widths": (4,) * 6}, "one to five"),
        ({"optimizer": "lion"}, "optimizer 'lion' is not one of sgd, adam"),
        ({"covariates": ("weather",)}, "covariate 'weather'"),
        ({"train_images": 5000}, "train_images = 5000 should be 0"),
        ({"train_images": 33, "batch": 16}, "leaves one image alone"),
        ({"holdout": 1437}, "holdout = 1437 leaves 0 images"),
        ({"last_batch": "drop", "train_images": 10}, "no batch is full"),
    ],
)
def test_bad_values_are_told_in_one_line(values, message):
    with pytest.raises(BadValue, match=message):
        FAMILY.build({"widths": (2, 4), **values})
