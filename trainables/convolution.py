"""Convolutions of 3x3 and 1x1, channels last, as operators over all lanes at once.

    y[n, h, w, o] = sum over i, j, c of  x[n, h + i - k // 2, w + j - k // 2, c] weight[o, i, j, c]  (zeros outside)

Under torch.func.vmap a convolution becomes one of as many groups as there are lanes, which no library does fast. These
operators join the lanes to the samples instead, each lane's samples with its own weight: on a GPU one Triton kernel
each (`.convolution_kernel`), elsewhere PyTorch's convolution, lane by lane. Nor does cuDNN keep lanes apart as it
should: in bf16 it does several narrow groups in one product, where 0 times another lane's NaN is NaN (torch 2.11 on an
H200, `tests/test_lanes_gpu.py`).

Rounding, bf16: products are summed in float32 and rounded once, as cuDNN does; the weight's gradient stays float32,
where autocast rounds it to bf16.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from trainables.operators import in_graph, takes_lanes, triton_for

DIVISOR = 16
"""Tensor cores multiply this many channels at a time: the kernels take multiples of it."""
FEW = 64
"""So many channels of all taps together are multiplied at once, whatever their number."""


def few(inputs: int, kernel: int) -> bool:
    """Whether a convolution's channels are few, as an image's: read for all taps at once."""
    return inputs < DIVISOR and inputs * kernel**2 <= FEW


# --- the operators: [samples, height, width, channels], one weight a group of samples ---------------------------------


@torch.library.custom_op("lanewise::conv_forward", mutates_args=())
def conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Every sample's convolution with its group's weight, same size.

    Args:
        x: [N, H, W, C].
        weight: [G, O, k, k, C] of x's dtype, k odd; the first N / G samples take the first.

    Returns:
        [N, H, W, O], contiguous.
    """
    return _by_group(x, weight)


@torch.library.custom_op("lanewise::conv_backward_input", mutates_args=())
def conv_backward_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to x [N, H, W, C] from that with respect to the result [N, H, W, O].

    The convolution with the taps turned round.
    """
    return _by_group(grad, weight.flip(2, 3).transpose(1, 4))


@torch.library.custom_op("lanewise::conv_backward_weight", mutates_args=())
def conv_backward_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to the weights.

    Args:
        grad: with respect to the result, [N, H, W, O].
        x: [N, H, W, C].
        weight: [G, O, k, k, C], asked for its shape alone.

    Returns:
        [G, O, C, k, k] as PyTorch keeps a weight, at least float32.
    """
    wide = _wide(x.dtype)
    parts = zip(x.to(wide).chunk(len(weight)), grad.to(wide).chunk(len(weight)), strict=True)
    shape = _first(weight[0]).shape
    each = [conv2d_weight(_first(a), shape, _first(g), padding=shape[-1] // 2) for a, g in parts]
    return torch.stack(each)


def _by_group(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's convolution of each group's samples."""
    groups = zip(x.chunk(len(weight)), weight, strict=True)
    each = [F.conv2d(_first(part), _first(taps), padding=taps.shape[1] // 2) for part, taps in groups]
    return torch.cat(each).permute(0, 2, 3, 1).contiguous()


def _first(tensor: Tensor) -> Tensor:
    """Channels last -> channels before positions."""
    return tensor.permute(0, 3, 1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@conv_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[1]))


@conv_backward_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:3], weight.shape[-1]))


@conv_backward_weight.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    groups, outputs, *sides, inputs = weight.shape
    return x.new_empty((groups, outputs, inputs, *sides), dtype=_wide(x.dtype))


@conv_forward.register_kernel("cuda")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return gpu_kernel().forward(x, weight)


@conv_backward_input.register_kernel("cuda")
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return gpu_kernel().backward_input(grad, weight)


@conv_backward_weight.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return gpu_kernel().backward_weight(grad, x, weight)


def gpu_kernel() -> ModuleType:
    """The module of the GPU kernels. Raises `BadValue` where Triton is missing."""
    with triton_for("convolutions in bf16 on a GPU need", "take precision=float32"):
        from trainables import convolution_kernel
    return convolution_kernel


for _operator in (conv_forward, conv_backward_input, conv_backward_weight):
    takes_lanes(_operator)


@register_flop_formula(torch.ops.lanewise.conv_forward)
def _(x_shape, weight_shape, *_, **__) -> int:
    return _operations(x_shape, weight_shape[1], weight_shape[2])


@register_flop_formula(torch.ops.lanewise.conv_backward_input)
def _(grad_shape, weight_shape, *_, **__) -> int:
    return _operations(grad_shape, weight_shape[4], weight_shape[2])


@register_flop_formula(torch.ops.lanewise.conv_backward_weight)
def _(grad_shape, x_shape, weight_shape, *_, **__) -> int:
    return _operations(grad_shape, x_shape[3], weight_shape[2])


def _operations(shape, others: int, kernel: int) -> int:
    samples, height, width, channels = shape
    return 2 * samples * height * width * channels * others * kernel**2


# --- the differentiable convolution -----------------------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    """The operators above as one differentiable function of x and the weight in its own dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # a custom operator may not see a tensor that asks for a gradient while torch.func is at work
        taps = weight.detach().permute(0, 2, 3, 1).to(x.dtype).contiguous().unsqueeze(0)
        return conv_forward(x.detach(), taps), taps

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])
        ctx.kind = weight.dtype

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, taps = ctx.saved_tensors
        grad, x, taps = grad.detach(), x.detach(), taps.detach()
        # what nobody asks for is left out when the step is compiled: the first layer's images have no gradient
        return conv_backward_input(grad, taps), conv_backward_weight(grad, x, taps).squeeze(0).to(ctx.kind)


@in_graph
def _convolution(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _Convolution.apply(x, weight)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, H, W, C] with weight [O, C, k, k], k odd, rounded to x's dtype: [N, H, W, O] in x's dtype."""
    outputs = len(weight)
    x, weight = _filled(x, weight)
    # contiguous here and not in the operators, each of which would make a copy of its own
    return _convolution(x.contiguous(), weight)[0][..., :outputs]


def _filled(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros up to numbers of channels that the kernels take."""
    outputs, inputs = (-channels % DIVISOR for channels in weight.shape[:2])
    if few(weight.shape[1], weight.shape[2]):
        inputs = 0
    if inputs or outputs:
        return F.pad(x, (0, inputs)), F.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
    return x, weight
