"""The contract of a model family: pure functions of ONE lane, and the plain data that names a run.

A family says what one trial computes. It knows nothing of Ray, MLflow, devices shared with others, or how many
trials train beside it; the engines in `lanes/` run its functions one lane at a time, stacked under `torch.func.vmap`,
or compiled. That works only if every function keeps these rules:

* no Python branch on a tensor's value, no `.item()`, no in-place change of an argument;
* every tensor is made on `state["seed"].device` (or on the device of the argument at hand), never on a default device;
* every random draw comes from `trainables.draws`, keyed by (seed, step, purpose);
* per-lane numbers arrive in `hyper` as 0-d tensors; what changes shapes or code stands in `program`.

A family is a package `trainables/<name>/` that exports `FAMILY`. Nothing else has to be edited to add one.

This module does not import torch, and a family's package need not either (`Late`): the command line, the driver and the
processes that only keep records read what a family is, and never train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = dict[str, Any]
"""Nested dict of tensors. Always holds `seed` and `step` (0-d int32) at its top level."""

Hypers: TypeAlias = "Mapping[str, Tensor]"
"""Field name of the family's Hyper -> 0-d tensor in the program's dtype."""

Arrays: TypeAlias = "Mapping[str, Tensor]"
"""Name -> tensor resident on the device, shared by all lanes of a program."""

Batch = Any
"""Whatever the family's `batch` returns: a (nested) dict or tuple of tensors."""


class BadValue(ValueError):
    """A user's mistake, told in one line: what was wrong, where, and what to do. Never a bug."""


@dataclass(frozen=True)
class Metric:
    """What a number in a curve means.

    Args:
        unit: "fraction", "nats", "count", "1" ...
        mode: "max" or "min" if better has a direction, else "none" (a covariate).
        doc: one line.
    """

    unit: str
    mode: Literal["max", "min", "none"]
    doc: str


@dataclass(frozen=True)
class Schedule:
    """How long one run is, and where its epochs end (an epoch ends with an evaluation and may end with a report).

    Args:
        steps_per_epoch: update steps between two evaluations.
        epochs: number of epochs in the whole run.
        epochs_per_task: epochs spent on one task of a continual stream; equals `epochs` where there is one task.
    """

    steps_per_epoch: int
    epochs: int
    epochs_per_task: int

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def tasks(self) -> int:
        return self.epochs // self.epochs_per_task

    def task_of(self, epoch: int) -> int:
        """Zero-based task to which the zero-based `epoch` belongs."""
        return epoch // self.epochs_per_task


@dataclass(frozen=True)
class Case:
    """A tiny program and hyper that exercise one method in seconds; the conformance suites run every case."""

    program: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, float] = field(default_factory=dict)


def no_covariates(program: Any, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """The default `inspect`: nothing beyond the metrics."""
    return {}


def last_values(program: Any, epochs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The default `summarize`: every metric's last value."""
    return {name: float(values[-1]) for name, values in epochs.items() if len(values)}


def never(program: Any) -> bool:
    """The default `convolves`."""
    return False


def accept(program: Any) -> None:
    """The default `validate`: field types were already checked when the program was built."""


@dataclass(frozen=True)
class Late:
    """A function of a family, named instead of imported: `Late("trainables.ci_vit.learning", "step")`.

    Its module is imported when the family is first asked for it, so that whoever only reads what a family is does not
    pay for torch.
    """

    module: str
    name: str

    def __call__(self, *args: Any) -> Any:
        """So that a type checker takes it for the function; the family hands out the function itself."""
        return self.found()(*args)

    def found(self) -> Callable:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Family:
    """A model family: eleven pure functions and what there is to know about them.

    A function may be given as `Late`; reading the attribute gives the function.

    Shapes below: S = steps_per_epoch, T = number of test batches, `...` = the family's own.

    Args:
        name: the package's name under `trainables/`.
        Program: frozen dataclass of ints, floats, strings, bools and tuples of them. It must have the fields `data`
            (str) and `precision` ("float32", "float64" or "bf16"). A field with `metadata={"identity": False}` (what
            to log, say) separates stacks but is left out of the config key.
        Hyper: frozen dataclass of floats: everything that may differ between lanes of one stack.
        metrics: every name that `step`, `evaluate` (with its set) and `summarize` return -> `Metric`.
        headline: the key of `summarize` that a sweep optimises by default.
        load: (program, data_dir or None, cache_dir) -> {name: numpy array}. Decodes once, memory-mapped under
            `cache_dir` where large; raises `BadValue` naming a file that is missing or malformed.
        schedule: (program) -> Schedule. Needs no data.
        init: (program, hyper, seed 0-d int32) -> state.
        order: (program, arrays, seed, epoch) -> {name: tensor [S, ...]}: what each step of that zero-based epoch reads
            (indices, permutations). Not compiled; seed and epoch are Python ints.
        batch: (program, arrays, row) -> batch, `row` being one step's slice of `order` (or of `test_order`).
        step: (program, state, hyper, batch) -> (state, {metric: 0-d tensor}). Increments `state["step"]`. In bf16 too,
            neither what it returns nor what `evaluate` does is of 16 bits: sums would lose their units.
        test_order: (program, arrays, seed, epoch) -> {name: tensor [T, ...]}: the evaluation batches after that epoch.
            A short last batch is padded with index -1. Or {set: {name: tensor}}, where there may be other sets at
            another epoch (the test set at the last one only, say): their metrics are `evaluate`'s under
            "<set>_<metric>". One batch has the same names and shapes in all sets: each other would be compiled anew.
        evaluate: (program, state, hyper, batch) -> {metric: SUM over the batch's real examples, "count": their number};
            the engine adds batches up and divides by the count.
        inspect: (program, state, hyper) -> {name: tensor of any small shape}, read at the end of an epoch if the sweep
            asked for covariates.
        summarize: (program, {metric: float array [epochs so far]}) -> {name: float}. The curves hold the mean over each
            epoch of what `step` returned and the results of `evaluate`. Must contain `headline`.
        validate: (program) -> None, raising `BadValue` where fields contradict one another.
        covariates: names of what can be recorded beside the metrics, where the program has a field `covariates` to
            choose among them; without one, `inspect` records all it has or nothing.
        convolves: (program) -> whether it has convolutions that become grouped ones under vmap, which are slow: on a
            GPU the probe then tries the branched engine before the stacked one.
        presets: name -> program and hyper fields to start from (`--set preset=...`).
        cases: small programs, one or more for every method.
    """

    name: str
    Program: type
    Hyper: type
    metrics: Mapping[str, Metric]
    headline: str
    load: Callable[[Any, Path | None, Path], Mapping[str, np.ndarray]]
    schedule: Callable[[Any], Schedule]
    init: Callable[[Any, Hypers, Tensor], State]
    order: Callable[[Any, Arrays, int, int], dict[str, Tensor]]
    batch: Callable[[Any, Arrays, dict[str, Tensor]], Batch]
    step: Callable[[Any, State, Hypers, Batch], tuple[State, dict[str, Tensor]]]
    test_order: Callable[[Any, Arrays, int, int], dict[str, Any]]
    evaluate: Callable[[Any, State, Hypers, Batch], dict[str, Tensor]]
    # defaults from factories: a class attribute would be found where a late function has not been imported yet
    inspect: Callable[[Any, State, Hypers], dict[str, Tensor]] = field(default_factory=lambda: no_covariates)
    summarize: Callable[[Any, Mapping[str, np.ndarray]], dict[str, float]] = field(default_factory=lambda: last_values)
    validate: Callable[[Any], None] = field(default_factory=lambda: accept)
    covariates: tuple[str, ...] = ()
    convolves: Callable[[Any], bool] = field(default_factory=lambda: never)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cases: Mapping[str, Case] = field(default_factory=dict)

    def __post_init__(self) -> None:
        late = {name: value for name, value in vars(self).items() if isinstance(value, Late)}
        for name in late:
            object.__delattr__(self, name)
        object.__setattr__(self, "_late", late)

    def __getattr__(self, name: str) -> Any:
        """Import a late function, once; from then on it is a plain attribute (the compiler sees nothing else)."""
        late = self.__dict__.get("_late", {})
        if name not in late:
            raise AttributeError(f"a family has no {name}")
        function = late[name].found()
        object.__setattr__(self, name, function)
        return function

    def import_all(self) -> None:
        """Import what is late now. An import in the middle of a step would break the graph that is compiled of it."""
        for name in self._late:
            getattr(self, name)

    @property
    def program_fields(self) -> dict[str, dataclasses.Field]:
        return {f.name: f for f in dataclasses.fields(self.Program)}

    @property
    def hyper_fields(self) -> dict[str, dataclasses.Field]:
        return {f.name: f for f in dataclasses.fields(self.Hyper)}

    def build(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        """Program and hyper from one flat mapping of field values; defaults elsewhere. Raises `BadValue`."""
        known = self.program_fields.keys() | self.hyper_fields.keys()
        for name in values:
            if name not in known:
                raise BadValue(f"{self.name} has no field '{name}'; it has: {', '.join(sorted(known))}")
        program = self.Program(**_typed(self.Program, {k: v for k, v in values.items() if k in self.program_fields}))
        hyper = self.Hyper(**_typed(self.Hyper, {k: v for k, v in values.items() if k in self.hyper_fields}))
        if program.precision not in PRECISIONS:
            raise BadValue(f"precision '{program.precision}' is not one of {', '.join(PRECISIONS)}")
        self.validate(program)
        return program, hyper


PRECISIONS = {"float32": "float32", "float64": "float64", "bf16": "float32"}
"""Precision -> name of the dtype of parameters and moments; bf16 keeps float32 master weights and autocasts the forward
pass."""


def dtype_of(program: Any) -> torch.dtype:
    import torch

    return getattr(torch, PRECISIONS[program.precision])


def hyper_tensors(program: Any, hyper: Any, device: torch.device | str) -> dict[str, Tensor]:
    """One lane's hypers as 0-d tensors in the program's dtype."""
    import torch

    names = [field.name for field in dataclasses.fields(hyper)]
    values = torch.tensor([getattr(hyper, name) for name in names], dtype=dtype_of(program))
    if torch.device(device).type == "cuda":
        values = values.pin_memory()  # nobody waits for the copy
    return dict(zip(names, values.to(device, non_blocking=True).unbind(), strict=True))  # one copy, not one each


def load_family(name: str) -> Family:
    """The `FAMILY` of `trainables/<name>/`, or of any importable module when `name` has a dot in it."""
    module = name if "." in name else f"trainables.{name}"
    try:
        return importlib.import_module(module).FAMILY
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise BadValue(f"no model family '{name}': module {module} does not exist") from error
        raise


# --- identity -------------------------------------------------------------------------------------------------------


def _typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Field values coerced to the type of the field's default (1 -> 1.0, [1, 2] -> (1, 2)), or `BadValue`."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    return {name: _coerce(name, value, defaults[name]) for name, value in values.items()}


def _coerce(name: str, value: Any, like: Any) -> Any:
    if isinstance(like, bool):
        if isinstance(value, bool):
            return value
        raise BadValue(f"{name} = {value!r} should be true or false")
    if isinstance(like, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise BadValue(f"{name} = {value!r} should be a number")
    if isinstance(like, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise BadValue(f"{name} = {value!r} should be a whole number")
    if isinstance(like, tuple):
        items = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_coerce(name, item, like[0]) if like else item for item in items)
    if isinstance(like, str):
        if isinstance(value, str):
            return value
        raise BadValue(f"{name} = {value!r} should be text")
    return value


def canonical(family: str, program: Any, hyper: Any | None = None) -> dict[str, Any]:
    """The plain data that a key is the hash of: every identity field, in a stable order."""
    identity = {
        f.name: getattr(program, f.name) for f in dataclasses.fields(program) if f.metadata.get("identity", True)
    }
    plain: dict[str, Any] = {"family": family, "program": identity}
    if hyper is not None:
        plain["hyper"] = dataclasses.asdict(hyper)
    return plain


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def program_key(family: str, program: Any) -> str:
    """Twelve hex digits naming a device stack: all program fields, logging ones included."""
    return _digest({"family": family, "program": dataclasses.asdict(program)})


def config_key(family: str, program: Any, hyper: Any) -> str:
    """Twelve hex digits naming a config, the same in every process and Python version."""
    return _digest(canonical(family, program, hyper))


def run_key(config: str, seed: int) -> str:
    """Twelve hex digits naming a run: a config with one seed."""
    return _digest({"config": config, "seed": seed})
