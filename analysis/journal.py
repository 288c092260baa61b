"""The lab journal: a sweep as a block of Markdown in the notebooks' own style, written from the data.

    # Varying L2 decay strength on VGG13-like network
    - exp5: 0.008 -> 0.9090 ± 0.0012 (n=5) 3.1 GPU-min
    - exp6: 0.016 -> 0.9150 ± 0.0011 (n=5) 3.1 GPU-min

Everything above the line `MARK` is written anew each time; what stands below it belongs to the reader and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import p_text, plain, spread_text
from analysis.confirmation import confirmed_table, flattery, race_line, ties
from analysis.doctor import cards_of
from analysis.errors import UserError
from analysis.figures import rounded
from analysis.objectives import front_line, tradeoff
from analysis.selection import more_seeds, probability_best, winners_curse
from analysis.statistics import all_pairs_p, holm
from analysis.store import ENDED, Sweep, open_sweep, sweep_names
from analysis.summary import complete, pivot, scores, summarise
from analysis.writing import replace_text

MARK = "<!-- yours: what stands below this line is kept when the journal is written again -->"
EMPTY = f"{MARK}\nresult: \n"
LISTED = 40
"""Runs listed; `table` and `export` give all."""


def write_journal(storage: Path | str, name: str, metric: str | None = None) -> Path:
    """Writes `<storage>/<name>/journal.md` and returns its path. What a reader wrote below the mark stays."""
    sweep = open_sweep(storage, name)
    path = sweep.folder / "journal.md"
    replace_text(path, f"{block(sweep, metric)}\n{_kept(path)}")
    sweep.publish([path])
    return path


def entries(storage: Path | str, name: str, metric: str | None = None) -> pd.DataFrame:
    """The generated part, one row a line: `section` (asked, result, run, observation, ran), `config_key`, `text`."""
    rows = [(section, key, text) for section, key, text in _lines(open_sweep(storage, name), metric)]
    return pd.DataFrame(rows, columns=["section", "config_key", "text"])


def notes(storage: Path | str, names: Sequence[str] = ()) -> pd.DataFrame:
    """What readers added with `note`, of these sweeps or of all: `name, date, text`."""
    rows = []
    for name in names or sweep_names(storage):
        path = open_sweep(storage, name).folder / "journal.md"
        own = _kept(path).split("\n") if path.exists() else []
        for line in own:
            if found := _NOTE.fullmatch(line):
                rows.append([name, found[1], found[2]])
            elif rows and line.startswith("  "):
                rows[-1][2] += "\n" + line.strip()
    return pd.DataFrame(rows, columns=["name", "date", "text"])


_NOTE = re.compile(r"- (\d{4}-\d{2}-\d{2}): (.*)")


def add_note(storage: Path | str, name: str, text: str, now: datetime | None = None) -> Path:
    """Appends a dated note to the sweep's journal, which is written first if there is none."""
    if not text.strip():
        raise UserError("the note is empty")
    sweep = open_sweep(storage, name)
    path = sweep.folder / "journal.md"
    if not path.exists():
        write_journal(storage, name)
    day = (now or datetime.now(UTC)).strftime("%Y-%m-%d")
    lines = text.strip().splitlines()
    note = "\n".join([f"- {day}: {lines[0]}", *(f"  {line}" for line in lines[1:])])
    before = path.read_text(encoding="utf-8")
    if MARK not in before:
        before = before.rstrip("\n") + "\n\n" + EMPTY
    replace_text(path, before.rstrip("\n") + "\n" + note + "\n")
    sweep.publish([path])
    return path


def _kept(path: Path) -> str:
    if not path.exists():
        return EMPTY
    text = path.read_text(encoding="utf-8")
    # No mark: someone took it out. Keep all that is there rather than guess which lines were theirs.
    return text[text.index(MARK) :] if MARK in text else f"{MARK}\n{text}"


def block(sweep: Sweep, metric: str | None = None) -> str:
    """The generated part: what was varied, every config's line, observations, stop reasons, time and devices."""
    parts: dict[str, list[str]] = {section: [] for section in _SECTIONS}
    for section, _, text in _lines(sweep, metric):
        parts[section].append(text)
    listed = parts["run"][:LISTED]
    if len(parts["run"]) > LISTED:
        listed.append(f"... and {len(parts['run']) - LISTED} more")
    lines = [*parts["asked"], ""]
    if parts["result"]:
        lines += ["Result:", *(f"- {line}" for line in parts["result"]), "", "What was chosen by, in the search:"]
    lines += [f"- {line}" for line in listed or ["nothing has reported yet"]]
    if parts["observation"]:
        lines += ["", "Observations:", *(f"- {line}" for line in parts["observation"])]
    return "\n".join([*lines, "", *parts["ran"]]) + "\n"


_SECTIONS = ("asked", "result", "run", "observation", "ran")


def _lines(sweep: Sweep, metric: str | None) -> list[tuple[str, str, str]]:
    """(section, config key or "", text), in the order of reading."""
    metric = metric or sweep.metric
    runs, confirmed = scores(sweep, metric), scores(sweep, metric, phase="confirm")
    table = summarise(sweep, runs, metric)
    title = str(sweep.info.get("doc") or sweep.name)
    asked = [f"# {_one_line(title[0].upper() + title[1:])}", _asked(sweep, runs, metric), _same(sweep)]
    asked.append(_varied(sweep, table))
    every = pd.concat([runs, confirmed]) if len(confirmed) else runs
    places = _kinds_of_device(every)
    lines = [("asked", "", line) for line in asked if line]
    lines += [("result", "", _one_line(line)) for line in confirmation(sweep, runs, confirmed, metric)]
    for row in _in_order(sweep, table):
        lines.append(("run", str(row["config_key"]), _config_line(sweep, row, places > 1)))
    lines += [("observation", "", line) for line in observations(sweep, runs, metric)]
    return lines + [("ran", "", line) for line in _how_it_ran(sweep, every)]


def _kinds_of_device(runs: pd.DataFrame) -> int:
    """Devices whose times may differ: GPUs, and machines; the cores of one machine are alike."""
    return runs.loc[runs["device"] != "", "device"].str.replace(r"^cpu:\d+@", "cpu@", regex=True).nunique()


def _asked(sweep: Sweep, runs: pd.DataFrame, metric: str) -> str:
    info = sweep.info
    rule = str((info.get("scheduler") or {}).get("name", "none"))
    pruning = "no pruning" if rule == "none" else f"pruned by {rule}"
    running = int((~runs["stop_reason"].isin(ENDED)).sum())
    state = f", still running ({running} runs)" if running else ""
    count = f"{runs['config_key'].nunique()} configs x {runs['seed'].nunique()} seeds"
    direction = {"max": "higher is better", "min": "lower is better"}.get(sweep.mode(metric), "")
    started = str(info.get("started_at", ""))[:10]
    named = f"{sweep.family}, sweep {info.get('sweep', sweep.name)} as {sweep.name}, {started}"
    return f"{named}: {count}, {info.get('searcher', '')}, {pruning}{state}; {metric}, {direction}"


def _same(sweep: Sweep) -> str:
    base = sweep.info.get("base") or {}
    return "same: " + ", ".join(f"{k}={_one_line(plain(v))}" for k, v in base.items()) if base else ""


def _varied(sweep: Sweep, table: pd.DataFrame) -> str:
    parts = []
    for axis in sweep.axes:
        if axis.get("kind") == "range":
            text = f"{axis['low']:g} .. {axis['high']:g}" + (" (log)" if axis.get("log") else "")
        else:
            values = [plain(v) for v in (axis.get("values") or axis.get("arms") or [])]
            text = ", ".join(values[:12]) + (f", ... ({len(values)})" if len(values) > 12 else "")
        parts.append(f"{axis['name']} {{{_one_line(text)}}}")
    return "varied: " + "; ".join(parts) if parts else ""


def _in_order(sweep: Sweep, table: pd.DataFrame) -> list[dict[Any, Any]]:
    """A grid in the order of its space, as the notebooks list it; anything else best first."""
    rows = table.to_dict("records")
    if sweep.info.get("searcher") != "grid" or len(rows) > LISTED:
        return rows

    def place(row: Mapping[Any, Any]) -> list[tuple[bool, Any]]:
        key: list[tuple[bool, Any]] = []
        for axis in sweep.axes:
            value = row.get(f"axis.{axis['name']}")
            values = [plain(v) for v in (axis.get("values") or axis.get("arms") or [])]
            text = plain(value)
            key.append((text not in values, values.index(text) if text in values else text))
        return key

    return sorted(rows, key=place)


def _config_line(sweep: Sweep, row: Mapping[Any, Any], with_device: bool = False) -> str:
    label, values = _one_line(str(row["label"])), _values(sweep, row)
    name = label if not values or all(v in label for v in values.split(", ")) else f"{label}: {values}"
    result = spread_text(row["mean"], row["sd"], row["n"]) if row["n"] else "no value yet"
    tail = device_time(row["device_seconds"], row["device"])
    if with_device and row["device"]:
        tail += f" on {_one_line(row['device'])}"
    state = ""
    if row["stop_reason"] == "stopped":
        state = f" (stopped at epoch {row['epoch']} of {row['epochs_total']})"
    elif row["stop_reason"] not in ENDED:
        state = f" ({row['stop_reason']}, epoch {row['epoch']} of {row['epochs_total']})"
    elif row["stop_reason"] != "finished" or ", " in row["stop_reasons"]:
        state = f" ({row['stop_reasons']})"
    return f"{name} -> {result} {tail}{state}"


def _values(sweep: Sweep, row: Mapping[Any, Any]) -> str:
    """The values of a config's axes; for a named run, of the fields that its name stands for."""
    texts = []
    for axis in sweep.axes:
        value = row.get(f"axis.{axis['name']}")
        if value is None or (isinstance(value, float) and np.isnan(value)):
            continue
        arms = axis.get("arms") or {}
        if axis.get("run_names") and value in arms:
            differing = [f for f in arms[value] if len({str(arm.get(f)) for arm in arms.values()}) > 1]
            texts += [plain(arms[value][f]) for f in differing]
        else:
            texts.append(f"{value:.4g}" if isinstance(value, float) else plain(value))
    return _one_line(", ".join(texts))


def device_time(seconds: float, device: str) -> str:
    """`3.1 GPU-min`, `40 CPU-s`."""
    kind = "CPU" if str(device).startswith("cpu") else "GPU" if device else "device"
    if not np.isfinite(seconds):
        return f"? {kind}-min"
    if seconds < 60:
        return f"{seconds:.2g} {kind}-s"
    return f"{seconds / 60:.1f} {kind}-min" if seconds < 6000 else f"{seconds / 3600:.1f} {kind}-h"


def told(sweep: Sweep, runs: pd.DataFrame, metric: str) -> list[str]:
    """What the tests say, how a race ended, which configs nothing beats in several objectives."""
    race = race_line(sweep)
    front = front_line(sweep, tradeoff(sweep, runs, metric), metric) if len(sweep.objectives) > 1 else None
    return [*differences(sweep, runs, metric), *(line for line in (race, front) if line)]


def observations(sweep: Sweep, runs: pd.DataFrame, metric: str) -> list[str]:
    """What the tests say, in sentences; then what the health checks warn of."""
    said = told(sweep, runs, metric)
    said += speed(runs)
    for card in cards_of(sweep, metric):
        if card.status != "PASS":
            said.append(f"{card.check}: {card.evidence}" + (f"; {card.advice}" if card.advice else ""))
    return [_one_line(line) for line in said]


def differences(sweep: Sweep, runs: pd.DataFrame, metric: str, alpha: float = 0.05) -> list[str]:
    """What can be told about the best config: whom it beats, whom not, how likely it is the best, how it flatters."""
    sign = -1.0 if sweep.mode(metric) == "min" else 1.0
    matrix = complete(sign * pivot(runs))
    if len(matrix) < 2 or matrix.shape[1] < 2:
        return []
    labels = runs.drop_duplicates("config_key").set_index("config_key")["label"].reindex(matrix.index).tolist()
    y = matrix.to_numpy(dtype=float)
    order = np.argsort(-y.mean(1), kind="stable")
    y, labels = y[order], [labels[i] for i in order]
    i, j, p = all_pairs_p(y)
    adjusted = holm(p)
    with_best = {int(b): float(q) for a, b, q in zip(i, j, adjusted, strict=True) if a == 0}
    beaten = [b for b in sorted(with_best) if with_best[b] < alpha]
    tied = [b for b in sorted(with_best) if not with_best[b] < alpha]
    n, pairs = y.shape[1], len(p)
    said = []
    if beaten:
        named = ", ".join(f"{labels[b]} ({p_text(with_best[b])})" for b in beaten[:3])
        more = f" and {len(beaten) - 3} more" if len(beaten) > 3 else ""
        said.append(
            f"{labels[0]} beats {named}{more}; paired over {n} seeds, Holm over {pairs} pair{'s' if pairs != 1 else ''}"
        )
    open_pairs = max(1, int((~(adjusted < alpha)).sum()))
    for b in tied[:3]:
        needed = more_seeds(y[0], y[b], alpha=alpha / open_pairs)
        would = f", {needed} more seeds would" if needed else ""
        said.append(f"{labels[0]} and {labels[b]} cannot be told apart ({p_text(with_best[b])}){would}")
    if len(tied) > 3:
        said.append(f"nor can {labels[0]} be told from {len(tied) - 3} other configs")
    chance = probability_best(y)
    said.append(f"P(best) of {labels[0]} is {chance[0]:.2f}")
    curse = winners_curse(y)
    spread = float(np.median(y.std(1, ddof=1)))
    if len(y) > 2 and curse.optimism > 0.1 * spread:
        said.append(
            f"chosen and scored on the same seeds, the best flatters itself by about {rounded(curse.optimism, spread)};"
            f" leaving one seed out, the same config is chosen in {curse.agreement:.0%} of cases"
        )
    return said


def confirmation(sweep: Sweep, runs: pd.DataFrame, confirmed: pd.DataFrame, metric: str) -> list[str]:
    """Results on fresh seeds that took no part in choosing: these are the sweep's results."""
    said = []
    for row in confirmed_table(sweep, runs, confirmed, metric).to_dict("records"):
        line = f"confirmed on fresh seeds: {row['label']} -> {spread_text(row['mean'], row['sd'], row['n'])}"
        if row["search_n"]:
            line += f"; in the search it was {rounded(row['search'], row['sd'])}, {flattery(row)}"
        said.append(line)
    tied = ties(sweep)
    if said and tied:
        said.append(f"equal in the search to the last of these and not confirmed: {', '.join(tied[:5])}")
    return said


def speed(runs: pd.DataFrame) -> list[str]:
    """Configs whose epochs took much longer than others', and whether that was the device's doing."""
    used = runs[(runs["epoch"] > 0) & (runs["device_seconds"] > 0)]
    if not len(used):
        return []
    used = used.assign(pace=used["device_seconds"] / used["epoch"])
    by_device = used.groupby("device")["pace"].median().sort_values()
    said = []
    if len(by_device) > 1 and by_device.iloc[-1] > 1.3 * by_device.iloc[0]:
        fast, slow = by_device.index[0], by_device.index[-1]
        said.append(
            f"an epoch took {by_device.iloc[0]:.2g} s on {fast} and {by_device.iloc[-1]:.2g} s on {slow}: "
            "times of configs on different devices do not compare"
        )
    relative = used["pace"] / used["device"].map(by_device)
    by_config = relative.groupby(used["config_key"]).median()
    slow_ones = by_config[by_config > 1.5].sort_values(ascending=False)
    labels = used.drop_duplicates("config_key").set_index("config_key")["label"]
    if 0 < len(slow_ones) <= 0.25 * len(by_config):
        named = ", ".join(f"{labels.loc[str(key)]} ({factor:.1f} times)" for key, factor in slow_ones.head(3).items())
        said.append(f"slow beside others on the same device: {named}")
    return said


def _how_it_ran(sweep: Sweep, runs: pd.DataFrame) -> list[str]:
    info = sweep.info
    reasons = ", ".join(f"{n} {reason}" for reason, n in runs["stop_reason"].value_counts().items()) or "none"
    lines = [f"runs: {reasons}"]
    per_device = runs.groupby("device")["device_seconds"].agg(["sum", "count"])
    spent = ", ".join(
        f"{device_time(row['sum'], str(d))} on {d} ({row['count']:.0f} runs)" for d, row in per_device.iterrows()
    )
    started, ended = pd.to_datetime(runs["started_at"], utc=True), pd.to_datetime(runs["ended_at"], utc=True)
    if len(runs) and started.notna().any() and ended.notna().any():
        spent += f"; {(ended.max() - started.min()).total_seconds() / 60:.1f} min by the clock"
    if spent:
        lines.append(f"time: {spent}")
    git = info.get("git") or {}
    commit = f" at {str(git.get('commit'))[:10]}{' with uncommitted changes' if git.get('dirty') else ''}"
    command = _one_line(" ".join(map(str, info.get("command") or [])))
    if command:
        lines.append(f"command: `{command}`" + (commit if git.get("commit") else ""))
    return lines


def _one_line(text: str) -> str:
    """One line of Markdown that holds no HTML: labels and descriptions are users' own words."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(str(text).split()))
