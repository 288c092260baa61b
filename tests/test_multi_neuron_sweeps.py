"""The multi-neuron sweeps: counts, exact values, and that every config builds."""

from __future__ import annotations

import pytest

from search_spaces.multi_neuron import SWEEPS
from trainables.family import config_key, load_family

FAMILY = load_family("multi_neuron")

COUNTS = {
    "selector_ab": 1,
    "cosine": 1,
    "n_choices": 5,
    "size_descent": 12,
    "tf_base": 1,
    "tf_linear": 1,
    "tf_attention": 1,
    "tf_n": 3,
    "tf_monitor": 1,
    "tf_layers16": 1,
    "backward": 3,
    "cl_base": 1,
    "cl_ewc": 1,
    "cl_multi": 2,
    "grow_n": 6,
    "selector_noise": 5,
    "cl_multi_ewc": 8,
    "cosine_n": 4,
    "reverify": 6,
    "oom": 3,
    "ste_sign": 3,
    "matched_mlp": 5,
    "causal": 3,
}
"""Rows of the inventory: 14 of the notebook, 6 wishes, 3 controls."""


def configs(name):
    sweep = SWEEPS.find(name)
    return {
        sweep.space.label(point): FAMILY.build({**sweep.base, **sweep.space.assignments(point)})
        for point in sweep.space.grid()
    }


def stacks(name):
    return len({program for program, _ in configs(name).values()})


@pytest.mark.parametrize("name", COUNTS)
def test_a_sweep_counts_as_the_inventory(name):
    sweep = SWEEPS.find(name)
    built = configs(name)
    assert sweep.configs == len(built) == COUNTS[name]
    assert len({config_key("multi_neuron", *pair) for pair in built.values()}) == COUNTS[name]


def test_the_inventory_is_complete():
    kinds = {kind: [s.name for s in SWEEPS.sweeps if s.kind == kind] for kind in ("notebook", "wish", "control")}
    assert [len(kinds["notebook"]), len(kinds["wish"])] == [14, 6]
    assert sum(COUNTS[name] for name in kinds["notebook"]) == 34
    assert sum(COUNTS[name] for name in kinds["wish"]) == 32
    assert set(COUNTS) <= {sweep.name for sweep in SWEEPS.sweeps}
    assert sum(COUNTS.get(name, 0) for name in kinds["control"]) == 11


def test_every_sweep_builds_and_optimises_a_declared_metric():
    for sweep in SWEEPS.sweeps:
        point = sweep.space.at({axis.name: 0.5 for axis in sweep.space.axes})
        program, _ = FAMILY.build({**sweep.base, **sweep.space.assignments(point), "covariates": sweep.covariates})
        assert FAMILY.metrics[sweep.metric or FAMILY.headline].mode in ("max", "min")
        assert FAMILY.schedule(program).steps > 0


def test_tables_of_numbers_are_one_stack():
    for name in ("n_choices", "ste_sign", "backward", "grow_n", "selector_noise", "cosine_n", "cl_multi"):
        assert stacks(name) == 1, name
    assert stacks("cl_multi_ewc") == 2
    assert stacks("causal") == 2


def test_notebook_settings():
    program, hyper = configs("selector_ab")["A and B"]
    assert (program.data, program.widths, program.selector, program.choices) == ("mnist", (64, 64), "sigmoid", 2)
    assert (program.batch, program.evaluate_on, FAMILY.schedule(program).steps) == (64, "test", 4690)
    assert (hyper.lr, hyper.momentum, hyper.ste_sign, hyper.threshold) == (0.01, 0.0, -1.0, 0.5)

    assert [h.active for _, h in configs("n_choices").values()] == [1, 2, 3, 4, 5]

    program, hyper = configs("tf_attention")["attention"]
    assert (program.layers, program.d_model, program.heads, program.feedforward) == (2, 256, 4, 512)
    assert (program.sequence, program.batch, FAMILY.schedule(program).steps) == (64, 1, 1000)
    assert (hyper.lr, hyper.weight_decay, hyper.clip, hyper.dropout) == (1e-4, 0.01, 1.0, 0.1)
    assert (hyper.causal, hyper.fan_3d, program.choices) == (0.0, 1.0, 2)
    assert configs("tf_base")["base"][1].causal == 1.0
    assert configs("tf_linear")["linear"][1].causal == 1.0
    assert [p.choices for p, _ in configs("tf_n").values()] == [5, 50, 75]
    assert [p.choices for p, _ in configs("oom").values()] == [75, 150, 300]
    assert {p.custom for p, _ in configs("oom").values()} == {"body"}
    assert configs("tf_layers16")["16 layers"][0].layers == 16

    program, hyper = configs("cl_base")["base"]
    assert (program.tasks, program.scenario, program.channels, program.hidden) == (5, "class", (32, 64), 128)
    assert (hyper.lr, hyper.momentum, hyper.dropout, hyper.dropout_hidden) == (1e-5, 0.9, 0.25, 0.5)
    assert FAMILY.schedule(program).steps == 5 * 5 * 175  # 4-5 has 11,263 images
    assert sorted({h.ewc_lambda for _, h in configs("cl_multi_ewc").values()}) == [0, 1e2, 1e3, 1e4]
    assert {p.choices for p, _ in configs("cl_multi_ewc").values()} == {1, 2}
    assert [h.selector_lr for _, h in configs("cl_multi").values()] == [0, 1]

    sizes = [p.widths for p, _ in configs("size_descent").values()]
    assert [len(w) for w in sizes[:6]] == [1, 2, 4, 8, 16, 32]
    assert [w[0] for w in sizes[6:]] == [64, 256, 1024, 4096, 16384, 65536]
    assert [p.widths[0] for p, _ in configs("matched_mlp").values()] == [64, 216, 299, 373, 440]
    assert [h.ste_sign for _, h in configs("ste_sign").values()] == [-1, 1, 0]
    noise = configs("selector_noise").values()
    assert [(h.epsilon, h.gumbel, h.explore_until) for _, h in noise] == [
        (0, 0, 0.2),
        (0.1, 0, 0.2),
        (0.3, 0, 0.2),
        (0, 1, 0.2),
        (0, 0.5, 0.2),
    ]


def test_mended_controls_hold_the_mask_and_the_fans():
    for name in ("causal", "selector_noise", "oom", "tf_entropy"):
        assert {h.fan_3d for _, h in configs(name).values()} == {0.0}
    assert [h.causal for _, h in configs("causal").values()] == [1.0, 1.0, 0.0]
