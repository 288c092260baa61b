"""Was pruning safe? Early ranks against final ranks, on configs that nothing stopped."""

from __future__ import annotations

import pandas as pd
from scipy import stats

from analysis.curves import curve_metric
from analysis.errors import UserError
from analysis.patient import Card, Patient
from analysis.replay import replay
from analysis.store import Sweep

ORDERS = 50


def early_ranks(patient: Patient) -> Card | None:
    """Whether ranks at the first rung foretell the end.

    Configs that a scheduler let live are a choice: among them early ranks say less than they do among all. So the
    estimate is taken from `patient.controls` where there are any: another sweep of the same space without pruning.
    They are also played to the sweep's own rule, in many orders.
    """
    sweep = patient.sweep
    total = sweep.schedule.get("epochs") or int(patient.runs["epochs_total"].max())
    scheduler = sweep.info.get("scheduler") or {}
    first = int(rungs[0]) if (rungs := scheduler.get("rungs") or []) else max(1, total // 9)
    pruned = int((patient.table["stop_reason"] == "stopped").sum())
    source = patient if patient.controls is None else Patient(patient.controls, patient.metric)
    if first >= total or (both := _ranked(source, first)) is None:
        return None
    rho = float(stats.spearmanr(both["early"], both["end"]).statistic)
    place = int(both["early"].rank(ascending=False).to_numpy()[both["end"].to_numpy().argmax()])
    if patient.controls is not None:
        of = f"{len(both)} controls of {patient.controls.name}, none of them pruned"
    else:
        of = f"{len(both)} configs that ran to the end"
        of += f" ({pruned} were pruned and are not among them)" if pruned else ""
    evidence = (
        f"ranks at epoch {first} and at the end agree by {rho:.2f} (Spearman) over {of}; the winner was {place}. then"
    )
    kept = None
    if patient.controls is not None and scheduler.get("name") == "asha":
        kept = _played(patient.controls, first, float(scheduler.get("reduction_factor") or 3))
        evidence += f"; the sweep's own rule keeps their winner in {kept:.0%} of {ORDERS} orders"
    if rho < 0.2:
        advice = "early results say nothing: raise the grace period, or --scheduler none"
        return Card("FAIL" if pruned else "WARN", "early ranks", evidence, advice)
    if rho < 0.6 or place > len(both) / 2 or (kept is not None and kept < 0.8):
        advice = "pruning may lose the best: `replay` shows what a longer grace costs"
        return Card("WARN", "early ranks", evidence, advice)
    advice = ""
    if pruned and patient.controls is None:
        advice = (
            "survivors are a choice: a small sweep with --scheduler none, given as --controls, makes it an estimate"
        )
    return Card("PASS", "early ranks", evidence, advice)


def _ranked(patient: Patient, first: int) -> pd.DataFrame | None:
    """Scores after epoch `first` and at the end of every finished config, higher is better; None below five."""
    sweep = patient.sweep
    finished = patient.table[patient.table["stop_reason"] == "finished"]
    if len(finished) < 5 or not sweep.metrics_of("epochs"):
        return None
    metric = curve_metric(sweep)
    rows = sweep.of_search(sweep.epochs([metric], configs=finished["config_key"], epochs=[first]))
    both = pd.DataFrame(
        {
            "early": rows.groupby("config_key")[metric].mean() * (-1.0 if sweep.mode(metric) == "min" else 1.0),
            "end": finished.set_index("config_key")["mean"] * (-1.0 if sweep.mode(patient.metric) == "min" else 1.0),
        }
    ).dropna()
    return both if len(both) >= 5 and both["early"].nunique() > 1 and both["end"].nunique() > 1 else None


def _played(controls: Sweep, grace: int, factor: float) -> float:
    """Share of random orders in which ASHA would have let the controls' winner live."""
    folder = controls.folder
    found = replay(folder.parent, folder.name, "asha", [grace], [factor], "random", ORDERS)
    return float(found["kept_winner"].iloc[0])


def check_controls(sweep: Sweep, controls: Sweep, metric: str) -> None:
    """Controls stand for the sweep's configs: another family, metric or length would not."""
    if controls.family != sweep.family:
        raise UserError(f"--controls {controls.name} is of {controls.family}, {sweep.name} of {sweep.family}")
    if f"final.{metric}" not in controls.run_columns:
        raise UserError(f"--controls {controls.name} has no {metric}")
    lengths = [s.schedule.get("epochs") for s in (controls, sweep)]
    if lengths[0] != lengths[1]:
        raise UserError(f"--controls {controls.name} runs {lengths[0]} epochs, {sweep.name} {lengths[1]}")
