"""Training of the multi-neuron nets against plain torch loops; monitors, masks, data and metrics by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lanes.engine import put
from lanes.serial import SerialEngine
from trainables.family import BadValue, hyper_tensors
from trainables.multi_neuron import FAMILY, monitor, nets, transformer
from trainables.multi_neuron.neurons import Gate, Pass
from trainables.multi_neuron.sets import IMAGE_SETS

DOUBLE = torch.float64


def engine_of(cache_dir, seed=3, **values):
    program, hyper = FAMILY.build({"precision": "float64", **values})
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, cache_dir), "cpu"))
    engine.insert("me", hyper, seed)
    return engine


def rows_of(engine, epoch, seed=3):
    return FAMILY.order(engine.program, engine.arrays, seed, epoch)["index"]


def batch_of(engine, index, name="index"):
    return FAMILY.batch(engine.program, engine.arrays, {name: index})


# --- against torch ----------------------------------------------------------------------------------------------------


def torch_mlp(params, sizes):
    net = nn.Sequential()
    for i, name in enumerate(("hidden1", "hidden2", "out")):
        layer = nn.Linear(sizes[i], sizes[i + 1], dtype=DOUBLE)
        weight = params[f"{name}/weight"]
        with torch.no_grad():
            layer.weight.copy_(weight if weight.dim() == 2 else weight[0])
            layer.bias.copy_(params[f"{name}/bias"] if weight.dim() == 2 else params[f"{name}/bias"][0])
        net.append(layer)
        if name != "out":
            net.append(nn.ReLU())
    return net


@pytest.mark.parametrize("fields", [{"choices": 1}, {"choices": 5, "active": 1.0}], ids=["dense", "masked to one"])
def test_one_choice_is_the_plain_mlp(cache_dir, fields):
    """Two epochs with momentum, decay and the short last batch, against torch.nn and torch.optim.SGD."""
    values = {"widths": [9, 7], "batch": 100, "epochs": 2, "lr": 0.05, "momentum": 0.8, "weight_decay": 0.01}
    engine = engine_of(cache_dir, **values, **fields)
    net = torch_mlp(engine.state("me")["params"], (64, 9, 7, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.8, weight_decay=0.01)
    losses = []
    for epoch in range(2):
        for index in rows_of(engine, epoch):
            data = batch_of(engine, index)
            x, y = data["x"][data["real"]].flatten(1), data["y"][data["real"]]
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert (rows_of(engine, 1)[-1] < 0).sum() == 2  # 1,198 images in batches of 100
    curves = [engine.advance(engine.until_epoch_end())["train_loss"][:, 0] for _ in range(2)]
    np.testing.assert_allclose(np.concatenate(curves), losses, rtol=1e-10)
    params = engine.state("me")["params"]
    for layer, name in zip((net[0], net[2], net[4]), ("hidden1", "hidden2", "out"), strict=True):
        weight = params[f"{name}/weight"]
        torch.testing.assert_close(weight if weight.dim() == 2 else weight[0], layer.weight.detach())
    held_out = batch_of(engine, torch.arange(239), "held_out")
    with torch.no_grad():
        logits = net(held_out["x"].flatten(1))
    result = engine.evaluate(["me"])["me"]
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, held_out["y"]).item(), rel=1e-9)
    assert result["test_acc"] == pytest.approx((logits.argmax(1) == held_out["y"]).double().mean().item(), abs=1e-12)


TEXT = {
    "data": "pydoc",
    "model": "transformer",
    "optimizer": "adamw",
    "layers": 2,
    "d_model": 8,
    "heads": 2,
    "feedforward": 12,
    "sequence": 10,
    "batch": 3,
    "epochs": 1,
    "epoch_steps": 6,
    "eval_windows": 7,
    "eval_batch": 4,
}


class TorchTransformer(nn.Module):
    """torch's own encoder layers on the same weights."""

    def __init__(self, params, program):
        super().__init__()
        width = program.d_model
        self.embedding = nn.Parameter(params["embedding"].clone())
        self.blocks = nn.ModuleList()
        for i in range(program.layers):
            block = nn.TransformerEncoderLayer(
                width,
                program.heads,
                program.feedforward,
                dropout=0.0,
                batch_first=True,
                norm_first=program.norm == "pre",
                dtype=DOUBLE,
            )
            at = f"layers.{i}"
            own = {
                "self_attn.in_proj_weight": torch.cat([params[f"{at}.{n}/weight"] for n in "qkv"]),
                "self_attn.in_proj_bias": torch.cat([params[f"{at}.{n}/bias"] for n in "qkv"]),
                "self_attn.out_proj.weight": params[f"{at}.out_proj/weight"],
                "self_attn.out_proj.bias": params[f"{at}.out_proj/bias"],
            }
            for name in ("linear1", "linear2", "norm1", "norm2"):
                own |= {f"{name}.{part}": params[f"{at}.{name}/{part}"] for part in ("weight", "bias")}
            block.load_state_dict(own)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width, dtype=DOUBLE) if program.norm == "pre" else nn.Identity()
        self.out = nn.Linear(width, len(self.embedding), dtype=DOUBLE)
        self.out.load_state_dict({part: params[f"linear_out/{part}"] for part in ("weight", "bias")})

    def forward(self, tokens):
        length, width = tokens.shape[1], self.embedding.shape[1]
        table = torch.zeros(length, width, dtype=DOUBLE)
        for place in range(length):
            for i in range(0, width, 2):
                angle = place / 10000 ** (i / width)
                table[place, i], table[place, i + 1] = math.sin(angle), math.cos(angle)
        x = self.embedding[tokens] * math.sqrt(width) + table
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=DOUBLE)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.out(self.norm(x))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_plain_transformer_trains_as_torch_s(cache_dir, norm):
    """Six clipped AdamW steps against torch.nn.TransformerEncoderLayer, torch.optim.AdamW and clip_grad_norm_."""
    engine = engine_of(cache_dir, **TEXT, choices=1, norm=norm, lr=0.003, weight_decay=0.02, clip=0.5)
    net = TorchTransformer(engine.state("me")["params"], engine.program)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003, weight_decay=0.02)
    losses, norms = [], []
    for index in rows_of(engine, 0):
        data = batch_of(engine, index)
        loss = F.cross_entropy(net(data["x"]).flatten(0, 1), data["y"].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    curves = engine.advance(6)
    assert min(norms) > 0.5
    np.testing.assert_allclose(curves["train_loss"][:, 0], losses, rtol=1e-9)
    np.testing.assert_allclose(curves["grad_norm"][:, 0], norms, rtol=1e-7)
    torch.testing.assert_close(engine.state("me")["params"]["embedding"], net.embedding.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("choices", [1, 3])
def test_causal_mask_keeps_the_future_out(choices):
    """Changing token 6 changes no logit before it, unless the mask is off."""
    program, hyper = FAMILY.build({**TEXT, "precision": "float64", "choices": choices})
    tensors = hyper_tensors(program, hyper, "cpu")
    params = nets.init(program, tensors, torch.tensor(1, dtype=torch.int32), DOUBLE)
    tokens = torch.arange(10)[None] * 7 % 90
    other = tokens.clone()
    other[0, 6] += 1

    def change(causal):
        flags = {**tensors, "causal": torch.tensor(causal, dtype=DOUBLE)}
        gate = Gate(torch.tensor(float(choices), dtype=DOUBLE))
        a, b = (nets.forward(Pass(program, params, flags, gate), t) for t in (tokens, other))
        return (a - b).abs().amax(-1)[0]

    masked, open_ = change(1.0), change(0.0)
    assert not masked[:6].any()
    assert masked[6:].min() > 1e-6
    assert open_.min() > 1e-6


def test_frozen_selectors_do_not_move_even_under_decay(cache_dir):
    engine = engine_of(cache_dir, **TEXT, choices=2, lr=0.01, weight_decay=0.1, selector_lr=0.0)
    before = engine.state("me")["params"]
    engine.advance(6)
    after = engine.state("me")["params"]
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("/selector_" in name), name


def test_multi_layers_of_the_transformer():
    def multi(custom):
        program, _ = FAMILY.build({**TEXT, "custom": custom})
        return nets.multi_layers(program)

    assert len(multi("all")) == 13  # the notebook's table
    assert set(multi("all")) - set(multi("body")) == {"linear_out"}
    assert set(multi("linear")) == {f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)} | {"linear_out"}
    assert multi("all")[0] == "layers.0.q"
    assert multi("all")[-1] == "linear_out"
    assert [layer.name for layer in transformer.layers(FAMILY.build({**TEXT, "choices": 1})[0]) if layer.multi] == []


# --- monitors ---------------------------------------------------------------------------------------------------------


def test_cosine_of_known_weights():
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 3.0]], [[-5.0, 0.0]]], dtype=DOUBLE)
    root = math.sqrt(0.5)
    assert monitor.cosine(weight, torch.tensor(3.0, dtype=DOUBLE)).item() == pytest.approx(2 * root / 3)
    assert monitor.cosine(weight, torch.tensor(2.0, dtype=DOUBLE)).item() == pytest.approx(0, abs=1e-12)
    assert monitor.cosine(weight, torch.tensor(4.0, dtype=DOUBLE)).item() == pytest.approx((root - 1) / 6)
    assert monitor.cosine(weight, torch.tensor(1.0, dtype=DOUBLE)).item() == 1


def test_cosine_equals_torch_s_pairwise_mean():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3, 3, 2, dtype=DOUBLE)
    flat = weight.flatten(2)
    pairs = [F.cosine_similarity(flat[i], flat[j], dim=-1).mean() for i in range(4) for j in range(i)]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(monitor.cosine(weight, torch.tensor(4.0, dtype=DOUBLE)), expected)


def test_entropies_of_known_choices():
    p = torch.tensor([[0.5, 1.0], [0.5, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(monitor.entropy(p, 0), torch.tensor([math.log(2), 0.0], dtype=DOUBLE))
    assert monitor.balance(p).item() == pytest.approx(math.log(2) / 2)


def test_pooled_entropy_is_the_notebook_s():
    """Its printed ratios and entropies; units that each always choose one neuron look even when pooled."""
    for ratio, printed in ((0.4847, 0.6927), (0.4141, 0.6783), (0.4932, 0.6931), (0.4355, 0.6848)):
        half = torch.tensor([[ratio + 0.3, ratio - 0.3], [0.7 - ratio, 1.3 - ratio]], dtype=DOUBLE)
        record = {"share": half, "entropy": torch.zeros((), dtype=DOUBLE)}
        found = monitor.metrics({"l": record})
        assert found["share_first"].item() == pytest.approx(ratio)
        assert found["pooled_first"].item() == pytest.approx(printed, abs=5e-5)
    record["share"] = torch.eye(2, dtype=DOUBLE)
    found = monitor.metrics({"l": record})
    assert found["pooled_last"].item() == pytest.approx(math.log(2))
    assert found["balance_last"].item() == 0


def test_balance_and_entropy_tell_different_things():
    """A decided selector that uses both neurons: balance ln 2, entropy 0; padding is left out."""
    choice = monitor.Choice(*[torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [0.0]]], dtype=DOUBLE)] * 2)
    record = monitor.records({"l": choice}, torch.tensor([True, True, False]))["l"]
    assert monitor.balance(record["share"]).item() == pytest.approx(math.log(2))
    assert record["entropy"].item() == 0


def test_covariates_are_means_over_the_epoch(cache_dir):
    names = ("share", "balance", "entropy", "gradient", "cosine")
    values = {"widths": [5, 4], "choices": 3, "batch": 20, "epochs": 2, "epoch_steps": 4, "lr": 0.1}
    engine = engine_of(cache_dir, **values, covariates=names)
    program = engine.program
    hyper = engine.hypers("me")
    for epoch in range(2):
        gradients, shares, entropies = [], [], []
        for index in rows_of(engine, epoch):
            state, data = engine.state("me"), batch_of(engine, index)
            params = {k: v.requires_grad_() for k, v in state["params"].items()}
            net = Pass(program, params, hyper, Gate(torch.tensor(3.0, dtype=DOUBLE)))
            F.cross_entropy(nets.forward(net, data["x"]), data["y"]).backward()
            gradients.append(params["hidden2/weight"].grad.flatten(1).norm(dim=1))
            choice = net.choices["hidden2"]
            shares.append(choice.hard.mean(0))
            entropies.append(torch.distributions.Categorical(probs=choice.p.detach().transpose(1, 2)).entropy().mean())
            engine.advance(1)
        found = engine.inspect(["me"])["me"]
        assert set(found) == {f"{name}/{layer}" for name in names for layer in ("hidden1", "hidden2")}
        share = torch.stack(shares).mean(0)
        np.testing.assert_allclose(found["gradient/hidden2"], torch.stack(gradients).mean(0), rtol=1e-9)
        np.testing.assert_allclose(found["share/hidden2"], share.mean(1), rtol=1e-9)
        np.testing.assert_allclose(found["entropy/hidden2"], torch.stack(entropies).mean(), rtol=1e-9)
        expected = torch.distributions.Categorical(probs=share.T).entropy().mean()
        np.testing.assert_allclose(found["balance/hidden2"], expected, rtol=1e-6)
        assert found["gradient/hidden2"].min() > 0


def test_growth_and_exploration_happen_in_training(cache_dir):
    values = {"widths": [6], "choices": 4, "batch": 20, "epochs": 4, "epoch_steps": 5, "lr": 0.05}
    fields = {"active": 1.0, "active_2": 2.0, "active_3": 4.0, "grow_1": 1.0, "grow_2": 3.0, "grow_copies": 1.0}
    engine = engine_of(cache_dir, **values, growing=True, covariates=("share",), **fields)
    initial = engine.state("me")["params"]["hidden1/weight"]
    used, moved = [], []
    for _ in range(4):
        engine.advance(5)
        used.append(int((engine.inspect(["me"])["me"]["share/hidden1"] > 0).sum()))
        now = engine.state("me")["params"]["hidden1/weight"]
        moved.append([bool((now[n] != initial[n]).any()) for n in range(4)])
    assert used == [1, 2, 2, 4]
    assert moved[0] == [True, False, False, False]
    assert moved[2] == [True, True, False, False]
    assert moved[3] == [True] * 4

    quiet = engine_of(cache_dir, **values)
    noisy = engine_of(cache_dir, **values, explore=True, gumbel=1.0, epsilon=0.2, explore_until=0.5)
    a, b = ([e.advance(5)["train_loss"][:, 0] for _ in range(4)] for e in (quiet, noisy))
    assert abs(a[0][0] - b[0][0]) > 1e-4


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate_on", ["valid", "test"])
def test_class_counts_are_those_of_the_digits(cache_dir, evaluate_on):
    check_counts("digits", evaluate_on, None, cache_dir)


@pytest.mark.parametrize("evaluate_on", ["valid", "test"])
def test_class_counts_are_those_of_mnist(data_dir, cache_dir, evaluate_on):
    check_counts("mnist", evaluate_on, data_dir, cache_dir)


def check_counts(data, evaluate_on, data_dir, cache_dir):
    program, _ = FAMILY.build({"data": data, "evaluate_on": evaluate_on})
    arrays = FAMILY.load(program, data_dir, cache_dir)
    images = IMAGE_SETS[data]
    assert np.bincount(arrays["train_labels"]).tolist() == images.train_counts(evaluate_on)
    assert np.bincount(arrays["held_out_labels"]).tolist() == images.held_out_counts(evaluate_on)
    assert arrays["train_images"].shape[1:] == (images.side, images.side)
    if evaluate_on == "test":
        pixels = arrays["train_images"] / images.white
        assert pixels.mean() == pytest.approx(images.mean, abs=1e-4)
        assert pixels.std() == pytest.approx(images.std, abs=1e-3)


def test_every_image_comes_once_an_epoch_in_a_new_order(cache_dir):
    engine = engine_of(cache_dir)
    first, second = (rows_of(engine, epoch).flatten() for epoch in (0, 1))
    for index in (first, second):
        assert sorted(index[index >= 0].tolist()) == list(range(1198))
    assert not torch.equal(first, second)
    ten = engine_of(cache_dir, examples=10, batch=10, epoch_steps=3)
    assert [sorted(row.tolist()) for row in rows_of(ten, 0)] == [list(range(10))] * 3


def test_text_windows_lie_inside_and_targets_follow(cache_dir):
    engine = engine_of(cache_dir, **{**TEXT, "epoch_steps": 400})
    text = engine.arrays["train"]
    index = rows_of(engine, 0)
    assert index.shape == (400, 3)
    assert index.min() >= 0
    assert index.max() + 10 < len(text)
    assert index.min() < len(text) * 0.02
    assert index.max() > len(text) * 0.98
    data = batch_of(engine, index[5])
    for row, start in enumerate(index[5].tolist()):
        assert torch.equal(data["x"][row].to(torch.uint8), text[start : start + 10])
        assert torch.equal(data["y"][row].to(torch.uint8), text[start + 1 : start + 11])
    held_out = FAMILY.test_order(engine.program, engine.arrays, 0, 0)["held_out"]
    assert held_out.shape == (2, 4)
    real = held_out[held_out >= 0]
    assert len(real) == 7
    assert (real.diff() >= 10).all()
    assert real.max() + 10 < len(engine.arrays["held_out"])
    assert real.max() > 0.8 * len(engine.arrays["held_out"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "rnn"}, "model = 'rnn' is not one of"),
        ({"custom": "linear"}, "custom = 'linear' does not go with model = mlp"),
        ({"selector": "sigmoid", "choices": 3}, "chooses between 2 neurons"),
        ({"model": "transformer"}, "data = digits are images: try data=pydoc"),
        ({"data": "pydoc"}, "reads images: data = 'pydoc'"),
        ({"fisher": "sample"}, "need several tasks: set tasks=5"),
        ({"tasks": 3}, "tasks = 3 is not one of 1, 2, 5"),
        ({"tasks": 5, "batch": 500}, "exceeds the smallest task"),
        ({"examples": 5000}, "has 1198 to train on"),
        ({"data": "pydoc", "model": "transformer", "d_model": 30}, "not a multiple of heads = 4"),
        ({"widths": []}, "must name one hidden layer"),
        ({"choices": 1, "growing": True}, "need choices above 1"),
        ({"choices": 0}, "choices = 0 must be 1 or more"),
        ({"covariates": ["ages"]}, "covariate 'ages' is not one of"),
        ({"tasks": 5, "fisher": "sample", "batch": 4}, "fisher_batch = 8 exceeds batch = 4"),
    ],
)
def test_contradictions_are_told_in_a_line(values, message):
    with pytest.raises(BadValue, match=message):
        FAMILY.build(values)


def test_text_without_a_test_part_says_so(cache_dir):
    program, _ = FAMILY.build({**TEXT, "evaluate_on": "test"})
    with pytest.raises(BadValue, match="pydoc has no test part: use evaluate_on=valid"):
        FAMILY.load(program, None, cache_dir)


@pytest.mark.parametrize("case", ["softmax", "transformer", "continual-ewc"])
def test_bfloat16_steps_are_near_float32(cache_dir, case):
    chosen = FAMILY.cases[case]
    curves = {}
    for precision in ("float32", "bf16"):
        engine = engine_of(cache_dir, **{**chosen.program, **chosen.hyper, "precision": precision})
        curves[precision] = engine.advance(3)["train_loss"][:, 0]
        assert (
            engine.state("me")["params"]["out/weight" if case != "transformer" else "embedding"].dtype == torch.float32
        )
    np.testing.assert_allclose(curves["bf16"], curves["float32"], rtol=0.1)
    assert (curves["bf16"] != curves["float32"]).any()
