"""Writing so that a reader never meets half a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.errors import UserError


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder to write into; its files move into `target`, each at once, when the block ends without an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield folder
        target.mkdir(exist_ok=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                goal = target / path.relative_to(folder)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file at once, over what was there."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
