"""A vision transformer on a stream of class pairs, as one would write it in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ordinary.loop import Batch, Loop, accuracy
from trainables.ci_vit.program import schedule
from trainables.ci_vit.stream import task_classes


class Block(nn.Module):
    def __init__(self, width: int, heads: int, neurons: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, neurons), nn.ReLU(), nn.Linear(neurons, width))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, side: int, channels: int, patch: int, width: int, depth: int, heads: int, ratio: int, out: int):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch * channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, ratio * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 / 0.87962566  # lecun_normal
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        count, side, _, channels = images.shape
        grid = images.reshape(count, side // self.patch, self.patch, side // self.patch, self.patch, channels)
        x = self.embed(grid.transpose(2, 3).reshape(count, -1, self.patch * self.patch * channels))
        x = torch.cat([self.cls.expand(count, -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


class CiVit(Loop):
    def build(self) -> None:
        p = self.program
        if p.algorithm != "vanilla":
            raise ValueError("the ordinary loop is of the notebook's net without an intervention")
        self.model = ViT(p.set.side, p.set.channels, p.patch_side, p.width, p.depth, p.heads, p.mlp_ratio, p.classes)
        self.plan = schedule(p)
        self.pixels: Tensor | None = None

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), lr=self.hyper.lr, eps=1e-7)]

    def before_epoch(self, epoch: int) -> None:
        if epoch % self.program.epochs_per_task == 0:
            self.classes = torch.tensor(task_classes(self.program, self.seed, self.plan.task_of(epoch)))
            if self.program.permuted:
                self.pixels = self.shuffled(self.program.set.side**2)

    def images(self, part: str, kept: int, chosen: Tensor) -> Batch:
        """Images and labels of rows `chosen` of the task's `classes * kept` images."""
        label = chosen // kept
        rows = self.classes.to(self.device)[label] * kept + chosen % kept
        images = self.arrays[f"{part}_images"][rows].float() / self.program.set.scale
        if self.pixels is not None:
            images = images.flatten(1, 2)[:, self.pixels].reshape(images.shape)
        return images, label

    def batches(self, epoch: int) -> Iterator[Batch]:
        p = self.program
        order = self.shuffled(p.classes * p.train)
        for i in range(self.plan.steps_per_epoch):
            yield self.images("train", p.train, order[i * p.batch : (i + 1) * p.batch])

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        with self.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if self.hyper.l2:
            loss = loss + self.hyper.l2 * sum(p.square().sum() for p in self.model.parameters())
        return loss, accuracy(logits, labels)

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        count = self.program.classes * self.program.test
        images, labels = self.images("test", self.program.test, torch.arange(count, device=self.device))
        with self.autocast():
            logits = self.model(images)
        return {"test_acc": accuracy(logits, labels).item()}


make = CiVit
