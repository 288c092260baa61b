"""Nets in ordinary PyTorch and the original's update rules as plain loops: what vgg_decay is checked against."""

from __future__ import annotations

import math

import torch
from torch import nn

from lanes.engine import put
from lanes.serial import SerialEngine
from trainables.family import hyper_tensors
from trainables.vgg_decay import FAMILY
from trainables.vgg_decay.augment import augmented
from trainables.vgg_decay.program import layers

TINY = {
    "widths": (3, 10),
    "batch": 16,
    "eval_batch": 16,
    "train_images": 40,
    "test_images": 20,
    "epochs": 8,
    "precision": "float64",
}


def build(**values):
    """(program, hyper tensors) of a tiny net in float64."""
    program, hyper = FAMILY.build({**TINY, **values})
    return program, hyper, hyper_tensors(program, hyper, "cpu")


class Net(nn.Module):
    """The program's net with conv bias, nn.BatchNorm2d, ReLU and nn.MaxPool2d, its parameters copied from a state."""

    def __init__(self, program, state):
        super().__init__()
        self.specs = layers(program)
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for spec in self.specs:
            pad = spec.kernel // 2
            self.convs[spec.name] = nn.Conv2d(spec.inputs, spec.outputs, spec.kernel, padding=pad, dtype=torch.float64)
            if spec.norm:
                self.norms[spec.name] = nn.BatchNorm2d(spec.outputs, dtype=torch.float64)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state["params"][name])
            for name, norm in self.norms.items():
                norm.running_mean.copy_(state["running"][f"{name}.mean"])
                norm.running_var.copy_(state["running"][f"{name}.var"])

    def tensors(self):
        """Parameters under the family's names, in its order."""
        found = {}
        for spec in self.specs:
            found[f"{spec.name}.weight"] = self.convs[spec.name].weight
            found[f"{spec.name}.bias"] = self.convs[spec.name].bias
            if spec.norm:
                found[f"{spec.name}.gamma"] = self.norms[spec.name].weight
                found[f"{spec.name}.beta"] = self.norms[spec.name].bias
        return found

    def running(self):
        found = {}
        for name, norm in self.norms.items():
            found[f"{name}.mean"], found[f"{name}.var"] = norm.running_mean, norm.running_var
        return found

    def forward(self, x):
        for spec in self.specs:
            x = self.convs[spec.name](x)
            if spec.norm:
                x = torch.relu(self.norms[spec.name](x))
            if spec.pool_after:
                x = nn.functional.max_pool2d(x, 2)
        return x.flatten(2).mean(2)


def train_both(steps, update, seed=1, prepare=None, **values):
    """Train the family on the serial engine, and `Net` with `update(net, step, memory)`, on the same batches.

    The reference sees short batches as they are, not padded. Returns (state, net, memory, losses of both).
    """
    program, hyper, tensors = build(**values)
    arrays = put(FAMILY.load(program, None, None), "cpu")
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("me", hyper, seed)
    state = engine.state("me")
    if prepare is not None:
        prepare(state)
        engine.remove(["me"])
        engine.insert("me", hyper, seed, state=state)
    net, memory = Net(program, state).train(), {}
    memory["init_variance"] = dict(zip((s.name for s in net.specs), state["init_variance"].tolist(), strict=True))
    per_epoch, losses = engine.schedule.steps_per_epoch, []
    for i in range(steps):
        row = {k: v[i % per_epoch] for k, v in FAMILY.order(program, arrays, seed, i // per_epoch).items()}
        data = FAMILY.batch(program, arrays, row)
        count = torch.tensor(i, dtype=torch.int32)
        images = augmented(program, tensors, torch.tensor(seed, dtype=torch.int32), count, data["images"])
        net.zero_grad()
        smoothing = float(tensors["label_smoothing"])
        loss = nn.functional.cross_entropy(
            net(images[data["real"]]), data["labels"][data["real"]], label_smoothing=smoothing
        )
        loss.backward()
        _drop_noise(net)
        update(net, i, memory)
        losses.append((float(engine.advance(1)["train_loss"][0, 0]), loss.item()))
    return engine.state("me"), net, memory, losses


def _drop_noise(net):
    """A bias before BatchNorm has the exact gradient 0; autograd returns rounding noise there."""
    for name in net.norms:
        grad = net.convs[name].bias.grad
        assert grad.abs().max() < 1e-12
        grad.zero_()


def assert_equal(state, net, tolerance=1e-10):
    for name, value in net.tensors().items():
        torch.testing.assert_close(state["params"][name], value.detach(), rtol=tolerance, atol=tolerance, msg=name)
    for name, value in net.running().items():
        torch.testing.assert_close(state["running"][name], value, rtol=tolerance, atol=tolerance, msg=name)


def halving(lr, step, per_epoch, every):
    return lr * 0.5 ** math.floor((step // per_epoch) / every)


def var_rates(net, memory, base, dup, last1=1.0, last2=1.0):
    """make_param_groups_with_proportional_variance and the factors on its last groups, as the original loops."""
    rates, duplicates = {}, 1.0
    for spec in net.specs:
        rates[spec.name] = base / memory["init_variance"][spec.name] * duplicates
        if spec.pool_after:
            duplicates /= dup
    rates["logit"] *= last1 * last2
    rates["fc6"] *= last2
    return rates


def specific_sgd(net, memory, lr, rates, *, ema=None, by_weight=True, mults=None):
    """MonitoredSpecificSGD without momentum. ema: None for no normalisation; mults: layer -> list, zipped as coded."""
    with torch.no_grad():
        for spec in net.specs:
            group = [net.tensors()[name] for name in spec.tensors]
            factors = (mults or {}).get(spec.name, [None] * len(group))
            for name, p, factor in zip(spec.tensors, group, factors, strict=False):
                decay = rates[spec.name] * p
                d = p.grad + (decay if factor is None else decay * factor)
                if ema is not None:
                    norms = memory.setdefault("norms", {})
                    length = d.norm()
                    norms[name] = ema * norms[name] + (1 - ema) * length if name in norms else length
                    d = d / (norms[name] + 1e-8)
                    if by_weight:
                        d = d * p.norm()
                p.sub_(lr * d)
