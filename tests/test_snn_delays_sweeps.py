"""The named sweeps of snn_delays: how many configs each has, their values, and that every one builds."""

from __future__ import annotations

import pytest

from search_spaces.snn_delays import SWEEPS
from trainables.family import config_key, load_family

COUNTS = {
    "bins": 3,
    "stages4": 3,
    "set3": 3,
    "rm": 3,
    "stem7_rm": 3,
    "stem7": 3,
    "stem5_small": 1,
    "sigma0": 2,
    "ssc": 2,
    "stem10": 1,
    "ssc_wide": 2,
    "plif": 1,
    "no_delays": 1,
    "gsc": 2,
    "inverted": 3,
    "inverted_bn": 2,
    "light": 5,
    "blocks113": 2,
    "fc_delays": 2,
    "sigma_per_batch": 2,
    "init_weights": 6,
    "stem7_long": 2,
    "more_rm": 10,
    "delays_ladder": 4,
    "seeds_null": 1,
}
FAMILY = load_family("snn_delays")


def configs(name: str) -> dict:
    """label -> (program, hyper) of a sweep's grid."""
    sweep = SWEEPS.find(name)
    return {
        sweep.space.label(point): FAMILY.build({**sweep.base, **sweep.space.assignments(point)})
        for point in sweep.space.grid()
    }


@pytest.mark.parametrize("name", COUNTS)
def test_a_sweep_has_the_notebook_s_number_of_configs_and_each_builds(name):
    assert SWEEPS.find(name).configs == COUNTS[name]
    built = configs(name)
    keys = {config_key("snn_delays", program, hyper) for program, hyper in built.values()}
    assert len(keys) == COUNTS[name]


def test_every_sweep_is_counted_and_notebook_and_wish_totals_agree():
    kinds = {"notebook": 35, "wish": 29, "control": 5}
    for kind, total in kinds.items():
        assert sum(s.configs for s in SWEEPS.sweeps if s.kind == kind) == total
    assert {s.name for s in SWEEPS.sweeps} == COUNTS.keys() | {"demo", "best"}


def test_run_names_of_the_notebook_find_their_configs():
    program, hyper = next(iter(configs("stem7|RM|bins=1|4-stages|n_C=32").values()))
    assert (program.stem, len(program.blocks), program.channels, program.bins) == (7, 4, 32, 1)
    assert hyper.right_most == 1.0
    program, hyper = next(iter(configs("stem7|bins=1|3-stages|n_C=32|No-Delays").values()))
    assert (hyper.right_most, hyper.sigma, hyper.lr_pos) == (1.0, 0.0, 0.0)
    program, _ = next(iter(configs("GSC train2: bins=2|windwsize/2|3-stages|nc=64").values()))
    assert (program.data, program.bins, program.window, program.channels) == ("gsc", 2, 512, 64)
    program, _ = next(iter(configs("bins = 1, 3 stages, timestep/2").values()))
    assert program.dt_ms == 5.0


def test_a_table_of_numbers_is_one_stack():
    for name in ("delays_ladder", "sigma_per_batch"):
        programs = {program for program, _ in configs(name).values()}
        assert len(programs) == 1, name
    assert len({program for program, _ in configs("more_rm").values()}) == 5
    assert len({program for program, _ in configs("rm").values()}) == 2  # SmallMD shares RM's three-stage stack


def test_spot_values():
    assert [p.bins for p, _ in configs("bins").values()] == [1, 2, 5]
    assert {p.dropout if hasattr(p, "dropout") else h.dropout for p, h in configs("ssc").values()} == {0.5}
    assert [p.epochs for p, _ in configs("stem7_long").values()] == [100, 200]
    base, hyper = next(iter(configs("seeds_null").values()))
    assert (base.epochs, base.batch, hyper.lr, hyper.lr_pos, hyper.dropout) == (100, 32, 5e-3, 0.1, 0.75)
    assert base.selection == "validation"
    assert SWEEPS.find("seeds_null").seeds == 8
