"""Figures: every kind comes out, from data whose truth is known, and shows what it should."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from analysis import figures, interactive, landscapes
from analysis.cli import app
from analysis.compare import grid
from analysis.curves import learning_curves
from analysis.errors import UserError
from analysis.figures import rounded
from analysis.objectives import nondominated
from analysis.plotting import KINDS, plot
from analysis.report import write_report
from analysis.store import open_sweep
from analysis.summary import scores, summarise
from tests.sweep_factory import Arm, grid_arms, lr_arms, tree, write_sweep

ASHA = {"name": "asha", "grace": 1, "reduction_factor": 3, "max_t": 9, "rungs": [1, 3]}


def pruned_sweep(storage):
    arms = [replace(arm, stop_epoch=(None, None, 3, 1)[i % 4]) for i, arm in enumerate(grid_arms())]
    for i in range(6):
        arms.append(Arm(f"extra {i}", 0.7 + 0.01 * i, axis={"method": "l2", "lr": 0.02 + 0.01 * i}))
    return write_sweep(storage, arms, scheduler=ASHA)


def summary(storage, name="demo"):
    sweep = open_sweep(storage, name)
    return sweep, summarise(sweep, scores(sweep))


def test_every_kind_is_drawn_twice(tmp_path):
    pruned_sweep(tmp_path)
    runs = tmp_path / "demo" / "runs.parquet"
    frame = pd.read_parquet(runs)
    frame["device_seconds"] *= np.linspace(1, 2, len(frame))
    frame.to_parquet(runs)
    made = plot(tmp_path, "demo")
    assert set(made["kind"]) == set(KINDS)
    for path in made["path"]:
        head = Path(path).read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" if path.endswith("png") else head == b"<!doctyp"


def test_numbers_on_parallel_axes_do_not_overlap():
    table = pd.DataFrame(
        {
            "axis.near": [0.02793, 0.02478, 0.009786, 0.002296, 0.00109],
            "axis.same": [3.0] * 5,
            "axis.name": list("abcde"),
            "mean": [0.1, 0.2, 0.3, 0.4, 0.5],
        }
    )
    figure = landscapes.parallel_coordinates(table, ["axis.near", "axis.same", "axis.name"], "acc")
    figure.canvas.draw()
    boxes: dict[float, list] = {}
    for text in figure.axes[0].texts:
        boxes.setdefault(text.get_position()[0], []).append((text.get_text(), text.get_window_extent()))
    assert [len(on_axis) for on_axis in boxes.values()] == [4, 1, 5, 5]
    for on_axis in boxes.values():
        low_to_high = sorted((box.y0, box.y1, name) for name, box in on_axis)
        for below, above in pairwise(low_to_high):
            assert below[1] <= above[0], (below, above)


def test_curves_show_the_means_and_end_where_the_scheduler_stopped(tmp_path):
    arms = lr_arms()
    arms[0] = replace(arms[0], stop_epoch=3)
    write_sweep(tmp_path, arms)
    sweep, table = summary(tmp_path)
    data = learning_curves(sweep, table["config_key"])
    labels = dict(zip(table["config_key"], table["label"], strict=True))
    (ax,) = figures.curves(data, labels).axes
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert set(lines) == set(table["label"])
    shown = lines["lr=0.01"].get_ydata()
    truth = data.table[data.table["config_key"] == arms[2].key]["mean"]
    np.testing.assert_array_equal(shown, truth)
    assert len(lines["lr=0.001"].get_xdata()) == 3
    styles = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines.values()}
    assert len({marker for _, _, marker in styles}) == 5  # told apart without colour


def test_neighbouring_colours_stay_apart_for_the_colour_blind():
    """Red-green blindness simulated (Vienot, Brettel & Mollon 1999): the first six colours still differ clearly."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    rgb = np.array([np.array(to_rgb(c)) ** 2.2 for c in figures.COLOURS[:6]])
    seen = rgb @ (np.linalg.inv(to_lms) @ deutan @ to_lms).T
    gaps = [np.linalg.norm(seen[i] - seen[j]) for i in range(6) for j in range(i)]
    assert min(gaps) > 0.1


def test_hyper_axis_is_logarithmic_and_interval_bars_are_the_tables(tmp_path):
    write_sweep(tmp_path, lr_arms())
    _, table = summary(tmp_path)
    (ax,) = figures.hyper_vs_result(table, ["axis.lr"], "last_test_acc").axes
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.003", "0.01", "0.03", "0.1"]


def test_heat_map_marks_the_best_cell(tmp_path):
    write_sweep(tmp_path, grid_arms())
    cells = grid(tmp_path, "demo", "method", "lr")
    ax = landscapes.heat_map(cells, "method", "lr", "acc").axes[0]
    bold = [text for text in ax.texts if text.get_fontweight() == "bold"]
    assert len(bold) == 1
    column, row = bold[0].get_position()
    assert ax.get_yticklabels()[int(row)].get_text() == "cbp"
    assert ax.get_xticklabels()[int(column)].get_text() == "0.01"


def test_pareto_front_by_hand():
    points = np.array([[0.5, 1.0], [0.7, 2.0], [0.6, 3.0], [0.9, 4.0], [0.9, 5.0], [0.95, 6.0]])
    assert nondominated(points, ["max", "min"]).tolist() == [True, True, False, True, False, True]
    assert nondominated(points, ["min", "min"]).tolist() == [True] + 5 * [False]
    assert nondominated(points, ["max", "max"]).tolist() == 5 * [False] + [True]
    twins = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 3.0]])
    assert nondominated(twins, ["max", "min"]).tolist() == [True, True, False]


def test_rung_diagram_counts_who_went_on(tmp_path):
    pruned_sweep(tmp_path)
    _, table = summary(tmp_path)
    ax = landscapes.rung_diagram(table, [1, 3], "acc").axes[0]
    said = [text.get_text() for text in ax.texts]
    assert said == [f"{(table['epoch'] > 1).sum()} on", f"{(table['epoch'] > 3).sum()} on"]


def test_numbers_are_rounded_by_their_spread():
    assert rounded(0.91503, 0.0011) == "0.9150"
    assert rounded(0.91503) == "0.915"
    assert rounded(12345.6, 210.0) == "1.235e+04"
    assert rounded(float("nan")) == "–"


def test_report_holds_health_observations_and_all_figures(tmp_path):
    pruned_sweep(tmp_path)
    report = write_report(tmp_path, "demo")
    page = report.page.read_text()
    assert "What can be told" in page
    assert re.search(r'class="card (PASS|WARN|FAIL)"', page)
    names = {path.name for path in report.files}
    assert {"curves.png", "hyper.png", "heatmap.png", "rungs.png", "interactive.html", "index.html"} <= names
    assert page.count("data:image/png;base64,") == len([n for n in names if n.endswith("png")])


def test_interactive_figures_hold_the_numbers(tmp_path):
    write_sweep(tmp_path, lr_arms())
    made = plot(tmp_path, "demo", ["hyper"], form="html")
    page = Path(made["path"].iloc[0]).read_text()
    text = page[page.rindex("Plotly.newPlot") :]
    assert json.dumps("lr=0.01") in text
    assert '"type":"log"' in text


def test_interactive_lines_pass_axes_that_a_config_does_not_have(tmp_path):
    """Plotly draws no line that has a gap."""
    arms = [
        Arm(f"c{i}", 0.9 - 0.01 * i, axis={"method": "l2", "l2": 10.0**-i} if i % 2 else {"method": "none"})
        for i in range(8)
    ]
    write_sweep(tmp_path, arms, space=[{"name": "method", "kind": "choice", "values": ["l2", "none"]}], epochs=3)
    sweep = open_sweep(tmp_path, "demo")
    table = summarise(sweep, scores(sweep))
    figure = interactive.parallel_coordinates(table, ["axis.method", "axis.l2"], "last_test_acc")
    lines = figure.data[0].dimensions
    assert all(np.isfinite(np.asarray(dimension["values"], dtype=float)).all() for dimension in lines)
    numeric = next(d for d in lines if d["label"].endswith("l2"))
    assert numeric["ticktext"][0] == "none"
    assert sum(np.asarray(numeric["values"]) == numeric["tickvals"][0]) == 4


def test_command_line_and_refusals(tmp_path):
    write_sweep(tmp_path, lr_arms(), seeds=2, epochs=3)
    storage = ["--storage", str(tmp_path)]
    run = CliRunner().invoke
    out = tmp_path / "figures"
    done = run(app, ["plot", "demo", "--kind", "curves", "--format", "png", "--out", str(out), *storage])
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.iterdir()] == ["curves.png"]
    before = tree(tmp_path)
    for arguments, message in [
        (["--kind", "pie"], "no kind of figure 'pie'"),
        (["--kind", "rungs"], "no data for rungs"),
        (["--kind", "heatmap", "--rows", "lr", "--cols", "nope"], "no field 'nope'"),
        (["--format", "svg"], "none of png"),
        (["--kind", "curves", "--curve", "tset_acc"], "did you mean test_acc"),
    ]:
        refused = run(app, ["plot", "demo", *arguments, *storage])
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match="no sweep"):
        plot(tmp_path, "other")
