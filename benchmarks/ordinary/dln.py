"""The dln family's two ends: digits from the last state of a diagonal recurrence, and nanoGPT's GPT."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ordinary.loop import Batch, Loop
from trainables.dln.data import test_order
from trainables.dln.program import pixels, vocabulary_size

NEAR = 0.2


class Recurrence(nn.Module):
    """h_l = z h_(l-1) + x_l with fixed z = size exp(i theta): the real part of the last state, in closed form."""

    def __init__(self, channels: int, forget: tuple[float, float], period: float, length: int):
        super().__init__()
        low, high = (math.log(value) for value in forget)
        self.register_buffer("size", 1 - torch.exp(low + torch.rand(channels) * (high - low)))
        self.register_buffer("theta", 2 * math.pi / period * torch.exp(torch.rand(channels) * math.log(period)))
        self.register_buffer("later", torch.arange(length - 1, -1, -1.0)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return x @ (torch.exp(torch.log(self.size) * self.later) * torch.cos(self.theta * self.later))


class Reader(nn.Module):
    def __init__(self, channels: int, dense: int, read: Recurrence, outputs: int, eps: float):
        super().__init__()
        self.read = read
        self.dense = nn.ModuleList(nn.Linear(channels, channels) for _ in range(dense))
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=eps) for _ in range(dense))
        self.out = nn.Linear(channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            state = self.read(images)
        for dense, norm in zip(self.dense, self.norms, strict=True):
            state = norm(torch.relu(dense(state) + state))
        return torch.sigmoid(self.out(state).float())


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, residual_std: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        for linear, std in ((self.qkv, 0.02), (self.up, 0.02), (self.out, residual_std), (self.down, residual_std)):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(count, length, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, 0.02 / (2 * layers) ** 0.5) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[-1]])
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Reconstruct(Loop):
    def build(self) -> None:
        p, h = self.program, self.hyper
        if p.recurrence != "dln" or p.levels or h.train_first:
            raise ValueError("the ordinary loop is of the notebook's first net: one fixed DLN level, then dense layers")
        read = Recurrence(p.channels, (h.forget_low, h.forget_high), h.period, pixels(p))
        self.model = Reader(p.channels, p.dense, read, pixels(p), h.norm_eps)
        self.brightest = 16 if p.data == "digits" else 255

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), self.hyper.lr, (self.hyper.b1, self.hyper.b2))]

    def batches(self, epoch: int) -> Iterator[Batch]:
        train = self.arrays["train"]
        for _ in range(self.program.steps_per_epoch):
            chosen = torch.randint(len(train), (self.program.batch,), device=self.device)
            yield (train[chosen].float() / self.brightest,)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        (images,) = batch
        with self.autocast():
            given = self.model(images)
        return F.mse_loss(given, images), ((given - images).abs() < NEAR).float().mean()

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        index = test_order(self.program, self.arrays, self.seed, epoch)["held_out"].flatten()
        parts = [self.loss((images,)) for images in self.held_out(index[index >= 0])]
        loss, right = (torch.stack(values).mean().item() for values in zip(*parts, strict=True))
        return {"held_out_loss": loss, "held_out_accuracy": right}

    def held_out(self, index: Tensor) -> list[Tensor]:
        """In equal batches, so that their mean is the mean."""
        images = self.arrays["held_out"][index].float() / self.brightest
        size = math.gcd(len(images), self.program.eval_batch)
        return list(images.split(size if size > 20 else len(images)))


class Language(Loop):
    def build(self) -> None:
        p = self.program
        if p.norm != "layer" or p.qkv != "joint" or p.unembedding != "tied" or p.memory:
            raise ValueError("the ordinary loop is of nanoGPT's net")
        self.model = GPT(vocabulary_size(p), p.length, p.width, p.heads, p.layers, self.hyper.dropout)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        h, parameters = self.hyper, list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": h.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.done = 0
        return [torch.optim.AdamW(groups, h.lr, (h.b1, h.b2))]

    def windows(self, part: str, starts: Tensor) -> Batch:
        window = self.arrays[part][starts[:, None] + torch.arange(self.program.length + 1, device=self.device)].long()
        return window[:, :-1], window[:, 1:]

    def batches(self, epoch: int) -> Iterator[Batch]:
        places = len(self.arrays["train"]) - self.program.length
        for _ in range(self.program.steps_per_epoch):
            yield self.windows("train", torch.randint(places, (self.program.batch,), device=self.device))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, targets = batch
        with self.autocast():
            logits = self.model(tokens)
        right = (logits.argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), right

    def before_step(self) -> None:
        h = self.hyper
        if h.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), h.clip)
        rise = min(1.0, self.done / h.warmup) if h.warmup else 1.0
        progress = min(1.0, max(0.0, (self.done - h.warmup) / max(1.0, h.decay_steps - h.warmup)))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        self.set_rate(h.lr * rise * (h.final_fraction + (1 - h.final_fraction) * cosine))
        self.done += 1

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        starts = test_order(self.program, self.arrays, self.seed, epoch)["held_out"]
        sums, count = torch.zeros(2, device=self.device), 0
        for row in starts:
            row = row[row >= 0]
            sums += torch.stack(self.loss(self.windows("held_out", row))) * len(row)
            count += len(row)
        loss, right = (sums / count).tolist()
        return {"held_out_loss": loss, "held_out_accuracy": right}


def make(program, hyper, arrays, seed, device) -> Loop:
    return (Language if program.task == "gpt" else Reconstruct)(program, hyper, arrays, seed, device)
