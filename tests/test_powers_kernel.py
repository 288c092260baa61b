"""The powers of constant decays: the operators' formulas, their gradient, and the kernels.

The formulas are compared with autograd through ordinary code in float64: 1e-11 of the largest value. The kernels, which
multiply from step to step, with the formulas: in float64 1e-12; in float32 5e-5, for either rounds phases of up to 400
radians by 1.5e-5; written as bf16 2^-7 (Triton's interpreter cuts off where a GPU rounds).
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from tests.gpu_kernels import assert_near, assert_replays, run_interpreted
from trainables.dln import powers, recurrence

SHAPES = [(1, 5, 1, 8), (2, 6, 29, 6), (3, 33, 64, 40), (2, 600, 30, 608)]
"""(lanes, channels, steps, width): one step; no padding; two instances of steps; two of channels."""
CASES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 2**-7}


def inputs(shape, kind, low, device="cpu"):
    """log_size, theta [G, D], and a gradient of the powers."""
    lanes, channels, steps, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.rand(size, generator=generator, dtype=torch.float64)
    log_size, theta = torch.log(1 - 0.1 * draw(lanes, channels)), 6.3 * draw(lanes, channels)
    to_powers = 2 * draw(lanes, steps, width) - 1
    return log_size.to(device, kind), theta.to(device, kind), to_powers.to(device, low)


def work(drawn, shape, low, of):
    log_size, theta, to_powers = drawn
    forward, backward = of
    return [forward(log_size, theta, *shape[2:], low), *backward(to_powers, log_size, theta)]


FORMULAS = powers.forward_formula, powers.backward_formula
OPERATORS = powers.powers_forward, powers.powers_backward


def kernels():
    from trainables.dln import powers_kernel

    return powers_kernel.forward, powers_kernel.backward


def check(shape, kind, low, device):
    """The kernels' results are the formulas'."""
    drawn = inputs(shape, kind, low, device)
    found, expected = (work(drawn, shape, low, of) for of in (kernels(), FORMULAS))
    assert [one.dtype for one in found] == [low, kind, kind]
    for one, other, limit in zip(found, expected, (LIMITS[low], LIMITS[kind], LIMITS[kind]), strict=True):
        assert_near(one.double(), other.double(), limit)


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    _, channels, steps, width = shape
    drawn = inputs(shape, torch.float64, torch.float64)
    leaves = [part.clone().requires_grad_() for part in drawn[:2]]
    later = torch.arange(steps - 1, -1, -1, dtype=torch.float64)[:, None]
    z = torch.polar(torch.exp(leaves[0]), leaves[1])
    expected = F.pad((z[:, None] ** later).real, (0, width - channels))
    found, *slopes = work(drawn, shape, torch.float64, OPERATORS)
    assert_near(found, expected.detach(), 1e-11)
    for one, other in zip(slopes, torch.autograd.grad(expected, leaves, drawn[2]), strict=True):
        assert_near(one, other, 1e-11)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_fake_tensors_look_like_the_results(low):
    log_size, theta, to_powers = inputs(SHAPES[1], torch.float32, low)
    torch.library.opcheck(powers.powers_forward, (log_size, theta, *SHAPES[1][2:], low))
    torch.library.opcheck(powers.powers_backward, (to_powers, log_size, theta))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_last_state_and_its_gradients_by_lanes(compiled, device):
    """vmap over grad, without vmap's fallback of one lane after another (which warns), against the ordinary code."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    log_size, theta, _ = inputs((3, 5, 11, 8), torch.float64, torch.float64, device)
    images = torch.rand(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)

    def loss(log_size, theta, of, *more):
        return of(log_size, theta, images, *more).square().sum()

    lanes = lambda of, *more: vmap(grad(lambda a, b: loss(a, b, of, *more), (0, 1)))
    expected = lanes(recurrence.last_real_constant)(log_size, theta)
    function = lanes(powers.last_real_constant, torch.float64)
    if compiled:
        function = torch.compile(function, fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*performance drop.*")
        found = function(log_size, theta)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-10)


def test_kernels_equal_formulas_in_the_interpreter():
    code = "from tests.test_powers_kernel import CASES, SHAPES, check; "
    code += "[check(shape, *case, 'cpu') for shape in SHAPES for case in CASES]"
    run_interpreted(code)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, (8, 500, 784, 504)])
    @pytest.mark.parametrize(("kind", "low"), CASES)
    def test_kernels_equal_formulas(self, shape, kind, low):
        if shape[2] > 100 and kind == torch.float32:
            pytest.skip("phases of 5,000 radians are rounded by more than the limit")
        check(shape, kind, low, "cuda")

    def test_a_captured_graph_reads_what_is_there_when_it_is_replayed(self):
        drawn = inputs(SHAPES[2], torch.float32, torch.bfloat16, "cuda")
        assert_replays(lambda: work(drawn, SHAPES[2], torch.bfloat16, kernels()), drawn[1])
