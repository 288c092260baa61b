"""The training loop that all families share: epochs of batches, zero_grad, backward, step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Loop(ABC):
    """One trial: a module, a torch optimiser, and data that is already on the device (which is generous).

    Args:
        program, hyper: the family's own dataclasses.
        arrays: the family's arrays as tensors on `device`.
        seed: of torch's generators.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def __init__(self, program: Any, hyper: Any, arrays: Mapping[str, Tensor], seed: int, device: torch.device | str):
        torch.manual_seed(seed)
        self.program, self.hyper, self.arrays, self.seed = program, hyper, arrays, seed
        self.device = torch.device(device)
        self.build()
        self.model.to(self.device)
        self.optimizers = self.make_optimizers()

    @abstractmethod
    def build(self) -> None:
        """Set `self.model`."""

    @abstractmethod
    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers over `self.model`."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Batch]:
        """The training batches of an epoch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, share of the batch that is right), both 0-d."""

    @abstractmethod
    def evaluate(self, epoch: int) -> dict[str, float]:
        """What the family's `evaluate` gives after that epoch: at least what its headline is made of."""

    def before_epoch(self, epoch: int) -> None:  # noqa: B027  # most have nothing to do
        """Set learning rates and the like."""

    def before_step(self) -> None:  # noqa: B027
        """Change gradients (clipping) before the optimisers run."""

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, right = self.loss(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.before_step()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach(), right.detach()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for an epoch. Returns its mean loss and accuracy; the device is waited for once, at its end."""
        self.before_epoch(epoch)
        self.model.train()
        losses, rights = [], []
        for batch in self.batches(epoch):
            loss, right = self.step(batch)
            losses.append(loss)
            rights.append(right)
        return {"train_loss": torch.stack(losses).mean().item(), "train_acc": torch.stack(rights).mean().item()}

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.program.precision == "bf16")

    def shuffled(self, count: int) -> Tensor:
        """A permutation of 0..count-1 on the device."""
        return torch.randperm(count, device=self.device)

    def set_rate(self, rate: float, optimizer: int = 0) -> None:
        """Learning rate of every parameter group, times the group's own `scale`."""
        for group in self.optimizers[optimizer].param_groups:
            group["lr"] = rate * group.get("scale", 1.0)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()
