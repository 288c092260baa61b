"""ci_vit's attention: the operators' formulas, their gradient under vmap and compile, and the kernels.

The formulas are compared with autograd through the written-out way in float64: 1e-12, a few hundred roundings of 1e-16.
The kernels in float32 (Triton's interpreter): 2e-5, roundings of 6e-8 that sums of up to 128 terms of size 10 add up.
The kernels in bf16 (GPU): against the written-out way in float64 on the same rounded q, k and v, error in the 2-norm
relative to the result's. A bf16 step is 2^-8 to 2^-7 of a value, so rounding the result gives 1.6e-3, and rounding p
(or ds) before its product as much again: 2.3e-3 together, below 4e-3. And not above 1.2 times the error of the
written-out way in bf16, which rounds the scores too.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from tests.families import arrays_of, build_case
from tests.gpu_kernels import assert_missing_triton_is_told, assert_replays, assert_whole_steps_equal, run_interpreted
from trainables.ci_vit import attention, model
from trainables.draws import counter
from trainables.family import hyper_tensors

SHAPES = [  # groups, samples of each, positions, heads, width
    (1, 2, 65, 3, 16),
    (2, 1, 17, 2, 12),
    (1, 1, 5, 1, 32),
    (1, 1, 100, 1, 64),
    (3, 2, 64, 1, 8),
    (1, 1, 128, 2, 16),
]
BIG = [(4, 25, 65, 3, 16), (2, 25, 65, 3, 64), (2, 9, 128, 4, 64), (2, 9, 81, 3, 32), (1, 7, 33, 5, 48)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """qkv, bias and the gradient of the result."""
    groups, samples, positions, heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    qkv, bias = draw(groups * samples, positions, 3, heads, width), draw(groups, 3, heads, width) / 2
    slope = draw(groups * samples, positions, heads, width)
    low = dtype if dtype == torch.float64 else torch.float32
    return qkv.to(device, dtype), bias.to(device, low), slope.to(device, dtype)


def by_autograd(qkv: torch.Tensor, bias: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Result, its gradients to qkv and to bias, through the written-out way."""
    qkv, bias = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
    biased = (qkv.unflatten(0, (len(bias), -1)) + bias[:, None, None]).flatten(0, 1)
    out, _ = attention.written_out(biased)
    return out.detach(), *torch.autograd.grad(out, (qkv, bias), slope)


def check_in_float32(shape: tuple[int, ...]) -> None:
    """The kernels' results are the formulas'."""
    from trainables.ci_vit import attention_kernel

    qkv, bias, slope = inputs(shape, torch.float32)
    expected, lse = attention.forward_formula(qkv, bias)
    found = attention_kernel.forward(qkv, bias)
    torch.testing.assert_close(found, (expected, lse), rtol=0, atol=2e-5)
    to_qkv, to_bias = attention_kernel.backward(slope, qkv, bias, lse)
    right, right_bias = attention.backward_formula(slope, qkv, bias, lse)
    torch.testing.assert_close(to_qkv, right, rtol=0, atol=2e-5)
    torch.testing.assert_close(to_bias, right_bias, rtol=0, atol=2e-4)  # of samples x positions slopes each


@pytest.mark.parametrize("spare", [0, 7])
def test_written_out_is_attention(spare):
    qkv, _, _ = inputs((1, 2, 9, 3, 4), torch.float64)
    out, distributions = attention.written_out(qkv, spare)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2), rtol=0, atol=1e-12)
    assert distributions.shape == (6, 9 + spare, 9 + spare)
    assert not distributions[:, :, 9:].any()
    torch.testing.assert_close(distributions.sum(-1), torch.ones(6, 9 + spare, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    qkv, bias, slope = inputs(shape, torch.float64)
    expected, *slopes = by_autograd(qkv, bias, slope)
    out, lse = attention.attention_forward(qkv, bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    found = attention.attention_backward(slope, qkv, bias, lse)
    assert found[0].is_contiguous()
    torch.testing.assert_close(found, tuple(slopes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fake_tensors_look_like_the_results(dtype):
    qkv, bias, slope = inputs(SHAPES[1], dtype)
    torch.library.opcheck(attention.attention_forward, (qkv, bias))
    torch.library.opcheck(attention.attention_backward, (slope, qkv, bias, attention.attention_forward(qkv, bias)[1]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_lanes(compiled, device):
    """vmap over grad, qkv made from weights as in a net; a lane's result is what it is alone."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    lanes, samples, positions, heads, width = 3, 2, 17, 2, 16
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(device, torch.float64)
    x, target = draw(samples * positions, 6), draw(samples, positions, heads, width)
    weight, bias = draw(lanes, 6, 3 * heads * width) / 2, draw(lanes, 3, heads, width)

    def loss(weight, bias, attend):
        qkv = (x.to(dtype) @ weight.to(dtype)).reshape(samples, positions, 3, heads, width)
        return (attend(qkv, bias).double() * target).sum()

    plain = lambda qkv, bias: attention.written_out(qkv.double() + bias)[0]
    gradients = lambda weight, bias: vmap(grad(lambda w, b: loss(w, b, attention.fused), (0, 1)))(weight, bias)
    found = (torch.compile(gradients) if compiled else gradients)(weight, bias)
    for lane in range(lanes):
        expected = grad(lambda w, b: loss(w, b, plain), (0, 1))(weight[lane], bias[lane])
        for one, other in zip(found, expected, strict=True):
            limit = 1e-11 if device == "cpu" else 1e-2 * float(other.abs().max())  # gradients of x's product are bf16
            torch.testing.assert_close(one[lane], other, rtol=0, atol=limit)


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_net_is_the_same_fused(precision, monkeypatch, cache_dir):
    """Logits, gradients and what is watched, the operator taken on the CPU for once."""
    family, program, hyper = build_case("ci_vit", "vanilla", precision=precision)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    row = {name: values[0] for name, values in family.order(program, arrays, 0, 0).items()}
    batch = family.batch(program, arrays, row)
    params = family.init(program, hyper_tensors(program, hyper, "cpu"), counter(0))["params"]

    def loss(params):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits, seen = model.forward(program, params, batch["images"], ("fired", "entropy"))
        return F.cross_entropy(logits, batch["labels"]), (logits, seen)

    assert not model._fused(program, torch.device("cpu"))
    slopes, (logits, seen) = grad(loss, has_aux=True)(params)
    monkeypatch.setattr(model, "_fused", lambda program, device: True)
    found, (fused_logits, fused_seen) = grad(loss, has_aux=True)(params)
    limit = 1e-12 if precision == "float64" else 3e-2  # bf16: eight bits, through every block
    torch.testing.assert_close(fused_logits, logits, rtol=limit, atol=limit)
    torch.testing.assert_close(fused_seen["entropy"], seen["entropy"], rtol=limit, atol=limit)
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=limit * max(1e-3, float(slope.abs().max())))
    width = program.width
    assert not found["qkv/bias"][:, width : 2 * width].any()


@pytest.mark.heavy
def test_whole_steps_of_a_stack_are_the_same_fused(monkeypatch, cache_dir):
    """The compiled engine over the operators against the serial one written out."""
    take = lambda: monkeypatch.setattr(model, "_fused", lambda program, device: True)
    assert_whole_steps_equal("covariates", take, cache_dir)


def test_only_bf16_on_a_gpu_is_fused():
    for precision, device, fused in (("bf16", "cuda", True), ("bf16", "cpu", False), ("float32", "cuda", False)):
        _, program, _ = build_case("ci_vit", "vanilla", precision=precision)
        assert model._fused(program, torch.device(device)) is fused
    assert not attention.fits(129, 16)
    assert not attention.fits(65, 65)


def test_operations_are_counted_as_of_the_written_out_way():
    qkv, bias, slope = inputs(SHAPES[0], torch.float64)
    with FlopCounterMode(display=False) as plain:
        by_autograd(qkv, bias, slope)
    with FlopCounterMode(display=False) as fused:
        lanes = qkv.unflatten(0, (2, 1)), bias.expand(2, *bias.shape).squeeze(1)
        vmap(grad(lambda qkv, bias: attention.fused(qkv, bias).sum()))(*lanes)
    assert fused.get_total_flops() == plain.get_total_flops() > 0


def test_missing_triton_is_told(monkeypatch):
    assert_missing_triton_is_told(monkeypatch, "trainables.ci_vit.attention_kernel", attention.gpu_kernel)


def test_kernels_equal_formulas_in_the_interpreter():
    code = "from tests.test_attention import SHAPES, check_in_float32; [check_in_float32(shape) for shape in SHAPES]"
    run_interpreted(code)


def test_key_tiles_hold_every_key():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    from trainables.ci_vit.attention_kernel import key_tiles

    assert key_tiles(65) == (64, 16)
    for positions in range(1, attention.MOST_POSITIONS + 1):
        first, rest = key_tiles(positions)
        assert positions <= first + rest <= max(16, 2 * positions)
        assert first <= max(16, positions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *BIG])
    def test_kernels_equal_formulas(self, shape):
        qkv, bias, slope = inputs(shape, torch.bfloat16, "cuda")
        # both sides see the same rounded q, k and v
        biased = (qkv.unflatten(0, (len(bias), -1)) + bias[:, None, None]).flatten(0, 1).to(torch.bfloat16)
        exact = by_autograd(biased.double(), torch.zeros_like(bias, dtype=torch.float64), slope.double())
        out, lse = attention.attention_forward(qkv, bias)
        found = out, *attention.attention_backward(slope, qkv, bias, lse)
        with torch.autocast("cuda", torch.bfloat16):
            plain = by_autograd(biased, torch.zeros_like(bias, dtype=torch.bfloat16), slope)
        for name, one, other, right in zip(("out", "slope", "bias"), found, plain, exact, strict=True):
            if name == "bias":  # to the keys' it is 0
                one, other, right = (tensor[:, ::2] for tensor in (one, other, right))
            error, usual = (float((x.double() - right).norm() / right.norm()) for x in (one, other))
            assert error < 4e-3, name
            assert error < 1.2 * usual, name

    def test_spares_the_neighbours_of_a_lane_that_is_not_a_number(self):
        qkv, bias, slope = inputs(BIG[0], torch.bfloat16, "cuda")
        out, lse = attention.attention_forward(qkv, bias)
        back = attention.attention_backward(slope, qkv, bias, lse)
        bias[1] = torch.nan
        bad, bad_lse = attention.attention_forward(qkv, bias)
        bad_back = attention.attention_backward(slope, qkv, bias, bad_lse)
        assert bad[25:50].isnan().all()
        for one, other in ((bad, out), *zip(bad_back, back, strict=True)):
            one, other = (tensor.unflatten(0, (len(bias), -1)) for tensor in (one, other))
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[2:], other[2:])

    def test_in_a_cuda_graph(self):
        qkv, bias, slope = inputs(BIG[0], torch.bfloat16, "cuda")

        def both():
            out, lse = attention.attention_forward(qkv, bias)
            return out, lse, *attention.attention_backward(slope, qkv, bias, lse)

        assert_replays(both, qkv)
