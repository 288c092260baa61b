"""Which reports of a stack's configs are complete, and told: each once, when all its rows and states are on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any

from lanes.job import Report
from lanes.runs import Run, report_of, seed_report
from trainables.family import Family


class Telling:
    """What was told.

    Args:
        family, program: of the stack.
    """

    def __init__(self, family: Family, program: Any):
        self._family, self._program = family, program
        self._per_epoch = family.schedule(program).steps_per_epoch
        self._told: set[str] = set()  # tokens that were told of a report and have not said `proceed`

    def waits(self, token: str, runs: Sequence[Run]) -> bool:
        """Whether all of a config's runs stand at a report, or at their ends, that is not told yet."""
        return token not in self._told and all(run.status not in ("waiting", "training") for run in runs)

    def forget(self, token: str) -> None:
        """Its report was accepted, or it leaves."""
        self._told.discard(token)

    def note_passed(self, run: Run, written: Future | None) -> None:
        """A run stands at a report and goes on. `written`: its state's way to the disk; None where it is there."""
        run.accepted = run.step // self._per_epoch
        run.passed[run.accepted] = written, seed_report(run, self._family, self._program)

    def wait_for_writing(self, configs: Mapping[str, Sequence[Run]]) -> None:
        """Until more is on disk of what must be there before the next reports are told."""
        runs = [run for token, runs in configs.items() if self.waits(token, runs) for run in runs]
        pending = [run.written for run in runs if run.written and not run.written.done()]
        if pending:
            wait(pending, return_when=FIRST_COMPLETED)

    def complete(
        self, configs: Mapping[str, Sequence[Run]], engine: Callable[[], str]
    ) -> tuple[list[Report], list[Run]]:
        """The reports now complete: of configs whose every run has passed the same one, or is parked at it, finished
        or diverged. And runs that were restored from older checkpoints than others of their config: these catch up
        first."""
        reports: list[Report] = []
        behind: list[Run] = []
        for token, runs in configs.items():
            reports += self._passed(token, runs, engine)
            if not self.waits(token, runs) or any(run.written and not run.written.done() for run in runs):
                continue
            for run in runs:
                if run.written:
                    run.written.result()
            parked = [run for run in runs if run.status == "parked"]
            late = [run for run in parked if run.step < max(other.step for other in parked)]
            if late:
                behind += late
                continue
            self._told.add(token)
            seeds = {run.seed: seed_report(run, self._family, self._program) for run in runs}
            reports.append(report_of(token, seeds, engine(), max(run.lanes for run in runs)))
        return reports, behind

    def _passed(self, token: str, runs: Sequence[Run], engine: Callable[[], str]) -> list[Report]:
        """Of the reports that runs have passed, in their order: those that every run has come to."""
        reports = []
        for epoch in sorted({epoch for run in runs for epoch in run.passed}):
            if any(self._comes_to(run, epoch) for run in runs):
                break
            seeds = {}
            for run in runs:
                if epoch in run.passed:
                    written, seed = run.passed.pop(epoch)
                    if written:
                        written.result()
                    seeds[run.seed] = replace(seed, device_seconds=run.device_seconds)
                elif run.status == "diverged":
                    seeds[run.seed] = seed_report(run, self._family, self._program)
            if len(seeds) == len(runs):  # else one was attached beyond it, when this report was lost
                reports.append(report_of(token, seeds, engine(), max(run.lanes for run in runs)))
        return reports

    def _comes_to(self, run: Run, epoch: int) -> bool:
        """Whether a run has still to come to a report's epoch, or its state to the disk."""
        if epoch in run.passed:
            written = run.passed[epoch][0]
            return written is not None and not written.done()
        return run.status != "diverged" and run.begun <= epoch * self._per_epoch
