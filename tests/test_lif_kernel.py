"""The LIF kernel against the plain loop: on a GPU as it is used, elsewhere in Triton's interpreter if Triton is there.

Forward, float64: 1e-12 (100 steps that each round at 1e-16; a spike that rounding flips would need a membrane within
that of the threshold). Forward, float32: neurons whose membrane never comes within 1e-4 of the threshold agree to 1e-5
(a hundred roundings of 6e-8, values below 10); the others may flip a spike and then differ: they are left out, and few.
Backward: the same h goes into both, so nothing can flip: 1e-5 of the largest gradient.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainables.family import BadValue
from trainables.snn_delays import neurons

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 5, 1, 3), (2, 3, 4, 1), (3, 7, 10, 13), (1, 4, 33, 50)]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, keep, alpha and a gradient; currents strong enough that about a fifth of the steps spike."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7 + 0.2).to(device, dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    keep = torch.linspace(0.3, 0.9, shape[0], dtype=dtype, device=device)
    alpha = torch.linspace(2.0, 5.0, shape[0], dtype=dtype, device=device)
    return x, keep, alpha, grad


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Forward and backward of the kernels equal the loops'."""
    from trainables.snn_delays import lif_kernel

    x, keep, alpha, grad = inputs(shape, dtype, device)
    expected, found = neurons.forward_loop(x, keep), lif_kernel.forward(x, keep)
    assert found.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    else:
        clear = ((expected - 1).abs() > 1e-4).all(2, keepdim=True).expand_as(expected)
        assert clear.float().mean() > 0.8
        torch.testing.assert_close(found[clear], expected[clear], rtol=0, atol=1e-5)
    slope = neurons.backward_loop(grad, expected, keep, alpha)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        lif_kernel.backward(grad, expected, keep, alpha), slope, rtol=0, atol=limit * float(slope.abs().max())
    )


def test_kernel_equals_loop_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here: the kernel is tested where it is installed")
    code = "import torch; from tests.test_lif_kernel import SHAPES, check; "
    code += "[check(shape, dtype, 'cpu') for shape in SHAPES for dtype in (torch.float32, torch.float64)]"
    # read when the kernels are defined, so in a process of its own; interpreted, they take CPU tensors
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_choice_of_implementation_is_explicit(monkeypatch):
    monkeypatch.setenv("LANEWISE_LIF", "loop")
    assert neurons.gpu_kernel() is None
    monkeypatch.setenv("LANEWISE_LIF", "fast")
    with pytest.raises(BadValue, match="should be kernel or loop"):
        neurons.gpu_kernel()
    monkeypatch.delenv("LANEWISE_LIF")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "trainables.snn_delays.lif_kernel", raising=False)
    with pytest.raises(BadValue, match="need triton"):
        neurons.gpu_kernel()


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [*SHAPES, (8, 1024, 100, 100)])
    def test_kernel_equals_loop(self, shape, dtype):
        check(shape, dtype, "cuda")

    def test_strided_inputs(self):
        from trainables.snn_delays import lif_kernel

        x, keep, _, _ = inputs((2, 6, 9, 8), torch.float64, "cuda")
        turned = x.transpose(1, 3).contiguous().transpose(1, 3)
        torch.testing.assert_close(lif_kernel.forward(turned, keep), lif_kernel.forward(x, keep), rtol=0, atol=0)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_under_vmap_and_grad(self, compiled, monkeypatch):
        """Gradients of a per-lane loss, with a learned decay, by kernel and by loop."""
        lanes, shape = 3, (2, 4, 12, 5)
        x = inputs((lanes, *shape[1:]), torch.float64, "cuda")[0]
        x = torch.stack([x, x + 0.1], 1)  # [lanes, B, C, T, N]
        keep = torch.linspace(0.4, 0.8, lanes, dtype=torch.float64, device="cuda")
        alpha = torch.full_like(keep, 5.0)

        def loss(x, keep, alpha):
            spikes = neurons.lif(x, keep, alpha, learn_keep=True)
            return (spikes * torch.arange(x.shape[2], device=x.device)[:, None]).sum()

        def gradients(x, keep, alpha):
            return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, keep, alpha)

        by_kernel = torch.compile(gradients)(x, keep, alpha) if compiled else gradients(x, keep, alpha)
        monkeypatch.setenv("LANEWISE_LIF", "loop")
        for found, expected in zip(by_kernel, gradients(x, keep, alpha), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_in_a_cuda_graph(self):
        x, keep, alpha, grad = inputs((2, 16, 20, 10), torch.float64, "cuda")

        def both():
            h = neurons.lif_forward(x, keep)
            return h, neurons.lif_backward(grad, h, keep, alpha)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        x.neg_()
        graph.replay()
        for found, expected in zip(captured, both(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
