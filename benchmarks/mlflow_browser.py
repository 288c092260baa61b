"""MLflow pages in a headless Chromium: what `benchmarks/mlflow_ui.py` times and `tests/test_mlflow_ui.py` asserts.

Needs the Python package `playwright` (in the `dev` extra) and a Chromium of the system's: `apt-get install chromium`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

SECONDS = 120.0
NAMES_SHOWN = """() => [...document.querySelectorAll('[role="row"][row-index]')]
  .filter(row => row.querySelector('a[href*="/runs/"]'))
  .sort((a, b) => a.getAttribute('row-index') - b.getAttribute('row-index'))
  .map(row => row.querySelector('a[href*="/runs/"]').innerText)"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The system's Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def server(database: Path) -> Iterator[str]:
    """`mlflow server` on the loopback over a sqlite database; its address. Stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(database.with_suffix(".server.log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=database.parent, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"mlflow server did not start: {log.name}") from None
                time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)  # the server and its workers
        process.wait()


@contextlib.contextmanager
def page(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A page of a fresh headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.set_default_timeout(SECONDS * 1000)
        # else MLflow 3 opens an assistant beside the page
        opened.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        try:
            yield opened
        finally:
            browser.close()


class Pages:
    """The pages of one experiment.

    Args:
        page: from `page`.
        address: of the server.
        experiment: id.
    """

    def __init__(self, page: Any, address: str, experiment: str):
        self.page, self._root = page, f"{address}/#/experiments/{experiment}"
        self._compare, self._experiment = f"{address}/#/compare-runs", experiment

    def tree(self) -> None:
        """Every run: the sweeps, closed."""
        self._open(f"{self._root}/runs?workflowType=machine_learning")

    def configs(self) -> None:
        """The saved view: finished configs, best first."""
        self._open(f"{self._root}/runs?workflowType=machine_learning&viewStateShareKey=lanewise")

    def _open(self, url: str) -> None:
        self.page.goto("about:blank")  # else only what follows the `#` would change, and nothing would be loaded
        self.page.goto(url)
        self.rows().first.wait_for()

    def rows(self) -> Any:
        """Links to runs in the table, from above."""
        return self.page.locator('[role="row"] a[href*="/runs/"]')

    def names(self) -> list[str]:
        """Names of the runs from above; the table's elements are not in the order in which they are placed."""
        return [str(name) for name in self.page.evaluate(NAMES_SHOWN)]

    def expand(self, name: str) -> None:
        """Open a run's children."""
        row = self.page.locator('[role="row"]').filter(has=self.page.get_by_text(name, exact=True)).first
        before = self.rows().count()
        row.get_by_role("button").first.click()
        self.page.wait_for_function(
            f"""document.querySelectorAll('[role="row"] a[href*="/runs/"]').length != {before}"""
        )

    def sort(self, column: str) -> None:
        """Click a column's head, and wait until the answer is in the table."""
        head = self.page.get_by_role("columnheader").filter(has_text=column).first
        with self.page.expect_response(lambda response: "runs/search" in response.url) as answered:
            head.click()
        runs = answered.value.json()["runs"]
        self.page.wait_for_function(
            f"name => ({NAMES_SHOWN})()[0] == name",
            arg=runs[0]["info"]["run_name"],
        )

    def artifact(self, run: str, path: str) -> Any:
        """An artifact as the UI shows it: the frame that holds its page."""
        self.page.goto("about:blank")
        self.page.goto(f"{self._root}/runs/{run}/artifacts/{path}?workflowType=machine_learning")
        return self.page.frame_locator("iframe").first

    def overview(self, run: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self._root}/runs/{run}?workflowType=machine_learning")

    def charts(self, runs: list[str]) -> None:
        """The chart view of some runs: their curves in common axes."""
        wanted = f"attributes.run_id IN ({', '.join(repr(run) for run in runs)})"
        order = quote("metrics.`device_seconds`")  # in the default order runs hide below their closed parent
        query = f"workflowType=machine_learning&compareRunsMode=CHART&searchFilter={quote(wanted)}&orderByKey={order}"
        self.page.goto("about:blank")
        self.page.goto(f"{self._root}/runs?{query}")

    def compare(self, runs: list[str]) -> None:
        """The comparing page: params and metrics of some runs side by side."""
        self.page.goto("about:blank")
        experiments = quote(json.dumps([self._experiment]))
        self.page.goto(f"{self._compare}?runs={quote(json.dumps(runs))}&experiments={experiments}")
