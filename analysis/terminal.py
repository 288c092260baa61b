"""Tables on a terminal of any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.figures import rounded

GAP = 2
"""Blanks that rich puts between two columns."""


def show(frame: pd.DataFrame, title: str | None = None, keys: int = 1) -> None:
    """Print a data frame.

    On a terminal that is too narrow for it, one part of its columns after another, each with the first `keys` columns
    before it: no number is ever broken. Into a pipe or a file go lines as wide as they come.
    """
    if not len(frame):
        print("nothing yet")
        return
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=1_000_000)
    cells = [[_plain(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    for part, columns in enumerate(_parts(frame, cells, keys, console.width)):
        if part:
            print()
        table = Table(title=None if part else title, title_justify="left", box=None, pad_edge=False)
        for i, width in columns:
            justify: Any = "right" if _numeric(frame.iloc[:, i]) else "left"
            table.add_column(Text(str(frame.columns[i]), style="bold"), justify=justify, width=width, overflow="fold")
        for row in zip(*(cells[i] for i, _ in columns), strict=True):
            table.add_row(*map(Text, row))
        console.print(table, crop=False)


def _parts(
    frame: pd.DataFrame, cells: Sequence[Sequence[str]], keys: int, room: int
) -> Iterator[list[tuple[int, int]]]:
    """(column, its width) of each part: the first columns in all, the others as many as fit."""
    wide = [max(map(cell_len, [str(name), *column])) for name, column in zip(frame.columns, cells, strict=True)]
    if sum(wide) + GAP * (len(wide) - 1) <= room:
        yield list(enumerate(wide))
        return
    for i, column in enumerate(wide):  # texts give way first
        if not _numeric(frame.iloc[:, i]):
            share = room // (2 * keys) - GAP if i < keys else room // 2
            words = [word for cell in cells[i] for word in cell.split()]  # a number in a label is not broken, either
            wide[i] = min(column, max([share, cell_len(str(frame.columns[i])), *map(cell_len, words)]))
    first = list(enumerate(wide))[:keys]
    part, used = list(first), sum(width + GAP for _, width in first)
    for i, width in list(enumerate(wide))[keys:]:
        if len(part) > keys and used + width > room:
            yield part
            part, used = list(first), sum(width + GAP for _, width in first)
        part.append((i, width))
        used += width + GAP
    yield part


def _numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and column.dtype != bool


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return rounded(value)
    return "" if value is None else str(value)
