"""The command line of every tune script: one command, the same flags, one resolved plan."""

# no `from __future__ import annotations` here: typer evaluates the annotations below, which close over `sweeps`

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from search_spaces.sweeps import Sweep, Sweeps
from trainables.family import BadValue, Family, load_family
from tuning import objectives
from tuning.exits import run_command
from tuning.followup import ASKED, ask_again, check
from tuning.ground import trouble
from tuning.journal import cut_off
from tuning.keeping import (
    bring_here,
    check_tracking_uri,
    load_sweep,
    only_driver,
    opened,
    refuse_existing,
)
from tuning.locks import held
from tuning.names import checked_name
from tuning.runner import Outcome, check_data, run, terminal, write_sweep_json
from tuning.secrets import redact
from tuning.shared import check_cluster
from tuning.storage import Bucket, cache_dir, here_for
from tuning.sweep import SweepPlan, driver_folder, perturbable
from tuning.uris import check_uri
from tuning.values import parse_axis, parse_field, replace_axis, split

NOTHING_LATER: Mapping[str, Any] = dict.fromkeys(ASKED)


def main(sweeps: Sweeps, arguments: list[str] | None = None) -> None:
    """Run a family's command line and exit: 0 done, 1 failed, 2 a mistake of the user's (one line), 130 interrupted."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=f"Search over {sweeps.family}. SWEEP is a named sweep or a notebook's run (see --list).")(
        _command(sweeps)
    )
    run_command(app, arguments)


def _command(sweeps: Sweeps) -> Any:
    def command(
        sweep: Annotated[
            str | None,
            typer.Argument(help=f"named sweep or notebook run [default: {sweeps.default}]", show_default=False),
        ] = None,
        list_: Annotated[bool, typer.Option("--list", help="show the named sweeps and stop")] = False,
        plan_: Annotated[
            bool, typer.Option("--plan", help="show what would run and, from a few steps, how long; then stop")
        ] = False,
        data: Annotated[str | None, typer.Option(help="data set [default: the sweep's]")] = None,
        data_dir: Annotated[
            Path | None, typer.Option(help="folder of data sets", envvar="LANEWISE_DATA", show_envvar=True)
        ] = None,
        trials: Annotated[int | None, typer.Option(help="number of configs [default: the sweep's]")] = None,
        seeds: Annotated[int | None, typer.Option(help="runs per config [default: the sweep's]")] = None,
        seed: Annotated[int, typer.Option(help="fixes proposals, initial weights, data order and every draw")] = 0,
        searcher: Annotated[
            Literal["grid", "random", "qmc", "optuna", "hyperopt"] | None,
            typer.Option(help="how configs are proposed [default: the sweep's]"),
        ] = None,
        scheduler: Annotated[
            Literal["asha", "median", "pbt", "none"] | None,
            typer.Option(help="how hopeless configs are stopped [default: the sweep's]"),
        ] = None,
        metric: Annotated[
            str | None,
            typer.Option(
                help="what to optimise [default: the family's headline]; several with commas, device_seconds among "
                "them: a Pareto front, schedulers and --confirm going by the first"
            ),
        ] = None,
        confirm: Annotated[
            int | None,
            typer.Option(
                metavar="K",
                help="run the K best again at the end on fresh seeds: only those figures are the result; also with "
                "--resume",
            ),
        ] = None,
        confirm_seeds: Annotated[int | None, typer.Option(help="fresh seeds for --confirm [default: --seeds]")] = None,
        race: Annotated[
            bool,
            typer.Option("--race", help="give more seeds to configs that may still be the best, until one is left"),
        ] = False,
        race_seeds: Annotated[
            int | None, typer.Option(help="the most seeds a config gets in a race [default: 5 times --seeds]")
        ] = None,
        margin: Annotated[
            float | None, typer.Option(help="end a race when none left can be better than the first by this much")
        ] = None,
        covariates: Annotated[
            str | None, typer.Option(help="what else to record: names, 'all' or 'none' [default: the sweep's]")
        ] = None,
        lanes: Annotated[str, typer.Option(help="lanes a device and program: auto, off, or a number")] = "auto",
        engine: Annotated[
            Literal["auto", "serial", "stacked", "branched"], typer.Option(help="how lanes run; auto measures")
        ] = "auto",
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="fix a program or hyper field; repeatable"),
        ] = None,
        space: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME=LOW..HIGH[:log]|A,B,C", help="replace a dimension of the space; repeatable"),
        ] = None,
        name: Annotated[str | None, typer.Option(help="name of this sweep [default: SWEEP and the time]")] = None,
        storage: Annotated[
            str,
            typer.Option(help="folder of sweeps, or s3://BUCKET/PREFIX", envvar="LANEWISE_STORAGE", show_envvar=True),
        ] = "sweeps",
        tracking_uri: Annotated[
            str | None, typer.Option(help="MLflow server or database [default: sqlite:///STORAGE/mlflow.db]")
        ] = None,
        address: Annotated[str, typer.Option(help="Ray cluster to run on [default: this machine]")] = "",
        resume: Annotated[
            str | None, typer.Option(metavar="NAME", help="continue a sweep that was interrupted")
        ] = None,
        retry: Annotated[
            Literal["failed"] | None,
            typer.Option(help="with --resume: run configs again that crashed, ran out of memory or diverged"),
        ] = None,
        max_concurrent: Annotated[int, typer.Option(help="configs in flight; 0 fills the devices")] = 0,
        placement: Annotated[
            Literal["spread", "packed"],
            typer.Option(help="spread configs over all devices, or fill one before the next"),
        ] = "spread",
        time_budget: Annotated[float, typer.Option(help="stop after this many seconds; 0: no limit")] = 0.0,
        quiet: Annotated[bool, typer.Option("--quiet", help="print errors only")] = False,
    ) -> int:
        if list_:
            print_sweeps(sweeps)
            return 0
        later = {
            "confirm": confirm,
            "confirm_seeds": confirm_seeds,
            "race": race or None,
            "race_seeds": race_seeds,
            "margin": margin,
        }
        if resume is not None:
            plan = load_sweep(storage, checked_name("--resume", resume))
            plan = replace(plan, address=address or plan.address, max_concurrent=max_concurrent or plan.max_concurrent)
            return search(plan, quiet, resume=True, retry=retry is not None, later=later)
        if retry is not None:
            raise BadValue(f"--retry {retry} needs --resume NAME: which sweep?")
        plan = resolve(
            sweeps,
            sweep,
            data=data,
            data_dir=data_dir,
            trials=trials,
            seeds=seeds,
            seed=seed,
            searcher=searcher,
            scheduler=scheduler,
            metric=metric,
            covariates=covariates,
            lanes=lanes,
            engine=engine,
            settings=set_ or [],
            dimensions=space or [],
            name=name,
            storage=storage,
            tracking_uri=tracking_uri,
            address=address,
            max_concurrent=max_concurrent,
            placement=placement,
            time_budget=time_budget,
            later=later,
        )
        if plan_:
            from tuning.estimate import print_plan

            check_data(plan)
            print_plan(plan, terminal())
            return 0
        if not quiet and name is None:
            tell_unfinished(plan)
        return search(plan, quiet, resume=False)

    return command


def resolve(
    sweeps: Sweeps,
    sweep: str | None,
    *,
    data: str | None,
    data_dir: Path | None,
    trials: int | None,
    seeds: int | None,
    seed: int,
    searcher: str | None,
    scheduler: str | None,
    metric: str | None,
    covariates: str | None,
    lanes: str,
    engine: str,
    settings: list[str],
    dimensions: list[str],
    name: str | None,
    storage: str | Path,
    tracking_uri: str | None,
    address: str,
    max_concurrent: int,
    time_budget: float,
    placement: str = "spread",
    later: Mapping[str, Any] = NOTHING_LATER,
) -> SweepPlan:
    """Flags over the named sweep over the family's defaults. Raises `BadValue`; touches no file.

    `later` is what to do after the search, by the names in `tuning.followup.ASKED`; None is what no flag says.
    """
    chosen, family = sweeps.find(sweep), load_family(sweeps.family)
    space, base = chosen.space, dict(chosen.base)
    for text in dimensions:
        space = replace_axis(space, parse_axis(family, space, text))
    fixed = dict(split("--set", text) for text in settings)
    if data is not None:
        fixed["data"] = data
    for field, text in fixed.items():
        base[field] = text if field == "preset" else parse_field(family, field, text)
        space = space.without(field)
    _within("--seeds", seeds, 1, 9_999)
    _within("--trials", trials, 1, 10_000_000)
    _within("--max-concurrent", max_concurrent, 0, 1_000_000)
    _within("--time-budget", time_budget, 0, 1e9)
    if not 0 <= seed < 200_000:
        raise BadValue(f"--seed {seed} should be between 0 and 199999")
    number = int(lanes) if lanes.isascii() and lanes.isdecimal() and len(lanes) < 7 else 0
    if lanes not in ("auto", "off") and number < 1:
        raise BadValue(f"--lanes {lanes} should be auto, off, or a number of lanes above 0")
    if engine == "branched" and not address and not _has_gpu():
        raise BadValue("--engine branched runs on a GPU; on this machine choose auto, serial or stacked")
    if data_dir is not None and not _is_folder(data_dir):
        raise BadValue(f"--data-dir {str(data_dir)[:200]!r} is not a folder")
    wanted = (chosen.metric or family.headline) if metric is None else metric
    first, *others = objectives.parse(family, wanted)
    place = opened(storage)
    if tracking_uri is not None:
        check_uri(tracking_uri, driver_folder(place))
        if isinstance(place, Bucket):
            check_tracking_uri(tracking_uri)
    if name is None:
        name = f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}"
    searcher = searcher or chosen.searcher
    plan = SweepPlan(
        name=checked_name("--name", name),
        family=sweeps.family,
        sweep=chosen.name,
        doc=chosen.doc,
        space=space,
        base=base,
        seed=seed,
        seeds=chosen.seeds if seeds is None else seeds,
        trials=trials if trials is not None else chosen.trials,
        searcher=searcher,
        scheduler=scheduler or chosen.scheduler,
        metric=first,
        others=tuple(others),
        covariates=_covariates(covariates, chosen, family),
        engine=engine,
        lanes=lanes,
        storage=driver_folder(place),
        bucket=place.url if isinstance(place, Bucket) else "",
        tracking_uri=tracking_uri or ("" if isinstance(place, Bucket) else f"sqlite:///{place.path / 'mlflow.db'}"),
        address=address,
        data_dir=data_dir.resolve() if data_dir else None,
        max_concurrent=max_concurrent,
        placement=placement,
        time_budget=time_budget,
        command=tuple(sys.argv),
        confirm=later["confirm"] or chosen.confirm,
        confirm_seeds=later["confirm_seeds"] or 0,
        race=bool(later["race"] or chosen.race),
        race_seeds=later["race_seeds"] or 0,
        margin=later["margin"],
    )
    objectives.check(plan.objectives, searcher, plan.scheduler)
    if searcher == "grid":
        grid = space.size()
        if grid is None:
            next(space.grid())  # names the range that cannot be enumerated
        plan = replace(plan, trials=min(plan.trials or grid or 0, grid or 0))
    elif plan.trials is None and space.size() is None:
        raise BadValue(f"{chosen.name} has a continuous range: say how many configs to try with --trials")
    if plan.scheduler == "pbt" and not perturbable(space, family):
        raise BadValue(
            f"--scheduler pbt has nothing to perturb: {chosen.name} has no axis that sets one of the hypers "
            f"{', '.join(family.hyper_fields)}"
        )
    check(plan, later)
    for point in space.corners():
        plan.resolve(point)  # contradictions among the fields are told here
    return plan


def _covariates(flag: str | None, chosen: Sweep, family: Family) -> tuple[str, ...]:
    """Names that the family records; ("all",) for one that offers no choice."""
    if flag is None:
        return chosen.covariates
    if flag == "all":
        return family.covariates or ("all",)
    names = () if flag == "none" else tuple(part.strip() for part in flag.split(",") if part.strip())
    for name in names:
        if name not in family.covariates:
            known = ", ".join((*family.covariates, "all", "none"))
            raise BadValue(f"--covariates {name} is nothing {family.name} records; it has: {known}")
    return names


def _within(flag: str, value: float | None, low: int, high: float) -> None:
    if value is None or low <= value <= high:
        return
    if value < low:
        raise BadValue(f"{flag} {value} should be {low} or more")
    raise BadValue(f"{flag} {value} should be {high:,.0f} or less")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no name that a file system could have
        return False


def search(
    plan: SweepPlan, quiet: bool, resume: bool, retry: bool = False, later: Mapping[str, Any] = NOTHING_LATER
) -> int:
    """Run a plan with everything a person sees. Returns the exit code."""
    if not resume:
        refuse_existing(plan)
    with contextlib.ExitStack() as stack:
        if resume:
            may_write = only_driver(plan, stack)
            bring_here(plan)
            for change in check_resume(plan):
                if not quiet:
                    print(f"warning: since this sweep last ran: {change}", file=sys.stderr)
            plan = ask_again(plan, later)
        data = check_data(plan)
        if plan.address:
            check_cluster(plan)
        if not resume:
            if plan.bucket:
                may_write = only_driver(plan, stack)
            write_sweep_json(plan, Path(sys.argv[0]).resolve().parent, data)
            if not plan.bucket:  # its lock is in the folder
                may_write = only_driver(plan, stack)
        return _run(plan, quiet, resume, retry, may_write)


def _run(plan: SweepPlan, quiet: bool, resume: bool, retry: bool, may_write: Callable[[], None]) -> int:
    console = terminal()
    again = f"continue with: {_resume_command(plan)}"
    try:
        outcome = run(plan, console, quiet, resume, retry, last_words=f"stopped at once; {again}", may_write=may_write)
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    except Exception as error:
        lost = trouble(plan.folder, error).replace(str(plan.folder), str(plan.store))
        if lost:
            print(f"the sweep stopped: {lost}; then {again}", file=sys.stderr)
            return 1
        # Tune's own errors are whole tracebacks; those are in the log
        why = redact((str(error).strip().splitlines() or ["no message"])[-1].strip())
        print(
            f"the sweep failed ({type(error).__name__}: {why}): see {_shown(plan.folder / 'log.txt')}; {again}",
            file=sys.stderr,
        )
        return 1
    if not quiet:
        print_end(plan, outcome, console)
    if outcome.reason == "too many crashes":
        print(f"the sweep stopped: {outcome.detail}; mend it, then {again} --retry failed", file=sys.stderr)
        return 1
    if outcome.reason == "interrupted":
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    return 0


def check_resume(plan: SweepPlan) -> list[str]:
    """What has changed since the sweep last ran; `BadValue` where it cannot go on."""
    from tuning.continuity import check
    from tuning.runs import load_plain

    return check(plan, load_plain(plan.folder), cache_dir())


def tell_unfinished(plan: SweepPlan) -> None:
    """A sweep of this script that was cut off may be what the user means: say how it goes on. At most the newest."""
    newest: tuple[float, str] | None = None
    if plan.bucket:  # looking would be a request a sweep
        return
    for path in plan.storage.glob("*/journal.jsonl"):
        try:
            old = SweepPlan.load(path.parent)
            if (old.family, old.sweep) != (plan.family, plan.sweep) or not cut_off(path):
                continue
            with held(path.with_name("driver.lock")):  # it does not run just now
                changed = path.stat().st_mtime
        except (BadValue, OSError):
            continue
        if newest is None or changed > newest[0]:
            newest = changed, _resume_command(old)
    if newest is not None:
        print(f"a sweep before this was cut off; it continues with: {newest[1]}", file=sys.stderr)


def print_end(plan: SweepPlan, outcome: Outcome, console: Any) -> None:
    """The three lines: where the report is, how to open MLflow, how to resume. A fourth, where configs failed: why is
    where, and how to run them again."""
    uri = plan.tracking_uri or f"sqlite:///{_read_folder(plan) / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        command = f"mlflow ui --backend-store-uri sqlite:///{_shown(Path(uri.removeprefix('sqlite:///')))}"
    else:
        command = redact(uri)
    page = Path(plan.name, "report", "index.html")
    lines = [("report", _shown(_read_folder(plan) / page))]
    if plan.bucket:
        lines.append(("", f"{plan.bucket}/{page}"))
    resume = _resume_command(plan)
    lines += [("MLflow", command), ("resume", resume)]
    failed = {reason: outcome.ended.get(reason, 0) for reason in ("crashed", "oom")}
    if any(failed.values()) and outcome.reason != "too many crashes":  # which says so itself
        errors = f"{plan.bucket}/{plan.name}/errors" if plan.bucket else _shown(plan.folder / "errors")
        counts = ", ".join(f"{count} {reason}" for reason, count in failed.items() if count)
        why = f" (tracebacks in {errors}/)" if failed["crashed"] else ""
        lines.append(("failed", f"{counts}{why}; again with: {resume} --retry failed"))
    console.print()
    for name, text in lines:  # whole on any terminal: they are copied
        console.print(Text(f"{name:<6}  {text}"), soft_wrap=True)


def _read_folder(plan: SweepPlan) -> Path:
    """The storage, or this machine's copy of it for readers."""
    return here_for(Bucket(plan.bucket), "read") if plan.bucket else plan.storage


def _resume_command(plan: SweepPlan) -> str:
    script = Path(plan.command[0]).name if plan.command else "tune.py"
    if Path("sweeps").resolve() == plan.storage:
        return f"python {script} --resume {plan.name}"
    return f"python {script} --resume {plan.name} --storage {plan.bucket or _shown(plan.storage)}"


def _shown(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def print_sweeps(sweeps: Sweeps) -> None:
    """Every named sweep: configs, seeds, steps of one run, and the notebook's run names in it."""
    console, family = terminal(), load_family(sweeps.family)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("sweep", "left"), ("configs", "right"), ("seeds", "right"), ("steps/run", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("what")
    for sweep in sweeps.sweeps:
        point = sweep.space.at({axis.name: 0.0 for axis in sweep.space.axes})
        values = {**sweep.base, **sweep.space.assignments(point)}
        values = {**family.presets.get(values.pop("preset", ""), {}), **values}
        steps = family.schedule(family.build(values)[0]).steps
        names = ", ".join(sweep.run_names())
        what = f"{sweep.doc} [{sweep.kind}]" + (f"\nruns: {names}" if names else "")
        mark = " (default)" if sweep.name == sweeps.default else ""
        table.add_row(f"{sweep.name}{mark}", str(sweep.configs or "any"), str(sweep.seeds), f"{steps:,}", Text(what))
    console.print(table)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
