"""The spiking net's products with BatchNorm's sums: the operators' formulas, their gradient, and the kernels.

The formulas are compared with autograd through ordinary code in float64: 1e-11 of the largest value, roundings of 1e-16
in sums of some hundred terms. The kernels in float32 (Triton's interpreter): 2e-5 of the largest value, roundings of
6e-8 that sums of as many terms add up. The kernels in bf16 (GPU): what is rounded to bf16 is off by 2^-9 of a value at
most, 2.5e-3 in the 2-norm; sums of what was rounded are float32, 2e-5.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from tests.families import arrays_of, build_case
from tests.gpu_kernels import assert_near, assert_replays, run_interpreted
from trainables.draws import counter
from trainables.family import hyper_tensors, load_family
from trainables.snn_delays import delay_ops, delays, mixing, model, pooling, training

SHAPES = [  # groups, B, T, N, C, D
    (1, 2, 3, 5, 8, 32),
    (2, 3, 7, 11, 24, 16),
    (3, 1, 30, 75, 16, 17),  # more rows than an instance takes
    (2, 2, 1, 1, 40, 100),
]
BIG = [(3, 8, 100, 50, 32, 32), (2, 8, 50, 25, 128, 128), (2, 4, 100, 50, 64, 64), (3, 8, 100, 100, 8, 32)]
NAMES = "x", "weight"
MIXED = "max", "v1_inverted"
"""Cases with one product a block, and with two."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype, low: torch.dtype, device: str = "cpu") -> dict[str, tuple]:
    """Arguments, and gradients of the results; the last third of the frames does not count."""
    groups, samples, steps, positions, channels, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, kind)

    counted = torch.ones(groups, samples, steps, dtype=dtype, device=device)
    counted[:, :, steps - steps // 3 :] = 0
    return {
        "forward": (
            draw(groups, samples, steps, positions, channels, kind=low),
            draw(groups, outputs, channels) / channels**0.5,
            draw(groups, outputs) / 4,
            counted,
        ),
        "to_results": (draw(groups, samples, steps, positions, outputs, kind=low), draw(groups, 2, outputs) / 4),
    }


def ordinary(x, weight, centre, counted) -> tuple[torch.Tensor, torch.Tensor]:
    lanes = []
    for own, matrix, middle, mask in zip(x, weight, centre, counted, strict=True):
        y = model.mix(own, matrix)
        rows = y[mask > 0] - middle
        lanes.append((y, torch.stack([rows.sum((0, 1)), (rows * rows).sum((0, 1))])))
    return tuple(map(torch.stack, zip(*lanes, strict=True)))


def work(drawn: dict[str, tuple], of: object) -> list[torch.Tensor]:
    """All results of the two operators, or of what stands for them in `of`, the backward fed by the forward."""
    forward, backward = of
    x, *others = drawn["forward"]
    y, sums = forward(x, *others)
    return [y, sums, *backward(*drawn["to_results"], x, y, *others)]


OPERATORS = mixing.mix_forward, mixing.mix_backward
FORMULAS = mixing.forward_formula, mixing.backward_formula


def kernels() -> tuple:
    from trainables.snn_delays import mixing_kernel as kernel

    return kernel.forward, kernel.backward


def check_in_float32(shape: tuple[int, ...]) -> None:
    """The kernels' results are the formulas'."""
    drawn = inputs(shape, torch.float32, torch.float32)
    for place, (one, other) in enumerate(zip(work(drawn, kernels()), work(drawn, FORMULAS), strict=True)):
        assert_near(one, other, 2e-5, str(place))


def check_not_a_number(shape: tuple[int, ...], device: str) -> None:
    """Of three lanes the middle one's weight is not a number: its results are none either, the others' as ever."""
    drawn = inputs(shape, torch.float32, torch.bfloat16 if device == "cuda" else torch.float32, device)
    good = work(drawn, kernels())
    drawn["forward"][1][1] = torch.nan
    for place, (one, other) in enumerate(zip(work(drawn, kernels()), good, strict=True)):
        assert torch.equal(one[0], other[0]), place
        assert torch.equal(one[2], other[2]), place
        assert one[1].isnan().all(), place


@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_equal_autograd(shape):
    drawn = inputs(shape, torch.float64, torch.float64)
    x, weight, *fixed = drawn["forward"]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    results = ordinary(*leaves, *fixed)
    y, sums, *found = work(drawn, OPERATORS)
    for one, other in zip((y, sums), results, strict=True):
        assert_near(one, other.detach(), 1e-11)
    slopes = torch.autograd.grad(results, leaves, drawn["to_results"])
    for name, one, other in zip(NAMES, found, slopes, strict=True):
        assert_near(one, other, 1e-11, name)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_fake_tensors_look_like_the_results(low):
    drawn = inputs(SHAPES[0], torch.float32, low)
    torch.library.opcheck(mixing.mix_forward, drawn["forward"])
    x, *others = drawn["forward"]
    y = mixing.mix_forward(x, *others)[0]
    torch.library.opcheck(mixing.mix_backward, (*drawn["to_results"], x, y, *others))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_lanes(compiled, device):
    """vmap over grad, x the same in all lanes; against ordinary code alone."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    dtype = torch.float64 if device == "cpu" else torch.float32
    drawn = inputs((3, 2, 5, 4, 8, 12), dtype, dtype, device)
    (x, weights, centres, counted), (to_y, to_sums) = drawn["forward"], drawn["to_results"]
    x, to_y, counted = x[0], to_y[0], counted[0]

    def loss(weight, x, centre, to_sums):
        y, first, second = mixing.mixed(x, weight, centre, counted)
        return (y * to_y).sum() + (first * to_sums[0]).sum() + (second * to_sums[1]).sum()

    def plain(weight, x, centre, to_sums):
        y, sums = ordinary(*(tensor.unsqueeze(0) for tensor in (x, weight, centre, counted)))
        return (y[0] * to_y).sum() + (sums[0] * to_sums).sum()

    gradients = lambda *own: vmap(lambda w, c, t: grad(loss, (0, 1))(w, x, c, t))(*own)
    found = (torch.compile(gradients) if compiled else gradients)(weights, centres, to_sums)
    for lane in range(3):
        leaves = weights[lane].clone().requires_grad_(), x.clone().requires_grad_()
        expected = torch.autograd.grad(plain(*leaves, centres[lane], to_sums[lane]), leaves)
        for one, other in zip(found, expected, strict=True):
            assert_near(one[lane], other, 1e-11 if device == "cpu" else 1e-4)


@pytest.mark.parametrize(
    ("case", "precision", "delayed"),
    [
        *((case, "float64", True) for case in load_family("snn_delays").cases),
        *((case, "bf16", False) for case in MIXED),
    ],
)
def test_net_is_the_same_fused(case, precision, delayed, monkeypatch, cache_dir):
    """Loss, gradients and BatchNorm's statistics of a step, and an evaluation, with operators taken on the CPU.

    delayed: those of delays and of the mean over positions too. In bf16 they do not round before a convolution, as the
    ordinary code does, and a neuron near its threshold spikes or does not.
    """
    family, program, hyper = build_case("snn_delays", case, precision=precision)
    arrays = arrays_of(family, program, cache_dir, "cpu")
    row = {name: values[0] for name, values in family.order(program, arrays, 0, 0).items()}
    batch = family.batch(program, arrays, row)
    values = hyper_tensors(program, hyper, "cpu")
    state = family.init(program, values, counter(0))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            after, metrics = training.step(program, state, values, batch)
            return after, metrics | training.evaluate(program, after, values, batch)

    assert not model.fused(program, torch.device("cpu"))
    expected, metrics = step()
    monkeypatch.setattr(model, "fused", lambda program, device: True)
    if delayed:
        monkeypatch.setattr(delays, "frequency_delay", delay_ops.walked_delay)
        monkeypatch.setattr(pooling, "mean_over_positions", pooling.mean_by_operator)
    found, found_metrics = step()
    limit = 1e-11 if precision == "float64" else 3e-2  # bf16: eight bits, through every layer
    for name, value in metrics.items():
        torch.testing.assert_close(found_metrics[name], value, rtol=limit, atol=limit)
    for part in ("running", "mu"):
        for name, value in expected[part].items():
            torch.testing.assert_close(
                found[part][name], value, rtol=0, atol=limit * max(1e-3, float(value.abs().max())), msg=name
            )


def test_only_bf16_on_a_gpu_is_fused():
    for precision, device, expected in (("bf16", "cuda", True), ("bf16", "cpu", False), ("float32", "cuda", False)):
        _, program, _ = build_case("snn_delays", "max", precision=precision)
        assert model.fused(program, torch.device(device)) is expected
    assert mixing.fits(128, 8)
    assert not mixing.fits(512, 128)


def test_operations_are_counted_as_of_ordinary_code():
    drawn = inputs(SHAPES[1], torch.float64, torch.float64)
    x, weight, *fixed = drawn["forward"]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with FlopCounterMode(display=False) as plain:
        torch.autograd.grad(ordinary(*leaves, *fixed), leaves, drawn["to_results"])
    with FlopCounterMode(display=False) as fused:
        loss = lambda x, weight, *fixed: sum(result.sum() for result in mixing.mixed(x, weight, *fixed))
        vmap(grad(loss, (0, 1)))(x, weight, *fixed)
    assert fused.get_total_flops() == plain.get_total_flops() > 0


def test_kernels_equal_formulas_in_the_interpreter():
    code = "from tests.test_mixing_kernel import SHAPES, check_in_float32; "
    run_interpreted(code + "[check_in_float32(shape) for shape in SHAPES]")


def test_lane_that_is_not_a_number_in_the_interpreter():
    run_interpreted("from tests.test_mixing_kernel import *; check_not_a_number((3, 2, 5, 4, 24, 16), 'cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *BIG])
    def test_kernels_equal_formulas_in_float64(self, shape):
        drawn = inputs(shape, torch.float32, torch.bfloat16, "cuda")
        weight = drawn["forward"][1]
        exact = {name: [tensor.double() for tensor in tensors] for name, tensors in drawn.items()}
        exact["forward"][1] = weight.bfloat16().double()  # as it is multiplied
        y, *found = work(drawn, OPERATORS)
        exact_y = mixing.forward_formula(*exact["forward"])[0]
        x, *others = exact["forward"]
        sums = mixing.sums_formula(y.double(), *others[1:])  # of what was rounded
        expected = exact_y, sums, *mixing.backward_formula(*exact["to_results"], x, y.double(), *others)
        for name, one, other in zip(("y", "sums", *NAMES), (y, *found), expected, strict=True):
            error = float((one.double() - other).norm() / other.norm())
            assert error < (2e-5 if name == "sums" else 2.5e-3), name

    @pytest.mark.parametrize("shape", BIG)
    def test_lane_is_the_same_alone(self, shape):
        drawn = inputs(shape, torch.float32, torch.bfloat16, "cuda")
        many = work(drawn, OPERATORS)
        for lane in range(shape[0]):
            own = {name: tuple(tensor[lane : lane + 1] for tensor in tensors) for name, tensors in drawn.items()}
            for alone, stacked in zip(work(own, OPERATORS), many, strict=True):
                assert torch.equal(alone[0], stacked[lane])

    @pytest.mark.parametrize("shape", [(3, 8, 100, 50, 32, 32), (3, 4, 50, 25, 128, 128), (3, 4, 50, 25, 64, 64)])
    def test_spares_the_neighbours_of_a_lane_that_is_not_a_number(self, shape):
        check_not_a_number(shape, "cuda")

    def test_in_a_cuda_graph(self):
        drawn = inputs((3, 4, 50, 25, 64, 64), torch.float32, torch.bfloat16, "cuda")
        assert_replays(lambda: work(drawn, OPERATORS), drawn["forward"][0])
