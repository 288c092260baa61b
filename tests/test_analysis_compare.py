"""Comparisons find the differences that were put in, and do not find those that were not."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from analysis.cli import app
from analysis.compare import compare, grid, table
from analysis.errors import UserError
from tests.sweep_factory import Arm, grid_arms, lr_arms, write_sweep


def pair(found, a, b):
    rows = found.pairs[((found.pairs["a"] == a) & (found.pairs["b"] == b))]
    return (rows if len(rows) else found.pairs[(found.pairs["a"] == b) & (found.pairs["b"] == a)]).iloc[0]


def test_real_differences_are_told_and_equal_arms_are_not(tmp_path):
    written = write_sweep(tmp_path, lr_arms())
    found = compare(tmp_path, ["demo"], by="lr")
    assert len(found.pairs) == 10
    told = pair(found, "0.01", "0.003")
    assert told["verdict"] == "0.01 is better"
    assert told["p_holm"] < 0.001
    assert told["difference"] == pytest.approx(0.04, abs=0.005)
    equal = pair(found, "0.01", "0.03")
    assert equal["verdict"] == "cannot tell"
    assert equal["more_seeds"] > 0
    a, b = (np.array(list(written.finals[f"lr={lr}"].values())) for lr in ("0.01", "0.03"))
    assert equal["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.arms["p_best"].sum() == pytest.approx(1.0)
    assert list(found.arms["arm"][:2]) in (["0.01", "0.03"], ["0.03", "0.01"])


def test_pairing_by_seed_sees_what_ignoring_it_does_not(tmp_path):
    arms = [Arm("a", 0.900, sd=0.001), Arm("b", 0.904, sd=0.001)]
    write_sweep(tmp_path, arms, seed_sd=0.02)
    assert compare(tmp_path, ["demo"]).pairs["p"].iloc[0] < 0.05
    assert compare(tmp_path, ["demo"], paired=False).pairs["p"].iloc[0] > 0.2


def test_metric_to_minimise_turns_better_around(tmp_path):
    write_sweep(tmp_path, lr_arms(), metrics={"last_test_acc": {"unit": "nats", "mode": "min", "doc": ""}})
    found = compare(tmp_path, ["demo"], by="lr")
    assert found.arms["arm"].iloc[0] == "0.1"
    assert pair(found, "0.1", "0.01")["verdict"] == "0.1 is better"
    claimed = compare(tmp_path, ["demo"], by="lr", claim="0.1 > 0.01", margin=0.01)
    assert claimed.pairs["verdict"].tolist() == ["holds"]


def test_claims_are_judged(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=8)

    def judge(claim, margin):
        return compare(tmp_path, ["demo"], by="lr", claim=claim, margin=margin).pairs["verdict"].iloc[0]

    assert judge("0.01 > 0.003", 0.01) == "holds"
    assert judge("0.01 >> 0.003", 0.01) == "holds"
    assert judge("0.01 >> 0.003", 0.2) == "noise"
    assert judge("0.003 > 0.01", 0.01) == "wrong"
    assert judge("0.01 = 0.03", 0.01) == "holds"
    assert judge("0.01 > 0.03", 0.01) == "noise"
    assert judge("0.01 = 0.03", 0.00001) == "cannot tell"
    assert judge("0.01 = 0.003", 0.01) == "wrong"
    for claim, margin, message in [
        ("0.01 better than 0.03", 0.1, "not of the form"),
        ("0.01 > 0.5", 0.1, "no arm '0.5'"),
        ("0.01 > 0.01", 0.1, "with itself"),
        ("0.01 > 0.03", None, "give --margin"),
    ]:
        with pytest.raises(UserError, match=message):
            judge(claim, margin)


def test_each_arm_at_its_best_setting_and_averaged_over_settings(tmp_path):
    write_sweep(tmp_path, grid_arms())
    best = compare(tmp_path, ["demo"], by="method")
    assert dict(zip(best.arms["arm"], best.arms["config"], strict=True)) == {
        "cbp": "cbp lr=0.01",
        "l2": "l2 lr=0.01",
        "vanilla": "vanilla lr=0.01",
    }
    assert any("flatters" in note for note in best.notes)
    averaged = compare(tmp_path, ["demo"], by="program.algorithm", pick="all")
    assert averaged.arms.set_index("arm").loc["cbp", "mean"] == pytest.approx(0.92 - 0.02, abs=0.004)
    assert averaged.arms["config"].unique().tolist() == ["mean of 3 settings"]
    assert averaged.arms["n"].tolist() == [5, 5, 5]


def test_an_arm_without_a_common_setting_cannot_be_averaged(tmp_path):
    arms = [
        Arm("a1", 0.9, axis={"m": "a", "lr": 0.1}),
        Arm("b1", 0.9, axis={"m": "b", "lr": 0.2}),
        Arm("c1", 0.9, axis={"m": "c", "lr": 0.1}),
        Arm("c2", 0.9, axis={"m": "c", "lr": 0.2}),
    ]
    write_sweep(tmp_path, arms)
    with pytest.raises(UserError, match="no setting"):
        compare(tmp_path, ["demo"], by="m", pick="all")


def test_stopped_runs_are_left_out_and_said_so_and_compared_at_an_epoch(tmp_path):
    arms = lr_arms()
    arms[0] = replace(arms[0], stop_epoch=3)
    write_sweep(tmp_path, arms)
    final = compare(tmp_path, ["demo"], by="lr")
    assert "0.001" not in set(final.arms["arm"])
    assert any("5 stopped" in note for note in final.notes)
    early = compare(tmp_path, ["demo"], by="lr", metric="test_acc", at="epoch=3")
    assert "0.001" in set(early.arms["arm"])


def test_against_a_baseline_corrects_for_its_comparisons_only(tmp_path):
    write_sweep(tmp_path, lr_arms())
    found = compare(tmp_path, ["demo"], by="lr", against="0.003")
    assert len(found.pairs) == 4
    assert (found.pairs["p_holm"] <= 4 * found.pairs["p"] + 1e-12).all()


def test_several_sweeps(tmp_path):
    write_sweep(tmp_path, lr_arms(), name="old")
    better = [replace(arm, mean=arm.mean + 0.02) for arm in lr_arms()]
    write_sweep(tmp_path, better, name="new")
    found = compare(tmp_path, ["old", "new"])
    assert found.pairs["verdict"].tolist() == ["new is better"]
    by_lr = compare(tmp_path, ["old", "new"], by="config")
    assert set(by_lr.arms["arm"]) >= {"old/lr=0.01", "new/lr=0.01"}


def test_one_seed_is_no_evidence(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=1)
    found = compare(tmp_path, ["demo"], by="lr")
    assert set(found.pairs["verdict"]) == {"cannot tell"}
    assert found.pairs["p_holm"].isna().all()
    assert any("one seed" in note for note in found.notes)


def test_the_floor_of_exact_tests_is_told(tmp_path):
    write_sweep(tmp_path, lr_arms())
    found = compare(tmp_path, ["demo"], by="lr", test="permutation")
    assert set(found.pairs["verdict"]) == {"cannot tell"}
    assert any("cannot go below p = 0.0625" in note for note in found.notes)


def test_grid_and_table(tmp_path):
    written = write_sweep(tmp_path, grid_arms())
    cells = grid(tmp_path, "demo", "method", "lr").set_index(["row", "column"])
    values = np.array(list(written.finals["cbp lr=0.01"].values()))
    assert cells.loc[("cbp", 0.01), "mean"] == pytest.approx(values.mean())
    assert cells.loc[("cbp", 0.01), "sd"] == pytest.approx(values.std(ddof=1))
    laid = table(tmp_path, "demo", "method", "lr")
    assert list(laid.columns) == ["0.001", "0.01", "0.1"]
    assert re.fullmatch(r"0\.9\d+ ± 0\.00\d+ \(n=5\)", laid.loc["cbp", "0.01"])
    single = table(tmp_path, "demo", "method")
    assert single.shape == (3, 1)


def test_command_lines(tmp_path):
    write_sweep(tmp_path, grid_arms())
    run = CliRunner().invoke
    storage = ["--storage", str(tmp_path)]
    done = run(app, ["compare", "demo", "--by", "method", *storage])
    assert done.exit_code == 0, done.output
    assert "cbp is better" in done.stdout
    assert "±" in run(app, ["table", "demo", "--rows", "method", "--cols", "lr", *storage]).stdout
    for arguments, message in [
        (["compare", "demo", "--by", "metod"], "did you mean method"),
        (["compare", "demo", "--by", "width"], "no field 'width'"),
        (["compare", "demo", "--by", "method", "--test", "anova"], "no test 'anova'"),
        (["compare", "demo", "--by", "method", "--at", "epoch=99", "--metric", "test_acc"], "nothing to compare"),
        (["table", "demo", "--rows", "metod"], "did you mean method"),
    ]:
        refused = run(app, [*arguments, *storage])
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
