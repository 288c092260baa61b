"""The multi-neuron MLP (or the plain one, with one choice), as one would write it in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ordinary.loop import Batch, Loop, accuracy
from trainables.multi_neuron.program import CLASSES, steps_per_epoch
from trainables.multi_neuron.sets import IMAGE_SETS


class MultiNeuron(nn.Module):
    """N computation neurons a unit, one of which a softmax selector picks; straight-through gradient."""

    def __init__(self, inputs: int, outputs: int, choices: int):
        super().__init__()
        self.choices = choices
        self.compute = nn.Linear(inputs, choices * outputs)
        self.select = nn.Linear(inputs, choices * outputs)

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.relu(self.compute(x)).unflatten(-1, (self.choices, -1))
        p = torch.softmax(self.select(x).float().unflatten(-1, (self.choices, -1)), -2)
        hard = torch.zeros_like(p).scatter_(-2, p.argmax(-2, keepdim=True), 1.0)
        return ((hard + p - p.detach()) * answers).sum(-2)


class MultiNeuronLoop(Loop):
    def build(self) -> None:
        p, h = self.program, self.hyper
        if p.model != "mlp" or p.selector != "softmax" or h.active not in (0, p.choices) or p.tasks > 1:
            raise ValueError("the ordinary loop is of the softmax MLP with all its neurons")
        self.set = IMAGE_SETS[p.data]
        modules: list[nn.Module] = [nn.Flatten()]
        width = self.set.side**2
        for wide in p.widths:
            if p.choices > 1:
                modules.append(MultiNeuron(width, wide, p.choices))
            else:
                modules += [nn.Linear(width, wide), nn.ReLU()]
            width = wide
        self.model = nn.Sequential(*modules, nn.Linear(width, CLASSES))

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        h = self.hyper
        return [torch.optim.SGD(self.model.parameters(), h.lr, momentum=h.momentum, weight_decay=h.weight_decay)]

    def images(self, part: str, index: Tensor) -> Batch:
        pixels = self.arrays[f"{part}_images"][index].float() / self.set.white
        return (pixels - self.set.mean) / self.set.std, self.arrays[f"{part}_labels"][index].long()

    def batches(self, epoch: int) -> Iterator[Batch]:
        count, size, steps = len(self.arrays["train_labels"]), self.program.batch, steps_per_epoch(self.program)
        order = torch.cat([self.shuffled(count) for _ in range(-(-steps * size // count))])
        if not self.program.epoch_steps:
            order = order[:count]
        for i in range(steps):
            yield self.images("train", order[i * size : (i + 1) * size])

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        with self.autocast():
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels), accuracy(logits, labels)

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        count, right = len(self.arrays["held_out_labels"]), 0
        for index in torch.arange(count, device=self.device).split(self.program.eval_batch):
            images, labels = self.images("held_out", index)
            with self.autocast():
                right = right + (self.model(images).argmax(-1) == labels).sum()
        return {"test_acc": float(right) / count}


make = MultiNeuronLoop
