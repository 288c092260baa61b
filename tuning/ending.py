"""What a person reads when a sweep has ended: the result, where there is one, and what was chosen by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tuning.journal import Event
from tuning.objectives import COSTS, Row, confirmed, front, mean, means, searched, value
from tuning.progress import clock
from tuning.race import ALPHA
from tuning.sweep import SweepPlan

ROOMY = 100
"""Columns of a terminal from which on the search's table has its costs, too."""


@dataclass(frozen=True)
class Ended:
    """What a sweep ended with: the rows of its runs table, and the newest events of its race and of confirming."""

    rows: Sequence[Row]
    look: Event | None = None
    confirmed: Event | None = None


def print_results(console: Console, plan: SweepPlan, ended: Ended) -> None:
    """Confirmed figures are the result and come first; then the Pareto front, the race, the search's own table."""
    mode = plan.objective.mode
    if ended.confirmed is not None:
        seeds = len(ended.confirmed["seeds"])
        _headed(
            console,
            f"result: on {seeds} fresh seeds, none of which took part in choosing",
            confirmed_table(plan, ended),
        )
        for line in confirmed_notes(plan, ended):
            console.print(Text(line), soft_wrap=True)
        console.print()
    if plan.others:
        named = ", ".join(f"{name} ({mode})" for name, mode in plan.modes.items())
        _headed(console, f"Pareto front: nothing beats these configs in all of {named}", front_table(plan, ended.rows))
        console.print()
    if ended.look is not None:
        console.print(Text(race_line(ended.look)), soft_wrap=True)
        console.print()
    search = results_table(ended.rows, plan.metric, mode, cost=console.width >= ROOMY)
    if ended.confirmed is not None:
        _headed(console, "what was chosen by, in the search:", search)
    else:
        print_table(console, search)


def _headed(console: Console, heading: str, table: Table) -> None:
    console.print(Text(heading, style="bold"), soft_wrap=True)
    print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """On a narrow terminal the labels in the first column wrap between words. No figure is ever cut: where even that
    is not enough, lines run over the edge."""
    natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if natural > console.width:
        labels = [str(cell) for cell in (table.columns[0].header, *table.columns[0].cells)]
        longest_word = max(cell_len(word) for label in labels for word in label.split())
        table.width = max(console.width, natural - max(map(cell_len, labels)) + longest_word)
    console.print(table, crop=False)


def confirmed_table(plan: SweepPlan, ended: Ended) -> Table:
    """Each confirmed config: every objective on the fresh seeds, and by how much its score in the search was better."""
    assert ended.confirmed is not None
    fresh = confirmed(ended.rows, plan.modes, ended.confirmed["seeds"])
    table = _table()
    for name in plan.objectives:
        _number_columns(table, name, "± sd")
    _number_columns(table, "seeds", "in the search", "flattered by")
    for entry in ended.confirmed["chosen"]:
        key, cells = entry["config_key"], []
        for name in plan.objectives:
            values = list(fresh[name].get(key, {}).values())
            cells += [_figure(values), _spread(values)]
        runs = fresh[plan.metric].get(key, {})
        promised = entry["values"][plan.metric]
        sign = 1.0 if plan.objective.mode == "max" else -1.0
        flattery = f"{sign * (promised - mean(runs)):+.4f}" if runs else "-"
        table.add_row(Text(entry["label"]), *cells, str(len(runs)), f"{promised:.4f}", flattery)
    return table


def confirmed_notes(plan: SweepPlan, ended: Ended) -> list[str]:
    """What the confirmed table does not say: ties, too few configs, how the k were ranked."""
    assert ended.confirmed is not None
    chosen, ties, notes = ended.confirmed["chosen"], ended.confirmed["ties"], []
    if ties:
        names = ", ".join(entry["label"] for entry in ties[:5]) + (f" and {len(ties) - 5} more" * (len(ties) > 5))
        notes.append(f"tied with the last of these in the search and not confirmed: {names}")
    if len(chosen) < ended.confirmed["k"]:
        notes.append(f"only {len(chosen)} of {ended.confirmed['k']}: no more configs ran to their end")
    if len(chosen) > 1:
        notes.append(
            "in the search's order; whoever picks the best of these by these figures is flattered again, a little"
        )
    return notes


def front_table(plan: SweepPlan, rows: Iterable[Row]) -> Table:
    """The Pareto front of the configs that ran to their end, by their means in the search."""
    rows = list(rows)
    points = means(rows, plan.objectives, plan.modes)
    labels = {row["config_key"]: row["label"] for row in rows}
    keys = front(points, list(plan.modes.values()))
    table = _table()
    _number_columns(table, *plan.objectives)
    for key in keys:
        table.add_row(
            Text(labels[key]), *(_objective(name, v) for name, v in zip(plan.objectives, points[key], strict=True))
        )
    return table


def race_line(look: Event) -> str:
    """How the race ended, or how far it came."""
    alive, started = [entry["label"] for entry in look["alive"]], look["started"]
    after = f"after {look['seeds']} seeds"
    if not alive:
        return "race: no config ran to its end"
    if look["verdict"] == "one left":
        return f"race: {alive[0]} is the best of {started} configs, {after} (error below {ALPHA:g})"
    if look["verdict"] == "within the margin":
        return f"race: no config left is better than {alive[0]} by {look['margin']:g} or more, {after}"
    names = ", ".join(alive[:4]) + (f" and {len(alive) - 4} more" if len(alive) > 4 else "")
    told = "cannot be told apart" if look["verdict"] else "are still in contention"
    return f"race: {len(alive)} of {started} configs {told} {after}: {names}"


def _objective(name: str, number: float) -> str:
    return f"{number:.3g}" if name in COSTS else f"{number:.4f}"


def _table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("config", overflow="fold")
    return table


def _number_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))


def _figure(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" if values else "-"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"


def results_table(
    rows: Iterable[Mapping[str, Any]], metric: str, mode: str, shown: int = 10, cost: bool = True
) -> Table:
    """The best configs of the search: mean and spread over seeds at the last report, stop reason.

    Args:
        rows: of the runs table.
        cost: with a column of the device time.
    """
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for row in searched(rows):
        configs.setdefault(row["config_key"], []).append(row)
    ranked = []
    for runs in configs.values():
        values = [number for row in runs if math.isfinite(number := value(row, metric))]
        ranked.append((statistics.fmean(values) if values else math.nan, values, runs))
    # finished configs first: a value at an early rung is not a result
    ranked.sort(
        key=lambda entry: (
            not any(row["stop_reason"] == "finished" for row in entry[2]),
            math.isnan(entry[0]),
            0.0 if math.isnan(entry[0]) else (-entry[0] if mode == "max" else entry[0]),
        )
    )
    table = _table()
    for name, width in ((metric, 7), ("± sd", 6), ("seeds", 5), ("epochs", 7)):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(width, len(name)))
    table.add_column("stop reason", no_wrap=True, min_width=14)
    if cost:
        table.add_column("device time", justify="right", no_wrap=True, min_width=11)
    for average, values, runs in ranked[:shown]:
        reasons = sorted({describe(row) for row in runs})
        table.add_row(
            Text(runs[0]["label"]),  # what a user wrote is text, brackets and all
            "-" if math.isnan(average) else f"{average:.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
            str(len(runs)),
            f"{max(row['epoch'] for row in runs)}/{runs[0]['epochs_total']}",
            ", ".join(reasons),
            *([clock(sum(row["device_seconds"] for row in runs))] if cost else []),
        )
    if len(ranked) > shown:
        table.add_row(f"... and {len(ranked) - shown} more")
    return table


def describe(row: Mapping[str, Any]) -> str:
    """A run's stop reason, with the epoch where the scheduler stopped it."""
    return f"stopped at {row['rung']}" if row["stop_reason"] == "stopped" else row["stop_reason"]
