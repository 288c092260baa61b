"""Reading `--set name=value` and `--space name=...` by the type of the field they name."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from search_spaces.space import Arms, Axis, Choice, Range, Space
from trainables.family import BadValue, Family

LARGEST = 2**63 - 1
"""What a tensor can hold."""
_RANGE = re.compile(r"^(?P<low>[^:]+?)\.\.(?P<high>[^:]+?)(?P<log>:log)?$")


def split(option: str, text: str) -> tuple[str, str]:
    """`name=value` -> (name, value)."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise BadValue(f"{option} {text!r} should look like name=value")
    return name.strip(), value.strip()


def parse_field(family: Family, name: str, text: str) -> Any:
    """The value of a program or hyper field, by the type of its default."""
    fields = family.program_fields | family.hyper_fields
    if name not in fields:
        raise BadValue(f"{family.name} has no field '{name}'; it has: {', '.join(sorted(fields))}")
    return parse_like(name, text, fields[name].default)


def parse_like(name: str, text: str, like: Any) -> Any:
    """Text as a value of the same type as `like`; tuples take commas or dashes."""
    if isinstance(like, bool):
        if text.lower() in ("true", "yes", "1", "on"):
            return True
        if text.lower() in ("false", "no", "0", "off"):
            return False
        raise BadValue(f"{name} = {text!r} should be true or false")
    if isinstance(like, int):
        try:
            number = int(text)
        except ValueError:
            raise BadValue(f"{name} = {text[:80]!r} should be a whole number") from None
        if abs(number) > LARGEST:
            raise BadValue(f"{name} = {text[:80]} is too large")
        return number
    if isinstance(like, float):
        return _number(name, text)
    if isinstance(like, tuple):
        parts = [part for part in re.split(r"[,\-x]" if like and isinstance(like[0], int) else ",", text) if part]
        return tuple(parse_like(name, part.strip(), like[0] if like else "") for part in parts)
    if like is dataclasses.MISSING:
        raise BadValue(f"{name} has no default to tell its type by")
    return text


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise BadValue(f"{name} = {text[:80]!r} should be a number") from None
    if not math.isfinite(number):
        raise BadValue(f"{name} = {text[:80]} should be a finite number")
    return number


def parse_axis(family: Family, space: Space, text: str) -> Axis:
    """`name=low..high[:log]` or `name=a,b,c` as the axis it replaces or adds: one of the space, or a field."""
    name, value = split("--space", text)
    old = next((axis for axis in space.axes if axis.name == name), None)
    if isinstance(old, Arms):
        labels = [label.strip() for label in value.split(",")]
        if len(set(labels)) != len(labels):
            raise BadValue(f"--space {name} lists an arm twice: {value}")
        for label in labels:
            if label not in old.arms:
                raise BadValue(f"--space {name} has no arm '{label}'; it has: {', '.join(old.arms)}")
        return Arms(name, {label: old.arms[label] for label in labels}, old.when, old.run_names)
    sets = old.sets if isinstance(old, (Choice, Range)) and old.sets else name
    when = old.when if old is not None else {}
    fields = family.program_fields | family.hyper_fields
    if sets not in fields:
        raise BadValue(
            f"--space {name}: neither an axis of this sweep ({', '.join(a.name for a in space.axes)}) nor a field of "
            f"{family.name} ({', '.join(sorted(fields))})"
        )
    like = fields[sets].default
    match = _RANGE.match(value)
    own = "" if sets == name else sets
    if match:
        integer = isinstance(like, int) and not isinstance(like, bool)
        if not integer and not isinstance(like, float):
            raise BadValue(f"--space {name} = {value}: {sets} is not a number; list its values: {name}=a,b,c")
        low, high = (parse_like(f"--space {name}", match[end], like) for end in ("low", "high"))
        return Range(name, low, high, bool(match["log"]), integer, own, when)
    return Choice(
        name, tuple(parse_like(f"--space {name}", part.strip(), like) for part in value.split(",")), own, when
    )


def replace_axis(space: Space, axis: Axis) -> Space:
    """The space with an axis given by the user. Where its field was set by other axes, those give way."""
    if axis.name in space or isinstance(axis, Arms):
        return space.replaced(axis)
    return Space((*space.without(axis.sets or axis.name).axes, axis))
