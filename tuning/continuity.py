"""What a sweep was begun with, and whether it is still so: library versions, code, data files, the meaning of configs.

Resuming with other versions or code is allowed and told; resuming with other data, or where a point of the space now
means another config, is refused: its runs would stand in one table with runs of something else.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainables.family import BadValue, load_family
from trainables.files import write_atomically
from tuning.journal import Event
from tuning.journal_check import checked
from tuning.provenance import git, versions
from tuning.sweep import SweepPlan, thaw

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 6


def facts(plan: SweepPlan) -> dict[str, Any]:
    """Versions, commit and code, as sweep.json and every `begin` of the journal hold them."""
    return {"versions": versions(), "git": git(ROOT), "code": code(plan.family)}


def code(family: str) -> dict[str, str]:
    """{file: first digits of its SHA-256} of what decides a run: the engines, the searchers, this family."""
    found = [*(ROOT / "lanes").glob("*.py"), *(ROOT / "trainables").glob("*.py")]
    found += [ROOT / "tuning" / f"{name}.py" for name in ("sweep", "searchers", "schedulers", "trial")]
    load_family(family)
    own_file = sys.modules[family if "." in family else f"trainables.{family}"].__file__
    if own_file is not None:
        own = Path(own_file)
        found += own.parent.rglob("*.py") if own.name == "__init__.py" else [own]
    found += (ROOT / "trainables" / "datasets").glob("*.py")
    return {_name(path): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(found)}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# --- data ---


def data_facts(files: Iterable[Path], cache: Path) -> dict[str, dict[str, Any]]:
    """{path: {bytes, sha256}} of data files. Digests are kept in `cache`, by path, size and time of change."""
    known_path = cache / "checksums.json"
    try:
        known = json.loads(known_path.read_text())
    except (OSError, ValueError):
        known = {}
    found, new = {}, {}
    for path in sorted(files):
        stat = path.stat()
        stamp = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        if stamp not in known:
            with open(path, "rb") as file:
                new[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path)] = {"bytes": stat.st_size, "sha256": known.get(stamp) or new[stamp]}
    if new:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(known_path, json.dumps({**known, **new}).encode())
    return found


def check_unchanged(data: Mapping[str, Mapping[str, Any]], cache: Path) -> None:
    """`BadValue` names the first data file that is not what it was when the sweep began."""
    for name, before in data.items():
        path = Path(name)
        if not path.is_file():
            raise BadValue(f"data file {name} is gone since the sweep began: bring it back, or begin a new sweep")
        size = path.stat().st_size
        if size != before["bytes"]:
            raise BadValue(
                f"data file {name} has changed since the sweep began: it has {size} bytes, it had {before['bytes']}: "
                "bring the old one back, or begin a new sweep"
            )
        if data_facts([path], cache)[name]["sha256"] != before["sha256"]:
            raise BadValue(
                f"data file {name} has changed since the sweep began: its contents differ (SHA-256): bring the old one "
                "back, or begin a new sweep"
            )


# --- meaning ---


def check_meaning(plan: SweepPlan, events: Iterable[Event]) -> None:
    """`BadValue` where a config that the journal holds is now another one, or cannot be made at all."""
    seen: set[str] = set()
    for event in events:
        if event["event"] != "proposed" or event["config_key"] in seen:
            continue
        seen.add(event["config_key"])
        what = f"the config {event['label'] or event['config_key']} of this sweep"
        advice = "go back to the code that began it, or begin a new sweep"
        try:
            config = plan.resolve(thaw(event["point"]))
        except (BadValue, KeyError) as error:
            raise BadValue(f"{what} cannot be made any more ({error}): {advice}") from error
        runs = {seed: plan.run_key(config.key, int(seed)) for seed in event["runs"]}
        same = config.key == event["config_key"] and config.epochs == event["epochs"]
        if same and (event["index"] < 0 or runs == event["runs"]):
            continue
        now = json.loads(json.dumps({**config.program, **config.hyper}))
        before = {**event["program"], **event["hyper"]}
        changed = [
            f"{name} {before.get(name, '(none)')} -> {now.get(name, '(none)')}"
            for name in sorted({*now, *before})
            if now.get(name) != before.get(name)
        ]
        if config.epochs != event["epochs"]:
            changed.append(f"epochs of a run {event['epochs']} -> {config.epochs}")
        raise BadValue(
            f"{what} now means another one ({', '.join(changed[:SHOWN]) or 'its key differs'}): the code has changed; "
            f"{advice}"
        )


def differences(plan: SweepPlan, plain: Mapping[str, Any], events: Iterable[Event]) -> list[str]:
    """What differs from the last time the sweep ran: `torch 2.11.0 -> 2.13.0`, `code lanes/stack.py`."""
    before: dict[str, Any] = {**plain}
    for event in events:
        if event["event"] == "begin":
            before.update({name: event[name] for name in ("versions", "git", "code") if name in event})
    now, told = facts(plan), []
    for name, version in now["versions"].items():
        if before.get("versions", {}).get(name, version) != version:
            told.append(f"{name} {before['versions'][name]} -> {version}")
    old = before.get("code")
    if old is not None:
        changed = sorted(name for name in {*old, *now["code"]} if old.get(name) != now["code"].get(name))
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            told.append(f"code {', '.join(changed[:SHOWN])}{more}")
    return told


def check(plan: SweepPlan, plain: Mapping[str, Any], cache: Path) -> list[str]:
    """Refuse, with `BadValue`, what cannot be resumed; otherwise what the user should know has changed."""
    check_unchanged(plain.get("data", {}), cache)
    events = checked(plan.folder / "journal.jsonl")
    check_meaning(plan, events)
    return differences(plan, plain, events)
