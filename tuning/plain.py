"""Is a sweep.json what a command wrote? Asked before it is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainables.family import BadValue

PLAIN: dict[str, Any] = {
    "name": str,
    "family": str,
    "sweep": str,
    "space": list,
    "base": dict,
    "seed": int,
    "seeds": int,
    "trials": (int, type(None)),
    "searcher": str,
    "metric": str,
    "covariates": list,
    "engine": str,
    "lanes": str,
    "tracking_uri": str,
    "scheduler": dict,
}
"""What sweep.json must hold for a sweep to go on."""


def check_plain(plain: Any, name: str) -> None:
    """Raises ValueError where sweep.json of the folder `name` holds what no command ever wrote."""
    if not isinstance(plain, dict):
        raise ValueError("it holds no JSON object")
    for field_name, kind in PLAIN.items():
        value = plain[field_name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{field_name} is {str(value)[:60]!r}")
    if plain["name"] != name:
        raise ValueError(f"it is of the sweep {plain['name'][:100]!r}: give its folder that name")
    allowed = {
        "searcher": ("grid", "random", "qmc", "optuna", "hyperopt"),
        "engine": ("auto", "serial", "stacked", "branched"),
    }
    for field_name, known in allowed.items():
        if plain[field_name] not in known:
            raise ValueError(f"{field_name} is {plain[field_name][:60]!r}")
    if plain["scheduler"]["name"] not in ("asha", "median", "pbt", "none"):
        raise ValueError(f"scheduler is {plain['scheduler']['name']!r}")
    if not (plain["lanes"] in ("auto", "off") or (plain["lanes"].isascii() and plain["lanes"].isdecimal())):
        raise ValueError(f"lanes is {plain['lanes'][:60]!r}")
    if plain["seeds"] < 1 or plain["seed"] < 0 or (plain["trials"] is not None and plain["trials"] < 1):
        raise ValueError("seeds, seed or trials is too small")
    if not all(isinstance(name, str) for name in plain["covariates"]):
        raise ValueError("covariates are no names")


def load_checked(folder: Path) -> dict[str, Any]:
    """The sweep.json of a sweep's folder, or `BadValue`. FileNotFoundError where there is none."""
    path = folder / "sweep.json"
    try:
        plain = json.loads(path.read_bytes())
        check_plain(plain, folder.name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise BadValue(f"{path} is damaged ({' '.join(why.split())[:200]})") from error
    return plain
