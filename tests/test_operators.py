"""Launching of kernels: at once, or compiled ahead, side by side."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap

from lanes.compiling import compile_lanes
from tests.families import FAMILIES, arrays_of, build_case
from trainables import operators
from trainables.family import load_family
from trainables.operators import OPERATORS, compiled_ahead, keep_compiled, kept, launch, takes_lanes, triton_for
from trainables.snn_delays.neurons import lif


class Kernel:
    """As Triton's: called by grid, or warmed up. Notes what was asked for."""

    def __init__(self, broken: bool = False):
        self.ran: list[tuple] = []
        self.compiled: list[tuple] = []
        self.threads: set[str] = set()
        self._broken = broken

    def __getitem__(self, grid):
        return lambda *args, **how: self.ran.append((grid, args, how))

    def warmup(self, *args, grid, **how):
        self.threads.add(threading.current_thread().name)
        if self._broken:
            raise RuntimeError("out of registers")
        self.compiled.append((grid, args, how))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_operator_is_written_out_for_a_log(caplog):
    """PyTorch 2.11 does so for one that it was not told of, which takes minutes where twelve blocks of them follow."""

    x = torch.rand(2, 3, 4, 5)
    with torch._inductor.config.patch(force_disable_caches=True), caplog.at_level("INFO", "torch._inductor.graph"):
        compiled = compile_lanes(lambda tensor: lif(tensor, torch.tensor(0.5), torch.tensor(2.0)) + late(kept(tensor)))

        @torch.library.custom_op("lanewise::test_late", mutates_args=())  # of a module that a step imports
        def late(tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1

        late.register_fake(torch.empty_like)
        takes_lanes(late)
        assert torch.equal(compiled(x), lif(x, torch.tensor(0.5), torch.tensor(2.0)) + x + 1)
    assert {"lanewise::lif_forward", "lanewise::kept", "lanewise::test_late"} <= OPERATORS
    assert not [record for record in caplog.records if "implicit fallback" in record.message]


@pytest.mark.parametrize(("chosen", "found"), [(None, "bin/ptxas"), ("/mine", "/mine")])
def test_kernels_are_assembled_by_one_program_from_the_first_on(monkeypatch, tmp_path, chosen, found):
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.touch(mode=0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", chosen or "")  # and so put back in the end
    if chosen is None:
        monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(operators, "choose_assembler", operators.choose_assembler.__wrapped__)  # as in a new process
    with triton_for("nothing needs", "go on"):
        assert os.environ["TRITON_PTXAS_PATH"] == str(tmp_path / found)


def test_what_triton_calls_a_kernel_does_not_depend_on_which_is_called_first():
    """By such a name a compiled kernel is found on disk."""
    pytest.importorskip("triton")
    modules = [".".join(path.with_suffix("").parts) for path in Path("trainables").glob("**/*_kernel.py")]
    code = (
        "import importlib, sys; from triton.runtime.jit import JITFunction\n"
        f"found = [importlib.import_module(name) for name in {modules}]\n"
        "named = {f'{m.__name__}.{n}': f for m in found for n, f in vars(m).items() if isinstance(f, JITFunction)}\n"
        "names = sorted(named, reverse=bool(sys.argv[1:]))\n"
        "print(sorted((name, named[name].cache_key) for name in names))"
    )
    one, other = (
        subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["reverse"])
    )
    assert one == other
    assert "lif_kernel._slope" in one


def test_where_compiled_steps_are_kept_does_not_depend_on_the_order_of_imports():
    from torch._inductor import config

    kept_by = []
    for names in (("a.one", "b.two"), ("b.two", "a.one")):
        with config.patch("unsafe_marked_cacheable_functions", {}):
            for name in names:
                keep_compiled(name, "1")
            kept_by.append(list(config.unsafe_marked_cacheable_functions))
    assert kept_by[0] == kept_by[1] == ["a.one", "b.two"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if list(Path("trainables", name).glob("*_kernel.py"))])
def test_kernels_import_nothing_that_their_program_had_not(family):
    """They are imported when they first run, and what is compiled after that would be looked up by other names."""
    code = (
        "import sys; from trainables.family import load_family\n"
        f"load_family('{family}').import_all()\n"
        "print(*(name for name in sys.modules if name.startswith('trainables')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    there = set(run.stdout.split())
    kernels = list(Path("trainables", family).glob("*_kernel.py"))
    for path in kernels:
        own = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        for module in {name for name in own if name and name.startswith("trainables")}:
            further = Path(*module.split(".")).with_suffix(".py")
            if not module.endswith("_kernel"):
                assert module in there, f"{path} imports {module}"
            elif further not in kernels:
                kernels.append(further)


def test_a_kernel_runs_at_once():
    kernel = Kernel()
    launch(kernel, (2, 3))(1, 2, num_warps=4)
    assert (kernel.ran, kernel.compiled) == ([((2, 3), (1, 2), {"num_warps": 4})], [])


def test_compiled_ahead_a_kernel_does_not_run(a_gpu):
    kernel = Kernel()
    with compiled_ahead():
        launch(kernel, (2,))(1, num_warps=4)
    assert (kernel.ran, kernel.compiled) == ([], [((2,), (1,), {"num_warps": 4})])
    assert threading.current_thread().name not in kernel.threads
    launch(kernel, (2,))(1, num_warps=4)
    assert len(kernel.ran) == len(kernel.compiled) == 1


def test_each_kind_of_arguments_is_compiled_once(a_gpu):
    one, other = Kernel(), Kernel()
    with compiled_ahead():
        for size in (3, 5):  # of a tensor the type matters, not the size
            launch(one, (size,))(torch.zeros(size), 7)
        launch(one, (3,))(torch.zeros(3, dtype=torch.bfloat16), 7)
        launch(one, (3,))(torch.zeros(3), 8)
        launch(one, (3,))(torch.zeros(3), 7, num_warps=8)
        launch(other, (3,))(torch.zeros(3), 7)
    assert (len(one.compiled), len(other.compiled)) == (4, 1)


def test_what_other_threads_launch_is_compiled_ahead_too(a_gpu):
    kernel = Kernel()  # autograd works gradients out in threads of its own
    with compiled_ahead(), ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: launch(kernel, (1,))(number), range(32)))
    assert (sorted(args for _, args, _ in kernel.compiled), kernel.ran) == ([(number,) for number in range(32)], [])


@pytest.mark.parametrize("before", [0, 1])
def test_a_kernel_that_cannot_be_compiled_is_told(a_gpu, before):
    broken, fine = Kernel(broken=True), Kernel()

    def work():
        for kernel in [fine] * before + [broken]:
            launch(kernel, (1,))(1)

    with pytest.raises(RuntimeError, match="out of registers"), compiled_ahead():
        work()
    launch(fine, (1,))(1)
    assert fine.ran, "afterwards kernels run again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_compiles_nothing_more(family, cache_dir, monkeypatch):
    import triton

    from lanes.probe import compile_kernels, make_engine

    built, program, hyper = build_case(family, next(iter(load_family(family).cases)), precision="bf16")
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(found["repr"]))
    engine = make_engine("serial", 1, built, program, arrays_of(built, program, cache_dir, "cuda"), "cuda")
    compile_kernels(engine, hyper)
    ahead = len(compiled)
    engine.insert("me", hyper, 1)
    curves = engine.advance(engine.until_epoch_end())
    assert all(torch.isfinite(torch.as_tensor(values)).all() for name, values in curves.items() if "loss" in name)
    assert len(compiled) == ahead, compiled[ahead:]


def test_what_is_compiled_with_such_a_function_is_kept_until_its_code_changes(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    x, scale = torch.randn(3, 2, 6, 4, 5), torch.rand(3, 5) + 0.5
    keep, alpha = torch.tensor(0.5), torch.tensor(2.0)

    def loss(scale, x):
        return (lif(x, keep, alpha, (scale, torch.zeros_like(scale))) * x).sum()

    def compiled():
        torch._dynamo.reset()
        counters.clear()
        slopes = torch.compile(vmap(grad(loss)), dynamic=False)(scale, x)
        return slopes, {name: count for name, count in counters["aot_autograd"].items() if "cache" in name}

    expected = vmap(grad(loss))(scale, x)
    for found in ({"autograd_cache_miss": 1, "autograd_cache_saved": 1}, {"autograd_cache_hit": 1}):
        slopes, happened = compiled()
        assert happened == found
        torch.testing.assert_close(slopes, expected)
    known = config.unsafe_marked_cacheable_functions
    changed = {**known, "trainables.snn_delays.neurons._lif": "changed"}
    with config.patch("unsafe_marked_cacheable_functions", changed):
        assert compiled()[1] == {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
