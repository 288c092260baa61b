"""What a result's identity and its randomness rest on: keys, counter-based draws, pure optimisers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import vmap

from trainables import draws, optimizers
from trainables.family import BadValue, config_key, load_family, program_key, run_key

GOLDEN = ("b43056f3a68b", "78ab08683c5c", "3cf1a420818d")


@dataclass(frozen=True)
class Program:
    width: int = 3
    kernel: tuple = (1, 3)
    logged: str = field(default="", metadata={"identity": False})


@dataclass(frozen=True)
class Hyper:
    lr: float = 0.1


def toy_keys() -> tuple[str, str, str]:
    family = load_family("tests.toys.regression")
    program, hyper = family.build({"lr": 0.1, "width": 8})
    config = config_key(family.name, program, hyper)
    return program_key(family.name, program), config, run_key(config, 3)


def test_keys_never_change():
    assert toy_keys() == GOLDEN


@pytest.mark.parametrize("hash_seed", ["1", "271828"])
def test_keys_are_the_same_in_another_process(hash_seed):
    code = "from tests.test_keys_and_draws import toy_keys; print(*toy_keys())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert tuple(done.stdout.split()) == GOLDEN


def test_keys_tell_apart_what_differs_and_nothing_else():
    base = config_key("toy", Program(), Hyper())
    assert config_key("toy", Program(logged="everything"), Hyper()) == base
    assert program_key("toy", Program(logged="everything")) != program_key("toy", Program())
    others = [
        config_key("other", Program(), Hyper()),
        config_key("toy", Program(width=4), Hyper()),
        config_key("toy", Program(kernel=(3, 1)), Hyper()),
        config_key("toy", Program(), Hyper(lr=0.1 + 1e-12)),
    ]
    assert len({base, *others}) == 5
    assert run_key(base, 0) != run_key(base, 1)


def test_values_are_coerced_to_their_field_before_they_are_hashed():
    family = load_family("tests.toys.regression")
    assert family.build({"lr": 1, "width": 8.0}) == family.build({"lr": 1.0, "width": 8})
    for values, told in (
        ({"width": 8.5}, "width = 8.5 should be a whole number"),
        ({"width": True}, "whole number"),
        ({"lr": "fast"}, "lr = 'fast' should be a number"),
        ({"optimizer": 3}, "should be text"),
        ({"optimizer": "adam"}, "is not sgd"),
        ({"nothing": 1}, "no field 'nothing'"),
        ({"precision": "int8"}, "precision 'int8'"),
    ):
        with pytest.raises(BadValue, match=told):
            family.build(values)


# --- draws ---


def at(value: int) -> torch.Tensor:
    return draws.counter(value)


def test_uniform_draws_are_uniform_and_open():
    u = draws.uniform(at(5), at(9), "noise", (200_000,), torch.float64).numpy()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts, _ = np.histogram(u, bins=256, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("varied", ["step", "seed", "purpose"])
def test_first_draws_are_uniform_along_each_coordinate(varied):
    values = [
        draws.uniform(
            at(i if varied == "seed" else 0),
            at(i if varied == "step" else 0),
            f"purpose{i}" if varied == "purpose" else "noise",
            (1,),
            torch.float64,
        ).item()
        for i in range(4000)
    ]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(4000)


def test_neighbouring_draws_are_not_correlated():
    n = 50_000
    base = draws.uniform(at(3), at(7), "noise", (n,), torch.float64).numpy()
    others = {
        "seed": draws.uniform(at(4), at(7), "noise", (n,), torch.float64),
        "step": draws.uniform(at(3), at(8), "noise", (n,), torch.float64),
        "swapped": draws.uniform(at(7), at(3), "noise", (n,), torch.float64),
        "purpose": draws.uniform(at(3), at(7), "noises", (n,), torch.float64),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other.numpy())[0, 1]) < 4 / math.sqrt(n), name
    for lag in (1, 2, 3, 16, 256):
        assert abs(np.corrcoef(base[:-lag], base[lag:])[0, 1]) < 4 / math.sqrt(n), lag


def test_normal_draws_have_a_normal_s_moments():
    z = draws.normal(at(1), at(2), "z", (200_000,), torch.float64).numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert z.var() == pytest.approx(1, abs=4 * math.sqrt(2 / len(z)))
    assert stats.kurtosis(z) == pytest.approx(0, abs=4 * math.sqrt(24 / len(z)))


def test_truncated_normal_is_scipy_s():
    z = draws.truncated_normal(at(1), at(2), "t", (200_000,), torch.float64).numpy()
    assert np.abs(z).max() < 2
    assert z.std() == pytest.approx(stats.truncnorm(-2, 2).std(), abs=0.004)
    assert stats.kstest(z, stats.truncnorm(-2, 2).cdf).pvalue > 1e-3


def test_permutations_are_permutations_and_differ():
    first = draws.permutation(at(0), at(0), "order", 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, draws.permutation(at(0), at(1), "order", 1000))
    # each element is as often first as any other
    heads = np.bincount([int(draws.permutation(at(s), at(0), "order", 8)[0]) for s in range(2000)], minlength=8)
    assert stats.chisquare(heads).pvalue > 1e-3


def test_integers_and_bernoulli():
    n = draws.integers(at(0), at(0), "n", 7, (70_000,)).numpy()
    assert stats.chisquare(np.bincount(n, minlength=7)).pvalue > 1e-3
    p = torch.tensor([0.1, 0.9], dtype=torch.float64)
    hits = draws.bernoulli(at(0), at(0), "b", p, (50_000, 2)).double().mean(0)
    torch.testing.assert_close(hits, p, rtol=0, atol=4 * 0.3 / math.sqrt(50_000))


@pytest.mark.parametrize("kind", [draws.uniform, draws.normal, draws.truncated_normal])
def test_float32_and_float64_draw_the_same_numbers(kind):
    single = kind(at(2), at(3), "x", (5000,), torch.float32).double()
    double = kind(at(2), at(3), "x", (5000,), torch.float64)
    torch.testing.assert_close(single, double, rtol=2e-4, atol=2e-5)
    assert torch.isfinite(single).all()


def test_draws_are_the_same_under_vmap():
    seeds = torch.arange(5, dtype=torch.int32)
    together = vmap(lambda s: draws.normal(s, at(4), "x", (7,), torch.float64))(seeds)
    alone = torch.stack([draws.normal(s, at(4), "x", (7,), torch.float64) for s in seeds])
    assert torch.equal(together, alone)


@pytest.mark.heavy
def test_draws_are_the_same_compiled():
    def both(seed, step):
        return draws.bits(seed, step, "x", 1000), draws.normal(seed, step, "x", (1000,), torch.float64)

    for eager, compiled in zip(both(at(3), at(9)), torch.compile(both)(at(3), at(9)), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)


# --- optimisers ---


def problem() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in ("a", "b")}
    grads = [{name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in params} for _ in range(60)]
    return params, grads


def reference(make, params, grads):
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = make(leaves.values())
    for grad in grads:
        for name, leaf in leaves.items():
            leaf.grad = grad[name].clone()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("decay", [None, 0.05], ids=["adam", "adamw"])
def test_adam_is_torch_s(decay):
    params, grads = problem()
    make = torch.optim.Adam if decay is None else torch.optim.AdamW
    kwargs = {} if decay is None else {"weight_decay": decay}
    expected = reference(lambda p: make(p, lr=0.01, betas=(0.8, 0.99), eps=1e-7, **kwargs), params, grads)
    mu = nu = optimizers.zeros_like(params)
    lr, rate = (
        torch.tensor(0.01, dtype=torch.float64),
        None if decay is None else torch.tensor(decay, dtype=torch.float64),
    )
    for i, grad in enumerate(grads):
        count = torch.tensor(i + 1)
        params, mu, nu = optimizers.adam(
            params, grad, mu, nu, count, lr, b1=0.8, b2=0.99, eps=1e-7, decoupled_decay=rate
        )
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torch_s(momentum, nesterov):
    params, grads = problem()
    expected = reference(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=nesterov), params, grads)
    velocity = optimizers.zeros_like(params)
    lr, m = torch.tensor(0.1, dtype=torch.float64), torch.tensor(momentum, dtype=torch.float64)
    for grad in grads:
        params, velocity = optimizers.sgd(params, grad, velocity, lr, m, nesterov=nesterov)
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0.5, 100.0], ids=["clips", "leaves"])
def test_clipping_is_torch_s(limit):
    _, (grads, *_) = problem()
    leaves = [value.clone().requires_grad_() for value in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(leaves, limit)
    clipped, norm = optimizers.clip_by_global_norm(grads, torch.tensor(limit, dtype=torch.float64))
    torch.testing.assert_close(norm, expected_norm)
    for leaf, grad in zip(leaves, clipped.values(), strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=1e-12)


def test_clipping_of_zero_gradients_is_zero():
    clipped, norm = optimizers.clip_by_global_norm({"a": torch.zeros(3, dtype=torch.float64)}, 1.0)
    assert norm == 0
    assert torch.equal(clipped["a"], torch.zeros(3, dtype=torch.float64))
