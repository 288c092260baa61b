"""Every sweep and run name of the vgg_decay notebook: how many configs, and which values."""

from __future__ import annotations

import pytest

from search_spaces.vgg_decay import SWEEPS
from trainables.family import config_key
from trainables.vgg_decay import FAMILY

COUNTS = {
    "l2": 7,
    "l2_repeat": 1,
    "momentum": 1,
    "l1_some": 6,
    "l1_all": 4,
    "var_dup4": 9,
    "var_dup2": 6,
    "var_dup1": 8,
    "last2_mult": 5,
    "hxp": 9,
    "last1_mult": 4,
    "lssgd": 4,
    "lssgd_ema": 3,
    "lssgd_nwm": 3,
    "topo": 3,
    "topo_aa": 6,
    "topo_ad": 9,
    "topo_ac": 11,
    "wd_front_x_last": 42,
    "decay_x_norm": 18,
    "unit_adam": 12,
    "last1_mult_far": 12,
    "l1_tune": 12,
    "topo_grouping": 3,
    "null": 1,
    "topo_matched": 6,
    "bn_decay": 4,
}


def configs(name):
    """{label: (program, hyper)} of a sweep."""
    sweep = SWEEPS.find(name)
    points = list(sweep.space.grid())
    return {sweep.space.label(p): FAMILY.build({**sweep.base, **sweep.space.assignments(p)}) for p in points}


def one(name):
    (config,) = configs(name).values()
    return config


def key(name):
    return config_key("vgg_decay", *one(name))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    sweep = SWEEPS.find(name)
    assert sweep.configs == COUNTS[name]
    found = configs(name)
    assert len(found) == COUNTS[name]
    assert len({config_key("vgg_decay", *config) for config in found.values()}) == COUNTS[name]
    for program, _ in found.values():
        assert (program.data, program.widths, program.batch) == ("cifar10", (32, 64, 128, 256, 256), 128)


def test_99_runs_of_the_notebook_by_name():
    names = [name for sweep in SWEEPS.sweeps if sweep.kind == "notebook" for name in sweep.run_names()]
    assert len(names) == len(set(names)) == 99
    assert sum(COUNTS[s.name] for s in SWEEPS.sweeps if s.kind == "notebook") == 99
    assert sum(COUNTS[s.name] for s in SWEEPS.sweeps if s.kind == "wish") == 99


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("exp1", {"wd": 0.0005, "momentum": 0.0}),
        ("exp7", {"wd": 0.032, "inverse_variance": 0.0}),
        ("exp9", {"wd": 0.016, "momentum": 0.9, "lr": 0.1}),
        ("axp5", {"l1": 0.00032, "wd": 0.016, "l1_front": 1.0, "l1_back": 0.0}),
        ("bxp4", {"l1": 0.0008, "l1_front": 1.0, "l1_back": 1.0}),
        ("cxp9", {"wd": 0.00128, "dup_mult": 4.0, "inverse_variance": 1.0}),
        ("dxp4", {"wd": 0.00016, "dup_mult": 2.0, "last1_mult": 1.0}),
        ("fxp8", {"wd": 0.00064, "dup_mult": 1.0, "inverse_variance": 1.0}),
        ("gxp5", {"wd": 0.00016, "last2_mult": 30.0, "last1_mult": 1.0}),
        ("hxp3", {"wd": 0.014}),
        ("ixp2", {"wd": 0.00016, "last1_mult": 10.0, "dup_mult": 2.0}),
        ("jxp4", {"last1_mult": 100.0, "normalize": 1.0, "norm_ema": 0.0, "by_weight": 1.0}),
        ("kxp3", {"last1_mult": 100.0, "normalize": 1.0, "norm_ema": 0.98, "by_weight": 1.0}),
        ("lxp2", {"last1_mult": 10.0, "normalize": 1.0, "norm_ema": 0.98, "by_weight": 0.0}),
        ("topo.b1", {"topo_a": 0.0, "topo_b": 1.0, "topo_base": 2.0, "last1_mult": 10.0, "wd": 0.00016}),
        ("topo.aa6", {"topo_a": 1.0, "topo_b": 0.0, "wd": 0.00064}),
        ("topo.ad7", {"topo_a": 1.0, "last1_mult": 160.0}),
        ("topo.ac11", {"topo_a": 1.0, "topo_base": 6.0, "topo_frozen_beta": 1.0}),
    ],
)
def test_runs_resolve_to_the_notebook_s_values(run, expected):
    program, hyper = one(run)
    assert {name: getattr(hyper, name) for name in expected} == expected
    assert FAMILY.schedule(program).steps == 78_200


def test_runs_that_are_one_config():
    assert key("exp6") == key("exp8") == key("hxp4")
    assert key("topo.a1") == key("topo.aa3") == key("topo.ad3") == key("topo.ac6")
    assert key("ixp2") == key("null") != key("topo.ac1")
    assert SWEEPS.find("null").seeds == 16


def test_one_stack_holds_nearly_every_row():
    """Programs among the notebook's rows and controls: one; every wish but unit_adam and l1_tune shares it too."""
    own = {"unit_adam", "l1_tune"}
    programs = {name: {program for program, _ in configs(name).values()} for name in COUNTS}
    assert len(set().union(*(found for name, found in programs.items() if name not in own))) == 1
    assert len(programs["unit_adam"]) == len(programs["l1_tune"]) == 3


def test_wishes_and_controls_hold_their_values():
    surface = configs("wd_front_x_last").values()
    assert {h.wd for _, h in surface} == {0.0, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4}
    assert {h.logit_wd for _, h in surface} == {0.0, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1}
    assert {(h.normalize, h.by_weight, h.decay_outside, h.wd) for _, h in configs("decay_x_norm").values()} == {
        (*norm, order, wd) for norm in ((0, 0), (1, 0), (1, 1)) for order in (0, 1) for wd in (4e-5, 1.6e-4, 6.4e-4)
    }
    assert {(p.second_moment, h.lr) for p, h in configs("unit_adam").values()} == {
        (shared, lr) for shared in ("element", "unit", "layer") for lr in (3e-4, 1e-3, 3e-3, 1e-2)
    }
    assert {h.last1_mult for _, h in configs("last1_mult_far").values()} == {100, 300, 1000, 3000, 1e4, 3e4}
    assert {(p.epochs, h.halve_every) for p, h in configs("l1_tune").values()} == {(140, 14), (200, 20), (300, 30)}
    assert {h.l1 for _, h in configs("l1_tune").values()} == {1e-6, 1e-5, 3e-5, 1e-4}
    assert {h.topo_base for _, h in configs("topo_grouping").values()} == {1, 6, 20}
    assert SWEEPS.find("topo_grouping").covariates == ("grouping",)
    matched = {(h.topo_base, h.topo_uniform, h.topo_frozen_beta) for _, h in configs("topo_matched").values()}
    assert matched == {(base, uniform, 0) for base in (1.5, 2, 6) for uniform in (0, 1)}
    assert {(h.wd, h.bn_decay, h.bias_decay) for _, h in configs("bn_decay").values()} == {
        (wd, flag, flag) for wd in (1.6e-4, 0.016) for flag in (0, 1)
    }


@pytest.mark.parametrize("name", ["demo", "best", "modern"])
def test_product_sweeps_build_everywhere(name):
    sweep = SWEEPS.find(None if name == "demo" else name)
    assert sweep.name == name
    for fraction in (0.0, 0.5, 0.999):
        point = sweep.space.at({axis.name: fraction for axis in sweep.space.axes})
        FAMILY.build({**sweep.base, **sweep.space.assignments(point)})
    assert (sweep.metric or FAMILY.headline) in FAMILY.metrics
