"""vgg_decay's layers one by one: `python benchmarks/convolutions.py --lanes 32`, on a GPU.

Each convolution of the notebook's net (batch 128, bf16), of all lanes at once by the family's kernels
(`trainables/convolution_kernel.py`), and of one lane by cuDNN, channels last; then what stands between two
convolutions: normalise, rectify, pool, by the family's kernels (`.norm_kernel`) and by the same formulas compiled.
Microseconds a lane, each from a CUDA graph. `least`: operations at the card's bf16 matmul ceiling, or bytes at its copy
bandwidth, whichever is more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.attention import graphed
from benchmarks.card import ceilings, seconds_of
from trainables import convolution
from trainables.vgg_decay import norm_ops
from trainables.vgg_decay.program import Program, layers

BATCH = 128


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def micros(work: Callable[[], object], lanes: int) -> float:
    """Of one lane."""
    return 1e6 * seconds_of(graphed(work), "cuda") / lanes


def convolutions(lanes: int, card: dict[str, float]) -> list[str]:
    rows = []
    side = 32
    for layer in layers(Program(data="cifar10", precision="bf16")):
        if layer.kernel == 3 and layer.inputs >= convolution.DIVISOR:
            x, weight = draw(lanes * BATCH, side, side, layer.inputs), draw(lanes, layer.outputs, 3, 3, layer.inputs)
            grad = draw(lanes * BATCH, side, side, layer.outputs)
            ours = (
                lambda x=x, weight=weight: convolution.conv_forward(x, weight),
                lambda grad=grad, weight=weight: convolution.conv_backward_input(grad, weight),
                lambda grad=grad, x=x, weight=weight: convolution.conv_backward_weight(grad, x, weight),
            )
            one, taps = (tensor.permute(0, 3, 1, 2) for tensor in (x[:BATCH], weight[0]))
            slope = grad[:BATCH].permute(0, 3, 1, 2)

            def of(which, one=one, taps=taps, slope=slope):
                return torch.ops.aten.convolution_backward(
                    slope, one, taps, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, which
                )

            theirs = (
                lambda one=one, taps=taps: F.conv2d(one, taps, padding=1),
                lambda of=of: of([True, False, False]),
                lambda of=of: of([False, True, False]),
            )
            operations = 2 * BATCH * side**2 * layer.inputs * layer.outputs * 9
            moved = 2 * BATCH * side**2 * (layer.inputs + layer.outputs)
            least = 1e6 * max(operations / card["bf16"], moved / card["copy"])
            found = [f"{micros(a, lanes):.1f} | {micros(b, 1):.1f}" for a, b in zip(ours, theirs, strict=True)]
            size = f"{layer.inputs} to {layer.outputs}, {side}x{side}"
            rows.append(f"| {layer.name} | {size} | {' | '.join(found)} | {least:.1f} |")
        side //= 1 + layer.pool_after
    return rows


def passes(lanes: int, card: dict[str, float]) -> list[str]:
    rows = []
    side = 32
    compiled = [torch.compile(f, dynamic=False) for f in (norm_ops.forward_formula, norm_ops.sums_formula)]
    compiled.append(torch.compile(norm_ops.backward_formula, dynamic=False))
    for layer in layers(Program(data="cifar10", precision="bf16")):
        if layer.kernel == 3:
            pool, part = layer.pool_after, 1 / 4 if layer.pool_after else 1
            x, vectors = draw(lanes * BATCH, side, side, layer.outputs), draw(5, lanes, layer.outputs).float().unbind()
            z, chosen = norm_ops.norm_forward(x, *vectors[:3], pool)
            first, last = (x, *vectors[:3], pool), (torch.randn_like(z), x, chosen, *vectors)
            weight = x.new_zeros((lanes, 0), dtype=torch.float32)
            calls = [first, (*last[:6], pool), (*last, weight, pool)]
            ways = (norm_ops.norm_forward, norm_ops.norm_sums, norm_ops.norm_backward), compiled
            took = [[micros(lambda f=f, a=a: f(*a), lanes) for f, a in zip(way, calls, strict=True)] for way in ways]
            values = 2 * BATCH * side**2 * layer.outputs * (1 + part), 2 * BATCH * side**2 * layer.outputs * (2 + part)
            least = [1e6 * size / card["copy"] for size in (values[0], values[0], values[1])]
            found = " | ".join(f"{a:.1f} | {b:.1f} | {c:.1f}" for a, b, c in zip(*took, least, strict=True))
            rows.append(f"| {layer.name} | {layer.outputs}, {side}x{side}{', pooled' * pool} | {found} |")
        side //= 1 + layer.pool_after
    return rows


def main(
    lanes: Annotated[int, typer.Option(help="trained at once")] = 32,
    out: Annotated[Path | None, typer.Option(help="write the tables here")] = None,
) -> None:
    """Print the tables."""
    card = ceilings("cuda")
    name = torch.cuda.get_device_name()
    lines = [
        f"`python {' '.join(['benchmarks/convolutions.py', *sys.argv[1:]])}` on {name}, torch {torch.__version__}, "
        f"{lanes} lanes.",
        "",
        "| layer | channels, positions | forward us | cuDNN | input's gradient | cuDNN | weight's gradient | cuDNN "
        "| least |",
        "|" + "---|" * 9,
        *convolutions(lanes, card),
        "",
        "| after layer | channels, positions | forward us | compiled | least | sums | compiled | least | backward "
        "| compiled | least |",
        "|" + "---|" * 11,
        *passes(lanes, card),
    ]
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
