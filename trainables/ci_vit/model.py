"""The vision transformer of the notebook: pre-LN, class token, ReLU MLP; weights laid out for stacking and for resets.

The blocks' weights are stacked over layers ([depth, ...]), and a flat view of all weights has a fixed order in which
the resettable entries come first, so that an update or a reset is a few large operations and not a few for each leaf.

Architecture, initialisation and eps as in ajozefiak/CL-transformers, src/models/ViT_factory.py (JAX, Flax): kernels are
[in, out], lecun_normal truncated at two standard deviations, biases and class token 0, positions N(0, 0.02), LayerNorm
eps 1e-6. One thing is mended: the key part of the qkv bias shifts all of a query's scores alike, so its gradient is
zero; computed, it is rounding noise, which Adam scales up to full steps (and L2 through Adam's eps into oscillation)
without any effect on the logits. Here that gradient is exactly 0 and the key bias stays at its initial 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables import draws
from trainables.ci_vit import attention, mlp, residual
from trainables.ci_vit.program import Program
from trainables.family import dtype_of

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal cut at +-2: Flax divides by it."""

LN_EPS = mlp.EPS

Added = tuple[Tensor, Tensor]
"""What a residual still lacks: a product [rows, width] and its bias [width]."""


@dataclass(frozen=True)
class Layout:
    """Where each weight stands in the flat vector.

    `shapes` are in flat order: mlp_in/kernel, mlp_in/bias, mlp_out/kernel (what a reset touches), qkv/kernel, then the
    rest. `resettable` is the length of the first three, `mlp_in` that of the first two, `qkv` that of the fourth.
    """

    shapes: Mapping[str, tuple[int, ...]]
    mlp_in: int
    resettable: int
    qkv: int
    total: int


def layout(program: Program) -> Layout:
    depth, width, neurons = program.depth, program.width, program.neurons
    shapes: dict[str, tuple[int, ...]] = {
        "mlp_in/kernel": (depth, width, neurons),
        "mlp_in/bias": (depth, neurons),
        "mlp_out/kernel": (depth, neurons, width),
        "qkv/kernel": (depth, width, 3 * width),
        "out/kernel": (depth, width, width),
        "patch/kernel": (program.patch_side**2 * program.set.channels, width),
        "head/kernel": (width, program.classes),
        "pos": (program.tokens, width),
        "cls": (width,),
        "patch/bias": (width,),
        "qkv/bias": (depth, 3 * width),
        "out/bias": (depth, width),
        "mlp_out/bias": (depth, width),
        "head/bias": (program.classes,),
        "ln1/bias": (depth, width),
        "ln2/bias": (depth, width),
        "ln/bias": (width,),
        "ln1/scale": (depth, width),
        "ln2/scale": (depth, width),
        "ln/scale": (width,),
    }
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    mlp_in = sizes["mlp_in/kernel"] + sizes["mlp_in/bias"]
    return Layout(shapes, mlp_in, mlp_in + sizes["mlp_out/kernel"], sizes["qkv/kernel"], sum(sizes.values()))


def flatten(program: Program, params: Mapping[str, Tensor]) -> Tensor:
    """All weights as one vector [total]."""
    return torch.cat([params[name].reshape(-1) for name in layout(program).shapes])


def unflatten(program: Program, flat: Tensor) -> dict[str, Tensor]:
    """The inverse of `flatten`. Copies: a view's strides would differ between a running and a restored lane."""
    shapes = layout(program).shapes
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def fresh(program: Program, seed: Tensor, step: Tensor, purpose: str) -> Tensor:
    """A freshly initialised net as a flat vector [total], drawn by (seed, step, purpose)."""
    shapes, dtype = layout(program).shapes, dtype_of(program)
    kernels = {name: shape for name, shape in shapes.items() if name.endswith("kernel")}
    z = draws.truncated_normal(seed, step, purpose, (sum(map(math.prod, kernels.values())),), dtype)
    drawn = dict(zip(kernels, z.split([math.prod(shape) for shape in kernels.values()]), strict=True))
    positions = draws.normal(seed, step, f"{purpose}/pos", (math.prod(shapes["pos"]),), dtype)
    parts = []
    for name, shape in shapes.items():
        if name in drawn:
            parts.append(drawn[name] * lecun_std(shape[-2]))
        elif name == "pos":
            parts.append(positions * 0.02)
        else:
            parts.append(torch.full((math.prod(shape),), float(name.endswith("scale")), dtype=dtype, device=z.device))
    return torch.cat(parts)


def lecun_std(fan_in: int) -> float:
    """Factor on a truncated standard normal that gives variance 1 / fan_in (Flax's lecun_normal)."""
    return math.sqrt(1 / fan_in) / TRUNCATED_STD


def forward(
    program: Program, params: Mapping[str, Tensor], images: Tensor, watch: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a batch and what was watched on the way.

    Args:
        images: [batch, side, side, channels], already scaled.
        watch: any of "fired", "activity", "entropy".

    Returns:
        logits [batch, classes], and {
        "fired": inputs (image x token) on which each MLP unit's pre-activation was >= 0, [depth, neurons];
        "activity": mean over inputs of each MLP unit's ReLU output, [depth, neurons];
        "entropy": nats of every attention distribution, [depth, batch, heads * tokens]}.
        What is watched carries no gradient.
    """
    count, tokens, width, heads = images.shape[0], program.tokens, program.width, program.heads
    patches = _patches(program, images) @ params["patch/kernel"] + params["patch/bias"]
    cls = params["cls"].expand(count, 1, width)
    x = torch.cat([cls, patches.reshape(count, tokens - 1, width)], dim=1) + params["pos"]
    x = x.reshape(count * tokens, width)
    params = {**params, "qkv/bias": _keys_fixed(params["qkv/bias"], width)}
    seen: dict[str, list[Tensor]] = {name: [] for name in watch}
    names = [name for name, shape in layout(program).shapes.items() if _per_block(name)]
    added: Added | None = None
    for values in zip(*(params[name].unbind(0) for name in names), strict=True):
        block = dict(zip(names, values, strict=True))
        x, h = _residual_norm(program, x, added, block["ln1/scale"], block["ln1/bias"])
        mixed, distributions = _attend(program, h @ block["qkv/kernel"], block["qkv/bias"], "entropy" in watch)
        added = mixed.reshape(count * tokens, width) @ block["out/kernel"], block["out/bias"]
        x, added, found = _mlp(program, x, added, block, watch)
        for name, value in found.items():
            seen[name].append(value)
        if distributions is not None:
            entropy = _entropy(distributions.to(dtype_of(program)))
            seen["entropy"].append(entropy.reshape(count, heads * tokens))
    x = _with(x, added)
    cls_tokens = x.reshape(count, tokens, width)[:, 0]
    logits = _norm(cls_tokens, params["ln/scale"], params["ln/bias"]) @ params["head/kernel"] + params["head/bias"]
    return logits.to(dtype_of(program)), {name: torch.stack(values) for name, values in seen.items()}


def _attend(program: Program, product: Tensor, bias: Tensor, watched: bool) -> tuple[Tensor, Tensor | None]:
    """One block's attention: every token's mixed values, and if watched the distributions.

    Args:
        product: queries, keys and values before their bias, [batch * tokens, 3 * width].
        bias: [3 * width].

    Returns:
        [batch * tokens, width], and [batch * heads, tokens, keys] without gradient, a key past the tokens having 0.
    """
    tokens, shape = program.tokens, (3, program.heads, program.width // program.heads)
    written_out = lambda qkv: attention.written_out(
        qkv.reshape(-1, tokens, *shape), -tokens % 8 if program.precision == "bf16" else 0
    )
    distributions = None
    if _fused(program, product.device):
        mixed = attention.fused(product.reshape(-1, tokens, *shape), bias.reshape(shape))
        if watched:  # worked out besides: a covariate does not change the run
            _, distributions = written_out((product + bias).detach())
    else:
        mixed, distributions = written_out(product + bias)
    if distributions is not None:
        distributions = distributions.detach()[:, :tokens] if watched else None
    return mixed.reshape(-1, program.width), distributions


def _residual_norm(
    program: Program, x: Tensor, added: Added | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """x with what it still lacks, [rows, width], and its LayerNorm."""
    if added is not None and _fused_residual(program, x.device):
        return residual.added_and_normalised(x, *added, scale, shift)
    x = _with(x, added)
    return x, _norm(x, scale, shift)


def _with(x: Tensor, added: Added | None) -> Tensor:
    return x if added is None else x + added[0] + added[1]


def _mlp(
    program: Program, x: Tensor, added: Added, block: Mapping[str, Tensor], watch: tuple[str, ...]
) -> tuple[Tensor, Added | None, dict[str, Tensor]]:
    """The second half of one block: x, what it lacks, and "fired" and "activity" [neurons] if watched.

    Args:
        x: [rows, width]. added: what it lacks before.
    """
    w_in, b_in, w_out, b_out = (block[f"mlp_{name}"] for name in ("in/kernel", "in/bias", "out/kernel", "out/bias"))
    norm, watched = (block["ln2/scale"], block["ln2/bias"]), ("fired" in watch, "activity" in watch)
    found: dict[str, Tensor] = {}
    if _fused_mlp(program, x.device):
        x, found["fired"], found["activity"] = mlp.fused(_with(x, added), *norm, w_in, b_in, w_out, b_out, *watched)
        return x, None, {name: value for name, value in found.items() if name in watch}
    x, h = _residual_norm(program, x, added, *norm)
    if _fused_residual(program, x.device):
        active, found["fired"], found["activity"] = residual.rectified(h @ w_in, b_in, *watched)
        return x, (active @ w_out, b_out), {name: value for name, value in found.items() if name in watch}
    pre = h @ w_in + b_in
    active = torch.relu(pre)
    if "fired" in watch:
        found["fired"] = (pre.detach() >= 0).sum(0)
    if "activity" in watch:
        found["activity"] = active.detach().mean(0)
    return x, (active @ w_out, b_out), found


def _fused_mlp(program: Program, device: torch.device) -> bool:
    """Whether the MLP is the fused operator. Elsewhere it is ordinary code."""
    return _has_kernels(program, device) and mlp.fits(program.width, program.neurons)


def _fused_residual(program: Program, device: torch.device) -> bool:
    """Whether what stands between products is fused operators, where the MLP is none. Elsewhere it is ordinary code."""
    return _has_kernels(program, device) and residual.fits(program.width) and not _fused_mlp(program, device)


def _fused(program: Program, device: torch.device) -> bool:
    """Whether attention is the fused operator. Elsewhere it is written out."""
    return _has_kernels(program, device) and attention.fits(program.tokens, program.width // program.heads)


def _has_kernels(program: Program, device: torch.device) -> bool:
    """In bf16 on a GPU."""
    return program.precision == "bf16" and device.type == "cuda"


def _keys_fixed(bias: Tensor, width: int) -> Tensor:
    """The qkv biases [depth, 3 * width] without gradient to the keys' part."""
    return torch.cat([bias[:, :width], bias[:, width : 2 * width].detach(), bias[:, 2 * width :]], dim=1)


def _per_block(name: str) -> bool:
    return name.split("/")[0] in ("ln1", "qkv", "out", "ln2", "mlp_in", "mlp_out")


def _patches(program: Program, images: Tensor) -> Tensor:
    """[batch, side, side, channels] -> [batch * patches, patch * patch * channels], rows of patches first."""
    side, patch, channels = program.set.side, program.patch_side, program.set.channels
    grid = images.reshape(-1, side // patch, patch, side // patch, patch, channels).transpose(2, 3)
    return grid.reshape(-1, patch * patch * channels)


def _norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS) * scale + bias


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over keys, p = 0 counting as 1e-10 in the logarithm."""
    return -(p * torch.log(torch.where(p == 0, 1e-10, p))).sum(-1)
