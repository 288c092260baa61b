"""What is shown fits the terminal it is shown on, and no figure is lost on a narrow one."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from rich.console import Console, Group

import analysis.terminal
from analysis.cli import main
from tests.test_command_line import plan_of
from tuning.cli import _shown, print_end
from tuning.ending import Ended, print_results
from tuning.progress import Progress
from tuning.runner import Outcome

LABELS = ["lr=0.005398 l2init l2_init=0.02793", "lr=0.002822 snr_v2 snr_percentile=0.7168", "lr=0.001752 vanilla"]


def rows(phase: str, seeds: range) -> list[dict]:
    return [
        {
            "config_key": f"c{config}", "run_key": f"{phase}{config}{seed}", "label": label, "phase": phase,
            "seed": seed, "final.test_loss": 0.1234 + config / 10 + seed / 1000, "epoch": 72, "epochs_total": 72,
            "stop_reason": "finished", "config_stop_reason": "finished", "rung": None, "device_seconds": 61.0,
        }
        for config, label in enumerate(LABELS)
        for seed in seeds
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_figure_of_the_result_is_cut_on_a_narrow_terminal(tmp_path, width):
    plan = plan_of("grid", storage=tmp_path, name="s")
    chosen = [{"config_key": f"c{i}", "label": LABELS[i], "values": {"test_loss": 0.1111 + i}} for i in range(2)]
    confirmed = {"seeds": [100, 101, 102], "k": 2, "ties": [], "chosen": chosen}
    file = io.StringIO()
    ended = Ended([*rows("search", range(2)), *rows("confirm", range(100, 103))], None, confirmed)
    print_results(Console(file=file, width=width, highlight=False), plan, ended)
    lines = file.getvalue().splitlines()
    result, search = (
        next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("result:", "what was chosen by")
    )
    for name in ("test_loss", "± sd", "seeds", "in the search", "flattered by"):
        assert name in lines[result + 1]
    for name in ("test_loss", "± sd", "seeds", "epochs", "stop reason"):
        assert name in lines[search + 1]
    figures = re.findall(r"(?<![=\d.])[+-]?\d\.\d{4}\b", "\n".join(lines[result + 2 : search]))
    assert figures == ["0.2244", "0.0010", "0.1111", "+0.1133", "0.3244", "0.0010", "1.1111", "-0.7867"]
    figures = re.findall(r"\d\.\d{4} +0\.0007 +2 +72/72 +finished", "\n".join(lines[search:]))
    assert [figure[:6] for figure in figures] == ["0.1239", "0.2239", "0.3239"]
    words = [line.split() for line in lines]
    for label in LABELS:
        assert all(any(word in line for line in words) for word in label.split()), label
    if width >= 80:
        table = [line.rstrip() for line in (*lines[result + 1 : result + 5], *lines[search + 1 :])]
        assert max(map(len, table)) <= width


@pytest.mark.parametrize(
    ("ended", "reason", "line"),
    [
        ({"finished": 3, "diverged": 1}, "done", None),
        ({"crashed": 5}, "too many crashes", None),
        ({"finished": 1, "oom": 2}, "done", "failed  2 oom; again with: python tune_toy.py --resume s"),
        ({"crashed": 1, "oom": 2}, "interrupted", "failed  1 crashed, 2 oom (tracebacks in {folder}/errors/); again"),
    ],
)
def test_failed_configs_are_named_at_the_end_with_what_to_do(tmp_path, ended, reason, line):
    plan = replace(plan_of("grid", storage=tmp_path / ("deep" * 30), name="s"), command=["tune_toy.py", "grid"])
    file = io.StringIO()
    print_end(plan, Outcome(ended, reason, "", 0, {}), Console(file=file, width=80))
    told = file.getvalue().splitlines()
    assert [text.split()[0] for text in told[1:4]] == ["report", "MLflow", "resume"], "each whole, however long"
    assert len(told) == (4 if line is None else 5)
    if line is not None:
        assert told[4].startswith(line.format(folder=_shown(plan.folder)))
        assert told[4].endswith(" --retry failed")


def test_the_live_line_shows_the_time_to_finish_in_80_columns():
    progress = Progress(None, 20, "test_acc_last", "max")
    for number, label in enumerate(LABELS):
        progress.apply({"event": "proposed", "trial": f"t{number}", "label": label})
    report = {"event": "report", "trial": "t1", "fraction": 1.0, "values": {"test_acc_last": 0.9}}
    progress.apply(report)
    progress.apply({"event": "end", "trial": "t1", "stop_reason": "stopped"})
    file = io.StringIO()
    Console(file=file, width=80).print(Group(progress.line()))  # as a live display draws it
    (line,) = file.getvalue().splitlines()
    assert line.startswith("1/20 done · 2 running · 1 pruned · ")
    assert "to finish" in line
    assert "best test_acc_last 0.9" in line


def test_a_resumed_sweep_reckons_the_time_to_finish_from_its_own_session(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tuning.progress.time.monotonic", lambda: now[0])
    progress = Progress(None, 20, "loss", "min")
    progress.apply({"event": "begin"})
    for number in range(10):  # replayed in no time
        progress.apply({"event": "proposed", "trial": f"t{number}", "label": ""})
        progress.apply({"event": "end", "trial": f"t{number}", "stop_reason": "finished"})
    progress.apply({"event": "begin"})
    progress.apply({"event": "proposed", "trial": "new", "label": ""})
    now[0] = 30.0
    assert progress.line().plain == "10/20 done · 1 running · 0 pruned · 30s · time to finish: measuring"
    progress.apply({"event": "end", "trial": "new", "stop_reason": "finished"})
    assert progress.line().plain == "11/20 done · 0 running · 0 pruned · 30s · 4m30s to finish"


FRAME = pd.DataFrame(
    {
        "arm": [LABELS[0], "[b]"],
        **{f"figure_{i}": [0.123456 + i, float("nan")] for i in range(9)},
        "best config": [LABELS[1], None],
        "whole": [12345678, 2],
    }
)


def shown(monkeypatch, capsys, width: int, keys: int = 1) -> list[str]:
    terminal = partial(Console, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr(analysis.terminal, "Console", terminal)
    analysis.terminal.show(FRAME, "figures", keys)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_wide_table_comes_in_parts_and_breaks_no_number(monkeypatch, capsys, width):
    lines = shown(monkeypatch, capsys, width)
    assert max(map(len, lines)) <= width
    assert lines[0].strip() == "figures"
    heads = [line for line in lines if line.startswith("arm")]
    assert len(heads) > 1
    assert re.findall(r"figure_\d", " ".join(heads)) == [f"figure_{i}" for i in range(9)]
    text = " ".join(lines)
    for i in range(9):
        assert re.search(rf"(?<!\d){i}\.12[35]?\d*(?!\d)", text)
    assert "12345678" in text
    for label in LABELS[:2]:
        assert all(word in text.split() for word in label.split()), label
    assert sum(line.startswith("[b]") for line in lines) == len(heads)


def test_a_table_that_fits_is_one_and_a_pipe_takes_any_width(monkeypatch, capsys):
    assert sum(line.startswith("arm") for line in shown(monkeypatch, capsys, 250)) == 1
    monkeypatch.undo()
    analysis.terminal.show(FRAME)
    (head,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("arm")]
    assert head.split()[-1] == "whole"


@pytest.mark.parametrize(
    "command", [["table", "s"], ["tabel"], ["compare"], ["list", "--storag"], ["plot", "s", "--at"]]
)
def test_a_command_that_cannot_be_is_one_line(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_no_command_is_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert "compare" in capsys.readouterr().out
