"""Every method of ci_vit against the plain-loop reference: 60 float64 steps, resets and task changes in them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lanes.serial import SerialEngine
from tests.ci_vit_reference import Reference, split_layers
from tests.families import arrays_of
from trainables import draws
from trainables.ci_vit import learning, resets, stream
from trainables.ci_vit.program import ALGORITHMS
from trainables.family import hyper_tensors, load_family

FAMILY = load_family("ci_vit")
STEPS = 60
TINY = {
    "depth": 2,
    "hidden": 6,
    "patch": 4,
    "batch": 8,
    "train_per_class": 20,
    "tasks": 4,
    "epochs_per_task": 3,
    "precision": "float64",
}

CASES = {
    "vanilla": ("vanilla", {}),
    "l2": ("vanilla", {"l2": 1e-2}),
    "l2 star, all but the resettable": ("vanilla", {"l2": 1e-2, "l2_mlp_in": 0}),
    "l2 star, qkv only": ("vanilla", {"l2": 1e-2, "l2_mlp_in": 0, "l2_other": 0}),
    "l2init": ("vanilla", {"l2_init": 1e-2}),
    "shrink_perturb": ("shrink_perturb", {"shrink": 0.98, "sigma": 0.02}),
    "shrink_perturb, key an epoch": ("shrink_perturb", {"shrink": 0.98, "sigma": 0.02, "perturb_key_epoch": 1}),
    "fresh_start": ("shrink_perturb", {"fresh_start": 1}),
    "cbp, several a step": ("cbp", {"reset_freq": 0.1, "cbp_age": 7, "cbp_decay": 0.9}),
    "cbp, one now and then": ("cbp", {"reset_freq": 0.02, "cbp_age": 10}),
    "cbp with ties": ("cbp", {"reset_freq": 0.02, "cbp_age": 10, "cbp_ties": 1}),
    "redo as coded": ("redo", {"reset_freq": 0.2, "redo_threshold": 0.02}),
    "redo of the paper": ("redo", {"reset_freq": 0.2, "redo_threshold": 0.4, "redo_mean": 1}),
    "snr": ("snr", {"reset_freq": 0.1, "snr_percentile": 0.7, "snr_threshold": 2, "lr": 2e-2}),
    "snr, epsilon": ("snr", {"reset_freq": 0.1, "snr_percentile": 0.6, "snr_threshold": 2, "snr_epsilon": 0.7}),
    "snr and l2": ("snr", {"reset_freq": 0.1, "snr_percentile": 0.6, "snr_epsilon": 0.7, "l2": 1e-3}),
    "snr_v2": ("snr_v2", {"reset_freq": 0.1, "snr_percentile": 0.8}),
    "snr_v2 and l2 star": (
        "snr_v2",
        {"reset_freq": 0.1, "snr_percentile": 0.55, "l2": 1e-2, "l2_mlp_in": 0, "l2_other": 0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_method_equals_the_plain_loop(case, cache_dir):
    algorithm, values = CASES[case]
    program, hyper = FAMILY.build({**TINY, "algorithm": algorithm, "lr": 5e-3, **values})
    arrays = arrays_of(FAMILY, program, cache_dir)
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("lane", hyper, seed=11)
    reference = Reference(program, hyper, seed=11)
    for epoch in range(STEPS // engine.schedule.steps_per_epoch):
        rows = stream.order(program, arrays, 11, epoch)
        curves = engine.advance(engine.schedule.steps_per_epoch)
        for i in range(engine.schedule.steps_per_epoch):
            data = stream.batch(program, arrays, {name: row[i] for name, row in rows.items()})
            expected = reference.step(data["images"], data["labels"])
            for name in curves:
                assert curves[name][i, 0] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), (name, epoch, i)
    leaves = split_layers(engine.state("lane")["params"])
    assert leaves.keys() == reference.leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf, reference.leaves[name].detach(), rtol=1e-8, atol=1e-9, msg=name)
    ages = torch.tensor([[unit["age"] for unit in layer] for layer in reference.units])
    assert torch.equal(engine.state("lane")["ages"], ages.int())
    if algorithm in ("cbp", "redo", "snr", "snr_v2"):
        assert reference.resets >= 5
        assert int(engine.state("lane")["statistics"]["reset_count"].sum()) == reference.resets
    if algorithm in ("snr", "snr_v2"):
        assert reference.renewals >= 2


# --- single facts ---------------------------------------------------------------------------------------------------


def lane(algorithm: str, cache_dir, **values):
    """(program, hypers, state, one batch) of a tiny run."""
    program, hyper = FAMILY.build({**TINY, "algorithm": algorithm, **values})
    tensors = hyper_tensors(program, hyper, "cpu")
    state = learning.init(program, tensors, draws.counter(0))
    arrays = arrays_of(FAMILY, program, cache_dir)
    rows = stream.order(program, arrays, 0, 0)
    return program, tensors, state, stream.batch(program, arrays, {name: row[0] for name, row in rows.items()})


@pytest.mark.parametrize(("by_epoch", "distinct"), [(0.0, 10), (1.0, 2)])
def test_perturbation_differs_at_every_step_unless_keyed_by_the_epoch(cache_dir, by_epoch, distinct):
    values = {"lr": 0.0, "shrink": 0.0, "sigma": 1.0, "perturb_key_epoch": by_epoch}
    program, hyper, state, data = lane("shrink_perturb", cache_dir, **values)
    seen = set()
    for _ in range(10):  # two epochs of five steps; with lr 0 and shrink 0 the weights are the noise itself
        state, _ = learning.step(program, state, hyper, data)
        seen.add(tuple(state["params"]["head/kernel"].flatten().tolist()))
    assert len(seen) == distinct


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ages_follow_a_hand_made_firing_pattern_in_every_algorithm(cache_dir, algorithm):
    never = {"lr": 0.0, "reset_freq": 0.0, "snr_threshold": 1e9, "cbp_age": 1e9}
    program, hyper, state, data = lane(algorithm, cache_dir, **never)
    pattern = ["fires", "silent", "silent", "fires", "silent", "silent", "silent", "fires"]
    expected = [0, 1, 2, 0, 1, 2, 3, 0]
    for firing, age in zip(pattern, expected, strict=True):
        bias = torch.full_like(state["params"]["mlp_in/bias"], -1e3)
        bias[0, 1] = 1e3 if firing == "fires" else -1e3
        bias[1, 2] = 1e3
        state = {**state, "params": {**state["params"], "mlp_in/bias": bias}}
        state, _ = learning.step(program, state, hyper, data)
        assert state["ages"][0, 1] == age
        assert state["ages"][1, 2] == 0
    assert state["ages"][0, 0] == len(pattern)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_keeps_the_state_s_order_so_that_it_compiles_once(cache_dir, algorithm):
    program, hyper, state, data = lane(algorithm, cache_dir, covariates=("entropy",))
    following, _ = learning.step(program, state, hyper, data)
    for before, after in ((state, following), *((state[k], following[k]) for k in ("params", "statistics"))):
        assert list(before) == list(after)
        for name, value in before.items():
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.shape, value.stride()) == (
                    after[name].dtype,
                    after[name].shape,
                    after[name].stride(),
                ), name


def test_a_reset_touches_its_unit_and_nothing_else(cache_dir):
    values = {"reset_freq": 1 / 24 * 1.0001, "cbp_age": 3.0, "lr": 1e-2}
    program, hyper, state, data = lane("cbp", cache_dir, **values)
    for _ in range(2):
        state, metrics = learning.step(program, state, hyper, data)
        assert metrics["resets"] == 0
    plain, _ = learning.step(dataclasses.replace(program, algorithm="vanilla"), state, hyper, data)
    state, metrics = learning.step(program, state, hyper, data)
    assert metrics["resets"] == 2  # round(1.0001) = 1 unit of each layer
    hit = state["statistics"]["reset_count"] == 1
    new, old = state["params"], plain["params"]
    for name in new.keys() - {"mlp_in/kernel", "mlp_in/bias", "mlp_out/kernel"}:
        assert torch.equal(new[name], old[name]), name
    assert torch.equal(new["mlp_in/kernel"].mT[~hit], old["mlp_in/kernel"].mT[~hit])
    assert torch.equal(new["mlp_out/kernel"][~hit], old["mlp_out/kernel"][~hit])
    assert (new["mlp_in/kernel"].mT[hit] != old["mlp_in/kernel"].mT[hit]).all()
    assert (new["mlp_in/bias"][hit] == 0).all()
    assert (new["mlp_out/kernel"][hit] == 0).all()
    touched = 2 * (program.width + 1 + program.width)
    for moment in ("mu", "nu"):
        assert int((state[moment] != plain[moment]).sum()) <= touched
        assert int((state[moment] == 0).sum()) >= touched


def seen_of(program, activity, **changes):
    units = torch.zeros(program.depth, program.neurons, dtype=torch.float64)
    facts = {
        "seed": draws.counter(0),
        "count": draws.counter(1),
        "inputs": 40,
        "fired": units.int(),
        "activity": activity,
        "ages_before": units.int(),
        "ages": units.int(),
        "w_in": units + 1,
        "w_out": units + 1,
    }
    return resets.Seen(**{**facts, **changes})


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_redo_normalises_by_the_sum_or_by_the_mean(cache_dir, mean):
    """Two nearly dormant units, two at half of the usual activity: tau .05 is little of a mean and much of a sum."""
    program, hyper, state, _ = lane("redo", cache_dir, reset_freq=1.0, redo_threshold=0.05, redo_mean=mean)
    activity = torch.full((program.depth, program.neurons), 2.0, dtype=torch.float64)
    activity[:, :2], activity[:, 2:4] = 0.05, 1.0
    mask, _ = resets.choose(program, hyper, state["statistics"], seen_of(program, activity))
    dormant = torch.arange(program.neurons) < 2
    assert torch.equal(mask[0], dormant if mean else torch.ones_like(dormant))  # a usual unit's share is 2 / 42 < .05
    assert torch.equal(mask[0], mask[1])


def test_redo_resets_a_layer_that_is_silent_altogether(cache_dir):
    program, hyper, state, _ = lane("redo", cache_dir, reset_freq=1.0, redo_threshold=0.0)
    activity = torch.ones(program.depth, program.neurons, dtype=torch.float64)
    activity[1] = 0
    mask, _ = resets.choose(program, hyper, state["statistics"], seen_of(program, activity))
    assert not mask[0].any()
    assert mask[1].all()


@pytest.mark.parametrize(("ties", "expected"), [(0.0, 1), (1.0, 3)])
def test_cbp_replaces_one_of_several_dead_units_or_all_that_tie(cache_dir, ties, expected):
    program, hyper, state, _ = lane("cbp", cache_dir, reset_freq=1 / 24, cbp_age=1.0, cbp_ties=ties)
    utility = torch.ones(program.depth, program.neurons, dtype=torch.float64)
    utility[:, [4, 9, 20]] = 0.0
    statistics = {**state["statistics"], "cbp_utility": utility}
    activity = torch.ones_like(utility)
    mask, carried = resets.choose(program, hyper, statistics, seen_of(program, activity))
    assert mask.sum(-1).tolist() == [expected, expected]
    assert mask[:, 4].all()
    assert bool((carried["cbp_age"] == torch.where(mask, 0.0, 1.0)).all())


def test_cbp_s_age_holds_a_reset_unit_back(cache_dir):
    program, hyper, state, data = lane("cbp", cache_dir, reset_freq=1.0, cbp_age=4.0)
    counts = []
    for _ in range(9):
        state, metrics = learning.step(program, state, hyper, data)
        counts.append(int(metrics["resets"]))
    everyone = program.depth * program.neurons
    assert counts == [0, 0, 0, everyone, 0, 0, 0, everyone, 0]


def test_snr_v2_below_1_minus_1_over_e_resets_units_of_their_own_mean_age(cache_dir):
    """-ln(1 - eta) < 1 for eta < .632: after a renewal a steadily firing unit's age exceeds its threshold."""
    program, hyper, state, _ = lane("snr_v2", cache_dir, reset_freq=1.0, snr_percentile=0.5, snr_threshold=1e9)
    statistics = state["statistics"]
    fired = torch.full((program.depth, program.neurons), 4)
    masks = []
    for _ in range(2):
        mask, statistics = resets.choose(program, hyper, statistics, seen_of(program, None, fired=fired))
        masks.append(bool(mask.all()))
    assert masks == [False, True]
    assert statistics["snr_threshold"].unique().tolist() == [5.0]  # ceil(ln 2 * 41 / 6)
