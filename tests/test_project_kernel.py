"""ci_vit's LayerNorm and product as operators: the formulas, their gradient under vmap and compile, and the kernels.

The formulas are compared with autograd through ordinary code in float64: 1e-11 of the largest value, roundings of 1e-16
in sums of up to 200 terms. The kernels in float32 (Triton's interpreter): 2e-5 of the largest value, roundings of 6e-8
that sums of up to 200 terms add up. The kernels in bf16 (GPU): against ordinary code in float64, error in the 2-norm
relative to the result's, with what is carried taken off dx, where it would hide what is wrong. A bf16 step is 2^-8 to
2^-7 of a value, so rounding one operand of a product gives 1.6e-3, both 2.3e-3 and the result's rounding as well
2.8e-3, below 4e-3. And not above 1.2 times the error of ordinary code under autocast.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from lanes.probe import make_engine
from tests.families import arrays_of, build_case
from tests.gpu_kernels import assert_near, assert_replays, run_interpreted
from trainables.ci_vit import model, project
from trainables.draws import counter
from trainables.family import hyper_tensors

SHAPES = [(2, 70, 48, 144), (1, 7, 16, 48), (3, 129, 32, 96), (2, 33, 62, 186), (1, 40, 17, 51)]
"""Lanes, rows of each, width, columns."""
BIG = [(3, 6500, 48, 144), (2, 1300, 62, 186), (1, 1500, 16, 48)]
NAMES = ("out", "x", "scale", "shift", "w", "b")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """The gradient of the product, of x by what else depends on it, x, and the weights as one of two blocks'."""
    lanes, rows, width, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    x = 2 * draw(lanes * rows, width) + draw(lanes * rows, 1)
    drawn = (
        1 + draw(lanes, 2, width) / 4,
        draw(lanes, 2, width) / 4,
        draw(lanes, 2, width, columns) * width**-0.5,
        draw(lanes, 2, columns) / 4,
    )
    both = draw(lanes * rows, columns), draw(lanes * rows, width)
    return tuple(tensor.to(device, dtype) for tensor in (*both, x, *(weight[:, 1] for weight in drawn)))


def ordinary(x, scale, shift, w, b) -> torch.Tensor:
    """The product by ordinary code."""
    rows = x.unflatten(0, (len(w), -1))
    h = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * scale.unsqueeze(1) + shift.unsqueeze(1)
    return (h @ w + b.unsqueeze(1)).flatten(0, 1)


def by_autograd(slope, carried, *leaves) -> tuple[torch.Tensor, ...]:
    """The product, the gradients of x and the weights."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = ordinary(*leaves)
    to_x, *rest = torch.autograd.grad(out, leaves, slope.to(out.dtype))
    return out.detach(), carried + to_x, *rest


def by_operators(slope, carried, x, *weights, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    out = project.norm_project_forward(x, *weights, dtype)
    return out, *project.norm_project_backward(slope.to(dtype), carried, x, *weights[:3])


def check_in_float32(shape: tuple[int, ...]) -> None:
    """The kernels' results are the formulas'."""
    from trainables.ci_vit import project_kernel

    slope, carried, *rest = inputs(shape, torch.float32)
    out = project_kernel.forward(*rest, project.EPS, torch.float32)
    found = out, *project_kernel.backward(slope, carried, *rest[:4], project.EPS)
    expected = by_operators(slope, carried, *rest, dtype=torch.float32)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert_near(one, other, 2e-5, name)


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    drawn = inputs(shape, torch.float64)
    for name, one, other in zip(NAMES, by_operators(*drawn, dtype=torch.float64), by_autograd(*drawn), strict=True):
        assert_near(one, other, 1e-11, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fake_tensors_look_like_the_results(dtype):
    slope, carried, *rest = inputs(SHAPES[0], torch.float64)
    torch.library.opcheck(project.norm_project_forward, (*rest, dtype))
    torch.library.opcheck(project.norm_project_backward, (slope.to(dtype), carried, *rest[:4]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_lanes(compiled, device):
    """vmap over grad, x the same in all lanes and used once more; a lane's result is what ordinary code gives it."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    dtype, products = (torch.float64, torch.float64) if device == "cpu" else (torch.float32, torch.bfloat16)
    slope, target, x, *weights = inputs((3, 33, 16, 48), dtype, device)
    x, slope, target = x[:33], slope[:33], target[:33]

    def loss(weights, x):
        out, x = project.fused(x * weights[0].mean(), *weights, products)
        return (out.to(dtype) * slope).sum() + (x.square() * target).sum()

    def plain(weights, x):
        x = x * weights[0].mean()
        out = ordinary(x, *(weight.unsqueeze(0) for weight in weights))
        return (out * slope).sum() + (x.square() * target).sum()

    gradients = lambda weights: vmap(lambda own: grad(loss, (0, 1))(own, x))(weights)
    found, to_x = (torch.compile(gradients) if compiled else gradients)(tuple(weights))
    limit = 1e-11 if device == "cpu" else 1e-2  # what is multiplied is bf16
    for lane in range(3):
        expected, expected_to_x = grad(plain, (0, 1))(tuple(weight[lane] for weight in weights), x)
        for name, one, other in zip(NAMES[2:], found, expected, strict=True):
            assert_near(one[lane], other, limit, name)
        assert_near(to_x[lane], expected_to_x, limit)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_net_is_the_same_fused(precision, attention, monkeypatch, cache_dir):
    """Logits, gradients and what is watched, the operators taken on the CPU for once."""
    family, program, hyper = build_case("ci_vit", "vanilla", precision=precision)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    row = {name: values[0] for name, values in family.order(program, arrays, 0, 0).items()}
    batch = family.batch(program, arrays, row)
    params = family.init(program, hyper_tensors(program, hyper, "cpu"), counter(0))["params"]
    bias = params["qkv/bias"]
    params["qkv/bias"] = torch.linspace(-1, 1, bias.numel(), dtype=bias.dtype).reshape_as(bias)

    def loss(params):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits, seen = model.forward(program, params, batch["images"], ("entropy",))
        return F.cross_entropy(logits, batch["labels"]), (logits, seen["entropy"])

    assert not model._fused_project(program, torch.device("cpu"))
    slopes, (logits, entropy) = grad(loss, has_aux=True)(params)
    monkeypatch.setattr(model, "_fused_project", lambda program, device: True)
    monkeypatch.setattr(model, "_fused", lambda program, device: attention)
    found, (fused_logits, fused_entropy) = grad(loss, has_aux=True)(params)
    limit = 1e-11 if precision == "float64" else 5e-2  # bf16: eight bits, through every block
    torch.testing.assert_close(fused_logits, logits, rtol=limit, atol=limit)
    torch.testing.assert_close(fused_entropy, entropy, rtol=limit, atol=limit)
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=limit * max(1e-3, float(slope.abs().max())))
    width = program.width
    assert not found["qkv/bias"][:, width : 2 * width].any()


@pytest.mark.heavy
def test_whole_steps_of_a_stack_are_the_same_fused(monkeypatch, cache_dir):
    """The compiled engine over all operators, with an evaluation, against the serial one with ordinary code."""
    family, program, hyper = build_case("ci_vit", "covariates", depth=1)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    alone = make_engine("serial", 1, family, program, arrays, "cpu")
    alone.insert("me", hyper, 3)
    steps = alone.until_epoch_end()
    curves, after = alone.advance(steps), alone.evaluate(["me"])["me"]
    for name in ("_fused_project", "_fused", "_fused_mlp"):
        monkeypatch.setattr(model, name, lambda program, device: True)
    many = make_engine("stacked, compiled", 2, family, program, arrays, "cpu")
    many.insert("other", hyper, 1)
    many.insert("me", hyper, 3)
    found, found_after = many.advance(steps), many.evaluate(["me"])["me"]
    for name, values in curves.items():
        torch.testing.assert_close(found[name][:, 1], values[:, 0], rtol=1e-9, atol=1e-9, msg=name)
    assert found_after == pytest.approx(after, rel=1e-9, abs=1e-9)


def test_only_bf16_on_a_gpu_is_fused():
    for precision, device, fused in (("bf16", "cuda", True), ("bf16", "cpu", False), ("float32", "cuda", False)):
        _, program, _ = build_case("ci_vit", "vanilla", precision=precision, hidden=48)
        assert model._fused_project(program, torch.device(device)) is fused
    assert project.fits(62)
    assert not project.fits(63)


def test_operations_are_counted_as_of_ordinary_code():
    drawn = inputs(SHAPES[0], torch.float64)
    with FlopCounterMode(display=False) as plain:
        by_autograd(*drawn)
    with FlopCounterMode(display=False) as fused:
        loss = lambda *args: project.fused(*args, torch.float64)[0].sum()
        x, *weights = drawn[2:]
        vmap(grad(loss, tuple(range(5))))(x.unflatten(0, (2, -1)), *weights)
    assert fused.get_total_flops() == plain.get_total_flops() > 0


def test_kernels_equal_formulas_in_the_interpreter():
    run_interpreted(
        "from tests.test_project_kernel import SHAPES, check_in_float32; [check_in_float32(shape) for shape in SHAPES]"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *BIG])
    def test_kernels_are_no_worse_than_ordinary_code(self, shape):
        slope, carried, *rest = inputs(shape, torch.float32, "cuda")
        slope = slope.bfloat16()
        exact = by_autograd(*(tensor.double() for tensor in (slope, carried, *rest)))
        found = by_operators(slope, carried, *rest, dtype=torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            usual = by_autograd(slope, carried, *rest)
        for name, right, one, other in zip(NAMES, exact, found, usual, strict=True):
            residual = carried if name == "x" else 0
            right = right - residual
            error, habit = (float((result - residual - right).norm() / right.norm()) for result in (one, other))
            assert error < (1e-5 if name == "b" else 4e-3), name  # b's is a plain sum in float32
            assert name == "b" or error < 1.2 * habit, name

    @pytest.mark.parametrize("shape", [(4, 333, 48, 144), (4, 130, 16, 48)])
    def test_lane_is_the_same_alone(self, shape):
        drawn = inputs(shape, torch.float32, "cuda")
        many = by_operators(*drawn, dtype=torch.bfloat16)
        for lane in range(4):
            one = by_operators(*(tensor.unflatten(0, (4, -1))[lane] for tensor in drawn), dtype=torch.bfloat16)
            for alone, stacked in zip(one, many, strict=True):
                assert torch.equal(alone, stacked.unflatten(0, (4, -1))[lane])

    @pytest.mark.parametrize("place", [2, 5])
    def test_spares_the_neighbours_of_a_lane_that_is_not_a_number(self, place):
        slope, *rest = inputs((3, 333, 48, 144), torch.float32, "cuda")
        carried, *rest = (tensor.clone() for tensor in rest)

        def work():
            out = project.norm_project_forward(*rest, torch.bfloat16)
            return out, *project.norm_project_backward(slope.bfloat16() + 0 * out, carried, *rest[:4])

        good = work()
        rest[place - 2].unflatten(0, (3, -1))[1] = torch.nan  # x or w
        for one, other in zip(work(), good, strict=True):
            one, other = (tensor.unflatten(0, (3, -1)) for tensor in (one, other))
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[2], other[2])
            assert one[1].isnan().all()

    def test_in_a_cuda_graph(self):
        drawn = inputs((3, 333, 48, 144), torch.float32, "cuda")
        assert_replays(lambda: by_operators(*drawn, dtype=torch.bfloat16), drawn[2])
