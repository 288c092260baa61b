"""Names that users give and that become files."""

from __future__ import annotations

import re

from trainables.family import BadValue

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_name(flag: str, name: str) -> str:
    """A name that stays inside the storage folder, or `BadValue`."""
    if not NAME.fullmatch(name):
        raise BadValue(
            f"{flag} {name[:120]!r} should be letters, digits, '.', '_' or '-', at most 100, not starting with a dot"
        )
    return name
