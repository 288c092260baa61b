"""BatchNorm, ReLU and max-pooling with a gradient of their own, against PyTorch's modules and autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from trainables.vgg_decay.batch_norm import EPSILON, normalised


def inputs(seed=0, lanes=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn((lanes, *size) if lanes else size, generator=generator, dtype=torch.float64)
    return draw(6, 4, 6, 5), draw(5), draw(5)


def plain(x, gamma, beta, mask, pool):
    """By PyTorch, of the examples that count; padding gives 0."""
    real = x if mask is None else x[mask]
    z = torch.relu(F.batch_norm(real.permute(0, 3, 1, 2), None, None, gamma, beta, training=True, eps=EPSILON))
    return (F.max_pool2d(z, 2) if pool else z).permute(0, 2, 3, 1)


MASKS = {"all": None, "some": torch.tensor([True, True, False, True, True, False])}


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_value_statistics_and_gradient(mask, pool):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    expected = plain(*leaves, mask, pool)
    slope = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = torch.autograd.grad(expected, leaves, slope)
    z, (mean, var, count) = normalised(*leaves, mask, pool)
    whole = torch.zeros_like(z)
    whole[slice(None) if mask is None else mask] = slope
    torch.testing.assert_close(z if mask is None else z[mask], expected, rtol=1e-12, atol=1e-12)
    for found, one in zip(torch.autograd.grad(z, leaves, whole), slopes, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-11, atol=1e-11)
    real = leaves[0] if mask is None else leaves[0][mask]
    torch.testing.assert_close(mean, real.mean((0, 1, 2)))
    torch.testing.assert_close(var, real.var((0, 1, 2), correction=0))
    assert count == real[..., 0].numel()
    assert not any(statistic.requires_grad for statistic in (mean, var, count))


def test_of_equals_the_first_has_the_gradient():
    # whole numbers of which many are equal; a gain of 0 and a shift above it make all of them equal
    x = torch.randint(0, 3, (6, 4, 6, 5), generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    gamma = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5], dtype=torch.float64, requires_grad=True)
    beta = torch.full_like(gamma, 0.3).requires_grad_()
    expected, (found, _) = plain(x, gamma, beta, None, True), normalised(x, gamma, beta, None, True)
    slope = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for one, other in zip(*(torch.autograd.grad(y, (x, gamma, beta), slope) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_lanes_under_vmap_equal_one_by_one(mask, compiled):
    def loss(x, gamma, beta):
        z, (mean, var, _) = normalised(x, gamma, beta, mask, True)
        return (z * torch.cos(z)).sum(), (mean, var)

    gradient = grad(loss, argnums=(0, 1, 2), has_aux=True)
    together = vmap(gradient)
    lanes = inputs(4, lanes=3)
    found = (torch.compile(together, dynamic=False) if compiled else together)(*lanes)
    for lane, alone in enumerate(zip(*lanes, strict=True)):
        for many, one in zip((*found[0], *found[1]), (lambda r: (*r[0], *r[1]))(gradient(*alone)), strict=True):
            torch.testing.assert_close(many[lane], one, rtol=1e-11, atol=1e-11)


def test_bf16_is_normalised_in_float32():
    x, gamma, beta = inputs()
    z, (mean, var, _) = normalised(x.bfloat16(), gamma.float(), beta.float(), None, False)
    assert (z.dtype, mean.dtype, var.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    expected = plain(x.bfloat16().double(), gamma, beta, None, False)
    torch.testing.assert_close(z.double(), expected, rtol=2**-8, atol=1e-5)
