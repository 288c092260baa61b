"""What a user did wrong, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: what was wrong, where, and what to do. The command line prints it and exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """`name` is none of `known`: the nearest ones first, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"there is: {', '.join(known)}" if known else "there is none yet"
    return UserError(f"no {kind} '{name}'{where}: {hint}")
