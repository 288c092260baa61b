"""What operators with GPU kernels share: how they take lanes, launch kernels and stand in compiled graphs, and what is
said without Triton."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from trainables.family import BadValue
from trainables.files import code_beside

OPERATORS: set[str] = set()
"""Names of all operators that take lanes, NAMESPACE::NAME. They read tensors of any strides."""
NARROW = 32
"""Kernels' tiles at most so wide are for two warps, too few for Hopper's own products: with four and a tile of 64 x 32
Triton 3.6's gradient of a convolution's weight gave one lane's NaN to another (beside NaN lanes on an H200,
`tests/test_convolution.py`; compare triton-lang/triton 10486 and 11366)."""


def takes_lanes(operator: CustomOpDef) -> None:
    """Register how an operator runs under torch.func.vmap: once, the lane axis joined to the first one of every tensor
    that goes in, [L, N, ...] -> [L * N, ...], and parted from it in every one that comes out."""
    OPERATORS.add(operator._qualname)
    if "torch._inductor.lowering" in sys.modules:  # families import what they compute with when it is first needed
        tell_inductor()

    @operator.register_vmap
    def _(info, dims, *args):
        lanes = info.batch_size
        joined = [
            _joined(arg, dim, lanes) if isinstance(arg, Tensor) else arg for arg, dim in zip(args, dims, strict=True)
        ]
        found = operator(*joined)
        if isinstance(found, Tensor):
            return found.unflatten(0, (lanes, -1)), 0
        return tuple(one.unflatten(0, (lanes, -1)) for one in found), (0,) * len(found)


def tell_inductor() -> None:
    """Name the operators to torch.compile, those of modules that are imported later too.

    PyTorch 2.11 writes an operator that was not named to it to a log when it first meets it, read or not, with all that
    its arguments are made of: of operators that give two results to the next, twice as much for each.
    """
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST  # seconds, and only who compiles needs it

    FALLBACK_ALLOW_LIST.update(OPERATORS)


@cache  # every launch of an operator passes here
def choose_assembler() -> None:
    """Have Triton's kernels assembled by the ptxas that PyTorch brings, if it brings one, from the first kernel on.

    PyTorch 2.11 changes to it in the middle of a process, when it first compiles a kernel of its own there. Compiled
    kernels are looked up by the version that a process began with: a second sweep, which has nothing to measure before
    it compiles, would look them up by another version than the first kept them by, and compile them all anew.
    """
    ptxas = Path(torch.__file__).parent / "bin" / "ptxas"
    if os.access(ptxas, os.X_OK):
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


@torch.library.custom_op("lanewise::kept", mutates_args=())
def kept(tensor: Tensor) -> Tensor:
    """The same, [N, ...], written to memory: torch.compile works out anew, for each, what many elements share."""
    return tensor.clone()


@kept.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


takes_lanes(kept)


def in_graph(function: Callable) -> Callable[..., Any]:
    """Have torch.compile call a function as it is, and keep on disk what it made of it.

    Traced through, torch.compile (2.13) loses an autograd.Function's own backward under torch.func.grad.

    Args:
        function: of tensors, and of nothing that may change while a process runs. At the top of a module.
    """
    keep_compiled(f"{function.__module__}.{function.__name__}", code_beside(function, keep_compiled))
    return torch.compiler.allow_in_graph(function)


def keep_compiled(name: str, version: str) -> None:
    """Let PyTorch keep on disk what it traced of graphs that call a function. Of functions that it does not know it
    keeps nothing, because the graph does not say what they do: every process traces them anew.

    Args:
        name: MODULE.FUNCTION.
        version: changes when what the function does changes.
    """
    from torch._inductor import config

    # Assigned anew: what was compiled is looked up by the settings, which are read when one is assigned. And sorted:
    # their order counts, and they come in the order of imports, which differs from process to process.
    known = {**config.unsafe_marked_cacheable_functions, name: version}
    config.unsafe_marked_cacheable_functions = dict(sorted(known.items()))


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As kernels read them."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _joined(tensor: Tensor, dim: int | None, lanes: int) -> Tensor:
    stacked = tensor.unsqueeze(0).expand(lanes, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return stacked.flatten(0, 1)


class _Ahead:
    """Compilations under way, each of a kernel for one kind of arguments."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._lock = pool, Lock()
        self._begun: dict[Hashable, Future] = {}

    def compile(self, kernel: Any, grid: tuple[int, ...], *args: Any, **how: Any) -> None:
        kinds = tuple((arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg for arg in args)
        key = kernel, kinds, tuple(how.items())
        with self._lock:  # gradients are worked out by threads of their own
            if key not in self._begun:
                first = not self._begun
                self._begun[key] = self._pool.submit(kernel.warmup, *args, grid=grid, **how)
                if first:  # by itself: Triton sets itself up
                    self.wait()

    def wait(self) -> None:
        for begun in self._begun.values():
            begun.result()


_ahead: _Ahead | None = None


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """A Triton kernel, to be called: kernel[grid]. Within `compiled_ahead` the call compiles it and does not run it."""
    return kernel[grid] if _ahead is None else partial(_ahead.compile, kernel, grid)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Kernels launched within are compiled for the current GPU, side by side, and not run: what they would write is
    garbage. Otherwise each is compiled when it first runs, one after the other: half a minute for a net of some layers.
    """
    global _ahead
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "compile", torch.cuda.set_device, (device,)) as pool:
        _ahead = _Ahead(pool)
        try:
            yield
            _ahead.wait()
        finally:
            _ahead = None


@contextmanager
def triton_for(what: str, instead: str) -> Iterator[None]:
    """Around the import of kernels. Raises `BadValue`: WHAT triton, which is missing; install it, or do INSTEAD."""
    choose_assembler()
    try:
        yield
    except ImportError as error:
        raise BadValue(f"{what} triton, which is not installed here ({error}): install it, or {instead}") from error
