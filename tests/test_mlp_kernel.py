"""ci_vit's MLP half of a block: the operators' formulas, their gradient under vmap and compile, and the kernels.

The formulas are compared with autograd through ordinary code in float64: 1e-11 of the largest value, roundings of 1e-16
in sums of up to 200 terms. The kernels in float32 (Triton's interpreter): 2e-5 of the largest value, roundings of 6e-8
that sums of up to 768 terms add up. The kernels in bf16 (GPU): against ordinary code in float64, error in the 2-norm
relative to the result's, with the residual taken off y and dx, where it would hide what is wrong. A bf16 step is 2^-8
to 2^-7 of a value, so rounding one operand of a product gives 1.6e-3 and both 2.3e-3; of two or three products in a row
that is below 6e-3. That holds where no pre-activation is near ReLU's kink (`clear`). Else about one in 500 falls on the
other side of it for the rounding, whole slopes come and go, and the gradients are off by some 4e-2, ordinary code's
under autocast no less: then they are compared with those, over many rows, and may be 1.3 times as far off.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from tests.families import build_case
from tests.gpu_kernels import (
    assert_missing_triton_is_told,
    assert_near,
    assert_net_is_the_same,
    assert_replays,
    assert_whole_steps_equal,
    run_interpreted,
)
from trainables.ci_vit import mlp, model

SHAPES = [  # lanes, rows of each, width, neurons
    (2, 70, 48, 192),
    (1, 7, 16, 64),
    (3, 129, 32, 128),
    (2, 33, 62, 256),
    (1, 40, 17, 64),
]
BIG = [(3, 6500, 48, 192), (2, 1300, 62, 256), (1, 1500, 16, 256)]
NAMES = ("y", "x", "scale", "shift", "w_in", "b_in", "w_out", "b_out")


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", clear: bool = False
) -> tuple[torch.Tensor, ...]:
    """The gradient of the result, x, and the weights; with `clear` no pre-activation is near 0."""
    lanes, rows, width, neurons = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
    drawn = (
        draw(lanes * rows, width),
        2 * draw(lanes * rows, width) + draw(lanes * rows, 1),
        1 + draw(lanes, width) / 4,
        draw(lanes, width) / 4,
        draw(lanes, width, neurons) * width**-0.5,
        6 * draw(lanes, neurons).sign() if clear else draw(lanes, neurons) / 4,
        draw(lanes, neurons, width) * neurons**-0.5,
        draw(lanes, width) / 4,
    )
    return tuple(tensor.to(device, dtype) for tensor in drawn)


def ordinary(x, scale, shift, w_in, b_in, w_out, b_out) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the pre-activations, [lanes, rows, neurons], by ordinary code."""
    rows = x.unflatten(0, (len(w_in), -1))
    h = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * scale.unsqueeze(1) + shift.unsqueeze(1)
    pre = h @ w_in + b_in.unsqueeze(1)
    return (rows + torch.relu(pre) @ w_out + b_out.unsqueeze(1)).flatten(0, 1), pre.detach()


def by_autograd(slope, *leaves) -> tuple[torch.Tensor, ...]:
    """y, the gradients of x and the weights, and the pre-activations."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y, pre = ordinary(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, slope), pre


def check_in_float32(shape: tuple[int, ...]) -> None:
    """The kernels' results are the formulas'."""
    from trainables.ci_vit import mlp_kernel

    slope, x, *weights = inputs(shape, torch.float32)
    rest = x, *(torch.stack([weight, weight], 1)[:, 1] for weight in weights)  # as one of two blocks' weights
    y, fired, activity = mlp.forward_formula(*rest, True, True)
    found = mlp_kernel.forward(*rest, mlp.EPS, True, True, products=torch.float32)
    assert_near(found[0], y, 2e-5)
    assert torch.equal(found[1], fired)
    assert_near(found[2], activity, 2e-5)
    y, fired, activity = mlp_kernel.forward(*rest, mlp.EPS, False, False, products=torch.float32)
    assert torch.equal(y, found[0])  # what is watched does not change it
    assert fired.shape == activity.shape == (shape[0], 0)
    slopes = mlp.backward_formula(slope, *rest[:6])
    found = mlp_kernel.backward(slope, *rest[:6], mlp.EPS, products=torch.float32)
    for name, one, other in zip(NAMES[1:], found, slopes, strict=True):
        assert_near(one, other, 2e-5, name)


def check_not_a_number(shape: tuple[int, ...], device: str) -> None:
    """A lane of three with a weight that is not a number comes out as such, the others as ever."""
    from trainables.ci_vit import mlp_kernel

    slope, *rest = inputs(shape, torch.float32, device)
    products = torch.bfloat16 if device == "cuda" else torch.float32

    def work():
        y, fired, activity = mlp_kernel.forward(*rest, mlp.EPS, True, True, products)
        return y, activity, *mlp_kernel.backward(slope + 0 * y, *rest[:6], mlp.EPS, products), fired

    good = work()
    rest[3][1, 0] = torch.nan
    bad = work()
    for one, other in zip(bad, good, strict=True):
        one, other = (tensor.unflatten(0, (3, -1)) for tensor in (one, other))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])
    assert all(tensor.unflatten(0, (3, -1))[1].isnan().all() for tensor in bad[:-1])
    assert not bad[-1][1].any()  # no pre-activation of its is >= 0


def errors(drawn: tuple[torch.Tensor, ...]) -> list[tuple[str, float, float]]:
    """Of the operators and of ordinary code under autocast: name of the result, error of the first, of the second."""
    slope, *rest = drawn
    exact = by_autograd(slope.double(), *(tensor.double() for tensor in rest))[:-1]
    found = mlp.mlp_forward(*rest, False, False)[0], *mlp.mlp_backward(slope, *rest[:6])
    with torch.autocast("cuda", torch.bfloat16):
        usual = by_autograd(slope, *rest)[:-1]
    residuals = rest[0], slope, *[0] * 6
    out = []
    for name, right, residual, *both in zip(NAMES, exact, residuals, found, usual, strict=True):
        right = right - residual
        out.append((name, *(float((one - residual - right).norm() / right.norm()) for one in both)))
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    slope, *rest = inputs(shape, torch.float64)
    y, *slopes, pre = by_autograd(slope, *rest)
    found, fired, activity = mlp.mlp_forward(*rest, True, True)
    assert_near(found, y, 1e-11)
    assert torch.equal(fired, (pre >= 0).sum(1, dtype=torch.int32))
    assert_near(activity, torch.relu(pre).mean(1), 1e-11)
    for name, one, other in zip(NAMES[1:], mlp.mlp_backward(slope, *rest[:6]), slopes, strict=True):
        assert_near(one, other, 1e-11, name)


@pytest.mark.parametrize("watched", [(False, False), (True, False), (True, True)])
def test_fake_tensors_look_like_the_results(watched):
    slope, *rest = inputs(SHAPES[0], torch.float64)
    torch.library.opcheck(mlp.mlp_forward, (*rest, *watched))
    torch.library.opcheck(mlp.mlp_backward, (slope, *rest[:6]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_lanes(compiled, device):
    """vmap over grad, x the same in all lanes; a lane's result is what ordinary code gives it alone."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    dtype = torch.float64 if device == "cpu" else torch.float32
    slope, x, *weights = inputs((3, 33, 16, 64), dtype, device, clear=device == "cuda")
    x, slope = x[:33], slope[:33]

    def loss(weights, x):
        y, fired, activity = mlp.fused(x * weights[0].mean(), *weights, True, True)
        return (y * slope).sum(), (fired, activity)

    def plain(weights, x):
        y, pre = ordinary(x * weights[0].mean(), *(weight.unsqueeze(0) for weight in weights))
        return (y * slope).sum(), ((pre[0] >= 0).sum(0), torch.relu(pre[0]).mean(0))

    gradients = lambda weights: vmap(lambda own: grad(loss, (0, 1), has_aux=True)(own, x))(weights)
    (found, to_x), (fired, activity) = (torch.compile(gradients) if compiled else gradients)(tuple(weights))
    limit = 1e-11 if device == "cpu" else 1e-2  # operands of products are bf16
    for lane in range(3):
        own = tuple(weight[lane] for weight in weights)
        (expected, expected_to_x), (count, mean) = grad(plain, (0, 1), has_aux=True)(own, x)
        for name, one, other in zip(NAMES[2:], found, expected, strict=True):
            assert_near(one[lane], other, limit, name)
        assert_near(to_x[lane], expected_to_x, limit)
        assert int((fired[lane] - count).abs().max()) <= (0 if device == "cpu" else 1)
        assert_near(activity[lane], mean, limit)


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_net_is_the_same_fused(precision, monkeypatch, cache_dir):
    assert_net_is_the_same(precision, "_fused_mlp", monkeypatch, cache_dir)


@pytest.mark.heavy
@pytest.mark.parametrize("case", ["covariates", "redo"])
def test_whole_steps_of_a_stack_are_the_same_fused(case, monkeypatch, cache_dir):
    """The compiled engine over the operators against the serial one with ordinary code."""
    take = lambda: monkeypatch.setattr(model, "_fused_mlp", lambda program, device: True)
    assert_whole_steps_equal(case, take, cache_dir)


def test_only_bf16_on_a_gpu_is_fused():
    for precision, device, fused in (("bf16", "cuda", True), ("bf16", "cpu", False), ("float32", "cuda", False)):
        _, program, _ = build_case("ci_vit", "vanilla", precision=precision, hidden=48)
        assert model._fused_mlp(program, torch.device(device)) is fused
    assert mlp.fits(62, 256)
    assert not mlp.fits(63, 256)
    assert not mlp.fits(62, 320)
    assert not mlp.fits(24, 96)


def test_operations_are_counted_as_of_ordinary_code():
    slope, *rest = inputs(SHAPES[0], torch.float64)
    lanes, rows, width, _ = SHAPES[0]
    with FlopCounterMode(display=False) as plain:
        by_autograd(slope, *rest)
    with FlopCounterMode(display=False) as fused:
        x, *weights = rest
        loss = lambda *args: mlp.fused(*args)[0].sum()
        vmap(grad(loss, tuple(range(7))))(x.reshape(lanes, rows, width), *weights)
    assert fused.get_total_flops() == plain.get_total_flops() > 0


def test_missing_triton_is_told(monkeypatch):
    assert_missing_triton_is_told(monkeypatch, "trainables.ci_vit.mlp_kernel", mlp.gpu_kernel)


def test_kernels_equal_formulas_in_the_interpreter():
    code = "from tests.test_mlp_kernel import SHAPES, check_in_float32; [check_in_float32(shape) for shape in SHAPES]"
    run_interpreted(code)


def test_lane_that_is_not_a_number_in_the_interpreter():
    run_interpreted("from tests.test_mlp_kernel import check_not_a_number; check_not_a_number((3, 70, 48, 64), 'cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *BIG])
    def test_kernels_equal_ordinary_code(self, shape):
        for name, error, habit in errors(inputs(shape, torch.float32, "cuda", clear=True)):
            assert error < (1e-5 if name == "b_out" else 6e-3), name  # b_out's is a plain sum in float32
            assert name == "b_out" or error < 1.3 * habit, name

    @pytest.mark.parametrize("shape", BIG)
    def test_kernels_are_no_worse_at_the_kink(self, shape):
        drawn = inputs(shape, torch.float32, "cuda")
        for name, error, habit in errors(drawn):
            # which few rows fall on the other side of the kink is chance: 1.6 was seen
            assert error < max(1e-5, 2 * habit), name
        _, fired, activity = mlp.mlp_forward(*drawn[1:], True, True)
        pre = ordinary(*(tensor.double() for tensor in drawn[1:]))[1]
        near = (pre.abs() < 4e-2).sum(1)  # bf16 operands put pre-activations of size 1 off by some 2e-3
        assert ((fired - (pre >= 0).sum(1)).abs() <= near).all()
        means = torch.relu(pre).mean(1)
        assert float((activity.double() - means).norm() / means.norm()) < 4e-3

    @pytest.mark.parametrize("shape", [(4, 333, 48, 192), (4, 130, 16, 64)])
    def test_lane_is_the_same_alone(self, shape):
        slope, *rest = inputs(shape, torch.float32, "cuda")
        many = (*mlp.mlp_forward(*rest, True, True), *mlp.mlp_backward(slope, *rest[:6]))
        lanes, rows = shape[:2]
        for lane in range(lanes):
            own = [tensor.unflatten(0, (lanes, -1))[lane] for tensor in (slope, *rest)]
            one = (*mlp.mlp_forward(*own[1:], True, True), *mlp.mlp_backward(*own[:7]))
            for alone, stacked in zip(one, many, strict=True):
                assert torch.equal(alone, stacked.unflatten(0, (lanes, -1))[lane])
        assert rows == len(own[0])

    @pytest.mark.parametrize("shape", [(3, 333, 48, 192), (3, 130, 16, 256)])
    def test_spares_the_neighbours_of_a_lane_that_is_not_a_number(self, shape):
        check_not_a_number(shape, "cuda")

    @pytest.mark.parametrize("shape", [(3, 333, 48, 192), (3, 130, 16, 256)])
    def test_in_a_cuda_graph(self, shape):
        slope, *rest = inputs(shape, torch.float32, "cuda")
        work = lambda: (*mlp.mlp_forward(*rest, True, True), *mlp.mlp_backward(slope, *rest[:6]))
        assert_replays(work, rest[0])
