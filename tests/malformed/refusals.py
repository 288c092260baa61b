"""Runs commands that must refuse, in this process: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LONGEST_LINE = 1200


@dataclass
class Tally:
    """Cases tried, and what was wrong with a refusal."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)

    def refuses(self, what: str, command: Callable[[], object], folder: Path | None = None) -> None:
        """`command` must exit with 2 after one line, and leave `folder` as it was."""
        self.tried += 1
        before = listing(folder) if folder else None
        out, err = io.StringIO(), io.StringIO()
        code: object = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                command()
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:  # a traceback, for a user
            self.wrong.append(f"{what}: raised {type(error).__name__}: {str(error)[:200]}")
            return
        told = err.getvalue()
        if code != 2:
            self.wrong.append(f"{what}: exit code {code}, {told.strip()[:200]!r}")
        elif told.count("\n") != 1 or not told.strip() or "Traceback" in told or len(told) > LONGEST_LINE:
            self.wrong.append(f"{what}: said {told[:300]!r}")
        elif out.getvalue():
            self.wrong.append(f"{what}: printed {out.getvalue()[:200]!r}")
        if folder and listing(folder) != before:
            self.wrong.append(f"{what}: wrote {sorted(set(listing(folder)) - set(before or ()))[:5]}")

    def check(self, at_least: int) -> None:
        """Every refusal was as it should be, and there were enough of them."""
        assert not self.wrong, f"{len(self.wrong)} of {self.tried}:\n" + "\n".join(self.wrong[:40])
        assert self.tried >= at_least, self.tried


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file below a folder but locks, with its size and when it was changed."""
    found: Iterable[Path] = sorted(folder.rglob("*"))
    return [
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in found
        if not path.is_dir() and path.suffix != ".lock"
    ]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was not refused fails here, before it costs anything."""

    def accepted(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was accepted")

    monkeypatch.setattr("tuning.cli.run", accepted)
    monkeypatch.setattr("tuning.cli.write_sweep_json", accepted)
    monkeypatch.delenv("LANEWISE_DATA", raising=False)
    monkeypatch.delenv("LANEWISE_STORAGE", raising=False)
    monkeypatch.setattr(sys, "argv", ["tune_toy.py"])
    monkeypatch.setattr(os, "environ", os.environ)
