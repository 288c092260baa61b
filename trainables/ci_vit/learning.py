"""One lane's step: gradient, regularisers, Adam, shrink and perturb, resets; and its evaluation and covariates.

The order in a step is the original's: gradient, loss, accuracy and activations of the current weights on the batch;
Adam; then noise or resets on what Adam left. Moments and initial weights are flat vectors (see `model`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from trainables import draws, optimizers
from trainables.ci_vit import model, resets
from trainables.ci_vit.program import RESETTING, Program, schedule
from trainables.family import Hypers, State, dtype_of

ADAM_EPS = 1e-7


def init(program: Program, hyper: Hypers, seed: Tensor) -> State:
    zero = torch.zeros_like(seed)
    flat = model.fresh(program, seed, zero, "init")
    units = (program.depth, program.neurons)
    state: State = {
        "seed": seed,
        "step": zero,
        "params": model.unflatten(program, flat),
        "initial": flat,
        "mu": torch.zeros_like(flat),
        "nu": torch.zeros_like(flat),
        "ages": torch.zeros(units, dtype=torch.int32, device=seed.device),
        "statistics": resets.init(program, hyper, seed),
    }
    if "entropy" in program.covariates:
        state["entropy"] = torch.zeros((program.depth, 2), dtype=flat.dtype, device=seed.device)
    return state


def step(program: Program, state: State, hyper: Hypers, data: dict[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """One update. `train_loss` (the cross-entropy alone) and `train_acc` are of the weights before it."""
    count, adam_count = state["step"] + 1, state["step"] + 1
    params, mu, nu = state["params"], state["mu"], state["nu"]
    noise = None
    if program.algorithm == "shrink_perturb":
        noise = model.fresh(program, state["seed"], _noise_key(program, hyper, count), "perturb")
        anew, adam_count = _start_of_task(program, hyper, state["step"])
        params = model.unflatten(program, torch.where(anew, noise, model.flatten(program, params)))
        mu, nu = torch.where(anew, 0, mu), torch.where(anew, 0, nu)

    watch = _watched(program)

    def loss_of(weights):
        logits, seen = model.forward(program, weights, data["images"], watch)
        loss = F.cross_entropy(logits, data["labels"])
        return loss, (_accuracy(logits.detach(), data["labels"]), seen)

    grads, (loss, (accuracy, seen)) = grad_and_value(loss_of, has_aux=True)(params)
    theta = model.flatten(program, params)
    slope = model.flatten(program, grads) + _pull(program, hyper, theta, state["initial"])
    (theta,), (mu,), (nu,) = (
        new.values()
        for new in optimizers.adam(
            {"all": theta}, {"all": slope}, {"all": mu}, {"all": nu}, adam_count, hyper["lr"], eps=ADAM_EPS
        )
    )
    if noise is not None:
        theta = hyper["shrink"] * theta + hyper["sigma"] * noise

    inputs = data["images"].shape[0] * program.tokens
    ages = resets.silent_ages(state["ages"], seen["fired"], inputs, hyper["snr_epsilon"])
    metrics = {"train_loss": loss, "train_acc": accuracy}
    statistics = state["statistics"]
    if program.algorithm in RESETTING:
        w_in, w_out = _weight_sums(program, theta) if program.algorithm == "cbp" else (None, None)
        facts = resets.Seen(
            state["seed"], count, inputs, seen["fired"], seen.get("activity"), state["ages"], ages, w_in, w_out
        )
        mask, statistics = resets.choose(program, hyper, statistics, facts)
        theta, mu, nu = _reset(program, state["seed"], count, mask, theta, mu, nu)
        ages = torch.where(mask, 0, ages)
        metrics.update(_reset_metrics(program, mask))

    params = model.unflatten(program, theta)
    following: State = {**state, "step": count, "params": params, "mu": mu, "nu": nu, "ages": ages}
    following["statistics"] = statistics
    if program.train_acc_after:
        logits, _ = model.forward(program, params, data["images"])
        metrics["train_acc_after"] = _accuracy(logits, data["labels"])
    if "entropy" in program.covariates:
        following["entropy"] = _moments(seen["entropy"])
        metrics.update(_entropy_metrics("train", following["entropy"]))
    return following, metrics


def evaluate(program: Program, state: State, hyper: Hypers, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the batch's real images; the entropies are the batch's own, weighted by its images."""
    watch = ("entropy",) if "entropy" in program.covariates else ()
    logits, seen = model.forward(program, state["params"], data["images"], watch)
    real = data["real"]
    losses = F.cross_entropy(logits, data["labels"], reduction="none")
    count = real.sum()
    sums = {
        "test_loss": torch.where(real, losses, 0).sum(),
        "test_acc": ((logits.argmax(-1) == data["labels"]) & real).sum(),
        "count": count,
    }
    if "entropy" in program.covariates:
        moments = _moments(seen["entropy"], real)
        sums.update({name: value * count for name, value in _entropy_metrics("test", moments).items()})
    return sums


def inspect(program: Program, state: State, hyper: Hypers) -> dict[str, Tensor]:
    """The covariates asked for, of the present state.

    ages [depth, neurons]: batches since each MLP unit last fired (or was reset). resets [depth, neurons]: times each
    was reset so far. dead [depth]: units silent for at least an epoch's batches. entropy_mean, entropy_std [depth]: of
    the last batch's attention, nats. norm/<kernel> [depth] or []: L2 norms.
    """
    found: dict[str, Tensor] = {}
    if "ages" in program.covariates:
        found["ages"] = state["ages"]
    if "dead" in program.covariates:
        found["dead"] = (state["ages"] >= schedule(program).steps_per_epoch).sum(-1)
    if "resets" in program.covariates:
        none = torch.zeros_like(state["ages"])
        found["resets"] = state["statistics"].get("reset_count", none)
    if "entropy" in program.covariates:
        found["entropy_mean"], found["entropy_std"] = state["entropy"].unbind(-1)
    if "norms" in program.covariates:
        for name, value in state["params"].items():
            if name.endswith("kernel"):
                found[f"norm/{name.removesuffix('/kernel')}"] = value.square().sum((-2, -1)).sqrt()
    return found


# --- parts of a step ------------------------------------------------------------------------------------------------


def _watched(program: Program) -> tuple[str, ...]:
    watch = ["fired"]
    if program.algorithm in ("cbp", "redo"):
        watch.append("activity")
    if "entropy" in program.covariates:
        watch.append("entropy")
    return tuple(watch)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()


def _pull(program: Program, hyper: Hypers, theta: Tensor, initial: Tensor) -> Tensor:
    """Gradient of l2 * sum(p^2) over the leaves in scope + l2_init * sum((p - p0)^2)."""
    plan = model.layout(program)
    scope = torch.cat(
        [
            hyper["l2_mlp_in"].expand(plan.mlp_in),
            hyper["l2_other"].expand(plan.resettable - plan.mlp_in),
            hyper["l2_qkv"].expand(plan.qkv),
            hyper["l2_other"].expand(plan.total - plan.resettable - plan.qkv),
        ]
    )
    return 2 * hyper["l2"] * scope * theta + 2 * hyper["l2_init"] * (theta - initial)


def _noise_key(program: Program, hyper: Hypers, count: Tensor) -> Tensor:
    """The counter that keys the fresh net: the step, or (the original's mistake) the epoch."""
    epoch = (count - 1) // schedule(program).steps_per_epoch
    return torch.where(hyper["perturb_key_epoch"] > 0, epoch, count)


def _start_of_task(program: Program, hyper: Hypers, step: Tensor) -> tuple[Tensor, Tensor]:
    """Whether this step starts a task after the first from fresh weights, and Adam's own count of updates."""
    plan = schedule(program)
    within = step % (plan.steps_per_epoch * plan.epochs_per_task)
    fresh = hyper["fresh_start"] > 0
    return fresh & (within == 0) & (step > 0), torch.where(fresh, within, step) + 1


def _weight_sums(program: Program, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of absolute incoming and outgoing weights of every MLP unit, each [depth, neurons]."""
    plan, depth, width, neurons = model.layout(program), program.depth, program.width, program.neurons
    w_in = theta[: depth * width * neurons].reshape(depth, width, neurons)
    w_out = theta[plan.mlp_in : plan.resettable].reshape(depth, neurons, width)
    return w_in.abs().sum(-2), w_out.abs().sum(-1)


def _reset(
    program: Program, seed: Tensor, count: Tensor, mask: Tensor, theta: Tensor, mu: Tensor, nu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh incoming weights, bias 0, outgoing weights 0 and Adam's moments of exactly these 0; Adam's count stays."""
    end = model.layout(program).resettable
    depth, width, neurons = program.depth, program.width, program.neurons
    dtype = dtype_of(program)
    incoming = draws.truncated_normal(seed, count, "reset/mlp_in", (depth * width * neurons,), dtype)
    incoming = incoming * model.lecun_std(width)
    replacement = torch.cat([incoming, incoming.new_zeros(end - len(incoming))])
    hit = torch.cat(
        [
            mask[:, None, :].expand(depth, width, neurons).reshape(-1),
            mask.reshape(-1),
            mask[:, :, None].expand(depth, neurons, width).reshape(-1),
        ]
    )
    return (
        torch.cat([torch.where(hit, replacement, theta[:end]), theta[end:]]),
        torch.cat([torch.where(hit, 0, mu[:end]), mu[end:]]),
        torch.cat([torch.where(hit, 0, nu[:end]), nu[end:]]),
    )


def _reset_metrics(program: Program, mask: Tensor) -> dict[str, Tensor]:
    per_layer = mask.sum(-1).to(dtype_of(program))
    metrics = {"resets": per_layer.sum()}
    if "resets" in program.covariates:
        metrics.update({f"resets/{layer}": value for layer, value in enumerate(per_layer.unbind(0))})
    return metrics


def _moments(entropy: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean and standard deviation over images x heads x queries, [depth, 2], of entropy [depth, batch, heads x q]."""
    weight = torch.ones_like(entropy[0]) if real is None else real[:, None].expand(entropy.shape[1:]).to(entropy.dtype)
    share = weight / weight.sum()
    mean = (entropy * share).sum((-2, -1))
    variance = ((entropy - mean[:, None, None]) ** 2 * share).sum((-2, -1))
    return torch.stack([mean, variance.sqrt()], dim=-1)


def _entropy_metrics(part: str, moments: Tensor) -> dict[str, Tensor]:
    named = {}
    for layer, pair in enumerate(moments.unbind(0)):
        named[f"{part}_entropy_mean/{layer}"], named[f"{part}_entropy_std/{layer}"] = pair.unbind(0)
    return named
