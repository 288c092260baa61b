"""The delay operators against the plain convolution; their kernels on a GPU, elsewhere in Triton's interpreter.

The convolution here is PyTorch's own on one lane, in float64. float64 agrees to 1e-12, float32 to 1e-5 of the largest
value (sums of up to a few thousand products). bf16 inputs are exact in float32, where sums are kept: its results are
rounded once, 2^-7 (the interpreter cuts off where a GPU rounds).
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.gpu_kernels import run_interpreted
from trainables.snn_delays import delay_ops

SHAPES = [
    # (groups, B, T, N, C), (k, K)
    ((1, 2, 10, 6, 3), (5, 4)),
    ((2, 3, 7, 5, 4), (7, 7)),  # as many positions as the frequency kernel reaches over
    ((3, 1, 5, 9, 2), (4, 9)),  # even k; K longer than T
    ((2, 2, 1, 1, 1), (3, 3)),  # one step, one position
    ((1, 2, 13, 11, 5), (1, 1)),
    ((1, 1, 5, 20, 3), (3, 2)),  # as many positions as two threads take
    ((2, 5, 6, 4, 33), (2, 3)),  # threads of more than one instance, and some past the end
    ((1, 1, 4, 3, 2), (7, 20)),  # so many taps that a thread takes fewer positions
]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
LIMITS = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def inputs(shape, kernel, dtype=torch.float64, device="cpu"):
    """x [G, B, T, N, C], kernels [G, k, K, C] with the longest delays out of reach in half of them, bias [G, K, N, C],
    and a gradient."""
    generator = torch.Generator().manual_seed(sum(shape) + sum(kernel))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    kernels = draw(shape[0], *kernel, shape[-1])
    kernels[shape[0] // 2 :, :, : kernel[1] // 2] = 0
    kind = torch.promote_types(dtype, torch.float32)
    x, grad = (draw(*shape).to(device, dtype) for _ in range(2))
    return x, kernels.to(device, kind), draw(shape[0], kernel[1], *shape[3:]).to(device, kind), grad


def convolution(x, kernels):
    """One lane: x [B, T, N, C], kernels [k, K, C]."""
    size, taps, channels = kernels.shape
    padded = F.pad(x.permute(0, 3, 1, 2), (size // 2, (size - 1) // 2, taps - 1, 0))
    return F.conv2d(padded, kernels.permute(2, 1, 0).unsqueeze(1), groups=channels).permute(0, 2, 3, 1)


def expected_of(x, kernels, bias, grad):
    """y and its gradients in float64, lane by lane, by autograd."""
    found = []
    for *lane, to_y in zip(*(t.double() for t in (x, kernels, bias, grad)), strict=True):
        leaves = [part.clone().requires_grad_() for part in lane]
        y = convolution(*leaves[:2])
        if bias.numel():
            rows = [leaves[2][min(step, kernels.shape[2] - 1)] for step in range(x.shape[2])]
            y = y + torch.stack(rows)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, to_y, materialize_grads=True)))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def agree(found, expected, limit):
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        largest = float(other.abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit * max(1.0, largest), check_device=False)


def check(shape, kernel, dtype, device):
    """Forward and backward of the kernels equal the convolution's."""
    from trainables.snn_delays import delay_kernel

    compare(shape, kernel, dtype, device, delay_kernel.forward, delay_kernel.backward)


def compare(shape, kernel, dtype, device, forward, backward):
    """With a bias and without."""
    x, kernels, bias, grad = inputs(shape, kernel, dtype, device)
    for added in (bias, bias[:, :0]):
        found = forward(x, kernels, added), *backward(grad, x, kernels, added.numel() > 0)
        assert found[0].dtype == found[1].dtype == dtype
        agree(found, expected_of(x, kernels, added, grad), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "kernel"), SHAPES)
def test_operators_are_the_convolution_and_its_gradients(shape, kernel, dtype):
    compare(shape, kernel, dtype, "cpu", delay_ops.delay_forward, delay_ops.delay_backward)


@pytest.mark.parametrize("kernel", [(3, 4), (6, 2), (4, 9)])  # of odd and even size; longer than the sequence
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("compiled", ["", "aot_eager", "inductor"])
def test_lanes_have_their_own_kernels_and_gradients(compiled, affine, kernel):
    """vmap of a gradient, without vmap's fallback of one lane after another (which warns)."""
    x, kernels, bias, grad = inputs((3, 2, 6, 5, 4), kernel)
    kernels = kernels.permute(0, 3, 1, 2)  # [lanes, C, k, K]
    numbers = bias[:, 0, :2]  # scale and shift, [lanes, 2, C]

    def loss(x, kernels, numbers, grad):
        return (delay_ops.walked_delay(x, kernels, tuple(numbers) if affine else None) * grad).sum()

    def plain(x, kernels, numbers, grad):
        within = numbers[0] * x + numbers[1] if affine else x
        return (convolution(within, kernels.permute(1, 2, 0)) * grad).sum()

    function = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))
    if compiled:
        torch.compiler.reset()  # a function may be compiled for eight shapes at most
        function = torch.compile(function, backend=compiled, fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*performance drop.*")
        found = function(x, kernels, numbers, grad)
    lanes = zip(x, kernels, numbers, grad, strict=True)
    expected = [torch.func.grad(plain, argnums=(0, 1, 2))(*lane) for lane in lanes]
    for one, others in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=1e-12, atol=1e-12)


def test_second_argument_shared_by_lanes():
    x, kernels, *_ = inputs((3, 2, 6, 5, 4), (3, 4))
    shared = kernels[0].permute(2, 0, 1)
    found = torch.func.vmap(delay_ops.walked_delay, in_dims=(0, None))(x, shared)
    torch.testing.assert_close(found, torch.stack([convolution(lane, kernels[0]) for lane in x]), rtol=0, atol=1e-12)


def test_kernels_equal_convolution_in_the_interpreter():
    code = "from tests.test_delay_kernel import DTYPES, SHAPES, check; "
    code += "[check(*case, dtype, 'cpu') for case in SHAPES for dtype in DTYPES]"
    run_interpreted(code)


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "kernel"), [*SHAPES, ((2, 4, 100, 100, 32), (7, 7)), ((2, 4, 100, 25, 128), (7, 11))]
    )
    def test_kernels_equal_convolution(self, shape, kernel, dtype):
        check(shape, kernel, dtype, "cuda")

    def test_gradient_of_many_samples_is_summed_in_parts(self):
        check((4, 32, 10, 100, 32), (3, 5), torch.float32, "cuda")

    def test_strided_inputs(self):
        from trainables.snn_delays import delay_kernel

        x, kernels, bias, grad = inputs((2, 3, 7, 5, 4), (3, 4), torch.float32, "cuda")
        turned, grad_turned = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (x, grad))
        assert torch.equal(delay_kernel.forward(turned, kernels, bias), delay_kernel.forward(x, kernels, bias))
        for one, other in zip(
            delay_kernel.backward(grad_turned, turned, kernels, True),
            delay_kernel.backward(grad, x, kernels, True),
            strict=True,
        ):
            assert torch.equal(one, other)
