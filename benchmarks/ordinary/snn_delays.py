"""The spiking net with learned delays, as one would write it with a Python loop over time (spikingjelly's own way)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ordinary.loop import Batch, Loop, accuracy
from trainables.snn_delays import delays
from trainables.snn_delays.program import classes, kernel_steps, schedule


class ATan(torch.autograd.Function):
    """Heaviside forward; the ATan surrogate's slope backward."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return grad * ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * x) ** 2), None


def spikes_over_time(x: Tensor, keep: float, alpha: float) -> Tensor:
    """LIF neurons, step by step: x [B, C, T, N] -> spikes."""
    v, spikes = torch.zeros_like(x[:, :, 0]), []
    for current in x.unbind(2):
        h = keep * v + current
        s = ATan.apply(h - 1.0, alpha)
        v = h * (1 - s.detach())
        spikes.append(s)
    return torch.stack(spikes, 2)


def spikingjelly_lif(x: Tensor, keep: float, alpha: float) -> Tensor:
    """The same by spikingjelly's LIFNode (version 2: it chooses its back end by itself)."""
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(
        tau=1 / (1 - keep),
        decay_input=False,
        surrogate_function=surrogate.ATan(alpha),
        detach_reset=True,
        step_mode="m",
    )
    return node(x.movedim(2, 0)).movedim(0, 2)


Neurons = Callable[[Tensor, float, float], Tensor]


class Delays(nn.Module):
    """Depthwise frequency x delay convolution whose delays are learned."""

    def __init__(self, channels: int, size: int, taps: int, version: str):
        super().__init__()
        self.taps, self.version = taps, version
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-bound, bound))
        self.position = nn.Parameter(taps // 2 - (taps - 1) * torch.rand(channels, size))
        self.register_buffer("sigma", torch.zeros(()))
        self.register_buffer("reach", torch.tensor(float(taps)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            kernel = delays.kernel(
                self.weight, self.position, self.sigma, self.taps, self.reach, self.version, delays.GAUSS_2_1D
            )
        else:
            kernel = delays.discrete(self.weight, self.position, self.taps, self.reach)
        size, taps = kernel.shape[1:]
        padded = F.pad(x, (size // 2, size - 1 - size // 2, taps - 1, 0))
        return F.conv2d(padded, kernel.transpose(1, 2).unsqueeze(1), groups=len(kernel))


class Block(nn.Module):
    def __init__(self, channels: int, size: int, taps: int, version: str, keep: float, alpha: float, neurons: Neurons):
        super().__init__()
        self.keep, self.alpha, self.neurons = keep, alpha, neurons
        self.delay = Delays(channels, size, taps, version)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(self.norm(self.pointwise(self.delay(x)).float()), self.keep, self.alpha)


class Net(nn.Module):
    def __init__(self, program, hyper, neurons: Neurons):
        super().__init__()
        p = program
        self.keep, self.dropout = 1 - p.dt_ms / hyper.tau_ms, hyper.dropout
        parts: list[nn.Module] = [
            nn.Conv2d(1, p.channels, (1, p.stem), (1, p.stem), bias=False),
            nn.BatchNorm2d(p.channels),
        ]
        for stage, count in enumerate(p.blocks):
            width, taps = p.channels * 2**stage, kernel_steps(p.max_delay_ms[stage], p.dt_ms)
            size = p.kernel_sizes[stage]
            parts += [Block(width, size, taps, p.kernel, self.keep, hyper.alpha, neurons) for _ in range(count)]
            if stage + 1 < len(p.blocks):
                parts += [nn.Conv2d(width, 2 * width, (1, 2), (1, 2), bias=False), nn.BatchNorm2d(2 * width)]
        self.parts = nn.Sequential(*parts)
        self.fc = nn.Linear(p.channels * 2 ** (len(p.blocks) - 1), classes(p), bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, F] -> membranes [B, T, classes]."""
        features = self.parts(frames[:, None]).mean(-1)
        if self.training:  # one mask a sample for all its time steps
            mask = torch.rand(features.shape[:2], device=features.device) >= self.dropout
            features = features * mask[..., None] / (1 - self.dropout)
        v, membranes = 0.0, []
        for current in self.fc(features.transpose(1, 2)).float().unbind(1):
            v = self.keep * v + current
            membranes.append(v)
        return torch.stack(membranes, 1)


class SnnDelays(Loop):
    neurons: Neurons = staticmethod(spikes_over_time)

    def build(self) -> None:
        p = self.program
        if p.neuron != "lif" or p.bottleneck != "none" or p.fc_delay_ms or p.padding != "batch":
            raise ValueError("the ordinary loop is of the notebook's plain LIF net")
        self.model = Net(p, self.hyper, self.neurons)
        self.lengths = self.arrays["length"].cpu()
        self.places = [module for module in self.model.modules() if isinstance(module, Delays)]

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        h = self.hyper
        places = [place.position for place in self.places]
        moved = {id(place) for place in places}
        norms = [t for m in self.model.modules() if isinstance(m, nn.BatchNorm2d) for t in m.parameters()]
        moved |= {id(tensor) for tensor in norms}
        weights = [p for p in self.model.parameters() if id(p) not in moved]
        groups = [
            {"params": weights, "weight_decay": h.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        main = torch.optim.Adam(groups, h.lr)
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(main, max_lr=h.lr, total_steps=max(2, self.program.epochs))
        return [main, torch.optim.Adam(places, h.lr_pos)]

    def before_epoch(self, epoch: int) -> None:
        p, h = self.program, self.hyper
        if epoch:
            self.cycle.step()
        self.set_rate(h.lr_pos * (1 + math.cos(math.pi * epoch / p.epochs)) / 2, 1)
        starts = (h.sigma_1, h.sigma_2, h.sigma_3, h.sigma_4)
        stages = [stage for stage, count in enumerate(p.blocks) for _ in range(count)]
        for place, stage in zip(self.places, stages, strict=True):
            start = torch.tensor(h.sigma * starts[stage] * place.taps)
            share, elapsed = torch.tensor(h.sigma_epochs), torch.tensor(float(epoch))
            place.sigma.copy_(delays.sigma_at(start, share, p.epochs, elapsed, p.kernel))

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        done = super().step(batch)
        with torch.no_grad():
            for place in self.places:
                place.position.clamp_(place.taps // 2 + 1 - place.taps, place.taps // 2)
        return done

    def samples(self, index: Tensor) -> Batch:
        """Frames up to the longest of these samples."""
        longest = int(self.lengths[index.cpu()].max())
        return self.arrays["x"][index, :longest].float(), self.arrays["label"][index].long()

    def batches(self, epoch: int) -> Iterator[Batch]:
        train = self.arrays["train"]
        order = train[self.shuffled(len(train))].cpu().split(self.program.batch)
        for index in order[: schedule(self.program).steps_per_epoch]:
            yield self.samples(index.to(self.device))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        frames, labels = batch
        with self.autocast():
            membranes = self.model(frames)
        scores = membranes.softmax(-1).sum(1)
        return F.cross_entropy(scores, labels), accuracy(scores, labels)

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        valid = self.arrays["valid"]
        parts = [(self.loss(self.samples(index)), len(index)) for index in valid.split(self.program.batch)]
        right = sum(float(share) * count for (_, share), count in parts)
        return {"valid_accuracy": right / len(valid)}


class WithSpikingjelly(SnnDelays):
    neurons: Neurons = staticmethod(spikingjelly_lif)


make = SnnDelays
