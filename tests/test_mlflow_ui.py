"""MLflow's own pages show a sweep as they should: a real server, a real browser."""

from __future__ import annotations

import importlib.util
import re

import pytest
from mlflow import MlflowClient

import tuning.sync
from analysis.journal import write_journal
from analysis.mlflow_link import log_to_sweep_run
from analysis.report import write_report
from analysis.store import open_sweep
from benchmarks.mlflow_browser import Pages, chromium, page, server
from benchmarks.synthetic import write

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs the Python package playwright"),
    pytest.mark.skipif(chromium() is None, reason="needs a system Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(pages, client, experiment) of a sweep of nine configs, three seeds each."""
    storage = tmp_path_factory.mktemp("ui") / "sweeps"
    folder = write(storage, "nine", 9, 3)
    tuning.sync.deliver(folder)
    made = write_report(storage, "nine")
    journal = write_journal(storage, "nine")
    sweep = open_sweep(storage, "nine")
    log_to_sweep_run(sweep, str(sweep.info["tracking_uri"]), [*made.files, journal], journal.read_text())
    with server(storage / "mlflow.db") as address, page(1400) as opened:
        client = MlflowClient(address)
        experiment = client.get_experiment_by_name("ci_vit/demo").experiment_id
        yield Pages(opened, address, experiment), client, experiment


def runs(client: MlflowClient, experiment: str, kind: str, more: str = "") -> list:
    return list(client.search_runs([experiment], f"tags.kind = '{kind}'{more}"))


def test_the_tree_expands_from_sweep_to_config_to_seed(shown):
    pages, _, _ = shown
    pages.tree()
    assert pages.names() == ["nine"]
    pages.expand("nine")
    configs = pages.names()[1:]
    assert len(configs) == 9
    assert all(re.match(r"lr=\S+ ", name) for name in configs)
    pages.expand(configs[0])
    assert sorted(pages.names()[2:5]) == [f"seed {seed} · {configs[0]}" for seed in range(3)]


def test_the_saved_view_shows_finished_configs_best_first_and_its_columns_sort(shown):
    pages, client, experiment = shown
    finished = runs(client, experiment, "config", " and tags.stop_reason = 'finished'")

    def ranked(metric: str, best_first: bool) -> list[str]:
        return [r.info.run_name for r in sorted(finished, key=lambda r: r.data.metrics[metric], reverse=best_first)]

    pages.configs()
    assert len(finished) == 3
    assert pages.names() == ranked("final/test_acc_last", True)
    heads = pages.page.get_by_role("columnheader").all_inner_texts()
    assert {"final/test_acc_last", "final/test_acc_last_sd", "seeds", "device_seconds", "lr"} <= set(heads)
    pages.sort("final/test_acc_last")
    assert pages.names() == ranked("final/test_acc_last", False)


def test_the_chart_view_of_two_configs_shows_their_curves(shown):
    pages, client, experiment = shown
    two = runs(client, experiment, "config", " and tags.stop_reason = 'finished'")[:2]
    from playwright.sync_api import expect

    pages.charts([run.info.run_id for run in two])
    pages.page.get_by_placeholder("Search metric charts").fill("^test_acc$")
    charts = pages.page.get_by_role("heading", level=4)
    expect(charts).to_have_text(["test_acc"], timeout=60_000)  # the others have gone
    lines = pages.page.locator("svg.main-svg .scatterlayer .trace path.js-line")
    lines.first.wait_for()
    colours = {line.evaluate("line => getComputedStyle(line).stroke") for line in lines.all()}
    assert len(colours) == 2  # MLflow may draw a run's curve twice, smoothed and not
    for line in lines.all():
        assert len(re.findall(r"[LC]|\d+\.?\d*,", line.get_attribute("d") or "")) >= 20  # 24 epochs


def test_report_and_journal_open_in_the_page(shown):
    pages, client, experiment = shown
    (top,) = runs(client, experiment, "sweep")
    frame = pages.artifact(top.info.run_id, "report/index.html")
    frame.get_by_role("heading", name="Results: test_acc_last").wait_for()
    assert frame.locator("figure img").count() >= 3
    assert frame.locator("figure img").first.evaluate("image => image.complete && image.naturalWidth") > 500
    pages.overview(top.info.run_id)
    pages.page.get_by_text("9 configs x 3 seeds").wait_for()  # the journal is the description
