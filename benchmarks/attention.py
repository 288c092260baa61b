"""Whether a fused attention kernel would pay: `python benchmarks/attention.py`, on a GPU.

One layer of attention, forward and backward, lanes folded into the batch as a fused kernel over lanes would have them:
written out as the families do (products and softmax, compiled, rows padded to 8), by PyTorch's own fused kernels, and
by ci_vit's kernels for few positions (`trainables/ci_vit/attention_kernel.py`). Those read the projection's own layout
[samples, positions, 3, heads, width] and add its bias; the others get q, k and v as they like them best.
`least` is the time to read and write once what must be: q, k, v, the result, and the gradient of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages stand one folder above

from benchmarks.card import seconds_of
from lanes.graphs import warm_up
from trainables.ci_vit import attention

SHAPES = {  # lanes, batch, heads, positions, channels of a head, causal
    "ci_vit L3": (32, 100, 3, 65, 16, False),
    "ci_vit L12": (8, 100, 3, 65, 64, False),
    "nanogpt": (4, 64, 6, 256, 64, True),
}
FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [N, H, S, D]."""
    positions, width = q.shape[-2:]
    spare = -positions % 8
    q, k, v = (F.pad(x, (0, 0, 0, spare)) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * width**-0.5
    place = torch.arange(positions + spare, device=q.device)
    absent = place > place[:, None] if causal else place >= positions
    return (torch.softmax(scores.masked_fill(absent, -torch.inf), -1) @ v)[..., :positions, :]


def few_positions(qkv: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """ci_vit's operators: forward, and the gradient of [N, S, 3, H, D]."""
    _, lse = attention.attention_forward(qkv, bias)
    return attention.attention_backward(grad, qkv, bias, lse)


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The same as one graph launch, so that only the GPU's time counts."""
    warm_up(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def main(
    out: Annotated[Path | None, typer.Option(help="write the table here")] = None,
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Print the table."""
    source = torch.empty(1 << (31 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    lines = [
        f"`python {' '.join(['benchmarks/attention.py', *sys.argv[1:]])}` on {name}, torch {torch.__version__}; copy "
        f"bandwidth {copy / 1e12:.2f} TB/s; bf16.",
        "",
        "| shape | lanes | batch x heads x positions x width | how | ms | least ms |",
        "|---|---|---|---|---|---|",
    ]
    for label, (lanes, batch, heads, positions, width, causal) in SHAPES.items():
        shape = (lanes * batch, heads, positions, width)
        q, k, v, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        least = 8 * q.numel() * q.element_size() / copy
        how = {"written out, compiled": torch.compile(written_out, dynamic=False)}
        how |= dict.fromkeys(FUSED, F.scaled_dot_product_attention)
        ways: dict[str, Callable[[], object]] = {}
        for way, function in how.items():
            fused = [FUSED[way]] if way in FUSED and device == "cuda" else [*FUSED.values(), SDPBackend.MATH]

            def both(function=function, fused=fused, way=way, causal=causal, inputs=inputs, grad=grad):
                with sdpa_kernel(fused):
                    more = {"is_causal": causal} if way in FUSED else {"causal": causal}
                    return torch.autograd.grad(function(*inputs, **more), inputs, grad)

            ways[way] = both
        if attention.fits(positions, width) and not causal:
            qkv = torch.stack([x.detach().transpose(1, 2) for x in inputs], 2)
            bias = torch.zeros(lanes, 3, heads, width, device=device)
            ways["few positions"] = partial(few_positions, qkv, bias, grad.transpose(1, 2).contiguous())
        for way, work in ways.items():
            took = seconds_of(graphed(work) if device == "cuda" else work, device)
            lines.append(
                f"| {label} | {lanes} | {batch} x {heads} x {positions} x {width}{' causal' * causal} | {way} "
                f"| {1e3 * took:.3f} | {1e3 * least:.3f} |"
            )
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
