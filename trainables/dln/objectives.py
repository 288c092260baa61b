"""What a batch asks of a model: losses and accuracies, one value a window or image, in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.dln import gpt, tdln
from trainables.dln.program import Program, vocabulary_size
from trainables.family import Hypers, dtype_of

NEAR = 0.2
"""The notebook counts a pixel or bit as right within this distance."""

Scores = dict[str, Tensor]
"""Name -> [B]."""


def scores(
    program: Program, params: dict[str, Tensor], hyper: Hypers, data: dict[str, Tensor], noise: gpt.Noise | None
) -> Scores:
    """ "loss", "accuracy" and, for bits and reals, "exact" of each window or image of the batch.

    noise: dropout's key; None where the model is only evaluated, which also asks for the true next token always.
    """
    if program.task == "reconstruct":
        images = data["images"]
        given = tdln.reconstruct(program, params, hyper, images)
        return {"loss": ((given - images) ** 2).mean(-1), "accuracy": _share((given - images).abs() < NEAR)}
    if program.task == "gpt":
        logits = gpt.forward(program, params, hyper, data["tokens"][..., :-1], noise)
        return _of_tokens(logits, data["tokens"][..., 1:])
    inputs, targets = _inputs_and_targets(program, data, training=noise is not None)
    logits = tdln.predict(program, params, hyper, inputs)
    if program.target == "next_row" and noise is not None:
        logits = logits[:-1]
    if program.targets == "softmax":
        return _of_tokens(logits, targets)
    return _of_numbers(program, logits, targets)


def _inputs_and_targets(program: Program, data: dict[str, Tensor], training: bool) -> tuple[Tensor, Tensor]:
    """Inputs [B, L, F] and targets ([B, L] ids for softmax, [B, L, F] numbers otherwise)."""
    tokens, dtype = data["tokens"], dtype_of(program)
    if program.targets == "softmax":
        numbers = (tokens[..., None] == torch.arange(vocabulary_size(program), device=tokens.device)).to(dtype)
        aims = tokens
    else:
        values = data["vocab"].to(torch.int64)[tokens].unflatten(-1, (-1, program.bytes_per_step))
        numbers = aims = (to_bits(values).flatten(-2) if program.targets == "bits" else values / 255).to(dtype)
    if program.target == "next_row" and training:
        return numbers[:, :-1], aims[1:, :-1]
    return numbers[:, :-1], aims[:, 1:]


def to_bits(values: Tensor) -> Tensor:
    """Bytes [...] -> their bits [..., 8], lowest first."""
    return (values[..., None] >> torch.arange(8, device=values.device)) & 1


def _of_tokens(logits: Tensor, targets: Tensor) -> Scores:
    """Cross-entropy in nats a token, and the share of tokens whose logit is the largest."""
    chosen = logits.log_softmax(-1).gather(-1, targets.to(torch.int64)[..., None])
    return {"loss": -chosen[..., 0].mean(-1), "accuracy": _share(logits.argmax(-1) == targets)}


def _of_numbers(program: Program, logits: Tensor, targets: Tensor) -> Scores:
    """Cross-entropy in nats a byte (or squared error), share within 0.2, and share of bytes read back exactly."""
    guess = torch.sigmoid(logits)
    if program.loss == "mse":
        loss = ((guess - targets) ** 2).mean((-2, -1))
    else:
        nats = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = nats.sum(-1).mean(-1) / program.bytes_per_step
    if program.targets == "bits":
        right = ((guess > 0.5) == (targets > 0.5)).unflatten(-1, (-1, 8)).all(-1)
    else:
        right = torch.round(255 * guess) == torch.round(255 * targets)
    return {"loss": loss, "accuracy": _share((guess - targets).abs() < NEAR), "exact": _share(right)}


def _share(right: Tensor) -> Tensor:
    """[B, ...] bool -> share of True in each row."""
    return right.flatten(1).to(torch.float32).mean(-1)
