"""The sweeps of ci_vit: the notebook's values, counted as the notebook counts them."""

from __future__ import annotations

import numpy as np
import pytest

from search_spaces.ci_vit import SWEEPS
from search_spaces.space import Space
from trainables.family import config_key, load_family

FAMILY = load_family("ci_vit")

COUNTS = {
    "lr": 12,
    "l2": 21,
    "l2init": 21,
    "shrink_perturb": 126,
    "cbp": 24,
    "redo": 90,
    "snr": 108,
    "snr_v2": 126,
    "snr_v2_fine": 72,
    "snr_l2": 3,
    "snr_v2_l2": 43,
    "snr_v2_l2_star": 4,
    "algorithms": 24,
    "covariates": 24,
    "sandp_key": 2,
    "cbp_age": 5,
    "cbp_decay": 4,
    "snr_epsilon": 4,
    "longer": 3,
    "more_epochs": 6,
    "redo_mean": 60,
    "fresh_start": 3,
}


def configs(name: str) -> list[tuple]:
    """(program, hyper) of every point of a grid."""
    sweep = SWEEPS.find(name)
    return [FAMILY.build({**sweep.base, **sweep.space.assignments(point)}) for point in sweep.space.grid()]


@pytest.mark.parametrize("name", COUNTS)
def test_grids_count_as_the_notebook_does(name):
    sweep = SWEEPS.find(name)
    built = configs(name)
    assert sweep.configs == len(built) == COUNTS[name]
    assert len({config_key("ci_vit", *config) for config in built}) == COUNTS[name]
    assert sweep.seeds == (1 if name == "snr_v2_l2_star" else 5)
    steps = {FAMILY.schedule(program).steps for program, _ in built}
    expected = {"longer": {120_000}, "more_epochs": {120_000, 240_000}}.get(name, {60_000})
    assert steps == expected


def test_every_row_of_the_notebook_s_table_is_here_and_no_more():
    assert {sweep.name for sweep in SWEEPS.sweeps} == COUNTS.keys() | {"demo", "best", "massive"}


def values_of(name: str, field: str, **where) -> set[float]:
    found = set()
    for program, hyper in configs(name):
        if all(getattr(program, k, getattr(hyper, k, None)) == v for k, v in where.items()):
            found.add(getattr(hyper, field))
    return found


def test_spot_values():
    assert values_of("lr", "lr") == {1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6}
    assert {program.depth for program, _ in configs("lr")} == {3, 12}
    assert values_of("l2", "l2") == values_of("l2init", "l2_init") == {1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7}
    assert values_of("shrink_perturb", "sigma") == {1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6}
    assert values_of("cbp", "reset_freq") == {1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7}
    np.testing.assert_allclose(sorted(1 / f for f in values_of("redo", "reset_freq")), [30, 60, 120, 240, 480])
    np.testing.assert_allclose(sorted(1 / f for f in values_of("snr", "reset_freq")), [120, 240, 480, 960, 1920, 3840])
    assert values_of("snr_v2_fine", "snr_percentile") == {0.65, 0.6, 0.55, 0.5}
    wide = values_of("snr_v2_fine", "reset_freq", depth=12, lr=1e-3)
    np.testing.assert_allclose(sorted(1 / f for f in wide), [30, 60, 90, 120, 240, 480, 960, 1920])
    assert len(values_of("snr_v2_fine", "reset_freq", depth=12, lr=1e-4)) == 5
    assert {(p.depth, h.lr) for p, h in configs("cbp")} == {(3, 1e-3), (12, 1e-3), (12, 1e-4)}
    for _, hyper in configs("snr_v2_l2_star"):
        assert (hyper.l2_mlp_in, hyper.l2_qkv, hyper.l2_other) == (0, 1, 0)
    assert values_of("redo", "redo_mean") == {0.0}
    assert values_of("redo_mean", "redo_mean") == {1.0}


def test_algorithms_and_covariates_are_the_best_of_each_net():
    found = {}
    sweep = SWEEPS.find("algorithms")
    for point in sweep.space.grid():
        program, hyper = FAMILY.build({**sweep.base, **sweep.space.assignments(point)})
        found[sweep.space.label(point)] = (program, hyper)
    assert found["L12@1e-4 cbp"][1].reset_freq == 1e-2
    assert found["L12@1e-3 l2init"][1].l2_init == 1e-3
    assert found["L3@1e-3 snr_v2"][1].snr_percentile == 0.55
    assert found["L12@1e-4 redo"][1].redo_threshold == 0.005
    program, hyper = found["L12@1e-3 shrink_perturb"]
    assert (program.depth, hyper.lr, hyper.shrink, hyper.sigma) == (12, 1e-3, 0.7, 0.1)
    assert SWEEPS.find("covariates").covariates == ("ages", "resets", "entropy", "norms", "dead")


def test_massive_is_every_grid_once():
    built = {config_key("ci_vit", *config) for config in configs("massive")}
    parts = [name for name in COUNTS if SWEEPS.find(name).kind in ("notebook", "original") and name != "algorithms"]
    each = {config_key("ci_vit", *config) for name in parts for config in configs(name)}
    assert built == each
    assert SWEEPS.find("massive").configs == len(built) == 641  # 650 less the 9 that the fine SNR-V2 grid repeats


def test_a_method_s_hypers_exist_only_where_it_is_chosen():
    for name in ("massive", "best", "demo"):
        space = SWEEPS.find(name).space
        choice = space["grid" if name == "massive" else "method"]
        for label in choice.values:
            active = {axis.name for axis in space.active({choice.name: label})}
            others = {axis.name for axis in space.axes if "." in axis.name and not axis.name.startswith(f"{label}.")}
            assert not active & others


@pytest.mark.parametrize("name", [sweep.name for sweep in SWEEPS.sweeps])
def test_spaces_are_data_and_every_corner_builds(name):
    sweep = SWEEPS.find(name)
    assert Space.from_plain(sweep.space.to_plain()) == sweep.space
    rng = np.random.default_rng(0)
    for _ in range(30):
        point = sweep.space.at({axis.name: rng.uniform() for axis in sweep.space.axes})
        FAMILY.build({**sweep.base, **sweep.space.assignments(point)})
