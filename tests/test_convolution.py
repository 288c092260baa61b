"""The convolution operators against PyTorch's convolution; their kernels on a GPU, elsewhere in Triton's interpreter.

float64 agrees to 1e-12 of the largest value, float32 to 1e-5 (sums of up to a few thousand products). bf16 inputs are
exact in float32, where sums are kept: results are rounded once, 2^-8, and the weight's gradient not at all.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from tests.gpu_kernels import assert_replays, run_interpreted
from trainables import convolution
from trainables.family import BadValue
from trainables.vgg_decay import model, norm_ops
from trainables.vgg_decay.program import Program

SHAPES = [
    # groups, samples a group, H, W, C, O, k
    (1, 2, 4, 4, 16, 16, 3),
    (2, 3, 4, 2, 16, 32, 3),
    (2, 2, 3, 5, 48, 16, 3),  # a width that no power of two above 16 divides, odd sides
    (3, 5, 1, 1, 32, 48, 1),
    (1, 2, 2, 2, 32, 160, 3),  # columns in two tiles, the second not full
    (2, 17, 4, 4, 16, 16, 3),  # rows in more than one tile, the last not full
    (2, 5, 6, 4, 3, 32, 3),  # an image's channels
    (1, 3, 3, 5, 7, 16, 3),
    (2, 2, 4, 4, 1, 160, 3),
]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def inputs(shape, dtype=torch.float64, device="cpu"):
    """x [G * N, H, W, C], weights [G, O, k, k, C], a gradient [G * N, H, W, O]."""
    groups, samples, height, width, inputs, outputs, kernel = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
    x = draw(groups * samples, height, width, inputs)
    return x, draw(groups, outputs, kernel, kernel, inputs), draw(groups * samples, height, width, outputs)


def plain(x, weight):
    """One lane by PyTorch: x [N, H, W, C], weight [O, C, k, k]."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)


def expected_of(x, weight, slope):
    """y and both gradients in float64, lane by lane, by autograd."""
    found = []
    parts = zip(x.double().chunk(len(weight)), weight.double(), slope.double().chunk(len(weight)), strict=True)
    for part, taps, to_y in parts:
        leaves = part.clone().requires_grad_(), taps.clone().requires_grad_()
        y = plain(leaves[0], leaves[1].permute(0, 3, 1, 2))
        found.append((y.detach(), *torch.autograd.grad(y, leaves, to_y)))
    ys, to_x, to_weight = zip(*found, strict=True)
    return torch.cat(ys), torch.cat(to_x), torch.stack(to_weight).permute(0, 1, 4, 2, 3)


def results_of(operators, x, weight, slope):
    forward, backward_input, backward_weight = operators
    return forward(x, weight), backward_input(slope, weight), backward_weight(slope, x, weight)


def assert_near(found, expected, limits):
    for name, one, other, limit in zip(("y", "dx", "dw"), found, expected, limits, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error <= limit, (name, float(error))


OPERATORS = convolution.conv_forward, convolution.conv_backward_input, convolution.conv_backward_weight
EXACT = dict.fromkeys((torch.float64,), (1e-12,) * 3) | {torch.float32: (1e-5,) * 3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_are_the_convolution_and_its_gradients(shape):
    x, weight, slope = inputs(shape)
    assert_near(results_of(OPERATORS, x, weight, slope), expected_of(x, weight, slope), EXACT[torch.float64])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lanes_under_vmap_equal_one_by_one_with_their_gradients(shape):
    x, weight, slope = inputs(shape)
    lanes = (x.unflatten(0, (len(weight), -1)), weight.permute(0, 1, 4, 2, 3), slope.unflatten(0, (len(weight), -1)))

    def loss(convolution):
        return lambda image, taps, to_y: (convolution(image, taps) * to_y).sum()

    together = vmap(grad(loss(convolution.convolution), argnums=(0, 1)))(*lanes)
    for lane, alone in enumerate(zip(*lanes, strict=True)):
        expected = grad(loss(plain), argnums=(0, 1))(*alone)
        for found, one in zip(together, expected, strict=True):
            torch.testing.assert_close(found[lane], one, rtol=1e-12, atol=1e-12)


def test_the_weights_gradient_is_not_rounded():
    x, weight, slope = inputs(SHAPES[0], torch.bfloat16)
    master = weight[0].permute(0, 3, 1, 2).float()
    found = grad(lambda taps: (convolution.convolution(x, taps).float() * slope.float()).sum())(master)
    assert found.dtype == torch.float32
    expected = expected_of(x, weight, slope)[2][0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("channels", "filled"), [((8, 10), (16, 16)), ((17, 16), (32, 16)), ((3, 30), (3, 32))])
def test_any_number_of_channels_is_filled_up(channels, filled):
    x, weight, slope = inputs((1, 3, 4, 5, *channels, 3))
    weight = weight[0].permute(0, 3, 1, 2)
    whole, taps = convolution._filled(x, weight)
    assert (whole.shape[-1], len(taps)) == filled
    torch.testing.assert_close(convolution.convolution(x, weight), plain(x, weight), rtol=1e-12, atol=1e-12)
    found, expected = (
        grad(lambda a, b, f=f: (f(a, b) * slope).sum(), argnums=(0, 1))(x, weight)
        for f in (convolution.convolution, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_engine_that_fits_a_net():
    assert not model.convolves(Program(data="cifar10", precision="bf16"))
    assert model.convolves(Program(data="cifar10", precision="float32"))


@pytest.mark.parametrize("operators", [convolution, norm_ops], ids=["conv", "norm"])
def test_missing_triton_is_told(monkeypatch, operators):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    for name in ("convolution_kernel", "vgg_decay.norm_kernel"):
        monkeypatch.delitem(sys.modules, f"trainables.{name}", raising=False)
    with pytest.raises(BadValue, match=r"needs? triton"):
        operators.gpu_kernel()


def check_kernels(shapes, dtype, device, limits):
    from trainables import convolution_kernel

    kernels = convolution_kernel.forward, convolution_kernel.backward_input, convolution_kernel.backward_weight
    for shape in shapes:
        x, weight, slope = inputs(shape, dtype, device)
        expected = expected_of(x, weight, slope)
        assert_near(results_of(kernels, x, weight, slope), expected, limits)


def test_kernels_in_the_interpreter():
    run_interpreted(
        "import torch; from tests.test_convolution import *; check_kernels(SHAPES, torch.float32, 'cpu', (1e-5,) * 3)"
    )


LAYERS = [(3, 32, 3, 32), (3, 32, 32, 32), (3, 16, 32, 64), (3, 16, 64, 64), (3, 8, 64, 128), (3, 8, 128, 128)]
LAYERS += [(3, 4, 128, 256), (3, 4, 256, 256), (3, 2, 256, 256), (1, 1, 256, 256)]


class TestOnAGpu:
    pytestmark = ON_GPU

    LARGE = (2, 40, 16, 16, 64, 64, 3)  # more rows than one instance of the weight's gradient sums

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_kernels(self, dtype):
        limits = (2**-8, 2**-8, 1e-5) if dtype == torch.bfloat16 else (1e-5,) * 3
        check_kernels([*SHAPES, self.LARGE], dtype, "cuda", limits)

    def test_a_lane_does_not_depend_on_its_neighbours(self):
        x, weight, slope = inputs((5, 20, 16, 16, 32, 64, 3), torch.bfloat16, "cuda")
        together = results_of(OPERATORS, x, weight, slope)
        for lane in range(5):
            own = slice(20 * lane, 20 * lane + 20)
            alone = results_of(OPERATORS, x[own], weight[lane : lane + 1], slope[own])
            for whole, part, at in zip(together, alone, (own, own, slice(lane, lane + 1)), strict=True):
                assert torch.equal(whole[at], part)

    @pytest.mark.parametrize("layer", LAYERS, ids=str)
    def test_at_full_size_beside_lanes_that_are_not_numbers(self, layer):
        kernel, side, channels, outputs = layer
        x, weight, slope = inputs((32, 128, side, side, channels, outputs, kernel), torch.bfloat16, "cuda")
        clean = results_of(OPERATORS, x, weight, slope)
        samples = lambda tensor: tensor.unflatten(0, (32, -1))
        exact = expected_of(samples(x)[3], weight[3:4], samples(slope)[3])
        mine = [samples(clean[0])[3], samples(clean[1])[3], clean[2][3:4]]
        assert_near(mine, exact, (2**-8, 2**-8, 1e-4))
        for tensor in (x, slope):
            samples(tensor)[::2] = torch.nan
        weight[::2] = torch.nan
        for _ in range(20):  # what is read by mistake depends on what ran before
            for found, before in zip(results_of(OPERATORS, x, weight, slope), clean, strict=True):
                assert torch.equal(samples(found)[1::2], samples(before)[1::2])

    def test_replays_from_a_graph(self):
        x, weight, slope = inputs(self.LARGE, torch.bfloat16, "cuda")
        assert_replays(lambda: results_of(OPERATORS, x, weight, slope), x)
