"""The recurrences against a plain loop, complex numpy and closed forms, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from trainables.dln import tdln
from trainables.dln.program import Hyper, Program
from trainables.dln.recurrence import last_real, last_real_constant, power, real_scan, scan, sequential
from trainables.draws import counter
from trainables.family import hyper_tensors


def problem(length: int, seed: int = 0):
    """log size, theta [D], times and inputs [B, L, D] as a TDLN has them."""
    g = torch.Generator().manual_seed(seed)
    channels = 5
    log_size = torch.log(1 - 0.3 * torch.rand(channels, generator=g, dtype=torch.float64))
    theta = 2 * math.pi * torch.rand(channels, generator=g, dtype=torch.float64)
    times = torch.rand(2, length, channels, generator=g, dtype=torch.float64)
    inputs = torch.randn(2, length, channels, generator=g, dtype=torch.float64)
    return log_size, theta, times, inputs


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
def test_scan_equals_the_loop_in_state_product_and_gradients(length):
    leaves = [leaf.requires_grad_() for leaf in problem(length)]

    def states(method):
        log_size, theta, times, inputs = leaves
        return method(power(log_size, theta, times), inputs)

    expected = states(sequential)
    (actual, products) = states(scan)
    for part in (0, 1):
        torch.testing.assert_close(actual[part], expected[part], rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    losses = [(weights * (result[0] + 2 * result[1])).sum() for result in (expected, actual)]
    wanted, got = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
    for one, other in zip(wanted, got, strict=True):
        if other is None:  # with one step nothing decays
            assert length == 1
            assert not one.any()
        else:
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    log_size, theta, times, _ = (leaf.detach().numpy() for leaf in leaves)
    running = np.cumprod(np.exp(times * (log_size + 1j * theta)), axis=1)
    np.testing.assert_allclose(products[0].detach().numpy(), running.real, atol=1e-12)
    np.testing.assert_allclose(products[1].detach().numpy(), running.imag, atol=1e-12)


def test_an_impulse_decays_in_closed_form():
    size, theta, length = 0.9, 0.7, 12
    inputs = torch.zeros(length, 1, dtype=torch.float64)
    inputs[0] = 1
    ones = torch.ones_like(inputs)
    log_size, angle = torch.tensor([math.log(size)], dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
    states, _ = scan(power(log_size, angle, ones), inputs)
    steps = np.arange(length)
    np.testing.assert_allclose(states[0][:, 0], size**steps * np.cos(theta * steps), atol=1e-14)
    np.testing.assert_allclose(states[1][:, 0], size**steps * np.sin(theta * steps), atol=1e-14)


def test_real_scan_returns_the_state_and_beside_it_the_product():
    decay, inputs = torch.rand(9, 4, dtype=torch.float64), torch.randn(2, 9, 4, dtype=torch.float64)
    states, products = real_scan(decay, inputs)
    state = torch.zeros(2, 4, dtype=torch.float64)
    for step in range(9):
        state = decay[step] * state + inputs[:, step]
        torch.testing.assert_close(states[:, step], state)
    torch.testing.assert_close(products[0], decay.cumprod(0))
    assert not torch.allclose(states, products)


def test_the_last_state_needs_no_scan():
    log_size, theta, times, inputs = problem(21)
    expected = sequential(power(log_size, theta, times), inputs)[0][:, -1]
    torch.testing.assert_close(last_real(log_size, theta, times, inputs), expected, rtol=1e-11, atol=1e-12)
    one_input = inputs[..., :1].expand_as(inputs)
    constant = sequential(power(log_size, theta, torch.ones_like(times)), one_input)[0][:, -1]
    torch.testing.assert_close(last_real_constant(log_size, theta, inputs[..., 0]), constant, rtol=1e-11, atol=1e-12)


def lane(program: Program, hyper: Hyper, seed: int = 0):
    hypers = hyper_tensors(program, hyper, "cpu")
    return hypers, tdln.init_params(program, hypers, counter(seed))


IMAGES = Program(
    task="reconstruct", data="digits", precision="float64", channels=6, recurrence="tdln", levels=0, dense=1
)


def test_tdln_at_time_one_is_the_dln_of_its_projected_input():
    hypers, params = lane(IMAGES, Hyper(time_bias=1000.0))
    images = torch.rand(3, 64, dtype=torch.float64)
    encoded = tdln.encode(IMAGES, params, hypers, images).numpy()
    projected = (
        images[..., None].numpy().repeat(6, -1) @ params["level0.data.w"].numpy() + params["level0.data.b"].numpy()
    )
    z = params["level0.size"].numpy() * np.exp(1j * params["level0.theta"].numpy())
    state = np.zeros((3, 6), dtype=complex)
    for step in range(64):
        state = z * state + projected[:, step]
    np.testing.assert_allclose(encoded, state.real, rtol=1e-10)
    # and a plain DLN is the same recurrence on the repeated input itself
    plain = dataclasses.replace(IMAGES, recurrence="dln")
    state = np.zeros((3, 6), dtype=complex)
    for step in range(64):
        state = z * state + images[:, step : step + 1].numpy()
    np.testing.assert_allclose(tdln.encode(plain, params, hypers, images).numpy(), state.real, rtol=1e-9)


@pytest.mark.parametrize("recurrence", ["tdln", "tdln_shifted"])
@pytest.mark.parametrize("norm_over", ["position", "sequence"])
def test_two_levels_against_a_plain_loop(recurrence, norm_over):
    program = dataclasses.replace(IMAGES, recurrence=recurrence, levels=1, dense=0, norm_over=norm_over)
    hypers, params = lane(program, Hyper(time_bias=0.3, norm_eps=1e-5))
    images = torch.rand(2, 64, dtype=torch.float64)
    p = {name: value.numpy() for name, value in params.items()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def recur(level, times, inputs):
        state, out = np.zeros((2, 6), dtype=complex), []
        for step in range(64):
            t = times[:, step]
            z = p[f"level{level}.size"] ** t * np.exp(1j * p[f"level{level}.theta"] * t)
            state = z * state + inputs[:, step]
            out.append(state.real)
        return np.stack(out, 1)

    x = images.numpy()[..., None].repeat(6, -1)
    if recurrence == "tdln":
        for level in (0, 1):
            t = sigmoid(0.3 + x @ p[f"level{level}.time.w"] + p[f"level{level}.time.b"])
            out = recur(level, t, t * (x @ p[f"level{level}.data.w"] + p[f"level{level}.data.b"]))
            if level == 1:
                summed = np.maximum(out + x, 0)
                axes = (-1,) if norm_over == "position" else (-2, -1)
                mean, var = summed.mean(axes, keepdims=True), summed.var(axes, keepdims=True)
                out = (summed - mean) / np.sqrt(var + 1e-5)
            x = out
    else:
        x = recur(0, np.ones_like(x), x)
        x = np.maximum(x @ p["level1.before.w"] + p["level1.before.b"], 0)
        t = sigmoid(0.3 + x @ p["level1.time.w"])
        x = recur(1, t, np.concatenate([np.ones_like(t[:, :1]), t[:, :-1]], 1) * x)
    expected = sigmoid(x[:, -1] @ p["out.w"] + p["out.b"])
    np.testing.assert_allclose(tdln.reconstruct(program, params, hypers, images).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("inputs", [1, 3, 4])
def test_folding_the_first_matrix_repeats_the_input(inputs):
    weight, x = torch.randn(10, 7, dtype=torch.float64), torch.randn(2, inputs, dtype=torch.float64)
    torch.testing.assert_close(x @ tdln.fold(weight, inputs), tdln.repeat_to(x, 10) @ weight)


def test_initial_memory_lies_where_the_lane_says():
    program = dataclasses.replace(IMAGES, channels=4000, recurrence="dln", dense=0)
    _, params = lane(program, Hyper(forget_low=1e-3, forget_high=0.1, period=100.0))
    forget, theta = 1 - params["level0.size"], params["level0.theta"]
    assert 1e-3 < forget.min() < 1.05e-3
    assert 0.095 < forget.max() < 0.1
    assert abs(forget.log().mean() - math.log(1e-2)) < 0.05  # log-uniform: its middle is the geometric mean
    assert 2 * math.pi / 100 < theta.min() < 0.064
    assert 6.2 < theta.max() < 2 * math.pi
