"""A plain-loop ci_vit: separate layers, torch.autograd, torch.optim.Adam, Python loops over units. Slow and literal.

It shares nothing with the family but the random draws and the batches; weights are compared leaf by leaf. It follows
the definitions of the original (ajozefiak/CL-transformers), one unit at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trainables import draws
from trainables.ci_vit import model

STACKED = ("ln1", "qkv", "out", "ln2", "mlp_in", "mlp_out")


def split_layers(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The family's stacked weights as one leaf a layer: "mlp_in/kernel" [L, D, H] -> "0/mlp_in/kernel" [D, H] ..."""
    leaves = {}
    for name, value in params.items():
        if name.split("/")[0] in STACKED:
            leaves.update({f"{layer}/{name}": value[layer].clone() for layer in range(len(value))})
        else:
            leaves[name] = value.clone()
    return leaves


def vit(program, leaves, images):
    """Logits, pre-activations of each block's MLP [B * T, H], attention of each block [B, heads, T, T]."""
    side, patch, width, heads = program.set.side, program.patch_side, program.width, program.heads
    channels = program.set.channels
    filters = leaves["patch/kernel"].reshape(patch, patch, channels, width).permute(3, 2, 0, 1)
    x = F.conv2d(images.permute(0, 3, 1, 2), filters, leaves["patch/bias"], stride=patch)
    assert x.shape[-1] == side // patch
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([leaves["cls"].reshape(1, 1, -1).repeat(len(x), 1, 1), x], 1) + leaves["pos"]
    pres, attentions = [], []
    for i in range(program.depth):
        h = F.layer_norm(x, (width,), leaves[f"{i}/ln1/scale"], leaves[f"{i}/ln1/bias"], 1e-6)
        q, k, v = F.linear(h, leaves[f"{i}/qkv/kernel"].T, leaves[f"{i}/qkv/bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(width // heads)
        attentions.append(scores.softmax(-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, leaves[f"{i}/out/kernel"].T, leaves[f"{i}/out/bias"])
        h = F.layer_norm(x, (width,), leaves[f"{i}/ln2/scale"], leaves[f"{i}/ln2/bias"], 1e-6)
        pre = F.linear(h, leaves[f"{i}/mlp_in/kernel"].T, leaves[f"{i}/mlp_in/bias"])
        pres.append(pre.flatten(0, 1))
        x = x + F.linear(F.relu(pre), leaves[f"{i}/mlp_out/kernel"].T, leaves[f"{i}/mlp_out/bias"])
    x = F.layer_norm(x[:, 0], (width,), leaves["ln/scale"], leaves["ln/bias"], 1e-6)
    return F.linear(x, leaves["head/kernel"].T, leaves["head/bias"]), pres, attentions


class Reference:
    """One run, a step at a time. `leaves` are the weights, `resets` counts them, `renewals` SNR's."""

    def __init__(self, program, hyper, seed: int):
        self.program, self.hyper = program, hyper
        self.seed = draws.counter(seed)
        self.count = 0
        self.leaves = self.fresh(0, "init")
        self.initial = {name: value.clone() for name, value in self.leaves.items()}
        self._new_optimiser()
        blank = {
            "age": 0,
            "a": 0,
            "f": 0.0,
            "u": 0.0,
            "tau": hyper.snr_threshold,
            "age2": 0.0,
            "sum": 1.0,
            "count": 1.0,
        }
        self.units = [[dict(blank) for _ in range(program.neurons)] for _ in range(program.depth)]
        self.resets = self.renewals = 0

    def _new_optimiser(self):
        for leaf in self.leaves.values():
            leaf.requires_grad_(True)
        self.adam = torch.optim.Adam(list(self.leaves.values()), lr=self.hyper.lr, betas=(0.9, 0.999), eps=1e-7)

    def fresh(self, step: int, purpose: str) -> dict[str, torch.Tensor]:
        flat = model.fresh(self.program, self.seed, draws.counter(step), purpose)
        return split_layers(model.unflatten(self.program, flat))

    def step(self, images, labels) -> dict[str, float]:
        program, hyper = self.program, self.hyper
        per_epoch = program.classes * program.train // program.batch
        if hyper.fresh_start and self.count and self.count % (per_epoch * program.epochs_per_task) == 0:
            self.leaves = self.fresh(self.count + 1, "perturb")
            self._new_optimiser()
        self.count += 1
        logits, pres, _ = vit(program, self.leaves, images)
        loss = F.cross_entropy(logits, labels)
        total = loss + self.penalty()
        self.adam.zero_grad()
        total.backward()
        for name, leaf in self.leaves.items():
            if name.endswith("qkv/bias"):
                keys = slice(program.width, 2 * program.width)
                assert leaf.grad[keys].abs().max() < 1e-15  # mathematically zero: do not let Adam scale the rounding
                leaf.grad[keys] = 0
        self.adam.step()
        with torch.no_grad():
            if program.algorithm == "shrink_perturb":
                key = (self.count - 1) // per_epoch if hyper.perturb_key_epoch else self.count
                noise = self.fresh(key, "perturb")
                for name, leaf in self.leaves.items():
                    leaf.copy_(hyper.shrink * leaf + hyper.sigma * noise[name])
            before = self.resets
            self.after([pre.detach() for pre in pres])
        hits = (logits.argmax(-1) == labels).double().mean()
        return {"train_loss": loss.item(), "train_acc": hits.item(), "resets": self.resets - before}

    def penalty(self):
        hyper = self.hyper
        total = torch.zeros((), dtype=torch.float64)
        for name, leaf in self.leaves.items():
            factor = hyper.l2_other
            if "mlp_in" in name:
                factor = hyper.l2_mlp_in
            if name.endswith("qkv/kernel"):
                factor = hyper.l2_qkv
            total = total + hyper.l2 * factor * leaf.square().sum()
            total = total + hyper.l2_init * (leaf - self.initial[name]).square().sum()
        return total

    def after(self, pres):
        """Ages, then the algorithm's choice of units and their resets."""
        program, hyper = self.program, self.hyper
        step = draws.counter(self.count)
        p = torch.tensor(hyper.reset_freq, dtype=torch.float64)
        shape = (program.depth, program.width, program.neurons)
        incoming = draws.truncated_normal(self.seed, step, "reset/mlp_in", shape, torch.float64)
        incoming = incoming / math.sqrt(program.width) / 0.87962566103423978
        expected = p * program.neurons
        coins = draws.bernoulli(self.seed, step, "cbp/replace", expected, (program.depth,))
        for layer, pre in enumerate(pres):
            units = self.units[layer]
            for i, unit in enumerate(units):
                silent = (pre[:, i] < 0).sum().item()
                unit["before"] = unit["age"]
                unit["age"] = unit["age"] + 1 if silent >= hyper.snr_epsilon * len(pre) else 0
            rule = getattr(self, program.algorithm, None)
            for i in rule(layer, pre, step, expected.item(), bool(coins[layer])) if rule else ():
                self.reset(layer, i, incoming[layer, :, i])
                units[i]["age"] = 0
                self.resets += 1
        if program.algorithm in ("snr", "snr_v2") and bool(draws.bernoulli(self.seed, step, "snr/renew", p)):
            self.renew()

    def reset(self, layer, i, incoming):
        w_in, bias, w_out = (self.leaves[f"{layer}/{n}"] for n in ("mlp_in/kernel", "mlp_in/bias", "mlp_out/kernel"))
        w_in[:, i] = incoming
        bias[i] = 0
        w_out[i, :] = 0
        for moment in ("exp_avg", "exp_avg_sq"):
            self.adam.state[w_in][moment][:, i] = 0
            self.adam.state[bias][moment][i] = 0
            self.adam.state[w_out][moment][i, :] = 0

    def cbp(self, layer, pre, step, expected, coin):
        hyper, units = self.hyper, self.units[layer]
        w_in, w_out = self.leaves[f"{layer}/mlp_in/kernel"], self.leaves[f"{layer}/mlp_out/kernel"]
        utilities = {}
        for i, unit in enumerate(units):
            unit["a"] += 1
            correction = 1 - hyper.cbp_decay ** unit["a"]
            h = pre[:, i].clamp(min=0).mean().item()
            f_hat = unit["f"] / correction
            unit["f"] = hyper.cbp_decay * unit["f"] + (1 - hyper.cbp_decay) * h
            y = abs(f_hat - h) * w_out[i].abs().sum().item() / w_in[:, i].abs().sum().item()
            u_hat = unit["u"] / correction
            unit["u"] = hyper.cbp_decay * unit["u"] + (1 - hyper.cbp_decay) * y
            if unit["a"] >= hyper.cbp_age:
                utilities[i] = u_hat
        wanted = round(expected) if expected > 1 else int(coin)
        chosen = sorted(utilities, key=lambda i: (utilities[i], i))[:wanted]
        if hyper.cbp_ties and chosen:
            chosen = [i for i in utilities if utilities[i] <= utilities[chosen[-1]]]
        for i in chosen:
            units[i].update(a=0, f=0.0, u=0.0)
        return chosen

    def redo(self, layer, pre, step, expected, coin):
        if not bool(
            draws.bernoulli(self.seed, step, "redo/now", torch.tensor(self.hyper.reset_freq, dtype=torch.float64))
        ):
            return []
        activity = pre.clamp(min=0).sum(0).tolist()
        norm = sum(activity) / len(activity) if self.hyper.redo_mean else sum(activity)
        return [i for i, a in enumerate(activity) if a / norm <= self.hyper.redo_threshold]

    def snr(self, layer, pre, step, expected, coin):
        chosen = [i for i, unit in enumerate(self.units[layer]) if unit["age"] >= unit["tau"]]
        for i, unit in enumerate(self.units[layer]):
            if unit["age"] == 0 or i in chosen:
                unit["sum"] += unit["before"] + 1
                unit["count"] += 1
        return chosen

    def snr_v2(self, layer, pre, step, expected, coin):
        chosen = []
        for i, unit in enumerate(self.units[layer]):
            firings = (pre[:, i] >= 0).sum().item()
            unit["age2"] = len(pre) / firings if firings else unit["age2"] + len(pre)
            unit["sum"] += len(pre)
            unit["count"] += firings
            if unit["age2"] >= unit["tau"]:
                chosen.append(i)
                unit["count"] += 1
                unit["age2"] = 0.0
        return chosen

    def renew(self):
        self.renewals += 1
        for unit in (unit for layer in self.units for unit in layer):
            rate = unit["count"] / unit["sum"]
            percentile = -math.log(1 - self.hyper.snr_percentile) / rate
            if self.program.algorithm == "snr" and unit["tau"] <= percentile:
                percentile = 2 * unit["tau"]
            unit.update(tau=math.ceil(percentile), sum=1.0, count=1.0)
