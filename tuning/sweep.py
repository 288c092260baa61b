"""One resolved command, frozen: everything a sweep is, as plain data that is written to sweep.json and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from search_spaces.space import Arms, Choice, Point, Range, Space
from trainables.family import BadValue, Family, Metric, Schedule, config_key, load_family, run_key
from tuning import objectives
from tuning.plain import check_plain
from tuning.secrets import redact, redact_command, tracking_uri
from tuning.storage import Bucket, Folder, Storage, here_for
from tuning.uris import check_uri

REDUCTION = 3
MOST_RUNGS = 3
SEGMENTS = {"median": 10, "pbt": 10, "none": 4}
"""How many reports a run makes under each scheduler that has no rungs."""
CONFIRMING = 5_000
"""Seeds from this one on (counted within the sweep's own) are kept for confirming: the search never uses them."""


@dataclass(frozen=True)
class Config:
    """A point of the space, resolved: what a Ray Tune trial runs.

    Args:
        point: the space's own coordinates.
        values: every program and hyper field it sets.
        key: config key.
        label: short readable name.
        epochs: length of each of its runs.
        reports: epochs after which it reports, ascending; the last is its end.
        algorithm: the program's `algorithm`, where the family has one.
        program, hyper: all their fields, defaults filled in.
    """

    point: Point
    values: dict[str, Any]
    key: str
    label: str
    epochs: int
    reports: tuple[int, ...]
    algorithm: str
    program: dict[str, Any]
    hyper: dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """A search, ready to run. See `tuning.cli` for what each field means to a user.

    `metric` is the first objective: schedulers, races and confirmation go by it; `others` are the further ones.
    """

    name: str
    family: str
    sweep: str
    doc: str
    space: Space
    base: Mapping[str, Any]
    seed: int
    seeds: int
    trials: int | None
    searcher: str
    scheduler: str
    metric: str
    covariates: tuple[str, ...]
    engine: str
    lanes: str
    storage: Path
    tracking_uri: str
    address: str = ""
    data_dir: Path | None = None
    max_concurrent: int = 0
    time_budget: float = 0.0
    placement: str = "spread"
    command: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    confirm: int = 0
    confirm_seeds: int = 0
    race: bool = False
    race_seeds: int = 0
    margin: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    bucket: str = ""
    """URL of the object storage that holds the sweeps; `storage` is then the driver's own folder, of its machine."""

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    @property
    def store(self) -> Storage:
        """Where the sweep's files go that others read."""
        return Bucket(self.bucket).at(self.name) if self.bucket else Folder(self.folder)

    @property
    def where(self) -> str:
        """The storage as a user names it."""
        return self.bucket or str(self.storage)

    @cached_property
    def loaded(self) -> Family:
        return load_family(self.family)

    @property
    def objective(self) -> Metric:
        return objectives.described(self.loaded, self.metric)

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.metric, *self.others)

    @property
    def modes(self) -> dict[str, str]:
        """Objective -> "max" or "min"."""
        return {name: objectives.described(self.loaded, name).mode for name in self.objectives}

    @property
    def budget(self) -> int:
        """Configs that will be tried."""
        if self.trials is not None:
            return self.trials
        size = self.space.size()
        if size is None:
            raise BadValue(f"{self.sweep} has a continuous range: say how many configs to try with --trials")
        return size

    def run_seeds(self, count: int | None = None, first: int = 0) -> list[int]:
        """The seeds of a config's runs: the same for every config, so that differences are paired."""
        return [self.seed * 10_000 + first + i for i in range(self.seeds if count is None else count)]

    def fresh_seeds(self) -> list[int]:
        """The seeds on which configs are confirmed: the same for every config, none of them used before."""
        return self.run_seeds(self.confirm_seeds or self.seeds, first=CONFIRMING)

    def resolve(self, point: Point) -> Config:
        """The config at a point. Raises `BadValue` where its fields contradict one another."""
        values = self.values_at(point)
        program, hyper = self.loaded.build(values)
        schedule = self.loaded.schedule(program)
        return Config(
            point=dict(point),
            values=values,
            key=config_key(self.loaded.name, program, hyper),
            label=self.space.label(point) or self.sweep,
            epochs=schedule.epochs,
            reports=self.report_epochs(schedule),
            algorithm=str(getattr(program, "algorithm", "")),
            program=asdict(program),
            hyper=asdict(hyper),
        )

    def values_at(self, point: Point) -> dict[str, Any]:
        """Field values: preset, then base, then the point, each overriding the ones before."""
        chosen = {**self.base, **self.space.assignments(point)}
        preset = chosen.pop("preset", None)
        if preset is not None:
            if preset not in self.loaded.presets:
                known = ", ".join(self.loaded.presets) or "none"
                raise BadValue(f"{self.family} has no preset '{preset}'; it has: {known}")
            chosen = {**self.loaded.presets[preset], **chosen}
        if self.covariates and "covariates" in self.loaded.program_fields:
            chosen["covariates"] = self.covariates
        return chosen

    def run_key(self, config: str, seed: int) -> str:
        return run_key(config, seed)

    # --- time: schedulers count `progress`, which is the same for runs of any length ---

    @property
    def reference(self) -> Config:
        """The config at the space's corner; its length stands for the sweep's."""
        return self.resolve(self.space.at({axis.name: 0.0 for axis in self.space.axes}))

    def rungs(self, schedule: Schedule) -> int:
        """Rungs below the end: as many thirds as the run has tasks (or epochs) for, at most MOST_RUNGS."""
        units = schedule.tasks if schedule.tasks > 1 else schedule.epochs
        count = 0
        while count < MOST_RUNGS and REDUCTION ** (count + 1) <= units:
            count += 1
        return count

    @cached_property
    def length(self) -> int:
        """`progress` at the end of every run: REDUCTION^rungs for ASHA, so that rungs fall on whole numbers."""
        if self.scheduler == "asha":
            program, _ = self.loaded.build(self.reference.values)
            return REDUCTION ** self.rungs(self.loaded.schedule(program))
        return SEGMENTS[self.scheduler]

    def report_epochs(self, schedule: Schedule) -> tuple[int, ...]:
        """Where a run of this schedule reports: rungs or segments, moved up to the end of a task, and its end."""
        unit = schedule.epochs_per_task if schedule.tasks > 1 else 1
        if self.scheduler == "asha":
            parts = [REDUCTION**-k for k in range(1, self.rungs(schedule) + 1)]
        else:
            parts = [k / SEGMENTS[self.scheduler] for k in range(1, SEGMENTS[self.scheduler])]
        epochs = {unit * math.ceil(round(schedule.epochs * part / unit, 9)) for part in parts}
        return (*tuple(sorted(e for e in epochs if e < schedule.epochs)), schedule.epochs)

    # --- to disk and back ---

    def to_plain(self) -> dict[str, Any]:
        """What sweep.json holds about the plan itself."""
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("space", "storage", "data_dir", "command", "extra", "covariates", "others", "bucket")
        }
        program, _ = self.loaded.build(self.reference.values)
        schedule = self.loaded.schedule(program)
        return {
            **plain,
            "base": dict(self.base),
            "space": self.space.to_plain(),
            "covariates": list(self.covariates),
            "others": list(self.others),
            "tracking_uri": redact(self.tracking_uri),
            "data_dir": str(self.data_dir) if self.data_dir else None,
            "command": redact_command(self.command),
            "headline": self.loaded.headline,
            "mode": self.objective.mode,
            "metrics": {name: asdict(metric) for name, metric in {**self.loaded.metrics, **objectives.COSTS}.items()},
            "schedule": asdict(schedule),
            "scheduler": {
                "name": self.scheduler,
                "reduction_factor": REDUCTION if self.scheduler == "asha" else None,
                "grace": self.reference.reports[0],
                "max_t": schedule.epochs,
                "rungs": list(self.reference.reports[:-1]),
            },
            **self.extra,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], storage: Path, bucket: str = "") -> SweepPlan:
        """The plan that `to_plain` described, its folder now under `storage`."""
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        known.update(
            space=Space.from_plain(plain["space"]),
            base={k: tuple(v) if isinstance(v, list) else v for k, v in plain["base"].items()},
            scheduler=plain["scheduler"]["name"],
            covariates=tuple(plain["covariates"]),
            others=tuple(plain.get("others", ())),
            data_dir=Path(plain["data_dir"]) if plain["data_dir"] else None,
            command=tuple(plain["command"]),
            storage=storage,
            bucket=bucket,
        )
        return cls(**known)

    @classmethod
    def load(cls, folder: Path, bucket: str = "") -> SweepPlan:
        """The plan of the sweep in `folder`, or in the bucket for which that is the driver's folder; or `BadValue`."""
        place = Bucket(bucket).at(folder.name) if bucket else Folder(folder)
        path = f"{place}/sweep.json"
        try:
            plain = json.loads(place.read("sweep.json"))
            check_plain(plain, folder.name)
            uri = plain["tracking_uri"] if bucket else tracking_uri(folder, plain)
            return cls.from_plain(plain | {"tracking_uri": uri}, folder.parent, bucket).checked()
        except FileNotFoundError:
            where = bucket or folder.parent
            raise BadValue(f"there is no sweep '{folder.name}' in {where}: {path} does not exist") from None
        except OSError as error:
            raise BadValue(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            why = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            raise BadValue(
                f"{path} is damaged, or this code reads it no more ({' '.join(why.split())[:200]}): "
                "it cannot be resumed, begin a new sweep"
            ) from error

    def checked(self) -> SweepPlan:
        """Itself, or `BadValue` where no sweep could be so: what was read from a file is not believed."""
        if self.metric not in self.loaded.metrics:
            raise BadValue(f"{self.family} has no metric '{self.metric}'")
        if self.tracking_uri:  # a sweep in a bucket may have none
            check_uri(self.tracking_uri, None, f"the tracking URI {redact(self.tracking_uri)!r}")
        for point in self.space.corners():
            self.resolve(point)
        return self


def driver_folder(storage: Storage) -> Path:
    """The folder of this machine that a driver works in: the storage itself, where that is a folder."""
    return storage.path if isinstance(storage, Folder) else here_for(storage, "drive")


def perturbable(space: Space, family: Family) -> list[Choice | Range]:
    """Axes that PBT may perturb: those that set one hyper, always. Never the program: that would be another net."""
    return [
        axis
        for axis in space.axes
        if not isinstance(axis, Arms) and not axis.when and (axis.sets or axis.name) in family.hyper_fields
    ]


def clamp(space: Space, point: Point) -> Point:
    """A point that PBT perturbed, moved back into its ranges."""
    inside = dict(point)
    for axis in space.active(point):
        if isinstance(axis, Range):
            value = min(max(point[axis.name], axis.low), axis.high)
            inside[axis.name] = round(value) if axis.integer else value
    return inside


def thaw(point: Mapping[str, Any]) -> Point:
    """A point read from JSON: lists are tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in point.items()}
