"""What epochs read is worked out once a seed and epoch, and is what the family says."""

from collections import Counter
from dataclasses import replace
from threading import Event

import pytest
import torch

from lanes.engine import Arrival
from lanes.orders import KEPT, Orders
from lanes.serial import SerialEngine
from tests.families import arrays_of, build_case
from tests.toys import regression as toy


@pytest.fixture
def counted(cache_dir):
    """(family, program, arrays, hyper, how often each order was worked out)."""
    calls: Counter = Counter()

    def order(program, arrays, seed, epoch):
        calls["order", seed, epoch] += 1
        return toy.order(program, arrays, seed, epoch)

    _, program, hyper = build_case("tests.toys.regression", "noisy")
    return replace(toy.FAMILY, order=order), program, arrays_of(toy.FAMILY, program, cache_dir), hyper, calls


@pytest.mark.parametrize("ahead", [False, True])
def test_an_order_is_the_family_s_and_worked_out_once(counted, ahead):
    family, program, arrays, _, calls = counted
    orders = Orders(family, program, arrays, ahead)
    for _ in range(2):
        for seed in (0, 1):
            orders.expect("order", seed, 3)
            found = orders.get("order", seed, 3)["index"]
            assert torch.equal(found, toy.order(program, arrays, seed, 3)["index"])
    assert calls == {("order", 0, 3): 1, ("order", 1, 3): 1}


def test_ahead_is_beside_whoever_expects(cache_dir):
    may_go = Event()

    def order(program, arrays, seed, epoch):
        assert may_go.wait(60)
        return toy.order(program, arrays, seed, epoch)

    _, program, _ = build_case("tests.toys.regression", "noisy")
    orders = Orders(replace(toy.FAMILY, order=order), program, arrays_of(toy.FAMILY, program, cache_dir), True)
    orders.expect("order", 0, 0)  # comes back although it cannot be worked out yet
    may_go.set()
    assert torch.equal(orders.get("order", 0, 0)["index"], toy.order(program, {}, 0, 0)["index"])


def test_the_newest_and_what_lanes_need_are_kept(counted):
    family, program, arrays, _, calls = counted
    orders = Orders(family, program, arrays, False)
    for epoch in range(KEPT + 10):
        orders.get("order", 0, epoch)
        orders.get("order", 7, 0)  # asked for again and again
        orders.trim(1)
    assert calls["order", 7, 0] == 1
    orders.get("order", 0, KEPT + 9)
    orders.get("order", 0, 0)
    assert calls["order", 0, KEPT + 9] == 1
    assert calls["order", 0, 0] == 2
    for seed in range(2 * KEPT):
        orders.get("order", seed, 1000)
    orders.trim(KEPT)
    orders.get("order", 0, 1000)
    assert calls["order", 0, 1000] == 1


def test_lanes_of_one_seed_share_their_orders(counted):
    family, program, arrays, hyper, calls = counted
    engine = SerialEngine(family, program, arrays)
    engine.insert_all([Arrival(f"lane{i}", replace(hyper, lr=0.01 * (i + 1)), i % 2) for i in range(6)])
    steps = family.schedule(program).steps_per_epoch
    for _ in range(2):
        engine.advance(steps)
    assert calls == {("order", seed, epoch): 1 for seed in (0, 1) for epoch in (0, 1, 2)}


def test_an_order_that_fails_says_so_when_asked_for(counted):
    family, program, arrays, _, _ = counted

    def order(program, arrays, seed, epoch):
        raise ValueError("no such image")

    orders = Orders(replace(family, order=order), program, arrays, True)
    orders.expect("order", 0, 0)
    with pytest.raises(ValueError, match="no such image"):
        orders.get("order", 0, 0)
