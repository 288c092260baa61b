"""What the documentation says exists: its commands parse and mean something, its files and names are there."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import analysis.cli
import tuning.cli
import tuning.cluster
import tuning.doctor
import tuning.estimate
import tuning.sync
from tests.aws_commands import call_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
ROOMS = ("search_spaces", "trainables", "lanes", "tuning", "analysis")


class Stopped(Exception):
    """A command got as far as beginning its work."""


# --- commands ---


def commands(text: str) -> Iterator[list[str]]:
    """Every command of the page's sh and bash blocks as words; comments, prompts and line continuations taken off."""
    for block in re.findall(r"^ *```(?:sh|bash)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in map(str.strip, block.replace("\\\n", " ").splitlines()):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
            if words:
                yield words


COMMANDS = [
    pytest.param(words, id=f"{name}: {shlex.join(words)}")
    for page, name in zip(PAGES, IDS, strict=True)
    for words in commands(page.read_text())
]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the command would begin its work."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "python":
        check_python(arguments, monkeypatch)
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "mlflow":
        from mlflow.cli import cli

        command = cli.get_command(None, arguments[0])  # `ui` is an alias, known only so
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= flags
    elif program == "ray":
        check_ray(arguments, monkeypatch)
    elif program == "sbatch":
        assert os.access(ROOT / arguments[0], os.X_OK)
        check_tune(arguments[1], arguments[2:], monkeypatch)
    elif program == "aws":
        call_of(words)
    elif words[0] == ".ci/run":
        assert os.access(ROOT / words[0], os.X_OK)
    else:
        pytest.fail(f"this test does not know how to check `{program}`")


def check_ray(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own parser takes it, the cluster file is there, and what it would run on the head is right."""
    from ray.scripts.scripts import cli

    name, rest = arguments[0], arguments[1:]
    assert name in ("up", "down", "submit", "exec")
    found = cli.commands[name].make_context(name, list(rest)).params
    assert (ROOT / found["cluster_config_file"]).is_file()
    if name == "submit":
        check_tune(found["script"], list(found["script_args"]), monkeypatch)
    elif name == "exec":
        check(shlex.split(found["cmd"].removeprefix("cd ~/lanewise && ")), monkeypatch)


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[:2] == ["-m", "analysis"]:
        check_typer(typer.main.get_command(analysis.cli.app), arguments[2:])
    elif arguments[:2] == ["-m", "tuning.sync"]:
        app = typer.Typer()
        app.command()(tuning.sync.main)
        check_typer(typer.main.get_command(app), arguments[2:])
    elif arguments[:2] == ["-m", "tuning.cluster"]:
        check_typer(typer.main.get_command(tuning.cluster.app), arguments[2:])
        assert (ROOT / arguments[3]).is_file()
    elif arguments[:2] == ["-m", "tuning.doctor"]:
        app = typer.Typer()
        app.command()(tuning.doctor.main)
        check_typer(typer.main.get_command(app), arguments[2:])
        assert all((ROOT / argument).is_file() for argument in arguments[2:])
    elif arguments[:2] == ["-m", "pytest"]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", *arguments[2:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    elif re.fullmatch(r"tune_\w+\.py", arguments[0]):
        check_tune(arguments[0], arguments[1:], monkeypatch)
    else:
        path = ROOT / arguments[0]
        assert path.suffix == ".py"
        source = path.read_text()
        assert all(word.split("=")[0] in source for word in arguments[1:] if word.startswith("--"))


def check_typer(command: typer.main.TyperGroup, arguments: list[str]) -> None:
    """Parse, down to the subcommand, without calling it."""
    context = command.make_context(command.name or "", list(arguments))
    if hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        _, subcommand, rest = command.resolve_command(context, rest)
        assert subcommand is not None
        subcommand.make_context(subcommand.name, rest, parent=context)


def check_tune(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the first step is real: flags, sweep names, fields, values. Data are not read."""
    assert (ROOT / script).is_file()
    sweeps = importlib.import_module(f"search_spaces.{script.removeprefix('tune_').removesuffix('.py')}").SWEEPS
    if "--resume" in arguments:
        check_typer(typer.main.get_command(parser_of(sweeps)), arguments)
        return

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(tuning.cli, "search", stop)
    monkeypatch.setattr(tuning.cli, "check_data", lambda plan: None)
    monkeypatch.setattr(tuning.estimate, "print_plan", stop)
    folder = "--data-dir"  # may be missing here: any folder stands for it
    given = [str(ROOT) if before == folder else word for before, word in itertools.pairwise(["", *arguments])]
    with pytest.raises((Stopped, SystemExit)) as end:
        tuning.cli.main(sweeps, given)
    assert isinstance(end.value, Stopped) or end.value.code == 0


def parser_of(sweeps: object) -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(tuning.cli._command(sweeps))
    return app


@pytest.mark.parametrize("words", COMMANDS)
def test_command_would_run(words, monkeypatch):
    check(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python tune_ci_vit.py --nonsense",
        "python tune_ci_vit.py no_such_sweep",
        "python tune_ci_vit.py lr --set no_such_field=1",
        "python tune_ci_vit.py --resume demo --seedz 3",
        "python tune_nothing.py",
        "python -m analysis report",
        "python -m analysis no_such_command demo",
        "python -m tuning.sync demo --storrage x",
        "python benchmarks/nothing.py",
        "make no-such-target",
        "mlflow ui --no-such-flag x",
        "ray up no_such_cluster.yaml",
        "ray submit cluster.yaml tune_ci_vit.py no_such_sweep",
        "ray exec cluster.yaml 'python tune_ci_vit.py --nonsense'",
        "python -m tuning.cluster sideways cluster.yaml",
        "python -m tuning.doctor no_such_cluster.yaml",
        "sbatch clusters/slurm.sh tune_ci_vit.py --nonsense",
        "rm -rf /",
    ],
)
def test_a_wrong_command_is_seen(line, monkeypatch, capsys):
    (words,) = commands(f"```sh\n$ {line}\n```\n")
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(words, monkeypatch)


def test_readme_s_first_screen():
    lines = [shlex.join(words) for words in commands((ROOT / "README.md").read_text())]
    assert lines[:3] == ["make demo", "make test", "python tune_ci_vit.py"]


def test_list_and_help_run(monkeypatch):
    """The two cheapest commands, for every family, as a user runs them."""
    for script in sorted(ROOT.glob("tune_*.py")):
        done = subprocess.run([sys.executable, script.name, "--list"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "(default)" in done.stdout
    done = subprocess.run([sys.executable, "tune_ci_vit.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    pages = [page for page in PAGES if page.name != "benchmarks.md"]  # which speaks of the benchmarks' own flags
    documented = {word for page in pages for word in re.findall(r"(?<=`)--[a-z-]+", page.read_text())}
    known = set(re.findall(r"--[a-z-]+", done.stdout)) | analysis_flags()
    assert documented <= known, sorted(documented - known)


def analysis_flags() -> set[str]:
    group = typer.main.get_command(analysis.cli.app)
    return {
        flag for command in group.commands.values() for parameter in command.params for flag in parameter.opts
    }  # a flag may be documented without its command


# --- files and names ---


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_named_exist(page):
    text = page.read_text()
    for token in inline_code(text):
        path = token.split("::")[0].split(" ")[0]
        if re.fullmatch(r"(?:[\w.-]+/)+[\w.-]*", path) and (path.split("/")[0] in {p.name for p in ROOT.iterdir()}):
            made = path.startswith(("sweeps/", ".venv/"))
            assert made or (ROOT / path).exists(), f"{page.name} names {path}"
        elif path != "journal.md" and re.fullmatch(r"tune_\w+\.py|[\w-]+\.md|Makefile|[\w-]+\.toml", path):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.name} names {path}"
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_named_exists(page):
    """`tuning.sweep.SweepPlan.resolve` and the like, by importing them."""
    for token in inline_code(page.read_text()):
        if re.fullmatch(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+", token):
            assert resolves(token), f"{page.name} names {token}"


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, name) and name not in fields:
                return False
            found = getattr(found, name, None)
        return True
    return False


def test_names_that_do_not_exist_are_seen():
    assert resolves("trainables.family.Family.summarize")
    assert resolves("lanes.stack.Stack.tick")
    assert not resolves("lanes.stack.Stack.tock")
    assert not resolves("lanes.no_such_module")
