"""The LIF kernel against the plain loop: on a GPU as it is used, elsewhere in Triton's interpreter if Triton is there.

Forward, float64: 1e-12 (100 steps that each round at 1e-16; a spike that rounding flips would need a membrane within
that of the threshold). Forward, float32: neurons whose membrane never comes within 1e-4 of the threshold agree to 1e-5
(a hundred roundings of 6e-8, values below 10); the others may flip a spike and then differ: they are left out, and few.
bf16 rounds what float32 has computed, so it is held to float32 on the same rounded input: 2^-7 of the value (the
interpreter cuts off where a GPU rounds).
Backward: the same membranes go into both, so nothing can flip: 1e-5 of the largest gradient (bf16: 2^-7 of it; sums
over neurons and time are not rounded to bf16).
"""

from __future__ import annotations

import sys

import pytest
import torch

from tests.gpu_kernels import assert_replays, run_interpreted
from trainables.family import BadValue
from trainables.snn_delays import neurons

SHAPES = [(1, 5, 1, 3), (2, 3, 4, 2), (3, 7, 10, 12), (1, 4, 33, 50)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, scale, shift, keep, alpha and a gradient; currents strong enough that about a fifth of the steps spike."""
    generator = torch.Generator().manual_seed(sum(shape))
    kind = torch.promote_types(dtype, torch.float32)
    channels = next(count for count in (3, 2, 1) if shape[-1] % count == 0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7 + 0.2).to(device, dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    scale = (0.8 + 0.4 * torch.rand(shape[0], channels, generator=generator, dtype=torch.float64)).to(device, kind)
    keep = torch.linspace(0.3, 0.9, shape[0], dtype=kind, device=device)
    alpha = torch.linspace(2.0, 5.0, shape[0], dtype=kind, device=device)
    return x, scale, 1 - scale, keep, alpha, grad


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Forward and backward of the kernels equal the loops'."""
    from trainables.snn_delays import lif_kernel

    x, scale, shift, keep, alpha, grad = inputs(shape, dtype, device)
    spikes, found = lif_kernel.forward(x, scale, shift, keep)
    assert found.is_contiguous()
    assert found.dtype == spikes.dtype == dtype
    assert torch.equal(spikes, (found >= 0).to(dtype))
    expected = neurons.forward_loop(x.to(scale.dtype), scale, shift, keep)[1]
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    else:
        clear = (expected.abs() > 1e-4).all(2, keepdim=True).expand_as(expected)
        assert clear.float().mean() > 0.8
        limit = 2**-7 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(found[clear].to(scale.dtype), expected[clear], rtol=limit, atol=1e-5)
    over = expected.to(dtype)
    given = (grad, over, x, scale, keep, alpha)
    for backward in (lif_kernel.backward, neurons.backward_loop):
        *learned, _ = backward(*given, True)
        *others, nothing = backward(*given, False)
        assert nothing.shape == (len(keep), 0)
        assert all(torch.equal(one, other) for one, other in zip(learned, others, strict=True))
    for found, slope in zip(lif_kernel.backward(*given, True), neurons.backward_loop(*given, True), strict=True):
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[found.dtype]
        assert found.is_contiguous()
        torch.testing.assert_close(found, slope, rtol=0, atol=limit * float(slope.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_keeps_every_spike_of_float32(shape):
    """What is stored is rounded, the recurrence is not."""
    x, scale, shift, keep, _, _ = inputs(shape, torch.bfloat16, "cpu")
    spikes, over = neurons.lif_forward(x, scale, shift, keep)
    expected, exact = neurons.lif_forward(x.float(), scale, shift, keep)
    assert torch.equal(spikes.float(), expected)
    torch.testing.assert_close(over.float(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_scale_and_shift_learn_as_if_applied_before(compiled):
    """Per lane, against the same neurons fed scale * x + shift."""
    lanes, shape = 3, (2, 8, 5, 4)
    x = inputs((lanes, 2, 8, 20), torch.float64, "cpu")[0].reshape(lanes, *shape)
    scale = torch.linspace(0.5, 1.5, lanes * 4, dtype=torch.float64).reshape(lanes, 4)
    shift = torch.linspace(0.4, -0.2, lanes * 4, dtype=torch.float64).reshape(lanes, 4)
    keep, alpha = torch.tensor(0.6, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).reshape(shape)

    def inside(x, scale, shift, keep):
        return (neurons.lif(x, keep, alpha, (scale, shift), learn_keep=True) * weights).sum()

    def before(x, scale, shift, keep):
        return (neurons.lif(scale * x + shift, keep, alpha, learn_keep=True) * weights).sum()

    def gradients(loss):
        function = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))
        return torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function

    arguments = (x, scale, shift, keep.expand(lanes))
    for found, expected in zip(gradients(inside)(*arguments), gradients(before)(*arguments), strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_kernel_equals_loop_in_the_interpreter():
    code = "from tests.test_lif_kernel import DTYPES, SHAPES, check; "
    code += "[check(shape, dtype, 'cpu') for shape in SHAPES for dtype in DTYPES]"
    run_interpreted(code)


def test_choice_of_implementation_is_explicit(monkeypatch):
    monkeypatch.setenv("LANEWISE_SNN_KERNELS", "off")
    assert neurons.gpu_kernel("lif_kernel") is None
    monkeypatch.setenv("LANEWISE_SNN_KERNELS", "fast")
    with pytest.raises(BadValue, match="should be on or off"):
        neurons.gpu_kernel("lif_kernel")
    monkeypatch.delenv("LANEWISE_SNN_KERNELS")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "trainables.snn_delays.lif_kernel", raising=False)
    with pytest.raises(BadValue, match="need triton"):
        neurons.gpu_kernel("lif_kernel")


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (8, 32, 100, 3200)])
    def test_kernel_equals_loop(self, shape, dtype):
        check(shape, dtype, "cuda")

    def test_strided_inputs(self):
        from trainables.snn_delays import lif_kernel

        x, scale, shift, keep, _, _ = inputs((2, 6, 9, 8), torch.float64, "cuda")
        turned = x.transpose(1, 3).contiguous().transpose(1, 3)
        for found, expected in zip(
            lif_kernel.forward(turned, scale, shift, keep), lif_kernel.forward(x, scale, shift, keep), strict=True
        ):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_under_vmap_and_grad(self, compiled, monkeypatch):
        """Gradients of a per-lane loss, with a learned decay, by kernel and by loop."""
        lanes = 3
        x = inputs((lanes, 2, 12, 20), torch.float64, "cuda")[0].unflatten(-1, (5, 4))  # [lanes, B, T, N, C]
        keep = torch.linspace(0.4, 0.8, lanes, dtype=torch.float64, device="cuda")
        alpha = torch.full_like(keep, 5.0)

        def loss(x, keep, alpha):
            spikes = neurons.lif(x, keep, alpha, learn_keep=True)
            return (spikes * torch.arange(x.shape[1], device=x.device)[:, None, None]).sum()

        def gradients(x, keep, alpha):
            return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, keep, alpha)

        by_kernel = torch.compile(gradients)(x, keep, alpha) if compiled else gradients(x, keep, alpha)
        monkeypatch.setenv("LANEWISE_SNN_KERNELS", "off")
        for found, expected in zip(by_kernel, gradients(x, keep, alpha), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_in_a_cuda_graph(self):
        x, scale, shift, keep, alpha, grad = inputs((2, 16, 20, 10), torch.float64, "cuda")

        def both():
            spikes, over = neurons.lif_forward(x, scale, shift, keep)
            return spikes, over, *neurons.lif_backward(grad, over, x, scale, keep, alpha, True)

        assert_replays(both, x)
