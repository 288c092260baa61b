"""Schedules, the whole update, evaluation and records of snn_delays against independent references, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from lanes.engine import put
from lanes.serial import SerialEngine
from lanes.stacked import StackedEngine
from trainables.family import BadValue, config_key, hyper_tensors, load_family, program_key
from trainables.snn_delays import TINY, delays, model, training
from trainables.snn_delays.program import Program, kernel_steps

FAMILY = load_family("snn_delays")
DOUBLE = torch.float64


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def build(**values):
    program, hyper = FAMILY.build({**TINY, "precision": "float64", **values})
    return program, hyper, hyper_tensors(program, hyper, "cpu")


def engine_of(cache_dir, **values) -> SerialEngine:
    program, hyper, _ = build(**values)
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, cache_dir), "cpu"))
    engine.insert("me", hyper, 0)
    return engine


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "end"), [("max", 1e-6), ("gauss", 0.23)])
@pytest.mark.parametrize("epochs", [12, 100])
def test_sigma_falls_as_the_original_multiplies_it(version, end, epochs):
    start, final = 9 / 3, epochs // 3
    alpha, sigma, expected = (end / start) ** (1 / final), start, []
    for epoch in range(epochs):
        expected.append(sigma)
        if epoch < final:
            sigma *= alpha
        elif epoch == final:
            sigma = 0.0 if version == "max" else end
    actual = [
        float(delays.sigma_at(scalar(start), scalar(1 / 3), epochs, scalar(float(epoch)), version))
        for epoch in range(epochs)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)
    assert actual[-1] == (0.0 if version == "max" else 0.23)
    assert float(delays.sigma_at(scalar(0.0), scalar(1 / 3), epochs, scalar(3.0), version)) == 0.0


def test_sigma_by_step_meets_sigma_by_epoch_at_every_epoch():
    program, _, by_epoch = build(epochs=9)
    _, _, by_step = build(epochs=9, sigma_by_step=1.0)
    per_epoch = FAMILY.schedule(program).steps_per_epoch
    assert per_epoch == 4
    for step in range(9 * per_epoch):
        a, b = (training.sigmas(program, hyper, torch.tensor(step)) for hyper in (by_epoch, by_step))
        if step % per_epoch == 0:
            torch.testing.assert_close(a, b)
        elif step < 3 * per_epoch:
            assert (b < a).all()
    first = training.sigmas(program, by_epoch, torch.tensor(0))
    torch.testing.assert_close(first, torch.tensor([3 / 3, 5 / 3], dtype=DOUBLE))


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 33, 100])
def test_learning_rate_and_beta_follow_torch_s_one_cycle(epochs):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs)
    for epoch in range(epochs):
        share, beta = map(float, training.one_cycle(scalar(epoch), epochs))
        group = optimizer.param_groups[0]
        assert 5e-3 * share == pytest.approx(group["lr"], rel=1e-12)
        assert beta == pytest.approx(group["betas"][0], rel=1e-12)
        if epoch + 1 < epochs:
            optimizer.step()
            cycle.step()


# --- the whole update against torch and spikingjelly ------------------------------------------------------------------


class Reference(nn.Module):
    """The net of `TINY` written with torch's and spikingjelly's own layers, batch-max padding, no dropout."""

    def __init__(self, params: dict, taps: list[int]):
        super().__init__()
        self.values = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(p.clone()) for name, p in params.items()})
        self.taps = taps
        self.norms = nn.ModuleDict(
            {
                name.removesuffix(".bn_scale").replace(".", "/"): nn.BatchNorm1d(len(p)).double()
                for name, p in params.items()
                if name.endswith(".bn_scale")
            }
        )
        for name, norm in self.norms.items():
            norm.weight, norm.bias = self.values[f"{name}/bn_scale"], self.values[f"{name}/bn_shift"]

    def norm(self, x, name):  # [T, B, C, N]
        return self.norms[name](x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def spike(self, x):
        node = neuron.LIFNode(
            tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(alpha=5.0), detach_reset=True, step_mode="m"
        )
        functional.reset_net(node)
        return node(x)

    def forward(self, x, sigmas):  # x [B, T, F]
        v = self.values
        steps, size = x.shape[1], x.shape[0]
        x = x.transpose(0, 1).reshape(-1, 1, x.shape[-1])
        x = F.conv1d(x, v["stem/weight"].unsqueeze(1), stride=v["stem/weight"].shape[1])
        x = self.norm(x.unflatten(0, (steps, size)), "stem")
        for stage, taps in enumerate(self.taps):
            name = f"stage{stage + 1}/block1"
            weight, position = v[f"{name}/delay"], v[f"{name}/position"]
            rows = []
            for channel in range(len(weight)):
                for f in range(weight.shape[1]):
                    distance = (torch.arange(taps) - (position[channel, f] + taps // 2)).abs()
                    bump = F.relu(sigmas[stage] + 1 - distance)
                    rows.append(weight[channel, f] * bump / (bump.sum() + 1e-7))
            kernel = torch.stack(rows).reshape(len(weight), 1, weight.shape[1], taps)
            image = F.pad(x.permute(1, 2, 3, 0), (taps - 1, 0, 1, 1))
            x = F.conv2d(image, kernel, groups=len(weight)).permute(3, 0, 1, 2)
            x = torch.einsum("tbcn,dc->tbdn", x, v[f"{name}/pointwise"])
            x = self.spike(self.norm(x, name))
            self.rate = float(x.detach().mean())
            if stage + 1 < len(self.taps):
                down = v[f"down{stage + 1}/weight"].unflatten(1, (-1, 2))
                x = F.conv1d(x.flatten(0, 1), down, stride=2).unflatten(0, x.shape[:2])
                x = self.norm(x, f"down{stage + 1}")
        current = x.mean(-1) @ v["fc/weight"].T
        node = neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=1e9, step_mode="m", store_v_seq=True)
        node(current)
        return node.v_seq.softmax(-1).sum(0)


def test_training_is_the_original_loop(cache_dir):
    """Losses, running statistics and parameters of a whole run against torch.optim, nn.BatchNorm1d and spikingjelly."""
    engine = engine_of(cache_dir, dropout=0.0, lr=0.05, weight_decay=1e-3, epochs=6, tau_ms=80.0, lr_pos=0.3)
    program, arrays = engine.program, engine.arrays
    start = engine.state("me")["params"]
    taps = [model.taps(program, stage) for stage in range(2)]
    net = Reference(start, taps).train()
    named = dict(net.values.items())
    plain = [p for name, p in named.items() if not name.endswith(("position", "bn_scale", "bn_shift"))]
    norms = [p for name, p in named.items() if name.endswith(("bn_scale", "bn_shift"))]
    places = [p for name, p in named.items() if name.endswith("position")]
    weights = torch.optim.Adam([{"params": plain, "weight_decay": 1e-3}, {"params": norms}], lr=1e-3)
    positions = torch.optim.Adam(places, lr=0.3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(weights, max_lr=0.05, total_steps=6)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(positions, T_max=6)
    sigma, final = [3 / 3, 5 / 3], 2
    alpha = [(1e-6 / s) ** (1 / final) for s in sigma]
    clamped = 0
    for epoch in range(6):
        losses = []
        for row in FAMILY.order(program, arrays, 0, epoch)["index"]:
            index = row[row >= 0]
            frames = arrays["x"][index][:, : arrays["length"][index].max()].double()
            loss = F.cross_entropy(net(frames, sigma), arrays["label"][index])
            assert 0.01 < net.rate < 0.9
            weights.zero_grad()
            positions.zero_grad()
            loss.backward()
            weights.step()
            positions.step()
            with torch.no_grad():
                for place, size in zip(places, taps, strict=True):
                    clamped += int((place.abs() > size // 2).sum())
                    place.clamp_(-(size // 2), size // 2)
            losses.append(loss.item())
        cycle.step()
        cosine.step()
        sigma = [s * a if epoch < final else 0.0 for s, a in zip(sigma, alpha, strict=True)]
        actual = engine.advance(engine.schedule.steps_per_epoch)["train_loss"][:, 0]
        np.testing.assert_allclose(actual, losses, rtol=1e-9)
    assert clamped > 3
    state = engine.state("me")
    for name, value in state["params"].items():
        torch.testing.assert_close(value, named[name.replace(".", "/")].detach(), rtol=1e-8, atol=1e-10)
        assert not torch.equal(value, start[name])
    for name, norm in net.norms.items():
        key = name.replace("/", ".")
        torch.testing.assert_close(state["running"][f"{key}.mean"], norm.running_mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state["running"][f"{key}.var"], norm.running_var, rtol=1e-9, atol=1e-12)


def test_evaluation_rounds_delays_and_leaves_the_state_alone(cache_dir):
    engine = engine_of(cache_dir, epochs=2)
    engine.advance(4)
    before = engine.state("me")
    program, hyper = engine.program, engine.hypers("me")
    row = {name: r[0] for name, r in FAMILY.test_order(program, engine.arrays, 0, 0)["valid"].items()}
    batch = FAMILY.batch(program, engine.arrays, row)
    as_is = FAMILY.evaluate(program, before, hyper, batch)
    rounded = {name: value.round() if name.endswith(".position") else value for name, value in before["params"].items()}
    moved = max(float((rounded[name] - value).abs().max()) for name, value in before["params"].items())
    assert moved > 0.2
    whole = FAMILY.evaluate(program, {**before, "params": rounded}, hyper, batch)
    assert torch.equal(as_is["loss"], whole["loss"])
    engine.evaluate(["me"])
    for name, value in engine.state("me")["params"].items():
        assert torch.equal(value, before["params"][name])
    kernels = model.discrete_kernels(program, hyper, before["params"])
    assert all(((kernel != 0).sum(-1) == 1).all() for kernel in kernels.values())


def test_test_set_is_evaluated_once_after_the_last_epoch(cache_dir):
    engine = engine_of(cache_dir, epochs=3)
    for epoch in range(3):
        engine.advance(4)
        found = engine.evaluate(["me"])["me"]
        assert {name.split("_")[0] for name in found} == ({"valid"} if epoch < 2 else {"valid", "test"})
    program, hyper, state = engine.program, engine.hypers("me"), engine.state("me")
    rows = FAMILY.test_order(program, engine.arrays, 0, 2)["test"]["index"]
    right = count = 0.0
    for index in rows:
        row = {"index": index}
        sums = FAMILY.evaluate(program, state, hyper, FAMILY.batch(program, engine.arrays, row))
        right, count = right + float(sums["accuracy"]), count + int(sums["count"])
    assert count == 360
    assert found["test_accuracy"] == pytest.approx(right / count, abs=1e-12)
    summary = FAMILY.summarize(program, {"valid_accuracy": np.array([0.2, 0.6, 0.4]), "test_accuracy": np.array([0.3])})
    assert summary == {"valid_accuracy": 0.4, "best_valid_accuracy": 0.6, "test_accuracy": 0.3}


def test_lanes_in_their_last_epoch_are_tested_beside_lanes_that_are_not(cache_dir):
    alone = {name: engine_of(cache_dir, epochs=2) for name in ("old", "young")}
    many = StackedEngine(FAMILY, alone["old"].program, alone["old"].arrays)
    hyper = build(epochs=2)[1]
    many.insert("old", hyper, 0)
    many.advance(4)
    many.insert("young", hyper, 0)
    many.advance(4)
    found = many.evaluate(["young", "old"])
    alone["old"].advance(4)
    for name, engine in alone.items():
        engine.advance(4)
        assert found[name] == pytest.approx(engine.evaluate(["me"])["me"], rel=1e-9)
    assert set(found["old"]) - set(found["young"]) == {"test_loss", "test_accuracy"}


def test_padding_decides_which_frames_count():
    batch = {
        "frames": torch.zeros(3, 6, 4),
        "length": torch.tensor([2, 4, 6]),
        "real": torch.tensor([True, True, False]),
    }
    masks = {name: training.frames_that_count(build(padding=name)[0], batch) for name in ("batch", "own", "set")}
    assert masks["batch"].sum(1).tolist() == [4, 4, 0]
    assert masks["own"].sum(1).tolist() == [2, 4, 0]
    assert masks["set"].sum(1).tolist() == [6, 6, 0]


def test_dropout_mask_is_shared_over_time_and_keeps_the_mean():
    program, _, hyper = build(dropout=0.75, channels=100)
    mask = training._dropout(program, hyper, torch.tensor(0, dtype=torch.int32), torch.tensor(3), 50)
    assert mask.shape == (50, 200)  # features of the second stage; no time axis
    assert set(mask.unique().tolist()) == {0.0, 4.0}
    assert mask.mean() == pytest.approx(1.0, abs=0.06)


def test_no_delays_is_lane_hyper_and_its_positions_never_move(cache_dir):
    engine = engine_of(cache_dir, right_most=1.0, sigma=0.0, lr_pos=0.0)
    engine.advance(4)
    program, params = engine.program, engine.state("me")["params"]
    for stage, name in model.blocks(program):
        assert (delays.delay(params[f"{name}.position"], model.taps(program, stage)) == 0).all()
        kernel = model.train_kernels(
            program, engine.hypers("me"), params, training.sigmas(program, engine.hypers("me"), torch.tensor(4))
        )[name]
        assert (kernel[..., :-1] == 0).all()
    tuned = engine_of(cache_dir, right_most=1.0, lr_pos=0.5)
    tuned.advance(4)
    assert any(
        (value < model.taps(program, 0) // 2).any()
        for name, value in tuned.state("me")["params"].items()
        if name == "stage1.block1.position"
    )


def test_positions_stay_inside_the_kernel(cache_dir):
    engine = engine_of(cache_dir, lr_pos=5.0, delay_ms_2=120.0, fc_delay_ms=120.0)
    engine.advance(4)
    params = engine.state("me")["params"]
    for name, low, high in (
        ("stage1.block1.position", -1, 1),
        ("stage2.block1.position", 0, 2),  # three of five taps
        ("fc.position", -1, 1),
    ):
        assert low <= params[name].min() <= params[name].max() <= high, name
        assert {low, high} & set(params[name].flatten().tolist()), name


# --- sizes, starts, records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "count"), [(32, 59_040), (64, 218_432)])
def test_parameter_count_of_the_notebook_s_nets(channels, count):
    c = channels
    by_hand = 7 * c + 2 * c + 20 * 4 * c  # stem and its BN, last layer
    for width, blocks in ((c, 1), (2 * c, 3), (4 * c, 1)):
        by_hand += blocks * (7 * width + 7 * width + width * width + 2 * width)  # delays, positions, pointwise, BN
    for width in (c, 2 * c):
        by_hand += 2 * width * width * 2 + 2 * 2 * width  # downsampling and its BN
    assert by_hand == count
    program, hyper = FAMILY.build({"data": "shd", "channels": channels})
    state = FAMILY.init(program, hyper_tensors(program, hyper, "cpu"), torch.tensor(0, dtype=torch.int32))
    assert sum(value.numel() for value in state["params"].values()) == count


def test_first_weights():
    for kind, std in (("kaiming_uniform", 1 / math.sqrt(3 * 64)), ("kaiming_normal", math.sqrt(2 / 64))):
        program, _, hyper = build(channels=64, conv_init=kind)
        params = model.init_params(program, hyper, torch.tensor(1, dtype=torch.int32))
        assert float(params["stage1.block1.pointwise"].std()) == pytest.approx(std, rel=0.05)
    program, _, hyper = build(channels=64, conv_init="orthogonal", fc_scale=0.1)
    params = model.init_params(program, hyper, torch.tensor(1, dtype=torch.int32))
    square, tall = params["stage1.block1.pointwise"], params["stage1.block1.delay"]
    torch.testing.assert_close(square @ square.T, torch.eye(64, dtype=DOUBLE), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tall.T @ tall, torch.eye(3, dtype=DOUBLE), rtol=1e-10, atol=1e-10)
    assert params["fc.weight"].abs().max() <= 0.1 / math.sqrt(128)
    position = params["stage2.block1.position"]
    assert -2 <= position.min() < -1.8
    assert 1.8 < position.max() <= 2


def test_pointwise_rate_zero_freezes_exactly_the_pointwise_weights(cache_dir):
    engine = engine_of(cache_dir, pointwise_rate=0.0, bottleneck="one_bn")
    start = engine.state("me")["params"]
    engine.advance(4)
    still = {name for name, value in engine.state("me")["params"].items() if torch.equal(value, start[name])}
    assert still == {name for name in start if name.endswith((".pointwise", ".pointwise_out"))}


def test_plif_with_frozen_tau_is_lif(cache_dir):
    values = {"tau_ms": 100.0, "epochs": 2}
    lif_run = engine_of(cache_dir, **values).advance(4)["train_loss"]
    frozen = engine_of(cache_dir, **values, neuron="plif", tau_rate=0.0).advance(4)["train_loss"]
    learned = engine_of(cache_dir, **values, neuron="plif", lr=0.05)
    np.testing.assert_allclose(frozen, lif_run, rtol=1e-9)
    learned.advance(4)
    assert len(set(learned.inspect(["me"])["me"]["tau"].tolist())) == 3  # two blocks and the readout, each its own


def test_records_of_delays_sigmas_tau_and_gradients(cache_dir):
    engine = engine_of(cache_dir, grads=True)
    engine.advance(4)
    found = engine.inspect(["me"])["me"]
    program = engine.program
    np.testing.assert_allclose(found["sigma"], [3 / 3, 5 / 3])
    np.testing.assert_allclose(found["tau"], [20.0] * 3)
    for stage, name in model.blocks(program):
        taps, position = model.taps(program, stage), found[f"position/{name}"]
        expected = np.bincount((taps // 2 - np.round(position)).astype(int).ravel(), minlength=taps)
        np.testing.assert_array_equal(found[f"delays/{name}"], expected)
        assert found[f"moved/{name}"] > 0
    assert all(found[f"grad_norm/{name}"] > 0 for name in engine.state("me")["params"])
    quiet = dataclasses.replace(program, grads=False)
    assert program_key("snn_delays", quiet) != program_key("snn_delays", program)
    hyper = FAMILY.Hyper()
    assert config_key("snn_delays", quiet, hyper) == config_key("snn_delays", program, hyper)


def test_bf16_trains(cache_dir):
    engine = engine_of(cache_dir, precision="bf16")
    curves = engine.advance(4)
    assert np.isfinite(curves["train_loss"]).all()
    assert engine.state("me")["params"]["fc.weight"].dtype == torch.float32
    assert np.isfinite(engine.evaluate(["me"])["me"]["valid_loss"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernel": "cubic"}, "kernel 'cubic' is not one of max, gauss, v1"),
        ({"blocks": (1, 1, 1)}, "kernel_sizes = .* needs one value a stage: blocks has 3"),
        ({"stem": 17}, "leaves no position for stage 2"),
        ({"valid_fraction": 0.0}, "leaves nothing to select on"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"dt_ms": 0.0}, "dt_ms = 0.0 must be above 0"),
    ],
)
def test_contradictions_are_refused_in_one_line(values, message):
    with pytest.raises(BadValue, match=message):
        build(**values)


def test_defaults_are_the_notebook_s_best_run():
    program, hyper = Program(), FAMILY.Hyper()
    assert (program.stem, program.channels, program.blocks, program.bins) == (7, 32, (1, 3, 1), 1)
    assert [kernel_steps(ms, 10.0) for ms in program.max_delay_ms] == [7, 9, 11]
    assert [kernel_steps(ms, 5.0) for ms in program.max_delay_ms] == [15, 19, 23]
    assert (hyper.lr, hyper.lr_pos, hyper.weight_decay, hyper.dropout) == (5e-3, 0.1, 2e-5, 0.75)
