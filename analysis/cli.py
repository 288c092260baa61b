"""`python -m analysis ...`: reading sweeps from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.errors import UserError
from analysis.figures import rounded
from analysis.store import open_sweep

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help="the sweep's name: its folder under the storage")]
Storage = Annotated[Path, typer.Option(help="folder that holds the sweeps")]
Metric = Annotated[str | None, typer.Option(help="metric to read; default: what the sweep optimised")]
At = Annotated[str, typer.Option(help="final, best, epoch=N or step=N")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow to log to; default: the sweep's own; `none`: do not log", show_default=False)
]
DEFAULT_STORAGE = Path("sweeps")


def command(function: Callable[..., None], name: str | None = None) -> Callable[..., None]:
    """Registers a command; a `UserError` becomes one line and exit code 2."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error

    return app.command(name)(guarded)


@command
def report(
    name: Name,
    storage: Storage = DEFAULT_STORAGE,
    metric: Metric = None,
    at: At = "final",
    curve: Annotated[str | None, typer.Option(help="metric of the learning curves", show_default=False)] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the HTML report with its figures, and log it on the sweep's MLflow run."""
    from analysis.report import write_report

    made = write_report(storage, name, metric, at, curve)
    print(made.page)
    log(storage, name, tracking_uri, made.files)


def log(storage: Path, name: str, uri: str | None, files: list[Path], description: str | None = None) -> None:
    """Logs to MLflow unless told `none`; a server that is away is told in one line and is no error."""
    if uri == "none":
        return
    from analysis.mlflow_link import log_to_sweep_run, tracking_uri

    sweep = open_sweep(storage, name)
    target = tracking_uri(sweep, uri)
    if target is None:
        return
    try:
        log_to_sweep_run(sweep, target, files, description)
    except UserError as error:
        if uri is not None:  # asked for by the user: not doing it is an error
            raise
        print(f"not logged to MLflow: {error}", file=sys.stderr)


@partial(command, name="list")
def list_command(storage: Storage = DEFAULT_STORAGE) -> None:
    """Show the sweeps of a storage folder."""
    from analysis.summary import list_sweeps

    show(list_sweeps(storage))


def show(frame: pd.DataFrame, title: str | None = None) -> None:
    """A data frame as a terminal table."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column]) and frame[column].dtype != bool
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_plain(value)) for value in row))
    if not len(frame):
        print("nothing yet")
        return
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:  # a pipe or a file: lines as wide as they come
        console = Console(markup=False, highlight=False, width=1000)
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return rounded(value)
    return "" if value is None else str(value)


def main() -> None:
    app()
