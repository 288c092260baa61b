"""`python -m analysis ...`: reading sweeps from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from analysis.errors import UserError
from analysis.store import open_sweep
from analysis.terminal import show

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
# typer brings its own copy of click; this is its base class of usage errors, whichever copy that is
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

Name = Annotated[str, typer.Argument(help="the sweep's name: its folder under the storage")]
Storage = Annotated[
    str, typer.Option(help="folder that holds the sweeps, or s3://BUCKET/PREFIX", envvar="LANEWISE_STORAGE")
]
Metric = Annotated[str | None, typer.Option(help="metric to read; default: what the sweep optimised")]
At = Annotated[str, typer.Option(help="final, best, epoch=N or step=N")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow to log to; default: the sweep's own; `none`: do not log", show_default=False)
]
DEFAULT_STORAGE = "sweeps"


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
    journal: Annotated[
        bool, typer.Option("--journal", help="write the journal, too, as a sweep does at its end")
    ] = False,
    tracking_uri: TrackingUri = None,
    when_told: Annotated[
        bool, typer.Option("--when-told", help="get ready, then wait for a line on standard input", hidden=True)
    ] = False,
) -> None:
    """Write the HTML report with its figures, and log it on the sweep's MLflow run."""
    from analysis.report import write_report

    if when_told and not sys.stdin.readline():
        return  # whoever would have told is gone

    made = write_report(storage, name, metric, at, curve)
    print(made.page)
    files, text = made.files, None
    if journal:
        from analysis.journal import write_journal
        from analysis.mlflow_link import fitting

        path = write_journal(storage, name, metric)
        print(path)
        files, text = [*files, path], path.read_text(encoding="utf-8")
        # for the sweep's own recorder, which sets it on the run
        (made.page.parent / "description.md").write_text(fitting(text), encoding="utf-8")
    log(storage, name, tracking_uri, files, text)


def log(storage: str, name: str, uri: str | None, files: list[Path], description: str | None = None) -> None:
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


@command
def compare(
    names: Annotated[list[str], typer.Argument(help="one sweep or several", metavar="NAME...")],
    storage: Storage = DEFAULT_STORAGE,
    by: Annotated[str | None, typer.Option(help="field that makes the arms, or config, or sweep")] = None,
    metric: Metric = None,
    at: At = "final",
    test: Annotated[str, typer.Option(help="t, permutation or wilcoxon")] = "t",
    against: Annotated[str | None, typer.Option(help="compare every arm with this one only")] = None,
    margin: Annotated[float | None, typer.Option(help="the smallest difference that matters")] = None,
    claim: Annotated[str | None, typer.Option(help="'A > B', 'A >> B' or 'A = B', judged against --margin")] = None,
    pick: Annotated[str, typer.Option(help="best: each arm's best config; all: mean over shared settings")] = "best",
    paired: Annotated[bool, typer.Option(help="compare seed by seed")] = True,
    alpha: Annotated[float, typer.Option(help="significance, after Holm's correction")] = 0.05,
    phase: Annotated[
        str | None,
        typer.Option(help="confirm: results on fresh seeds; search: scores chosen by [results where there are]"),
    ] = None,
) -> None:
    """Say which arms differ, seed by seed, corrected for the number of comparisons."""
    from analysis import compare as comparing

    kind: Any = test
    picked: Any = pick
    found = comparing.compare(
        storage, names, by, metric, at, kind, against, margin, claim, picked, paired, alpha, phase
    )
    arms = found.arms.drop(columns="config") if (found.arms.arm == found.arms.config).all() else found.arms
    show(arms, f"{found.metric} at {at}" + (", result on fresh seeds" if found.phase == "confirm" else ""))
    print()
    show(found.pairs, keys=2)
    print()
    for line in [*comparing.sentences(found, alpha), *found.notes]:
        print(line)


@command
def table(
    name: Name,
    rows: Annotated[str, typer.Option(help="field down the side")],
    cols: Annotated[str | None, typer.Option(help="field along the top")] = None,
    storage: Storage = DEFAULT_STORAGE,
    metric: Metric = None,
    at: At = "final",
    pick: Annotated[str, typer.Option(help="best: each cell's best config; all: over all its runs")] = "best",
) -> None:
    """Lay results out by one field or two: mean ± standard deviation (number of runs)."""
    from analysis import compare as comparing

    laid = comparing.table(storage, name, rows, cols, metric=metric, at=at, pick=pick)
    show(laid.reset_index(names=rows if cols is None else f"{rows} / {cols}"))


@command
def journal(
    name: Name, storage: Storage = DEFAULT_STORAGE, metric: Metric = None, tracking_uri: TrackingUri = None
) -> None:
    """Write the sweep's lab journal (journal.md) and set it as the MLflow run's description."""
    from analysis.journal import write_journal

    path = write_journal(storage, name, metric)
    text = path.read_text(encoding="utf-8")
    print(text)
    log(storage, name, tracking_uri, [path], text)


@command
def note(
    name: Name,
    text: Annotated[str, typer.Argument(help="what to remember")],
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Add a dated note to the sweep's journal."""
    from analysis.journal import add_note

    path = add_note(storage, name, text)
    print(path)
    log(storage, name, tracking_uri, [path], path.read_text(encoding="utf-8"))


@command
def doctor(
    name: Name,
    storage: Storage = DEFAULT_STORAGE,
    metric: Metric = None,
    controls: Annotated[
        str | None, typer.Option(help="a sweep of the same space that ran with --scheduler none", show_default=False)
    ] = None,
) -> None:
    """Check the sweep's health: PASS, WARN or FAIL with evidence and advice."""
    from analysis.doctor import examine

    cards = examine(storage, name, metric, controls)
    if not len(cards):
        print("nothing yet")
    for card in cards.to_dict("records"):
        print(f"{card['status']}  {card['check']}: {card['evidence']}")
        if card["advice"]:
            print(f"      {card['advice']}")


@command
def replay(
    name: Name,
    storage: Storage = DEFAULT_STORAGE,
    scheduler: Annotated[str, typer.Option(help="none, asha or median")] = "asha",
    grace: Annotated[list[int] | None, typer.Option(help="first epoch that may stop a config; repeatable [1]")] = None,
    factor: Annotated[list[float] | None, typer.Option(help="1/factor of configs go on; repeatable [3]")] = None,
    order: Annotated[str, typer.Option(help="recorded, or random: many orders of proposing")] = "recorded",
    repeats: Annotated[int, typer.Option(help="number of random orders")] = 20,
    concurrent: Annotated[int | None, typer.Option(help="configs at a time; default: as in the sweep")] = None,
    metric: Annotated[
        str | None, typer.Option(help="curve to play; default: the headline's", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random orders")] = 0,
) -> None:
    """Play finished curves to another scheduler: what it would have saved, and whether it keeps the winner."""
    from analysis.replay import replay as play

    kind: Any = order
    show(play(storage, name, scheduler, grace or [1], factor or [3.0], kind, repeats, concurrent, metric, seed))


@command
def export(
    name: Name,
    layout: Annotated[str, typer.Option(help="folders (the ci_vit notebook's), csv or parquet")],
    out: Annotated[Path, typer.Option(help="folder to write into; made if it is not there")],
    storage: Storage = DEFAULT_STORAGE,
    force: Annotated[bool, typer.Option("--force", help="write over what is there")] = False,
) -> None:
    """Write runs and curves in another layout."""
    from analysis.export import export as write

    kind: Any = layout
    made = write(storage, name, kind, out, force)
    print(f"{out / name}: {len(made)} {'runs' if layout == 'folders' else 'tables'}")


@command
def plot(
    name: Name,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="curves, hyper, heatmap, importance, parallel, rungs or pareto; repeatable [all]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write into [<storage>/NAME/plots]")] = None,
    form: Annotated[str, typer.Option("--format", help="png, html or both")] = "both",
    storage: Storage = DEFAULT_STORAGE,
    metric: Metric = None,
    at: At = "final",
    curve: Annotated[str | None, typer.Option(help="metric of the learning curves", show_default=False)] = None,
    rows: Annotated[str | None, typer.Option(help="heat map: field down the side", show_default=False)] = None,
    cols: Annotated[str | None, typer.Option(help="heat map: field along the top", show_default=False)] = None,
    top: Annotated[int, typer.Option(help="configs with a learning curve of their own")] = 6,
) -> None:
    """Draw figures as PNG for print and as interactive HTML."""
    from analysis.plotting import plot as draw

    how: Any = form
    made = draw(
        storage, name, kind or (), out, how, metric=metric, at=at, curve=curve, rows=rows, columns=cols, top=top
    )
    for path in made["path"]:
        print(path)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The command line: what is wrong with a command is one line and exit code 2, as everything else that is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], "python -m analysis", standalone_mode=False)
    except ClickException as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        code = 2
    except typer.Abort:
        code = 130
    sys.exit(code or 0)
