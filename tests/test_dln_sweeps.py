"""Every row of the notebook's table is a sweep, counts as it counts, and builds; run names lead to their runs."""

from __future__ import annotations

import math

import pytest

from search_spaces.dln import SWEEPS
from trainables.family import load_family

FAMILY = load_family("dln")

COUNTS = {
    "memory_trained": 2,
    "partition": 2,
    "memory_size": 2,
    "tdln": 3,
    "tdln_unified": 2,
    "t_bias": 2,
    "tdln_layers": 2,
    "interpolate": 1,
    "missing_digit": 2,
    "wikitext2_bytes": 7,
    "trivial_string": 1,
    "wikitext2_fixed": 1,
    "two_sentences": 3,
    "five_entries": 4,
    "char_loss": 2,
    "char_softmax": 3,
    "batch_length": 2,
    "rerun": 2,
    "compute_gate": 2,
    "precision": 3,
    "attn_scale": 2,
    "emb_norm": 2,
    "init_family": 3,
    "norm_eps": 2,
    "init_scale": 28,
    "init_scale_matrix": 2,
    "plain_normal": 7,
    "weight_decay": 4,
    "split_qkv": 1,
    "v_scale": 7,
    "dln_window": 1,
    "window": 4,
    "activation": 11,
    "activation4": 4,
    "highway_ablation": 4,
    "big_state": 4,
    "attn_or_mlp_init": 8,
    "qk_gain": 2,
    "rope": 2,
    "activation_val": 10,
    "window_true": 8,
    "gate_matched": 3,
    "demo": 12,
    "best": 64,
    "nanogpt": 1,
}


def configs(sweep) -> list[tuple]:
    if sweep.searcher != "grid":
        middle = sweep.space.at({axis.name: 0.5 for axis in sweep.space.axes})
        return [FAMILY.build({**sweep.base, **sweep.space.assignments(middle)})]
    return [FAMILY.build({**sweep.base, **sweep.space.assignments(point)}) for point in sweep.space.grid()]


def test_every_sweep_counts_as_the_notebook_s_table():
    assert {sweep.name: sweep.configs for sweep in SWEEPS.sweeps} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_every_config_builds_on_the_family(name):
    sweep = SWEEPS.find(name)
    built = configs(sweep)
    assert sweep.doc
    assert not sweep.metric or sweep.metric in FAMILY.metrics
    if sweep.searcher == "grid":
        distinct = set(built)
        # the four scales of init_scale share the point where all are 1
        assert len(distinct) == (25 if name == "init_scale" else len(built))


def run(name: str):
    return configs(SWEEPS.find(name))[0]


def test_runs_answer_to_their_log_s_name():
    program, hyper = run("logs/20230810-213808")
    assert (program.recurrence, program.channels, hyper.time_bias, program.data) == ("tdln", 500, 1000.0, "mnist")
    assert (program.batch, hyper.lr, hyper.train_first, program.epochs) == (40, 1e-4, 0.0, 32)
    program, hyper = run("logs/20230812-180730")
    assert (program.channels, program.bytes_per_step, program.target) == (640, 4, "next_row")
    assert hyper.train_memory == 0.0
    program, hyper = run("logs/20240605-204752")
    assert (program.activation, hyper.act_a, hyper.act_b) == ("shrink", 0.5, 1.0)
    assert (hyper.up_scale, hyper.up_average) == (math.sqrt(2), 0.0)
    program, hyper = run("logs/20240610-213526/tanh")
    assert (hyper.act_a, hyper.act_b, hyper.up_average) == (1.05 * 3, 3.0, 1.0)
    assert program.steps_per_epoch * program.epochs == 4000
    program, hyper = run("logs/20240601-152117")
    assert (program.memory, hyper.window, hyper.state_returned) == (100, 5.0, 0.0)
    program, hyper = run("logs/20240601-132328/0.3")
    assert (hyper.v_scale, hyper.qk_scale, hyper.embedding_scale) == (0.3, 0.1, 0.03)
    assert program.steps_per_epoch * program.epochs == 250


def test_a_notebook_table_of_lane_numbers_is_one_stack():
    for name in ("init_scale", "plain_normal", "v_scale", "weight_decay", "attn_or_mlp_init", "init_family"):
        assert len({program for program, _ in configs(SWEEPS.find(name))}) == 1, name
    assert len({program for program, _ in configs(SWEEPS.find("activation"))}) == 4  # gelu, relu, shrink, leaky
    assert len({program for program, _ in configs(SWEEPS.find("window_true"))}) == 2


def test_gates_match_the_mlp_s_parameters():
    counts = []
    for program, _ in configs(SWEEPS.find("gate_matched")):
        hidden = program.hidden or 4 * program.width
        counts.append((3 if program.mlp == "gate" else 2) * hidden * program.width)
    assert max(counts) / min(counts) < 1.001


def test_windows_with_a_working_recurrence_remember():
    for program, hyper in configs(SWEEPS.find("window_true")):
        if program.memory:
            assert (hyper.state_returned, hyper.decay_low, hyper.decay_high) == (1.0, 0.95, 0.999)


def test_nanogpt_is_shakespeare_char():
    ((program, hyper),) = configs(SWEEPS.find("nanogpt"))
    shape = (program.layers, program.width, program.heads, program.length, program.batch)
    assert shape == (6, 384, 6, 256, 64)
    assert program.steps_per_epoch * program.epochs == 5000
    assert (program.data, program.lower, program.windows, program.precision) == ("shakespeare", False, "random", "bf16")
    assert (hyper.lr, hyper.warmup, hyper.decay_steps, hyper.final_fraction) == (1e-3, 100.0, 5000.0, 0.1)
    assert (hyper.b1, hyper.b2, hyper.weight_decay, hyper.clip, hyper.dropout) == (0.9, 0.99, 0.1, 1.0, 0.2)
