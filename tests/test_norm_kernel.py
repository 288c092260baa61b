"""The passes between two convolutions: operators under vmap, and their kernels against the formulas, which
`test_vgg_decay_batch_norm` holds against PyTorch's modules. On a GPU, elsewhere in Triton's interpreter.

Arithmetic is float32: 1e-5 of the largest value; results in bf16 are rounded once, 2^-8.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from tests.gpu_kernels import assert_replays, run_interpreted
from trainables.vgg_decay import norm_ops

SHAPES = [
    # groups, samples a group, H, W, C
    (1, 2, 4, 4, 16),
    (2, 3, 4, 2, 48),  # a width that is no power of two
    (3, 5, 2, 6, 32),
    (2, 70, 4, 4, 256),  # several tiles and, not pooled, the last not full
]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
FORMULAS = norm_ops.forward_formula, norm_ops.sums_formula, norm_ops.backward_formula
OPERATORS = norm_ops.norm_forward, norm_ops.norm_sums, norm_ops.norm_backward


def inputs(shape, pool, weighted, dtype=torch.float64, device="cpu"):
    """x, three vectors, a gradient, two more vectors, and the samples' weights."""
    groups, samples, height, width, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(device)
    kind = torch.promote_types(dtype, torch.float32)
    # few values, so that many of a window are equal
    x = torch.round(draw(groups * samples, height, width, channels) * 2).to(dtype)
    vectors = [draw(groups, channels).to(kind) for _ in range(5)]
    side = 2 if pool else 1
    grad = draw(groups * samples, height // side, width // side, channels).to(dtype)
    weight = (torch.rand(groups, samples if weighted else 0, generator=generator) < 0.7).to(device, kind)
    return x, vectors[:3], grad, vectors[3:], weight


def results_of(passes, x, vectors, grad, shared, weight, pool):
    forward, sums, backward = passes
    z, chosen = forward(x, *vectors, pool)
    return z, chosen, sums(grad, x, chosen, *vectors, pool), backward(grad, x, chosen, *vectors, *shared, weight, pool)


def assert_near(found, expected, limits):
    for name, one, other, limit in zip(("z", "chosen", "sums", "dx"), found, expected, limits, strict=True):
        assert one.shape == other.shape, name
        if other.numel():
            error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1)
            assert error <= limit, (name, float(error))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_operators_under_vmap_equal_lane_by_lane(pool, weighted):
    x, vectors, grad, shared, weight = inputs((3, 2, 4, 4, 8), pool, weighted)
    lanes = lambda tensor: tensor.unflatten(0, (3, -1))

    def one(x, centre, scale, shift, grad, mean, tilt, weight):
        return results_of(OPERATORS, x, (centre, scale, shift), grad, (mean, tilt), weight, pool)

    rows = [vector.unsqueeze(1) for vector in (*vectors, *shared)]
    together = vmap(one)(lanes(x), *rows[:3], lanes(grad), *rows[3:], weight.unsqueeze(1))
    whole = results_of(FORMULAS, x, vectors, grad, shared, weight, pool)
    for many, flat in zip(together, whole, strict=True):
        torch.testing.assert_close(many.flatten(0, 1), flat, rtol=0, atol=0)


def check_kernels(dtype, device, limits):
    from trainables.vgg_decay import norm_kernel

    kernels = norm_kernel.forward, norm_kernel.sums, norm_kernel.backward
    for shape in SHAPES:
        for pool in (False, True):
            for weighted in (False, True):
                given = inputs(shape, pool, weighted, dtype, device)
                exact = inputs(shape, pool, weighted, dtype, "cpu")
                wide = [[t.double() for t in part] if isinstance(part, list) else part.double() for part in exact]
                found = [part.cpu() for part in results_of(kernels, *given, pool)]
                assert_near(found, results_of(FORMULAS, *wide, pool), limits)


def test_kernels_in_the_interpreter():
    run_interpreted(
        "import torch; from tests.test_norm_kernel import *; check_kernels(torch.float32, 'cpu', (1e-5, 0, 1e-5, 1e-5))"
    )


class TestOnAGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_kernels(self, dtype):
        rounded = 2**-8 if dtype == torch.bfloat16 else 1e-5
        check_kernels(dtype, "cuda", (rounded, 0, 1e-5, rounded))

    @pytest.mark.parametrize("pool", [False, True])
    def test_a_lane_does_not_depend_on_its_neighbours_and_not_a_number_stays_one(self, pool):
        x, vectors, grad, shared, weight = inputs((3, 70, 8, 8, 32), pool, False, torch.bfloat16, "cuda")
        x[70:140] = torch.nan
        together = results_of(OPERATORS, x, vectors, grad, shared, weight, pool)
        for lane in (0, 2):
            own, row = slice(70 * lane, 70 * lane + 70), slice(lane, lane + 1)
            of_lane = lambda some, row=row: [vector[row] for vector in some]
            alone = results_of(OPERATORS, x[own], of_lane(vectors), grad[own], of_lane(shared), weight[row], pool)
            for whole, part, at in zip(together, alone, (own, own, row, own), strict=True):
                assert torch.equal(whole[at], part)
        z, _, sums, dx = together
        assert all(part.isnan().all() for part in (z[70:140], sums[1, 1], dx[70:140]))

    def test_replays_from_a_graph(self):
        x, *rest = inputs((2, 70, 8, 8, 32), True, True, torch.bfloat16, "cuda")
        assert_replays(lambda: results_of(OPERATORS, x, *rest, True), x)
