"""The VGG13-like net under variance-inverse weight decay, as one would write it in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ordinary.loop import Batch, Loop
from trainables.vgg_decay.program import DATA_SETS, layers, sizes, steps_per_epoch


class VggDecay(Loop):
    def build(self) -> None:
        modules: list[nn.Module] = []
        self.convolutions: dict[str, nn.Conv2d] = {}
        for layer in layers(self.program):
            conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.kernel // 2)
            nn.init.normal_(conv.weight, std=(2 / layer.fan_in) ** 0.5)
            nn.init.zeros_(conv.bias)
            self.convolutions[layer.name] = conv
            modules.append(conv)
            if layer.norm:
                modules += [nn.BatchNorm2d(layer.outputs), nn.ReLU(inplace=True)]
            if layer.pool_after:
                modules.append(nn.MaxPool2d(2))
        self.model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        info = DATA_SETS[self.program.data]
        shape = (1, -1, 1, 1)
        self.mean = (torch.tensor(info.mean) * info.top).reshape(shape).to(self.device)
        self.std = (torch.tensor(info.std) * info.top).reshape(shape).to(self.device)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Each convolution with the BatchNorm behind it in a group with its own decay."""
        h, groups = self.hyper, []
        norms = iter(module for module in self.model if isinstance(module, nn.BatchNorm2d))
        for layer in layers(self.program):
            conv = self.convolutions[layer.name]
            decay = h.wd / conv.weight.detach().var().item() ** h.inverse_variance / h.dup_mult**layer.pools
            decay *= 1.0 if layer.stage else h.last2_mult
            decay *= h.last1_mult if layer.name == "logit" else 1.0
            tensors = [*conv.parameters(), *(next(norms).parameters() if layer.norm else ())]
            groups.append({"params": tensors, "weight_decay": decay})
        return [torch.optim.SGD(groups, lr=h.lr, momentum=h.momentum, nesterov=bool(h.nesterov))]

    def before_epoch(self, epoch: int) -> None:
        self.set_rate(self.hyper.lr * self.hyper.lr_factor ** (epoch // self.hyper.halve_every))

    def images(self, part: str, index: Tensor) -> Batch:
        images = self.arrays[f"{part}_images"][index].movedim(-1, 1).float()
        return (images - self.mean) / self.std, self.arrays[f"{part}_labels"][index].long()

    def batches(self, epoch: int) -> Iterator[Batch]:
        order = self.shuffled(sizes(self.program)[0])
        for i in range(steps_per_epoch(self.program)):
            images, labels = self.images("train", order[i * self.program.batch : (i + 1) * self.program.batch])
            mirrored = torch.rand(len(images), 1, 1, 1, device=self.device) < self.hyper.flip
            yield torch.where(mirrored, images.flip(-1), images), labels

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        with self.autocast():
            logits = self.model(images)
        right = (logits.argmax(-1) == labels).sum()
        # the family counts an epoch's correct examples over all its examples
        share = right.float() * steps_per_epoch(self.program) / sizes(self.program)[0]
        return F.cross_entropy(logits.float(), labels), share

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        test, right = sizes(self.program)[1], 0
        for index in torch.arange(test, device=self.device).split(self.program.eval_batch):
            images, labels = self.images("test", index)
            with self.autocast():
                right = right + (self.model(images).argmax(-1) == labels).sum()
        return {"test_acc": float(right) / test}


make = VggDecay
