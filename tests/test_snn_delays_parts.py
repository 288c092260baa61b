"""Neurons and delay kernels of snn_delays against spikingjelly, DCLS and closed forms, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from DCLS.construct.modules import Dcls1d
from spikingjelly.activation_based import neuron, surrogate
from torch.func import grad, vmap

from trainables.family import hyper_tensors, load_family
from trainables.snn_delays import TINY, delays, pooling
from trainables.snn_delays.neurons import lif, membrane
from trainables.snn_delays.program import kernel_steps

FAMILY = load_family("snn_delays")
DOUBLE = torch.float64


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def currents(seed: int = 0, shape=(3, 25, 5, 4)) -> torch.Tensor:
    """[B, T, N, C]"""
    return 0.8 * torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.3


# --- neurons against spikingjelly -------------------------------------------------------------------------------------


def test_lif_forward_and_gradient_are_spikingjelly_s():
    x = currents().requires_grad_()
    weights = currents(1)
    node = neuron.LIFNode(
        tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(alpha=5.0), detach_reset=True, step_mode="m"
    )
    expected = node(x.movedim(1, 0)).movedim(0, 1)
    assert 0.05 < expected.mean() < 0.9
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    actual = lif(x, scalar(0.5), scalar(5.0))
    (actual_grad,) = torch.autograd.grad((actual * weights).sum(), x)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_parametric_lif_learns_tau_as_spikingjelly_s_does():
    x, weights = currents(), currents(1)
    node = neuron.ParametricLIFNode(
        init_tau=3.0, decay_input=False, surrogate_function=surrogate.ATan(alpha=5.0), detach_reset=True, step_mode="m"
    ).double()
    expected = node(x.movedim(1, 0)).movedim(0, 1)
    (expected * weights).sum().backward()
    program, hyper = FAMILY.build({**TINY, "precision": "float64", "neuron": "plif", "tau_ms": 120.0})
    tensors = hyper_tensors(program, hyper, "cpu")  # 120 ms are 3 steps of 40 ms
    state = FAMILY.init(program, tensors, torch.tensor(0, dtype=torch.int32))
    tau = state["params"]["fc.tau"]
    torch.testing.assert_close(tau, node.w.detach().to(DOUBLE), rtol=1e-7, atol=0)  # theirs was rounded to float32

    def loss(w):
        return (lif(x, 1 - torch.sigmoid(w), scalar(5.0), learn_keep=True) * weights).sum()

    torch.testing.assert_close(grad(loss)(node.w.detach()), node.w.grad, rtol=1e-10, atol=1e-10)


def test_readout_membrane_is_spikingjelly_s_neuron_that_never_spikes():
    x = currents(shape=(3, 4, 25))
    node = neuron.LIFNode(tau=2.5, decay_input=False, v_threshold=1e9, step_mode="m", store_v_seq=True)
    node(x.movedim(2, 0))
    torch.testing.assert_close(membrane(x, scalar(1 - 1 / 2.5)), node.v_seq.movedim(0, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_lanes_with_their_own_tau_keep_the_hand_written_gradient(compiled):
    x, weights = currents(shape=(3, 2, 12, 5, 4)), currents(1, (2, 12, 5, 4))
    keep, alpha = torch.tensor([0.3, 0.5, 0.9], dtype=DOUBLE), torch.tensor([2.0, 5.0, 5.0], dtype=DOUBLE)

    def loss(x, keep, alpha):
        return (lif(x, keep, alpha, learn_keep=True) * weights).sum()

    def loop(x, keep, alpha):
        v, total = torch.zeros_like(x[:, 0]), 0.0
        for t in range(x.shape[1]):
            h = keep * v + x[:, t]
            soft = torch.atan(math.pi / 2 * alpha * (h - 1)) / math.pi
            spike = (h >= 1).to(DOUBLE) - soft.detach() + soft
            total = total + (spike * weights[:, t]).sum()
            v = h * (1 - spike.detach())
        return total

    gradient = vmap(grad(loss, argnums=(0, 1)))
    actual = (torch.compile(gradient, backend="aot_eager", fullgraph=True) if compiled else gradient)(x, keep, alpha)
    expected = vmap(grad(loop, argnums=(0, 1)))(x, keep, alpha)
    assert all(part.abs().max() > 0.1 for part in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# --- delay kernels against DCLS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["max", "gauss", "v1"])
@pytest.mark.parametrize("sigma", [0.0, 1.7])
def test_kernels_and_their_gradients_are_dcls_s(version, sigma):
    taps = 9
    layer = Dcls1d(3, 4, 1, dilated_kernel_size=taps, bias=False, version=version).double()
    with torch.no_grad():
        layer.P.uniform_(-4, 4, generator=torch.Generator().manual_seed(0))
        if layer.SIG is not None:
            layer.SIG.fill_(sigma)
    x = currents(shape=(2, 3, 20))
    expected = layer(F.pad(x, (taps - 1, 0)))
    (expected**2).sum().backward()
    weight, position = layer.weight.detach().squeeze(-1), layer.P.detach()[0].squeeze(-1)

    def out(weight, position):
        kernels = delays.kernel(weight, position, scalar(sigma), taps, scalar(float(taps)), version, delays.GAUSS_1D)
        return delays.synapse_delay(x, kernels)

    torch.testing.assert_close(out(weight, position), expected, rtol=1e-12, atol=1e-12)
    grads = grad(lambda w, p: (out(w, p) ** 2).sum(), argnums=(0, 1))(weight, position)
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], layer.weight.grad.squeeze(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[1], layer.P.grad[0].squeeze(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("version", "floor"), [("max", 0.0), ("gauss", 1.0), ("v1", 0.0)])
def test_two_dimensional_kernel_in_closed_form(version, floor):
    """`Dcls2_1d`, depthwise: k[f, t] = w[f] g(t - c[f]) / (sum g + 1e-7) with c = P + K // 2."""
    taps, sigma = 7, 1.3
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 5, dtype=DOUBLE, generator=generator)
    position = torch.rand(2, 5, dtype=DOUBLE, generator=generator) * 6 - 3
    actual = delays.kernel(weight, position, scalar(sigma), taps, scalar(7.0), version, delays.GAUSS_2_1D)
    for channel in range(2):
        for f in range(5):
            centre = float(position[channel, f]) + 3
            shape = {
                "max": lambda d: max(0.0, sigma + 1 - abs(d)),
                "gauss": lambda d: math.exp(-0.5 * (d / (sigma + floor)) ** 2),
                "v1": lambda d: max(0.0, 1 - abs(d)),
            }[version]
            bump = np.array([shape(t - centre) for t in range(taps)])
            expected = float(weight[channel, f]) * bump / (bump.sum() + 1e-7)
            np.testing.assert_allclose(actual[channel, f].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_frequency_delay_convolution_by_plain_loops():
    x = currents(shape=(2, 10, 6, 3))
    kernels = torch.randn(3, 5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros_like(x)
    for t in range(10):
        for n in range(6):
            for f in range(5):
                for k in range(4):
                    source_t, source_n = t - 3 + k, n - 2 + f
                    if source_t >= 0 and 0 <= source_n < 6:
                        expected[:, t, n] += kernels[:, f, k] * x[:, source_t, source_n]
    torch.testing.assert_close(delays.frequency_delay(x, kernels), expected, rtol=1e-12, atol=1e-12)


def test_right_most_is_no_delay_and_each_step_left_is_one_step_later():
    taps = 9
    impulse = torch.zeros(1, 12, 1, 1, dtype=DOUBLE)
    impulse[0, 2, 0, 0] = 1.0
    for later in range(taps):
        kernels = delays.discrete(
            torch.ones(1, 1, dtype=DOUBLE), torch.full((1, 1), taps // 2 - later, dtype=DOUBLE), taps, scalar(9.0)
        )
        out = delays.frequency_delay(impulse, kernels)[0, :, 0, 0]
        assert int(out.argmax()) == 2 + later
        assert out.sum() == pytest.approx(1.0, abs=1e-6)
        assert float(delays.delay(torch.tensor(float(taps // 2 - later)), taps)) == later


@pytest.mark.parametrize("version", ["max", "gauss"])
def test_a_lane_with_shorter_delays_is_the_net_with_the_shorter_kernel(version):
    weight = torch.randn(4, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    unit = torch.rand(4, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))
    reach = delays.reach_of(scalar(50.0), 10.0, 11)
    assert float(reach) == 5 == kernel_steps(50.0, 10.0)
    long = delays.first_positions(unit, 11, reach, scalar(0.0))
    short = delays.first_positions(unit, 5, reach, scalar(0.0))
    masked = delays.kernel(weight, long, scalar(1.4), 11, reach, version, 1.0)
    alone = delays.kernel(weight, short, scalar(1.4), 5, reach, version, 1.0)
    assert masked[:, :6].abs().max() == 0
    torch.testing.assert_close(masked[:, 6:], alone, rtol=1e-12, atol=1e-12)
    assert delays.clamp(long - 100, 11, reach).tolist() == [5 - 4] * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_mean_over_positions_as_an_operator(compiled):
    """By lanes, with its gradient, against the ordinary mean; here on a CPU, where nets take the ordinary one."""
    x = torch.randn(3, 2, 4, 5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))

    def slopes(mean):
        return vmap(grad(lambda x: (mean(x, DOUBLE) ** 3).sum()))

    operator = slopes(pooling.mean_by_operator)
    if compiled:
        operator = torch.compile(operator, fullgraph=True)
    torch.testing.assert_close(operator(x), slopes(pooling.mean_over_positions)(x), rtol=1e-12, atol=1e-12)
    torch.library.opcheck(pooling.position_mean, (x[0, 0].bfloat16(), torch.float32))
