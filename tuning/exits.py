"""How commands end: a mistake of the user's is one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from trainables.family import BadValue

# typer brings its own copy of click; this is its base class of usage errors, whichever copy that is
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run_command(app: typer.Typer, arguments: list[str] | None, prog: str | None = None) -> NoReturn:
    """Run a command and exit: what it returns, 2 a mistake of the user's (one line), 130 interrupted."""
    prog = prog or Path(sys.argv[0]).name
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name=prog, standalone_mode=False)
    except ClickException as error:
        print(" ".join(error.format_message().split()), file=sys.stderr)
        code = 2
    except typer.Abort:
        code = 130
    except BadValue as error:
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        code = 2
    sys.exit(code or 0)
