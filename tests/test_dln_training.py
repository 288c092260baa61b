"""The training step, the data's windows and the objectives, against torch's own and against counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lanes.engine import put
from lanes.serial import SerialEngine
from tests.families import arrays_of
from trainables.dln import data, gpt, objectives, pictures, tdln, training
from trainables.dln.program import Hyper
from trainables.family import BadValue, hyper_tensors, load_family

FAMILY = load_family("dln")
TEXT = {
    "data": "pydoc",
    "precision": "float64",
    "layers": 1,
    "width": 12,
    "heads": 2,
    "length": 8,
    "batch": 3,
    "steps_per_epoch": 6,
    "epochs": 2,
    "eval_windows": 5,
    "eval_batch": 3,
    "dropout_at": (),
}
IMAGES = {
    "task": "reconstruct",
    "data": "digits",
    "precision": "float64",
    "batch": 8,
    "channels": 12,
    "steps_per_epoch": 10,
    "epochs": 2,
    "warmup": 0.0,
    "final_fraction": 1.0,
    "weight_decay": 0.0,
    "clip": 0.0,
}


def engine_of(values: dict, cache_dir, seed: int = 0) -> SerialEngine:
    program, hyper = FAMILY.build(values)
    engine = SerialEngine(FAMILY, program, arrays_of(FAMILY, program, cache_dir))
    engine.insert("me", hyper, seed)
    return engine


@pytest.mark.parametrize(
    ("done", "expected"),
    [(0, 0.0), (25, 2.5e-4), (99, 9.9e-4), (100, 1e-3), (2550, 5.5e-4), (5000, 1e-4), (9999, 1e-4)],
)
def test_learning_rate_rises_then_falls_along_a_cosine(done, expected):
    hypers = {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(Hyper()).items()}
    rate = training.learning_rate(hypers, torch.tensor(done, dtype=torch.int32))
    assert rate.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_no_warm_up_and_a_constant_rate():
    hypers = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in vars(Hyper(warmup=0.0, final_fraction=1.0)).items()
    }
    for done in (0, 1, 4000, 6000):
        assert training.learning_rate(hypers, torch.tensor(done)).item() == pytest.approx(1e-3)


@pytest.mark.parametrize("decayed", ["matrices", "matrices+embeddings", "all"])
def test_updates_equal_torch_s_adamw_with_clipping(decayed, cache_dir):
    hyper = {"lr": 0.02, "warmup": 3.0, "decay_steps": 12.0, "clip": 0.5, "weight_decay": 0.3, "b2": 0.99}
    engine = engine_of({**TEXT, **hyper, "decayed": decayed, "norm_gain": True}, cache_dir)
    program, hypers = engine.program, engine.hypers("me")
    start = engine.state("me")["params"]
    rows = data.order(program, engine.arrays, 0, 0)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    tables = {"embedding", "unembedding", "positions"}
    shrunk = {
        name
        for name, value in leaves.items()
        if decayed == "all" or (value.dim() == 2 and (decayed != "matrices" or name not in tables))
    }
    groups = [
        {"params": [p for name, p in leaves.items() if (name in shrunk) == wanted], "weight_decay": rate}
        for wanted, rate in ((True, 0.3), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    norms = []
    for step in range(6):
        batch = data.batch(program, engine.arrays, {"train": rows["train"][step]})
        loss = objectives.scores(program, leaves, hypers, batch, None)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.5).item())
        progress = (step - 3) / 9
        rate = 0.02 * step / 3 if step < 3 else 0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    curves = engine.advance(6)
    np.testing.assert_allclose(curves["gradient_norm"][:, 0], norms, rtol=1e-9)
    assert max(norms) > 0.5  # clipping did happen
    for name, value in engine.state("me")["params"].items():
        torch.testing.assert_close(value, leaves[name].detach(), rtol=1e-8, atol=1e-11, msg=name)
    assert not torch.equal(start["h0.up"], engine.state("me")["params"]["h0.up"])


def test_embedding_and_unembedding_drift_apart_only_where_told(cache_dir):
    for tie, drifts in (("tied_at_start", True), ("tied", False)):
        engine = engine_of({**TEXT, "unembedding": tie, "warmup": 0.0, "lr": 0.01}, cache_dir)
        before = engine.state("me")["params"]
        assert ("unembedding" in before) == drifts
        engine.advance(3)
        after = engine.state("me")["params"]
        if drifts:
            assert torch.equal(before["embedding"], before["unembedding"])
            assert not torch.allclose(after["embedding"], after["unembedding"])


def test_frozen_memory_stays_and_both_ways_of_freezing_are_the_same(cache_dir):
    ends = {}
    for name, values in {
        "mask": {"train_memory": 0.0},
        "detach": {"freeze": "detach", "train_memory": 0.0},
        "trained": {},
        "first": {"train_first": 0.0},
    }.items():
        engine = engine_of({**IMAGES, "recurrence": "tdln", "levels": 1, "dense": 0, "lr": 0.01, **values}, cache_dir)
        before = engine.state("me")["params"]
        engine.advance(10)
        after = engine.state("me")["params"]
        ends[name] = after
        moved = {key for key in after if not torch.equal(before[key], after[key])}
        fixed = {
            "mask": {"level0.size", "level0.theta", "level1.size", "level1.theta"},
            "trained": set(),
            "first": {key for key in after if key.startswith("level0.")},
        }
        assert moved == after.keys() - fixed.get(name, fixed["mask"]), name
    for key, value in ends["mask"].items():
        torch.testing.assert_close(ends["detach"][key], value, rtol=1e-12, atol=1e-14, msg=key)


def test_window_starts_random_behind_breaks_and_fixed(cache_dir):
    arrays, starts = {}, {}
    for kind in ("random", "breaks", "fixed"):
        program, _ = FAMILY.build({**TEXT, "windows": kind, "fixed_windows": 2, "steps_per_epoch": 300})
        arrays[kind] = arrays_of(FAMILY, program, cache_dir)
        starts[kind] = data.order(program, arrays[kind], 5, 0)["train"]
        assert starts[kind].shape == (300, 3)
        again = data.order(program, arrays[kind], 5, 0)["train"]
        assert torch.equal(again, starts[kind])
        assert not torch.equal(data.order(program, arrays[kind], 5, 1)["train"], starts[kind])
    train = arrays["random"]["train"]
    assert set(starts["fixed"].flatten().tolist()) == {0, 8}
    assert starts["random"].max() > 0.99 * len(train)
    assert starts["random"].max() + 9 <= len(train)
    newline = 0  # first of the documentation's symbols
    at = starts["breaks"].flatten()
    assert bool((train[at - 1] == newline).all())
    assert bool((train[at - 2] == newline).all())
    assert not bool((train[starts["random"].flatten() - 1] == newline).all())


def test_batches_hold_consecutive_tokens_and_evaluation_the_same_windows(cache_dir):
    program, _ = FAMILY.build({**TEXT, "eval_windows": 0, "eval_batch": 100})
    arrays = arrays_of(FAMILY, program, cache_dir)
    batch = data.batch(program, arrays, {"train": torch.tensor([17])})
    assert torch.equal(batch["tokens"][0], arrays["train"][17:26].long())
    rows = data.test_order(program, arrays, 0, 0)["held_out"]
    assert torch.equal(rows, data.test_order(program, arrays, 3, 7)["held_out"])
    real = rows[rows >= 0]
    assert real.tolist() == list(range(0, (len(arrays["held_out"]) - 9) // 8 * 8 + 1, 8))  # end to end
    few, _ = FAMILY.build(TEXT)
    chosen = data.test_order(few, arrays, 0, 0)["held_out"]
    assert (chosen >= 0).sum() == 5
    assert set(chosen[chosen >= 0].tolist()) <= set(real.tolist())


def test_evaluation_is_the_mean_over_windows_without_dropout(cache_dir):
    engine = engine_of({**TEXT, "dropout_at": ("mlp",), "eval_batch": 2}, cache_dir)
    engine.advance(6)
    measured = engine.evaluate(["me"])["me"]
    state, program = engine.state("me"), engine.program
    starts = data.test_order(program, engine.arrays, 0, 0)["held_out"].flatten()
    batch = data.batch(program, engine.arrays, {"held_out": starts[starts >= 0]})
    tokens = batch["tokens"]
    logits = logits_of(program, state, engine.hypers("me"), tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert measured["held_out_loss"] == pytest.approx(expected.item(), rel=1e-10)
    right = (logits.argmax(-1) == tokens[:, 1:]).double().mean()
    assert measured["held_out_accuracy"] == pytest.approx(right.item(), rel=1e-6)


def logits_of(program, state, hypers, tokens):
    return gpt.forward(program, state["params"], hypers, tokens, None)


def test_bits_losses_and_targets_by_hand():
    program, _ = FAMILY.build(
        {**TEXT, "task": "tdln", "targets": "bits", "loss": "bce", "bytes_per_step": 2, "length": 2, "channels": 5}
    )
    text = np.frombuffer(b"abcdef", dtype=np.uint8)
    vocab = torch.from_numpy(np.frombuffer(bytes(range(256)), dtype=np.uint8).copy())
    batch = {"tokens": torch.from_numpy(text.astype(np.int64))[None].repeat(2, 1), "vocab": vocab}
    inputs, targets = objectives._inputs_and_targets(program, batch, training=True)
    assert inputs.shape == targets.shape == (2, 2, 16)
    bits = np.unpackbits(text[2:4], bitorder="little")
    np.testing.assert_array_equal(targets[0, 0].numpy(), bits)  # after "ab" comes "cd"
    np.testing.assert_array_equal(inputs[0, 1].numpy(), bits)
    sure = objectives._of_numbers(program, (targets - 0.5) * 20, targets)
    assert sure["exact"].tolist() == [1.0, 1.0]
    assert sure["accuracy"].tolist() == [1.0, 1.0]
    unsure = objectives._of_numbers(program, torch.zeros_like(targets), targets)
    np.testing.assert_allclose(unsure["loss"].numpy(), 8 * math.log(2))  # nats a byte
    assert unsure["accuracy"].tolist() == [0.0, 0.0]


def test_the_indexing_mistake_asks_for_the_next_row_and_evaluation_does_not():
    program, _ = FAMILY.build({**TEXT, "task": "tdln", "length": 3, "channels": 5, "target": "next_row"})
    tokens = torch.arange(12).reshape(3, 4)
    inputs, wrong = objectives._inputs_and_targets(program, {"tokens": tokens}, training=True)
    assert wrong.tolist() == [[4, 5, 6], [8, 9, 10]]
    assert inputs.argmax(-1).tolist() == tokens[:, :-1].tolist()
    assert objectives._inputs_and_targets(program, {"tokens": tokens}, training=False)[1].tolist() == [
        [1, 2, 3],
        [5, 6, 7],
        [9, 10, 11],
    ]


def test_a_digit_left_out_is_not_trained_on(cache_dir):
    program, _ = FAMILY.build({**IMAGES, "without_digit": 4})
    everything, _ = FAMILY.build(IMAGES)
    some, all_of_them = (put(FAMILY.load(p, None, cache_dir), "cpu") for p in (program, everything))
    assert len(some["train"]) < len(all_of_them["train"]) == 1437
    assert torch.equal(some["held_out"], all_of_them["held_out"])
    images = data.batch(everything, all_of_them, {"train": torch.arange(50)})["images"]
    assert images.max() == 1.0
    assert images.min() == 0.0


def test_digits_are_given_back_from_the_last_state_and_interpolate(cache_dir, tmp_path):
    engine = engine_of(
        {
            **IMAGES,
            "precision": "float32",
            "recurrence": "dln",
            "channels": 96,
            "batch": 64,
            "lr": 4e-3,
            "steps_per_epoch": 250,
        },
        cache_dir,
    )
    engine.advance(1)
    engine.advance(249)
    held_out = engine.evaluate(["me"])["me"]
    images = engine.arrays["held_out"].float() / 16
    mean_image = engine.arrays["train"].float().mean(0) / 16
    constant = ((images - mean_image) ** 2).mean().item()
    assert held_out["held_out_loss"] < 0.6 * constant  # the state says which digit it was
    program, state, hypers = engine.program, engine.state("me"), engine.hypers("me")
    one, four = images[1], images[4]
    row = pictures.interpolate(program, state, hypers, one, four)
    assert row.shape == (20, 64)
    ends = dict(zip(pictures.MIXES, row, strict=True))
    given = tdln.reconstruct(program, state["params"], hypers, torch.stack([four, one]))
    torch.testing.assert_close(ends[0.0], given[0])
    torch.testing.assert_close(ends[1.0], given[1], rtol=1e-4, atol=1e-5)
    by_state = pictures.interpolate(program, state, hypers, one, four, mixes=(0.0, 0.5, 1.0), space="state")
    torch.testing.assert_close(by_state[0], given[0], rtol=1e-4, atol=1e-5)
    path = tmp_path / "digits.png"
    pictures.write_strip(path, program, [row, torch.stack([one, four] * 10)])
    with Image.open(path) as picture:
        assert picture.size == (20 * 8 * 4, 2 * 8 * 4)
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "gtp"}, "task 'gtp' is not one of"),
        ({"task": "reconstruct"}, "needs images"),
        ({"data": "mnist"}, "needs a text"),
        ({"width": 13}, "does not divide into 2 heads"),
        ({"dropout_at": ("mlps",)}, "dropout_at 'mlps'"),
        ({"task": "tdln", "targets": "bits"}, "go with loss bce or mse"),
        ({"task": "tdln", "bytes_per_step": 2}, "one byte a step"),
        ({"batch": 0}, "at least 1"),
        ({"autocast": "float16"}, "needs precision float32"),
        ({"width": 6, "positions": "rope"}, "even head width"),
    ],
)
def test_mistakes_in_a_program_are_told(values, message):
    with pytest.raises(BadValue, match=message):
        FAMILY.build({**TEXT, **values})


def test_a_text_too_short_for_its_windows_is_told(tmp_path, cache_dir):
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be.\n" * 4)
    program, _ = FAMILY.build({**TEXT, "data": str(short), "length": 64})
    with pytest.raises(BadValue, match="smaller length"):
        FAMILY.load(program, None, cache_dir)
    program, _ = FAMILY.build({**TEXT, "data": str(short), "length": 4, "windows": "breaks"})
    with pytest.raises(BadValue, match="no blank line"):
        FAMILY.load(program, None, cache_dir)


def test_covariates_and_summary(cache_dir):
    engine = engine_of({**TEXT, "memory": 4}, cache_dir)
    engine.advance(6)
    covariates = engine.inspect(["me"])["me"]
    decay = covariates["h0.decay"]
    assert ((decay > 0.94) & (decay < 1.0)).all()
    assert covariates["weight_rms/h0.up"] == pytest.approx(
        engine.state("me")["params"]["h0.up"].square().mean().sqrt().item()
    )
    summary = FAMILY.summarize(engine.program, {"held_out_loss": np.array([3.0, 2.0, np.nan, 2.5])})
    assert summary == {"held_out_loss": 2.5, "best_held_out_loss": 2.0}


@pytest.mark.parametrize("case", FAMILY.cases)
def test_half_precision_stays_finite_and_close(case, cache_dir):
    losses = {}
    for precision in ("float32", "bf16"):
        chosen = FAMILY.cases[case]
        engine = engine_of({**chosen.program, **chosen.hyper, "precision": precision}, cache_dir)
        losses[precision] = engine.advance(3)["train_loss"][:, 0]
        dtypes = {value.dtype for value in engine.state("me")["params"].values()}
        assert dtypes == {torch.float32}
    np.testing.assert_allclose(losses["bf16"], losses["float32"], rtol=0.03)


def test_hypers_are_tensors_of_every_field():
    program, hyper = FAMILY.build(TEXT)
    assert hyper_tensors(program, hyper, "cpu").keys() == vars(Hyper()).keys()
