"""What stands between the products of ci_vit's wide blocks: the operators' formulas, their gradient, and the kernels.

The formulas are compared with autograd through ordinary code in float64: 1e-11 of the largest value, roundings of 1e-16
in sums of up to 130 terms. The kernels in float32 (Triton's interpreter): 2e-5 of the largest value, roundings of 6e-8
that sums of as many terms add up. The kernels in bf16 (GPU): sums and the residual are float32, 1e-5; what is rounded
to bf16 once is off by 2^-9 of a value at most, 2e-3 in the 2-norm.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from tests.families import build_case
from tests.gpu_kernels import (
    assert_missing_triton_is_told,
    assert_near,
    assert_net_is_the_same,
    assert_replays,
    assert_whole_steps_equal,
    run_interpreted,
)
from trainables.ci_vit import model, residual

SHAPES = [  # lanes, rows of each, channels, units of the hidden layer
    (2, 130, 24, 96),
    (1, 7, 17, 40),
    (3, 129, 192, 300),
    (2, 3, 130, 520),
]
BIG = [(3, 6500, 192, 768), (2, 1300, 384, 1536), (1, 1500, 96, 384), (4, 65, 1024, 1024)]
RESIDUAL = ("x", "added", "bias", "scale", "shift")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, low: torch.dtype, device: str = "cpu") -> dict[str, tuple]:
    """Arguments and gradients of the results, of either pair of operators; `low` is what products are of."""
    lanes, rows, width, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, kind)

    count = lanes * rows
    return {
        "residual": (
            2 * draw(count, width) + draw(count, 1),
            draw(count, width, kind=low),
            draw(lanes, width) / 4,
            1 + draw(lanes, width) / 4,
            draw(lanes, width) / 4,
        ),
        "to_residual": (draw(count, width), draw(count, width, kind=low)),
        "rectify": (draw(count, hidden, kind=low), draw(lanes, hidden) / 4),
        "to_rectify": (draw(count, hidden, kind=low),),
    }


def ordinary_residual(x, added, bias, scale, shift) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (x + added).unflatten(0, (len(bias), -1)) + bias.unsqueeze(1)
    h = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * scale.unsqueeze(1) + shift.unsqueeze(1)
    return rows.flatten(0, 1), h.flatten(0, 1)


def ordinary_rectify(product, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden layer, and before the ReLU [lanes, rows, units]."""
    pre = product.unflatten(0, (len(bias), -1)) + bias.unsqueeze(1)
    return torch.relu(pre).flatten(0, 1), pre


def work(drawn: dict[str, tuple], of: object) -> list[torch.Tensor]:
    """All results of the four operators, or of what stands for them in `of`, a backward fed by its forward."""
    bias, scale = drawn["rectify"][1], drawn["residual"][3]
    forward, backward, rectify, rectify_back = of
    y, h, mean, rate = forward(*drawn["residual"])
    slopes = backward(*drawn["to_residual"], y, mean, rate, scale)
    active, counts, means = rectify(*drawn["rectify"], True, True)
    return [y, h, mean, rate, *slopes, active, means, *rectify_back(*drawn["to_rectify"], active, bias), counts]


OPERATORS = (
    residual.residual_forward,
    residual.residual_backward,
    residual.rectify_forward,
    residual.rectify_backward,
)
FORMULAS = (
    residual.residual_forward_formula,
    residual.residual_backward_formula,
    residual.rectify_forward_formula,
    residual.rectify_backward_formula,
)


def kernels() -> tuple:
    from trainables.ci_vit import residual_kernel as kernel

    forward = lambda *args: kernel.residual_forward(*args, residual.EPS)
    return forward, kernel.residual_backward, kernel.rectify_forward, kernel.rectify_backward


def check_in_float32(shape: tuple[int, ...]) -> None:
    """The kernels' results are the formulas'; what is watched does not change them."""
    drawn = inputs(shape, torch.float32, torch.float32)
    *found, counts = work(drawn, kernels())
    *expected, right = work(drawn, FORMULAS)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_near(one, other, 2e-5, str(place))
    assert torch.equal(counts, right)
    active, none, nothing = kernels()[2](*drawn["rectify"], False, False)
    assert torch.equal(active, found[9])
    assert none.shape == nothing.shape == (shape[0], 0)


def check_not_a_number(shape: tuple[int, ...], device: str) -> None:
    """Of three lanes the middle one's bias is not a number: it comes out as such, the others as ever."""
    low = torch.bfloat16 if device == "cuda" else torch.float32
    drawn = inputs(shape, torch.float32, low, device)
    good = work(drawn, kernels())
    drawn["residual"][2][1], drawn["rectify"][1][1] = torch.nan, torch.nan
    for place, (one, other) in enumerate(zip(work(drawn, kernels()), good, strict=True)):
        one, other = (tensor.unflatten(0, (3, -1)) for tensor in (one, other))
        assert torch.equal(one[0], other[0]), place
        assert torch.equal(one[2], other[2]), place
        # its shift's gradient and the hidden layer's do not depend on what became of it; nothing is >= 0
        assert one[1].isnan().all() if place not in (8, 11, 12, 13) else torch.isfinite(one[1]).all(), place
    assert not one[1].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    drawn = inputs(shape, torch.float64, torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in drawn["residual"]]
    y, h = ordinary_residual(*leaves)
    found_y, found_h, mean, rate = residual.residual_forward(*drawn["residual"])
    assert_near(found_y, y.detach(), 1e-11)
    assert_near(found_h, h.detach(), 1e-11)
    slopes = torch.autograd.grad((y, h), leaves, drawn["to_residual"])
    found = residual.residual_backward(*drawn["to_residual"], found_y, mean, rate, drawn["residual"][3])
    for name, one, other in zip(RESIDUAL, found, slopes, strict=True):
        assert_near(one, other, 1e-11, name)

    leaves = [leaf.clone().requires_grad_() for leaf in drawn["rectify"]]
    active, pre = ordinary_rectify(*leaves)
    found_active, fired, activity = residual.rectify_forward(*drawn["rectify"], True, True)
    assert_near(found_active, active.detach(), 1e-11)
    assert torch.equal(fired, (pre >= 0).sum(1, dtype=torch.int32))
    assert_near(activity, torch.relu(pre).mean(1).detach(), 1e-11)
    slopes = torch.autograd.grad(active, leaves, drawn["to_rectify"])
    found = residual.rectify_backward(*drawn["to_rectify"], found_active, drawn["rectify"][1])
    for one, other in zip(found, slopes, strict=True):
        assert_near(one, other, 1e-11)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_fake_tensors_look_like_the_results(low):
    drawn = inputs(SHAPES[0], torch.float32, low)
    y, _, mean, rate = residual.residual_forward(*drawn["residual"])
    torch.library.opcheck(residual.residual_forward, drawn["residual"])
    torch.library.opcheck(residual.residual_backward, (*drawn["to_residual"], y, mean, rate, drawn["residual"][3]))
    for watched in ((False, False), (True, False), (True, True)):
        torch.library.opcheck(residual.rectify_forward, (*drawn["rectify"], *watched))
    active = residual.rectify_forward(*drawn["rectify"], False, False)[0]
    torch.library.opcheck(residual.rectify_backward, (*drawn["to_rectify"], active, drawn["rectify"][1]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_lanes(compiled, device):
    """vmap over grad of both, one behind the other, the rows the same in all lanes; against ordinary code alone."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    dtype = torch.float64 if device == "cpu" else torch.float32
    drawn = inputs((3, 33, 24, 24), dtype, dtype, device)
    rows, (x, added, *vectors), to_h = 33, drawn["residual"], drawn["to_rectify"][0]
    x, added, to_h, to_y = x[:rows], added[:rows], to_h[:rows], drawn["to_residual"][0][:rows]
    weights = *vectors, drawn["rectify"][1]

    def loss(weights, x, added):
        *vectors, bias = weights
        y, h = residual.added_and_normalised(x * vectors[1].mean(), added, *vectors)
        active, fired, activity = residual.rectified(h, bias, True, True)
        return (y * to_y).sum() + (active * to_h).sum(), (fired, activity)

    def plain(weights, x, added):
        *vectors, bias = (weight.unsqueeze(0) for weight in weights)
        y, h = ordinary_residual(x * vectors[1].mean(), added, *vectors)
        active, pre = ordinary_rectify(h, bias)
        return (y * to_y).sum() + (active * to_h).sum(), ((pre[0] >= 0).sum(0), torch.relu(pre[0]).mean(0))

    gradients = lambda weights: vmap(lambda own: grad(loss, (0, 1, 2), has_aux=True)(own, x, added))(weights)
    (found, *to_rows), (fired, activity) = (torch.compile(gradients) if compiled else gradients)(weights)
    limit = 1e-11 if device == "cpu" else 1e-4
    for lane in range(3):
        own = tuple(weight[lane] for weight in weights)
        (expected, *expected_to_rows), (count, mean) = grad(plain, (0, 1, 2), has_aux=True)(own, x, added)
        for one, other in zip((*found, *to_rows), (*expected, *expected_to_rows), strict=True):
            assert_near(one[lane], other, limit)
        assert int((fired[lane] - count).abs().max()) <= (0 if device == "cpu" else 1)
        assert_near(activity[lane], mean, limit)


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_net_is_the_same_fused(precision, monkeypatch, cache_dir):
    assert_net_is_the_same(precision, "_fused_residual", monkeypatch, cache_dir)


@pytest.mark.heavy
@pytest.mark.parametrize("case", ["covariates", "redo"])
def test_whole_steps_of_a_stack_are_the_same_fused(case, monkeypatch, cache_dir):
    """The compiled engine over the operators against the serial one with ordinary code."""
    take = lambda: monkeypatch.setattr(model, "_fused_residual", lambda program, device: True)
    assert_whole_steps_equal(case, take, cache_dir)


def test_only_wide_nets_in_bf16_on_a_gpu_are_fused():
    cases = (("bf16", "cuda", 192, True), ("bf16", "cpu", 192, False), ("float32", "cuda", 192, False))
    for precision, device, hidden, fused in (*cases, ("bf16", "cuda", 48, False)):
        _, program, _ = build_case("ci_vit", "vanilla", precision=precision, hidden=hidden)
        assert model._fused_residual(program, torch.device(device)) is fused


def test_missing_triton_is_told(monkeypatch):
    assert_missing_triton_is_told(monkeypatch, "trainables.ci_vit.residual_kernel", residual.gpu_kernel)


def test_kernels_equal_formulas_in_the_interpreter():
    code = "from tests.test_residual_kernel import SHAPES, check_in_float32; "
    run_interpreted(code + "[check_in_float32(shape) for shape in SHAPES]")


def test_lane_that_is_not_a_number_in_the_interpreter():
    code = "from tests.test_residual_kernel import check_not_a_number; "
    run_interpreted(code + "check_not_a_number((3, 70, 24, 96), 'cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *BIG])
    def test_kernels_equal_formulas_in_float64(self, shape):
        drawn = inputs(shape, torch.float32, torch.bfloat16, "cuda")
        exact = {name: tuple(tensor.double() for tensor in tensors) for name, tensors in drawn.items()}
        *found, counts = work(drawn, OPERATORS)
        *expected, right = work(exact, FORMULAS)
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            error = float((one.double() - other).norm() / other.norm())
            # of the mask, a pre-activation within rounding of 0 passes or not, where both results are next to nothing
            assert error < (2.5e-3 if one.dtype == torch.bfloat16 else 2e-5), place
        near = (ordinary_rectify(*exact["rectify"])[1].abs() < 1e-6).sum(1)
        assert ((counts - right).abs() <= near).all()

    @pytest.mark.parametrize("shape", [(4, 333, 192, 768), (4, 130, 24, 96)])
    def test_lane_is_the_same_alone(self, shape):
        drawn = inputs(shape, torch.float32, torch.bfloat16, "cuda")
        many = work(drawn, OPERATORS)
        for lane in range(4):
            own = {name: tuple(t.unflatten(0, (4, -1))[lane] for t in tensors) for name, tensors in drawn.items()}
            vectors = {"residual": slice(2, None), "rectify": slice(1, None)}
            for name, those in vectors.items():
                own[name] = (*own[name][: those.start], *(t.reshape(1, -1) for t in own[name][those]))
            for alone, stacked in zip(work(own, OPERATORS), many, strict=True):
                assert torch.equal(alone, stacked.unflatten(0, (4, -1))[lane].reshape(alone.shape))

    @pytest.mark.parametrize("shape", [(3, 333, 192, 768), (3, 130, 24, 96)])
    def test_spares_the_neighbours_of_a_lane_that_is_not_a_number(self, shape):
        check_not_a_number(shape, "cuda")

    def test_in_a_cuda_graph(self):
        drawn = inputs((3, 333, 192, 768), torch.float32, torch.bfloat16, "cuda")
        assert_replays(lambda: work(drawn, OPERATORS), drawn["residual"][0])
