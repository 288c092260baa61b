"""The journal in the notebooks' style, and the doctor's cards, on sweeps whose faults were put in by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from analysis.cli import app
from analysis.doctor import examine
from analysis.errors import UserError
from analysis.importance import main_effects
from analysis.journal import MARK, add_note, entries, notes, write_journal
from analysis.store import open_sweep
from analysis.summary import scores, summarise
from tests.sweep_factory import Arm, grid_arms, lr_arms, tree, write_sweep


def card(storage, check, name="demo"):
    cards = examine(storage, name).set_index("check")
    return cards.loc[check]


# --- journal --------------------------------------------------------------------------------------------------------


def test_runs_are_listed_in_the_notebooks_style_and_order(tmp_path):
    written = write_sweep(tmp_path, lr_arms(), doc="varying the learning rate")
    text = write_journal(tmp_path, "demo").read_text()
    assert text.startswith("# Varying the learning rate\n")
    lines = [line for line in text.splitlines() if line.startswith("- lr=") and "->" in line]
    assert [line.split(" ->")[0] for line in lines] == [f"- lr={v}" for v in ("0.001", "0.003", "0.01", "0.03", "0.1")]
    values = np.array(list(written.finals["lr=0.01"].values()))
    found = re.fullmatch(r"- lr=0.01 -> (0\.\d+) ± (0\.\d+) \(n=5\) 18 GPU-s", lines[2])
    assert float(found[1]) == pytest.approx(values.mean(), abs=6e-5)
    assert float(found[2]) == pytest.approx(values.std(ddof=1), abs=6e-5)


def test_named_runs_show_what_they_stand_for(tmp_path):
    runs = {"exp5": 0.008, "exp6": 0.016, "exp7": 0.032}
    arms = [Arm(name, 0.9, axis={"run": name}, hyper={"l2": l2}) for name, l2 in runs.items()]
    space = [
        {
            "name": "run",
            "kind": "arms",
            "run_names": True,
            "arms": {name: {"l2": l2, "optimizer": "sgd"} for name, l2 in runs.items()},
        }
    ]
    write_sweep(tmp_path, arms, space=space)
    assert re.search(r"^- exp6: 0\.016 -> 0\.9", write_journal(tmp_path, "demo").read_text(), re.M)


def test_values_that_a_label_already_says_are_not_said_again(tmp_path):
    arms = [Arm(f"lr={lr:.4g} l2", 0.9, axis={"lr": lr, "method": "l2"}) for lr in (0.0050405412, 0.0100000001)]
    write_sweep(tmp_path, arms)
    assert re.search(r"^- lr=0\.005041 l2 -> 0\.", write_journal(tmp_path, "demo").read_text(), re.M)


def test_observations_say_what_was_told_and_what_was_not(tmp_path):
    write_sweep(tmp_path, lr_arms())
    text = write_journal(tmp_path, "demo").read_text()
    assert re.search(r"beats lr=0\.003 \(p<0\.001\), lr=0\.001", text)
    assert re.search(r"- lr=0.0[13] and lr=0.0[13] cannot be told apart \(p=[\d.]+\), \d+ more seeds would", text)


def test_with_one_seed_nothing_is_claimed(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=1)
    text = write_journal(tmp_path, "demo").read_text()
    assert "beats" not in text
    assert "noise is unknown" in text
    assert "(n=1)" in text


def test_equal_configs_are_seldom_called_different(tmp_path):
    called = 0
    for trial in range(20):
        arms = [Arm(f"x={i}", 0.9, axis={"x": float(i)}) for i in range(6)]
        write_sweep(tmp_path, arms, name=f"null{trial}", rng_seed=trial, epochs=3, steps=False)
        called += " beats " in write_journal(tmp_path, f"null{trial}").read_text()
    assert called <= 4  # 20 sweeps at 5%: more than 4 happens once in 400


def test_stop_reasons_devices_and_time(tmp_path):
    arms = [replace(arm, device="cuda:0@a" if i % 2 else "cuda:1@b") for i, arm in enumerate(lr_arms())]
    arms[0] = replace(arms[0], stop_epoch=3)
    write_sweep(tmp_path, arms)
    path = tmp_path / "demo" / "runs.parquet"
    runs = pq.read_table(path).to_pandas()
    runs.loc[runs["device"] == "cuda:1@b", "device_seconds"] *= 2
    runs.to_parquet(path)
    text = write_journal(tmp_path, "demo").read_text()
    assert "(stopped at epoch 3 of 9)" in text
    assert "runs: 20 finished, 5 stopped" in text
    assert "on cuda:0@a (10 runs)" in text
    assert "0.4 s on cuda:0@a and 0.8 s on cuda:1@b" in text


def test_what_a_human_wrote_is_kept(tmp_path):
    write_sweep(tmp_path, lr_arms())
    path = write_journal(tmp_path, "demo")
    path.write_text(path.read_text().replace("result: ", "result: lr hardly matters above 0.003\nand more"))
    write_sweep(tmp_path, lr_arms()[:4])  # the sweep changed meanwhile
    text = write_journal(tmp_path, "demo").read_text()
    assert "result: lr hardly matters above 0.003\nand more" in text
    assert text.count(MARK) == 1
    assert "lr=0.1 ->" not in text
    assert write_journal(tmp_path, "demo").read_text() == text


def test_a_journal_without_its_mark_is_kept_whole(tmp_path):
    write_sweep(tmp_path, lr_arms())
    path = tmp_path / "demo" / "journal.md"
    path.write_text("my own words\n")
    assert write_journal(tmp_path, "demo").read_text().endswith("my own words\n")


def test_notes_are_dated_and_survive(tmp_path):
    write_sweep(tmp_path, lr_arms())
    add_note(tmp_path, "demo", "looks fine\nsecond line", datetime(2026, 3, 2, tzinfo=UTC))
    add_note(tmp_path, "demo", "again", datetime(2026, 3, 3, tzinfo=UTC))
    text = write_journal(tmp_path, "demo").read_text()
    assert "- 2026-03-02: looks fine\n  second line\n- 2026-03-03: again\n" in text
    with pytest.raises(UserError, match="empty"):
        add_note(tmp_path, "demo", "  ")


def test_the_journal_as_tables(tmp_path):
    write_sweep(tmp_path, lr_arms())
    lines = entries(tmp_path, "demo")
    text = write_journal(tmp_path, "demo").read_text()
    assert all(line in text for line in lines["text"])
    runs = lines[lines["section"] == "run"]
    assert set(runs["config_key"]) == {arm.key for arm in lr_arms()}
    add_note(tmp_path, "demo", "looks fine\nsecond line", datetime(2026, 3, 2, tzinfo=UTC))
    add_note(tmp_path, "demo", "again", datetime(2026, 3, 3, tzinfo=UTC))
    assert notes(tmp_path).to_dict("records") == [
        {"name": "demo", "date": "2026-03-02", "text": "looks fine\nsecond line"},
        {"name": "demo", "date": "2026-03-03", "text": "again"},
    ]


def test_each_line_names_its_device_where_devices_differ(tmp_path):
    arms = [replace(arm, device=f"cuda:{i % 2}@a NVIDIA H{1 + i % 2}00") for i, arm in enumerate(lr_arms())]
    write_sweep(tmp_path, arms)
    assert re.search(
        r"^- lr=0.003 -> .* 18 GPU-s on cuda:1@a NVIDIA H200$", write_journal(tmp_path, "demo").read_text(), re.M
    )
    write_sweep(tmp_path, [replace(arm, device=f"cpu:{i}@a") for i, arm in enumerate(lr_arms())], name="cores")
    assert re.search(r"^- lr=0.003 -> .* 18 CPU-s$", write_journal(tmp_path, "cores").read_text(), re.M)


def test_user_words_are_no_markup(tmp_path):
    arms = lr_arms()
    arms[0] = replace(arms[0], label="<img src=x onerror=alert(1)>")
    write_sweep(tmp_path, arms, doc="a\n# heading <script>")
    text = write_journal(tmp_path, "demo").read_text()
    assert "<img" not in text
    assert "<script" not in text
    assert not re.search(r"^# heading", text, re.M)


def test_confirmation_on_fresh_seeds_is_the_result(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=8)
    path = tmp_path / "demo" / "runs.parquet"
    runs = pq.read_table(path).to_pandas()
    runs["phase"] = np.where(runs["seed"] >= 5, "confirm", "search")
    runs = runs[(runs["phase"] == "search") | (runs["label"] == "lr=0.03")]
    runs.to_parquet(path)
    text = write_journal(tmp_path, "demo").read_text()
    fresh = runs[runs["phase"] == "confirm"]["final.last_test_acc"]
    said = re.search(r"confirmed on fresh seeds: lr=0.03 -> (0\.\d+) ± \S+ \(n=3\)", text)
    assert float(said[1]) == pytest.approx(fresh.mean(), abs=6e-4)
    assert set(scores(open_sweep(tmp_path, "demo"))["seed"]) == set(range(5))


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_a_healthy_sweep_passes(tmp_path):
    arms = [replace(arm, tau=0.8) for arm in lr_arms()]
    write_sweep(tmp_path, arms, epochs=20)
    cards = examine(tmp_path, "demo")
    assert set(cards["status"]) == {"PASS"}, cards[cards["status"] != "PASS"].to_string()
    assert {"edge of the space", "noise", "diverged region", "early ranks", "train/test gap"} <= set(cards["check"])


def test_best_at_the_edge(tmp_path):
    arms = [Arm(f"lr={lr:g}", 0.7 + 0.05 * i, axis={"lr": lr}) for i, lr in enumerate((1e-4, 1e-3, 1e-2, 1e-1))]
    write_sweep(tmp_path, arms)
    found = card(tmp_path, "edge of the space")
    assert found["status"] == "FAIL"
    assert "lr = 0.1, its upper end" in found["evidence"]
    flat = [replace(arm, mean=0.9) for arm in arms]
    flat[0] = replace(flat[0], mean=0.9005)
    write_sweep(tmp_path, flat, name="flat", rng_seed=5)
    assert card(tmp_path, "edge of the space", "flat")["status"] in ("WARN", "PASS")
    inside = [replace(arm, mean=0.9 if arm.label == "lr=0.01" else 0.8) for arm in arms]
    write_sweep(tmp_path, inside, name="inside")
    assert card(tmp_path, "edge of the space", "inside")["status"] == "PASS"


def test_still_improving(tmp_path):
    write_sweep(tmp_path, [replace(arm, tau=20.0) for arm in lr_arms()], epochs=20)
    assert card(tmp_path, "still improving")["status"] == "WARN"


def test_a_gain_that_noise_explains_is_said_to_be_one(tmp_path):
    """Two seeds of eight epochs, one of which dips at the epoch that the last is compared with."""
    write_sweep(tmp_path, [replace(arm, tau=0.1, sd=0.0) for arm in lr_arms()], seeds=2, epochs=8)
    for path in (tmp_path / "demo" / "epochs").glob("*.parquet"):
        table = pd.read_parquet(path)
        schema = pq.read_schema(path)
        table.loc[(table.epoch == 6) & (table.seed == 1), "test_acc"] -= 0.3
        pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), path)
    found = card(tmp_path, "still improving")
    assert found["status"] == "PASS"
    assert re.search(r"gained 0\.1\d* .* no more than its seeds' noise \(p=0\.\d+, n=2\)", found["evidence"])


def test_early_ranks_that_mislead(tmp_path):
    arms = [Arm(f"x={i}", 0.80 + 0.01 * i, axis={"x": float(i)}, tau=0.5 * 2.2**i) for i in range(7)]
    write_sweep(tmp_path, arms, epochs=27)
    found = card(tmp_path, "early ranks")
    assert found["status"] == "WARN"
    assert "7. then" in found["evidence"]


def test_controls_tell_whether_pruning_was_safe(tmp_path):
    """Survivors agree with their early ranks; controls show that late bloomers were lost."""
    rule = {"name": "asha", "grace": 3, "reduction_factor": 3, "max_t": 27, "rungs": [3, 9]}
    early = [Arm(f"x={i}", 0.80 + 0.01 * i, axis={"x": float(i)}, tau=2.0) for i in range(9)]
    pruned = [replace(arm, stop_epoch=None if i > 3 else 3) for i, arm in enumerate(early)]
    write_sweep(tmp_path, pruned, epochs=27, scheduler=rule)
    alone = card(tmp_path, "early ranks")
    assert (alone["status"], "4 were pruned" in alone["evidence"]) == ("PASS", True)
    assert "--controls" in alone["advice"]
    late = [replace(arm, tau=0.5 * 1.8**i) for i, arm in enumerate(early)]
    for name, arms, status in (("same", early, "PASS"), ("late", late, "FAIL")):
        write_sweep(tmp_path, arms, name=name, epochs=27)
        found = examine(tmp_path, "demo", controls=name).set_index("check").loc["early ranks"]
        assert found["status"] == status, found["evidence"]
        assert f"9 controls of {name}, none of them pruned" in found["evidence"]
    assert float(re.search(r"keeps their winner in (\d+)%", found["evidence"])[1]) < 50
    write_sweep(tmp_path, early, name="short", epochs=9)
    with pytest.raises(UserError, match="runs 9 epochs, demo 27"):
        examine(tmp_path, "demo", controls="short")


def test_noise_that_hides_everything(tmp_path):
    write_sweep(tmp_path, [Arm(f"x={i}", 0.9, axis={"x": float(i)}, sd=0.02) for i in range(6)], rng_seed=3)
    assert card(tmp_path, "noise")["status"] == "FAIL"


def test_diverged_region_is_located(tmp_path):
    arms = lr_arms()
    arms[4] = replace(arms[4], diverges=(0, 1, 2, 3))
    write_sweep(tmp_path, arms)
    found = card(tmp_path, "diverged region")
    assert found["status"] == "WARN"
    assert "4 of 25" in found["evidence"]
    assert "lr >= 0.1" in found["evidence"]


def test_memorising_dead_units_collapsed_entropy_and_lost_plasticity(tmp_path):
    arms = [replace(arm, gap=0.18) for arm in lr_arms()]

    def dead(arm, seed, epoch):
        return [0.0, 0.05 * epoch]

    def entropy(arm, seed, epoch):
        return [[3.0 / epoch**2]]

    write_sweep(tmp_path, arms, covariates={"dead_units": dead, "attention_entropy": entropy})
    assert card(tmp_path, "train/test gap")["status"] == "WARN"
    found = card(tmp_path, "units and entropy")
    assert found["status"] == "WARN"
    assert "dead_units" in found["advice"]
    assert "attention_entropy" in found["advice"]
    write_sweep(tmp_path, arms, name="stream", epochs=60, epochs_per_task=2, steps=False)
    assert card(tmp_path, "plasticity", "stream")["status"] == "PASS"
    folder = tmp_path / "stream" / "epochs"
    for part in folder.iterdir():
        frame = pd.read_parquet(part)
        frame["test_acc"] = 0.95 - 0.005 * frame["epoch"]
        frame.to_parquet(part)
    assert card(tmp_path, "plasticity", "stream")["status"] == "WARN"


def test_dimensions_without_effect_and_repeats(tmp_path):
    arms = grid_arms()
    write_sweep(tmp_path, arms)
    path = tmp_path / "demo" / "runs.parquet"
    runs = pq.read_table(path).to_pandas()
    same = runs["label"] == "cbp lr=0.1"
    runs.loc[same, "final.last_test_acc"] = runs.loc[runs["label"] == "cbp lr=0.01", "final.last_test_acc"].to_numpy()
    runs.to_parquet(path)
    events = (tmp_path / "demo" / "journal.jsonl").read_text().splitlines()
    proposal = next(line for line in events if '"proposed"' in line)
    (tmp_path / "demo" / "journal.jsonl").write_text("\n".join([*events, proposal, '{"event": "prop']))
    found = card(tmp_path, "dimensions")
    assert found["status"] == "WARN"
    assert "equal results on every seed" in found["evidence"]
    assert "1 proposals repeated" in found["evidence"]


def test_crashes_one_seed_and_an_idle_device(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=1)
    path = tmp_path / "demo" / "runs.parquet"
    runs = pq.read_table(path).to_pandas()
    runs.loc[0, ["stop_reason", "error"]] = ["crashed", "RuntimeError: out of luck"]
    runs["device_seconds"] /= 30
    runs.to_parquet(path)
    cards = examine(tmp_path, "demo").set_index("check")
    assert cards.loc["failures", "status"] == "FAIL"
    assert "out of luck" in cards.loc["failures", "evidence"]
    assert cards.loc["seeds", "status"] == "FAIL"
    assert cards.loc["driver", "status"] == "FAIL"


def test_importance_finds_the_axis_that_matters(tmp_path):
    rng = np.random.default_rng(1)
    arms = []
    for i in range(60):
        lr, idle = 10 ** rng.uniform(-4, -1), rng.uniform(0, 1)
        axis = {"lr": lr, "idle": idle}
        arms.append(Arm(f"c{i}", 0.9 - 0.05 * abs(np.log10(lr) + 2.5), axis=axis))
    write_sweep(tmp_path, arms, seeds=2, epochs=3, steps=False)
    sweep = open_sweep(tmp_path, "demo")
    effects = main_effects(sweep, summarise(sweep, scores(sweep))).set_index("axis")
    assert effects.index[0] == "lr"
    assert effects.loc["lr", "share"] > 0.6
    assert effects.loc["idle", "share"] < 0.15
    few = main_effects(sweep, summarise(sweep, scores(sweep)).head(10)).set_index("axis")
    assert few["high"].max() < 1  # ten values of a range are no ten groups


def test_command_lines(tmp_path):
    write_sweep(tmp_path, lr_arms())
    storage = ["--storage", str(tmp_path)]
    run = CliRunner().invoke
    assert "Observations:" in run(app, ["journal", "demo", *storage]).stdout
    assert run(app, ["note", "demo", "a thought", *storage]).exit_code == 0
    assert "a thought" in (tmp_path / "demo" / "journal.md").read_text()
    assert "PASS  seeds" in run(app, ["doctor", "demo", *storage]).stdout
    before = tree(tmp_path)
    for arguments in (["note", "demo", ""], ["journal", "none"], ["doctor", "none"]):
        refused = run(app, [*arguments, *storage])
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1
    assert tree(tmp_path) == before
