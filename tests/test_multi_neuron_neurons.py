"""Vectorised multi-neuron layers against the notebook's own: a module a unit, a loop over units, torch's autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from trainables import draws
from trainables.family import hyper_tensors
from trainables.multi_neuron import FAMILY, cnn, mlp, nets
from trainables.multi_neuron.neurons import (
    Exploration,
    Gate,
    Layer,
    Pass,
    choose,
    grown,
    init_layers,
    lane_conv2d,
)
from trainables.multi_neuron.program import clock_of

DOUBLE = torch.float64


class NotebookNeuron(nn.Module):
    """`CustomNeuron` of the notebook, its sigmoid straight-through mask verbatim."""

    def __init__(self, size):
        super().__init__()
        self.selection_layer = nn.Linear(size, 1, dtype=DOUBLE)
        self.comp_layers = nn.ModuleList(nn.Linear(size, 1, dtype=DOUBLE) for _ in range(2))
        self.threshold = 0.5

    def forward(self, x):
        selection_output = torch.sigmoid(self.selection_layer(x))
        with torch.no_grad():
            hard = (selection_output < self.threshold).to(DOUBLE)
        selected_mask = self.straight_through(hard, selection_output)
        a, b = (torch.relu(layer(x)) for layer in self.comp_layers)
        return selected_mask * a + (1 - selected_mask) * b

    def straight_through(self, hard, selection_output):
        return hard - selection_output.detach() + selection_output


class CorrectedNeuron(NotebookNeuron):
    """The same with the mask built on the probability of what it selects, 1 - s."""

    def straight_through(self, hard, selection_output):
        return hard - (1 - selection_output).detach() + (1 - selection_output)


class SoftmaxNeuron(nn.Module):
    """The N-choice neuron of different_number_of_choices.ipynb."""

    def __init__(self, size, choices):
        super().__init__()
        self.selection_layer = nn.Linear(size, choices, dtype=DOUBLE)
        self.comp_layers = nn.ModuleList(nn.Linear(size, 1, dtype=DOUBLE) for _ in range(choices))

    def forward(self, x):
        p = torch.softmax(self.selection_layer(x), dim=1)
        hard = torch.zeros_like(p).scatter_(1, p.argmax(dim=1, keepdim=True), 1.0)
        mask = hard - p.detach() + p
        outputs = torch.cat([torch.relu(layer(x)) for layer in self.comp_layers], dim=1)
        return (mask * outputs).sum(dim=1, keepdim=True)


def built(**values):
    program, hyper = FAMILY.build({"precision": "float64", **values})
    return program, hyper_tensors(program, hyper, "cpu")


def layer_params(modules):
    """The vectorised parameters of a list of notebook neurons."""
    return {
        "hidden1/weight": torch.stack([torch.cat([c.weight for c in m.comp_layers]) for m in modules], 1).detach(),
        "hidden1/bias": torch.stack([torch.cat([c.bias for c in m.comp_layers]) for m in modules], 1).detach(),
        "hidden1/selector_weight": torch.stack([m.selection_layer.weight for m in modules], 1).detach(),
        "hidden1/selector_bias": torch.stack([m.selection_layer.bias for m in modules], 1).detach(),
    }


def layer_grads(modules):
    return {
        "hidden1/weight": torch.stack([torch.cat([c.weight.grad for c in m.comp_layers]) for m in modules], 1),
        "hidden1/bias": torch.stack([torch.cat([c.bias.grad for c in m.comp_layers]) for m in modules], 1),
        "hidden1/selector_weight": torch.stack([m.selection_layer.weight.grad for m in modules], 1),
        "hidden1/selector_bias": torch.stack([m.selection_layer.bias.grad for m in modules], 1),
    }


@pytest.mark.parametrize(
    ("neuron", "fields"),
    [
        (lambda: NotebookNeuron(7), {"selector": "sigmoid", "choices": 2, "ste_sign": -1.0}),
        (lambda: CorrectedNeuron(7), {"selector": "sigmoid", "choices": 2, "ste_sign": 1.0}),
        (lambda: SoftmaxNeuron(7, 4), {"selector": "softmax", "choices": 4, "ste_sign": 1.0}),
    ],
    ids=["sigmoid-as-written", "sigmoid-corrected", "softmax"],
)
def test_layer_equals_a_loop_over_notebook_neurons(neuron, fields):
    torch.manual_seed(0)
    modules = [neuron() for _ in range(6)]
    x = torch.randn(40, 7, dtype=DOUBLE, requires_grad=True)
    pull = torch.randn(40, 6, dtype=DOUBLE)
    expected = torch.cat([module(x) for module in modules], dim=1)
    (expected * pull).sum().backward()

    program, hyper = built(**fields)
    gate = Gate(torch.tensor(float(program.choices), dtype=DOUBLE))

    def loss(p, value):
        out = Pass(program, p, hyper, gate).linear("hidden1", value, relu=True)
        return (out * pull).sum(), out

    params = layer_params(modules)
    (slopes, upstream), out = grad(loss, argnums=(0, 1), has_aux=True)(params, x.detach())
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(upstream, x.grad, rtol=1e-10, atol=1e-12)
    for name, value in layer_grads(modules).items():
        assert value.abs().max() > 0.1, name
        torch.testing.assert_close(slopes[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_the_notebook_s_sigmoid_selector_gets_the_negated_gradient():
    """Raising s turns A off, so the corrected gradient of the selector is minus the written one; all else is equal."""
    program, written = built(selector="sigmoid", choices=2, ste_sign=-1.0, widths=[5])
    corrected = {**written, "ste_sign": -written["ste_sign"]}
    frozen = {**written, "ste_sign": 0 * written["ste_sign"]}
    params, x, gate = random_net(program, written)

    def slopes(hyper):
        return grad(lambda p: nets.forward(Pass(program, p, hyper, gate), x).square().sum())(params)

    a, b, c = slopes(written), slopes(corrected), slopes(frozen)
    for name in params:
        if "/selector_" in name:
            assert a[name].abs().max() > 1e-3
            torch.testing.assert_close(a[name], -b[name], rtol=1e-12, atol=0)
            assert not c[name].any()
        else:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def random_net(program, hyper):
    seed = draws.counter(5)
    params = nets.init(program, hyper, seed, DOUBLE)
    x = draws.normal(seed, seed, "x", (9, 8, 8), DOUBLE)
    return params, x, Gate(torch.tensor(float(program.choices), dtype=DOUBLE))


@pytest.mark.parametrize("unselected", [0.0, 1.0])
def test_for_each_sample_gradient_reaches_the_selected_neuron_only(unselected):
    program, hyper = built(widths=[6], choices=4, unselected=unselected)
    params, x, gate = random_net(program, hyper)
    reached = 0
    for one in x:
        net = Pass(program, params, hyper, gate)
        nets.forward(net, one[None])
        chosen = net.choices["hidden1"].hard[0].bool()  # [N, out]
        slopes = grad(lambda p, i=one: nets.forward(Pass(program, p, hyper, gate), i[None]).square().sum())(params)
        assert chosen.sum(0).eq(1).all()
        assert not slopes["hidden1/weight"][~chosen].any()
        assert not slopes["hidden1/bias"][~chosen].any()
        reached += int(slopes["hidden1/weight"][chosen].any(-1).sum())
    assert reached > 20


def test_what_the_selector_sends_upstream_and_hears_of():
    """upstream 0: the layer's input hears of the chosen neuron's weights alone.

    unselected 0: the selector's gradient is that of p at the chosen neuron, times its output.
    """
    program, hyper = built(widths=[6], choices=3)
    params, _, gate = random_net(program, hyper)
    x = draws.normal(draws.counter(1), draws.counter(2), "x", (1, 64), DOUBLE)
    pull = draws.normal(draws.counter(1), draws.counter(3), "pull", (6,), DOUBLE)

    def run(flags, p, value):
        tensors = {**hyper, **{name: torch.tensor(flag, dtype=DOUBLE) for name, flag in flags.items()}}
        net = Pass(program, p, tensors, gate)
        return (net.linear("hidden1", value, relu=True)[0] * pull).sum(), net.choices["hidden1"]

    def slopes(**flags):
        return grad(lambda p, v: run(flags, p, v)[0], argnums=(0, 1))(params, x)

    _, choice = run({}, params, x)
    index = choice.hard[0].argmax(0)
    units = torch.arange(6)
    rows, biases = params["hidden1/weight"][index, units], params["hidden1/bias"][index, units]
    outputs = torch.relu(rows @ x[0] + biases)
    fires = (outputs > 0).to(DOUBLE)
    by_hand = (pull * fires) @ rows
    torch.testing.assert_close(slopes(upstream=0.0)[1][0], by_hand, rtol=1e-10, atol=1e-12)
    assert (slopes(upstream=1.0)[1][0] - by_hand).abs().max() > 1e-3
    torch.testing.assert_close(
        slopes(upstream=0.0)[0]["hidden1/selector_weight"], slopes(upstream=1.0)[0]["hidden1/selector_weight"]
    )
    p = choice.p[0]
    # d p_chosen / d logit_n = p_chosen (1[n = chosen] - p_n)
    slope = pull * outputs * p[index, units] * (torch.eye(3, dtype=DOUBLE)[index].T - p)
    torch.testing.assert_close(slopes(unselected=0.0)[0]["hidden1/selector_bias"], slope, rtol=1e-10, atol=1e-12)
    assert (slopes(unselected=1.0)[0]["hidden1/selector_bias"] - slope).abs().max() > 1e-3


def test_convolution_equals_its_neurons_one_by_one():
    program, hyper = built(model="cnn", custom="all", choices=3, channels=[4, 2], hidden=3)
    params, x, gate = random_net(program, hyper)
    net = Pass(program, params, hyper, gate)
    out = net.conv("conv1", x.unsqueeze(1), relu=True)

    def conv(kind, n):
        w, b = params[f"conv1/{kind}weight"][n], params[f"conv1/{kind}bias"][n]
        return torch.nn.functional.conv2d(x.unsqueeze(1), w, b)

    chosen = torch.stack([conv("selector_", n) for n in range(3)]).argmax(0)
    maps = torch.stack([conv("", n).relu() for n in range(3)])
    expected = maps.gather(0, chosen[None])[0]
    assert len(chosen.unique()) == 3
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 32), (3, 5), (8, 16)])
def test_convolution_that_keeps_lanes_apart_is_the_convolution(inputs, outputs):
    generator = torch.Generator().manual_seed(inputs)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=DOUBLE)
    arguments = draw(4, inputs, 5, 6), draw(outputs, inputs, 3, 3), draw(outputs)
    plain, by_operator = torch.nn.functional.conv2d, lane_conv2d
    torch.testing.assert_close(by_operator(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)

    lanes = [torch.stack([argument, draw(*argument.shape)]) for argument in arguments]

    def slopes(way):  # of every single example of every lane, as the Fisher information asks for them
        one = lambda x, w, b: grad(lambda *leaves: (way(x[None], *leaves) ** 2).sum(), argnums=(0, 1))(w, b)
        return vmap(vmap(one, (0, None, None)))(*lanes)

    for found, expected in zip(slopes(by_operator), slopes(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_masked_choices_equal_the_smaller_net():
    """N by masking a padded 5: same initial bits of the neurons in use, same outputs as the net built with N = 2."""
    five, hyper = built(widths=[6, 4], choices=5, active=2.0)
    two, _ = built(widths=[6, 4], choices=2)
    params5, x, _ = random_net(five, hyper)
    params2, _, gate = random_net(two, hyper)
    for name, value in params2.items():
        torch.testing.assert_close(params5[name][:2] if value.shape != params5[name].shape else params5[name], value)
    out5 = nets.forward(Pass(five, params5, hyper, gate), x)
    out2 = nets.forward(Pass(two, params2, hyper, gate), x)
    torch.testing.assert_close(out5, out2, rtol=1e-12, atol=1e-12)


def exploring(epsilon, gumbel, on=True, choices=4, active=4.0, logits=None):
    program, hyper = built(choices=choices, explore=True, epsilon=epsilon, gumbel=gumbel, temperature=2.0)
    gate = Gate(torch.tensor(active, dtype=DOUBLE), Exploration(draws.counter(3), draws.counter(8), torch.tensor(on)))
    return choose(program, hyper, gate, "hidden1", logits)


def test_epsilon_chooses_at_random_as_often_as_it_says():
    logits = torch.tensor([9.0, 1.0, 0.0, -1.0], dtype=DOUBLE)[:, None].expand(4000, 4, 5)
    share = exploring(0.3, 0.0, logits=logits).hard.mean((0, 2))
    # 3-sigma of a share over 20,000 draws is below .01
    torch.testing.assert_close(share, torch.tensor([0.775, 0.075, 0.075, 0.075], dtype=DOUBLE), rtol=0, atol=0.01)
    masked = exploring(0.3, 0.0, active=2.0, logits=logits).hard.mean((0, 2))
    torch.testing.assert_close(masked, torch.tensor([0.85, 0.15, 0, 0], dtype=DOUBLE), rtol=0, atol=0.01)
    assert exploring(0.3, 0.0, on=False, logits=logits).hard[:, 0].all()


def test_gumbel_noise_samples_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=DOUBLE)[:, None].expand(4000, 4, 5)
    chosen = exploring(0.0, 0.5, logits=logits)
    torch.testing.assert_close(chosen.hard.mean((0, 2)), torch.softmax(logits[0, :, 0], 0), rtol=0, atol=0.012)
    assert torch.equal(chosen.hard.argmax(1), chosen.p.argmax(1))
    quiet = exploring(0.0, 0.5, on=False, logits=logits)
    torch.testing.assert_close(quiet.p[0, :, 0], torch.softmax(logits[0, :, 0] / 2, 0), rtol=1e-12, atol=0)


def test_growth_copies_once_and_where_asked():
    program, _ = built(choices=5, growing=True, epoch_steps=4, epochs=5)
    fields = {"active": 1.0, "active_2": 2.0, "active_3": 5.0, "grow_1": 2.0, "grow_2": 4.0}
    params = {
        "hidden1/weight": torch.arange(5.0, dtype=DOUBLE)[:, None, None].expand(5, 2, 3).clone(),
        "hidden1/bias": torch.arange(5.0, dtype=DOUBLE)[:, None].expand(5, 2).clone(),
    }

    def numbers(step, copies):
        hyper = built(choices=5, growing=True, grow_copies=copies, **fields)[1]
        clock = clock_of(program, torch.tensor(step, dtype=torch.int32), DOUBLE)
        return grown(program, params, hyper, clock, ["hidden1"])["hidden1/weight"][:, 0, 0].tolist()

    fresh = [0.0, 1.0, 2.0, 3.0, 4.0]
    for step in range(20):
        expected = {8: [0.0, 0.0, 2.0, 3.0, 4.0], 16: [0.0, 1.0, 0.0, 1.0, 0.0]}.get(step, fresh)
        assert numbers(step, 1.0) == expected, step
        assert numbers(step, 0.0) == fresh


def test_xavier_bounds_of_each_matrix_and_of_the_tensor():
    """std of computation neurons of a [5, 256, 256] layer: .0625 by matrix, .0055 as torch counts a 3-D tensor."""
    for fan_3d, std in ((0.0, 0.0625), (1.0, 0.00547)):
        program, hyper = built(choices=5, init="xavier", fan_3d=fan_3d)
        params = init_layers(program, hyper, draws.counter(0), [Layer("l", (256, 256), True)], DOUBLE)
        assert params["l/weight"].std().item() == pytest.approx(std, rel=0.01)
        assert not params["l/bias"].any()
        reference = torch.empty(5, 256, 256)
        torch.manual_seed(0)
        if fan_3d:
            torch.nn.init.xavier_uniform_(reference)
        else:
            for matrix in reference:
                torch.nn.init.xavier_uniform_(matrix)
        assert params["l/weight"].std().item() == pytest.approx(reference.std().item(), rel=0.01)
        assert params["l/weight"].abs().max().item() == pytest.approx(reference.abs().max().item(), rel=1e-3)


def test_default_init_has_torch_linear_s_bounds():
    program, hyper = built(choices=3, widths=[50, 40])
    params = nets.init(program, hyper, draws.counter(0), DOUBLE)
    for name, fan_in in (("hidden1", 64), ("hidden2", 50), ("out", 40)):
        for part in ("weight", "bias"):
            value = params[f"{name}/{part}"]
            assert value.abs().max() <= 1 / math.sqrt(fan_in)
            if value.numel() > 100:
                assert value.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)


def test_dropout_keeps_the_mean_and_is_off_outside_training():
    program, hyper = built()
    x = torch.ones(200, 200, dtype=DOUBLE)
    gate = Gate(torch.tensor(2.0, dtype=DOUBLE))
    rate = torch.tensor(0.25, dtype=DOUBLE)
    kept = Pass(program, {}, hyper, gate, (draws.counter(1), draws.counter(2))).dropout("a", x, rate)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    assert kept.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(Pass(program, {}, hyper, gate).dropout("a", x, rate), x)


def test_layer_shapes_of_the_notebook_s_nets():
    program, hyper = built(data="mnist", choices=2, selector="sigmoid")
    shapes = {name: tuple(v.shape) for name, v in nets.init(program, hyper, draws.counter(0), DOUBLE).items()}
    assert shapes["hidden1/weight"] == (2, 64, 784)
    assert shapes["hidden1/selector_weight"] == (1, 64, 784)
    assert shapes["out/weight"] == (10, 64)
    cl, _ = FAMILY.build(FAMILY.presets["split_mnist"])
    assert [(layer.name, layer.shape) for layer in cnn.layers(cl)] == [
        ("conv1", (32, 1, 3, 3)),
        ("conv2", (64, 32, 3, 3)),
        ("hidden", (128, 9216)),
        ("out", (10, 128)),
    ]


@pytest.mark.parametrize("choices", [1, 2, 5])
def test_counted_parameters_are_those_of_the_net(choices):
    program, hyper = built(choices=choices, widths=[7, 5])
    params = nets.init(program, hyper, draws.counter(0), DOUBLE)
    assert sum(value.numel() for value in params.values()) == mlp.count_parameters(64, (7, 5), choices)


@pytest.mark.parametrize("choices", [2, 3, 4, 5])
def test_matched_width_is_the_nearest(choices):
    target = mlp.count_parameters(784, (64, 64), choices)
    width = mlp.matched_width(784, (64, 64), choices)
    off = [abs(mlp.count_parameters(784, (w, w), 1) - target) for w in (width - 1, width, width + 1)]
    assert min(off) == off[1]
