"""Which MLflow run is which: found by their tags, made once, and put right where a server that died or froze left two.

MLflow gives a run its id itself, so that a request to make one is not safe to repeat: a client that hears no answer
cannot know whether its run exists. So nothing is repeated blindly (`tuning.tracking` turns the client's own retries
off), a run is looked up before it is made, and a request that was served late, after the next one, leaves a second
empty run that is deleted when it is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

KEYS = {"sweep": "sweep", "config": "config_key", "run": "run_key"}
"""Kind of run -> the tag that says which one."""
log = logging.getLogger(__name__)


class TrackedRuns:
    """The MLflow runs of one sweep.

    Args:
        client: an `MlflowClient`.
        experiment: id of the sweep's experiment.
        sweep: its name.
        tags: on every run.
    """

    def __init__(self, client: Any, experiment: str, sweep: str, tags: Mapping[str, str]):
        self._client, self._experiment, self._sweep = client, experiment, sweep
        self._tags = {**tags, "sweep": sweep}
        self._ids: dict[tuple[str, str], str] = {}
        self.find()

    def __getitem__(self, which: tuple[str, str]) -> str:
        """MLflow's id of a (kind, key)."""
        return self._ids[which]

    def __contains__(self, which: tuple[str, str]) -> bool:
        return which in self._ids

    def find(self) -> dict[tuple[str, str], str]:
        """Look all of them up; of two for one (kind, key) the empty one is deleted. Returns their status."""
        found: dict[tuple[str, str], list[Any]] = {}
        for run in self._pages():
            kind = run.data.tags.get("kind", "")
            if kind in KEYS and KEYS[kind] in run.data.tags:
                found.setdefault((kind, run.data.tags[KEYS[kind]]), []).append(run)
        parents = {run.data.tags.get("mlflow.parentRunId", "") for runs in found.values() for run in runs}
        status = {}
        for which, runs in found.items():
            ours = self._ids.get(which, "")
            # the one with something in it: ours, a parent, one with params; between equals the choice repeats itself
            runs.sort(
                key=lambda run: (
                    run.info.run_id != ours,
                    run.info.run_id not in parents,
                    not run.data.params,
                    run.info.run_id,
                )
            )
            for run in runs[1:]:
                log.warning("two MLflow runs for %s: %s goes", which, run.info.run_id)
                self._client.delete_run(run.info.run_id)
            self._ids[which] = runs[0].info.run_id
            status[which] = runs[0].info.status
        return status

    def need(self, kind: str, key: str, name: str, at: int, tags: Mapping[str, str]) -> str:
        """MLflow's id of a run, made if it is new; `at` in ms is when it began."""
        if (kind, key) not in self._ids:
            run = self._client.create_run(self._experiment, at, {"kind": kind, **self._tags, **tags}, name)
            self._ids[kind, key] = run.info.run_id
        return self._ids[kind, key]

    def _pages(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.sweep = '{self._sweep}'", max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return
