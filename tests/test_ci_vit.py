"""ci_vit's net, stream, covariates and summary: the notebook's sizes and counts, definitions by independent means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from lanes.serial import SerialEngine
from lanes.stacked import StackedEngine
from tests.ci_vit_reference import split_layers, vit
from tests.families import arrays_of
from trainables import draws
from trainables.ci_vit import learning, model, stream
from trainables.ci_vit.program import DATA
from trainables.family import BadValue, config_key, hyper_tensors, load_family, program_key

FAMILY = load_family("ci_vit")
NOTEBOOK = {"data": "imagenet32", "tasks": 500, "epochs_per_task": 10, "batch": 100}


def build(**values):
    return FAMILY.build(values)


def fresh_params(program, seed: int = 0):
    return model.unflatten(program, model.fresh(program, draws.counter(seed), draws.counter(0), "init"))


# --- the net --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "count", "neurons"), [(3, 90_530, 192), (12, 5_361_218, 768)])
def test_the_notebook_s_nets_have_its_parameter_counts(depth, count, neurons):
    program, _ = build(**NOTEBOOK, depth=depth)
    assert model.layout(program).total == count
    assert program.tokens == 65
    assert program.neurons == neurons == 4 * program.width  # derived: no field sets it
    assert "neurons" not in FAMILY.program_fields


def test_initial_weights_are_flax_s():
    program, _ = build(**NOTEBOOK, depth=6, precision="float64")
    params = fresh_params(program)
    assert sum(value.numel() for value in params.values()) == model.layout(program).total
    for name, value in params.items():
        if name.endswith("kernel"):
            std = value.shape[-2] ** -0.5
            assert value.std().item() == pytest.approx(std, rel=0.05 if value.numel() < 5000 else 0.02), name
            assert value.abs().max().item() <= 2 * std / 0.8796 + 1e-9, name
            assert value.abs().max().item() > 1.7 * std / 0.8796, name
        elif name == "pos":
            assert value.std().item() == pytest.approx(0.02, rel=0.03)
            assert value.abs().max().item() > 0.05  # not truncated
        else:
            assert bool((value == float(name.endswith("scale"))).all()), name
    normal = scipy.stats.truncnorm(-2, 2)
    z = params["mlp_in/kernel"].flatten().numpy() * program.width**0.5 * normal.std()
    assert scipy.stats.kstest(z[:20_000], normal.cdf).pvalue > 0.001


def test_forward_and_attention_entropy_equal_the_plain_net():
    program, _ = build(depth=2, hidden=12, patch=2, precision="float64")
    params = {
        name: value + 0.1 * draws.normal(draws.counter(5), draws.counter(0), name, tuple(value.shape), torch.float64)
        for name, value in fresh_params(program).items()
    }
    images = draws.uniform(draws.counter(1), draws.counter(0), "images", (7, 8, 8, 1), torch.float64)
    logits, seen = model.forward(program, params, images, ("fired", "activity", "entropy"))
    expected, pres, attentions = vit(program, split_layers(params), images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for layer in range(2):
        assert torch.equal(seen["fired"][layer], (pres[layer] >= 0).sum(0))
        torch.testing.assert_close(seen["activity"][layer], F.relu(pres[layer]).mean(0), rtol=1e-10, atol=1e-12)
        entropy = scipy.stats.entropy(attentions[layer].numpy(), axis=-1)
        np.testing.assert_allclose(seen["entropy"][layer].reshape(entropy.shape), entropy, rtol=1e-9)
        mean, std = learning._moments(seen["entropy"])[layer]
        assert (mean.item(), std.item()) == pytest.approx((entropy.mean(), entropy.std()), rel=1e-9)


def test_bf16_trains_near_float32_with_float32_weights(cache_dir):
    losses = {}
    for precision in ("float32", "bf16"):
        program, hyper = build(
            depth=2, hidden=12, patch=4, batch=20, tasks=1, epochs_per_task=3, precision=precision, algorithm="snr_v2"
        )
        engine = StackedEngine(FAMILY, program, arrays_of(FAMILY, program, cache_dir))
        engine.insert("a", hyper, 0)
        engine.insert("b", hyper, 1)
        losses[precision] = np.concatenate([engine.advance(14)["train_loss"] for _ in range(3)])
        assert engine.state("a")["params"]["qkv/kernel"].dtype == torch.float32
        assert 0 <= engine.evaluate(["a"])["a"]["test_acc"] <= 1
    np.testing.assert_allclose(losses["bf16"][:10], losses["float32"][:10], rtol=0.05)
    assert not np.array_equal(losses["bf16"], losses["float32"])


# --- the stream -----------------------------------------------------------------------------------------------------


def test_counts_at_the_notebook_s_settings():
    schedule = FAMILY.schedule(build(**NOTEBOOK)[0])
    assert schedule.tasks == 500
    assert schedule.steps_per_epoch * schedule.epochs_per_task == 120
    assert schedule.steps == 60_000
    assert schedule.epochs == 5_000
    stand_in = FAMILY.schedule(build(**{**NOTEBOOK, "data": "tinyimagenet32"})[0])
    assert (stand_in.steps_per_epoch * 10, stand_in.steps) == (100, 50_000)


def test_one_pass_meets_every_class_once_and_a_second_pass_pairs_anew():
    program, _ = build(**{**NOTEBOOK, "tasks": 1000})
    tasks = [tuple(stream.task_classes(program, 3, task)) for task in range(1000)]
    first, second = tasks[:500], tasks[500:]
    for along in (first, second):
        assert sorted(label for pair in along for label in pair) == list(range(1000))
    assert len(set(map(frozenset, first)) & set(map(frozenset, second))) < 5
    assert tasks[:20] != [tuple(stream.task_classes(program, 4, task)) for task in range(20)]
    assert build(**{**NOTEBOOK, "tasks": 0})[0].length == 500


def fake_arrays(program):
    """Images whose pixels tell their class and place in it: [class, place, ...]."""
    arrays = {}
    for name, kept in (("train_images", program.train), ("test_images", program.test)):
        images = np.zeros(
            (program.set.classes, kept, program.set.side, program.set.side, program.set.channels), np.uint8
        )
        images[..., 0, 0, 0] = (np.arange(program.set.classes) % 256)[:, None]
        images[..., 0, 1, 0] = (np.arange(kept) % 256)[None]
        arrays[name] = torch.from_numpy(images.reshape(-1, *images.shape[2:]))
    return arrays


def test_each_epoch_reads_a_task_s_600_images_a_class_once_in_a_new_order():
    program, _ = build(**{**NOTEBOOK, "data": "lop"})
    arrays = {"train_images": torch.zeros(1), "test_images": torch.zeros(1)}
    classes = stream.task_classes(program, 0, 1)
    epochs = [stream.order(program, arrays, 0, epoch) for epoch in (10, 11, 20)]
    assert epochs[0]["train"].shape == epochs[0]["label"].shape == (12, 100)
    expected = [label * 600 + i for label in classes for i in range(600)]
    for rows in epochs[:2]:
        assert sorted(rows["train"].flatten().tolist()) == sorted(expected)
        assert torch.equal(rows["label"], (rows["train"] // 600 == classes[1]).long())
    assert not torch.equal(epochs[0]["train"], epochs[1]["train"])
    assert set(epochs[2]["train"].flatten().tolist()).isdisjoint(expected)
    again = stream.order(program, arrays, 0, 10)
    assert torch.equal(again["train"], epochs[0]["train"])
    assert not torch.equal(stream.order(program, arrays, 1, 10)["train"], epochs[0]["train"])
    tests = stream.test_order(program, arrays, 0, 11)
    assert sorted(tests["test"].flatten().tolist()) == [
        label * 100 + i for label in sorted(classes) for i in range(100)
    ]


def test_batches_carry_the_right_images_scaled():
    program, _ = build(data="cifar10", train_per_class=30, test_per_class=7, batch=10, pixels="plain")
    arrays = fake_arrays(program)
    classes = stream.task_classes(program, 0, 0)
    for rows in (stream.order(program, arrays, 0, 0), stream.test_order(program, arrays, 0, 0)):
        data = stream.batch(program, arrays, {name: row[0] for name, row in rows.items()})
        assert data["images"].max() <= 1
        told = (data["images"][:, 0, 0, 0] * 255).round().long()
        assert torch.equal(told, torch.tensor(classes)[data["labels"]])
        assert bool(data["real"].all())


def test_test_batches_are_padded_and_padding_does_not_count(cache_dir, monkeypatch):
    program, hyper = build(depth=1, hidden=6, patch=4, batch=20, precision="float64", covariates=("entropy",))
    arrays = arrays_of(FAMILY, program, cache_dir)
    whole = SerialEngine(FAMILY, program, arrays)
    whole.insert("a", hyper, 0)
    whole.advance(14)
    expected = whole.evaluate(["a"])["a"]
    monkeypatch.setattr(stream, "TEST_BATCH", 50)
    rows = stream.test_order(program, arrays, 0, 0)
    assert rows["test"].shape == (2, 50)
    assert int((rows["test"] == -1).sum()) == 100 - 68
    actual = whole.evaluate(["a"])["a"]
    assert actual["test_acc"] == pytest.approx(expected["test_acc"], rel=1e-12)
    assert actual["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)
    assert actual["test_entropy_mean/0"] == pytest.approx(expected["test_entropy_mean/0"], rel=1e-9)


def test_digits_keep_one_pixel_permutation_a_task(cache_dir):
    program, _ = build(data="digits", epochs_per_task=2, batch=28)
    arrays = arrays_of(FAMILY, program, cache_dir)
    assert program.length == 5
    assert len(arrays["train_images"]) == 1400
    assert len(arrays["test_images"]) == 340
    pixels = [stream.order(program, arrays, 0, epoch)["pixels"][0] for epoch in range(4)]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], stream.test_order(program, arrays, 0, 1)["pixels"][0])
    assert not torch.equal(pixels[1], pixels[2])
    assert sorted(pixels[0].tolist()) == list(range(64))
    rows = stream.order(program, arrays, 0, 0)
    shown = stream.batch(program, arrays, {name: row[0] for name, row in rows.items()})["images"]
    plain = arrays["train_images"][rows["train"][0]] / 16
    torch.testing.assert_close(shown.flatten(1), plain.flatten(1)[:, pixels[0]])
    assert 0.9 < shown.max() <= 1
    unpermuted, _ = build(data="digits", pixels="plain")
    assert "pixels" not in stream.order(unpermuted, arrays, 0, 0)


def test_digits_are_scikit_learn_s_split_in_file_order(cache_dir):
    from sklearn.datasets import load_digits

    program, _ = build()
    arrays = arrays_of(FAMILY, program, cache_dir)
    bundle = load_digits()
    for label in range(10):
        mine = bundle.images[bundle.target == label]
        train = arrays["train_images"][label * 140 : (label + 1) * 140, :, :, 0]
        test = arrays["test_images"][label * 34 : (label + 1) * 34, :, :, 0]
        np.testing.assert_array_equal(train, mine[:140])
        np.testing.assert_array_equal(test, mine[140:174])


def test_cifar10_by_class(tmp_path, data_dir):
    pytest.importorskip("trainables.datasets.cifar10")
    program, _ = build(data="cifar10", train_per_class=4, test_per_class=3, batch=8)
    arrays = FAMILY.load(program, data_dir, tmp_path)
    assert arrays["train_images"].shape == (40, 32, 32, 3)
    assert arrays["test_images"].shape == (30, 32, 32, 3)


def test_tinyimagenet_learns_a_task(tmp_path, data_dir):
    program, hyper = build(
        data="tinyimagenet32", train_per_class=100, test_per_class=5, depth=1, hidden=12, patch=8, batch=25, tasks=1
    )
    arrays = {name: torch.from_numpy(np.array(a)) for name, a in FAMILY.load(program, data_dir, tmp_path).items()}
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("a", hyper, 0)
    accuracy = [engine.advance(8)["train_acc"].mean() for _ in range(10)]
    assert accuracy[-1] > 0.6
    assert accuracy[-1] > accuracy[0]


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_summary_averages_last_epochs_of_the_last_tasks_and_not_the_last_epochs():
    program, _ = build(**NOTEBOOK)
    curve = np.tile(np.linspace(0.5, 0.95, 10), 500) + np.repeat(np.linspace(0, 0.04, 500), 10)
    summary = FAMILY.summarize(program, {"test_acc": curve, "train_acc": curve / 2, "train_acc_after": curve / 3})
    expected = np.mean([curve[task * 10 + 9] for task in range(450, 500)])
    assert summary["test_acc_last"] == pytest.approx(expected, abs=1e-12)
    assert summary["train_acc_last"] == pytest.approx(expected / 2, abs=1e-12)
    assert summary["train_acc_after_last"] == pytest.approx(expected / 3, abs=1e-12)
    assert abs(summary["test_acc_last"] - curve[-50:].mean()) > 0.2  # what the notebook first selected on


def test_summary_in_mid_task_counts_completed_tasks_only():
    program, _ = build(tasks=20, epochs_per_task=4)  # a tenth of 20 tasks: the last 2
    curve = np.array([0.5, 0.6, 0.7, 0.8, 0.1, 0.2, 0.3, 0.9, 0.0, 0.0])
    assert FAMILY.summarize(program, {"test_acc": curve[:3]})["test_acc_last"] == 0.7
    assert FAMILY.summarize(program, {"test_acc": curve[:4]})["test_acc_last"] == 0.8
    assert FAMILY.summarize(program, {"test_acc": curve[:7]})["test_acc_last"] == 0.8
    assert FAMILY.summarize(program, {"test_acc": curve})["test_acc_last"] == pytest.approx(0.85)


def test_accuracies_before_and_after_the_update(cache_dir):
    program, hyper = build(
        depth=1, hidden=6, patch=4, batch=28, precision="float64", train_acc_after=True, algorithm="cbp"
    )
    arrays = arrays_of(FAMILY, program, cache_dir)
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("a", hyper, 2)
    rows = stream.order(program, arrays, 2, 0)
    for i in range(5):
        data = stream.batch(program, arrays, {name: row[i] for name, row in rows.items()})
        accuracy = []
        for moment in ("before", "after"):
            logits, _, _ = vit(program, split_layers(engine.state("a")["params"]), data["images"])
            accuracy.append((logits.argmax(-1) == data["labels"]).double().mean().item())
            if moment == "before":
                curves = engine.advance(1)
        assert [curves["train_acc"][0, 0], curves["train_acc_after"][0, 0]] == pytest.approx(accuracy, abs=1e-12)


def test_covariates_are_those_asked_for_and_do_not_change_the_run(cache_dir):
    tiny = {"depth": 2, "hidden": 6, "patch": 4, "batch": 28, "precision": "float64"}
    values = {**tiny, "algorithm": "cbp", "reset_freq": 0.05, "cbp_age": 4.0}
    plain, hyper = build(**values)
    full, _ = build(**values, covariates=("ages", "resets", "entropy", "norms", "dead"))
    assert config_key("ci_vit", plain, hyper) == config_key("ci_vit", full, hyper)
    assert program_key("ci_vit", plain) != program_key("ci_vit", full)
    states = []
    for program in (plain, full):
        engine = StackedEngine(FAMILY, program, arrays_of(FAMILY, program, cache_dir))
        engine.insert("a", hyper, 0)
        curves = engine.advance(10)
        states.append(engine.state("a"))
    assert FAMILY.inspect(plain, states[0], hyper_tensors(plain, hyper, "cpu")) == {}
    for name, value in states[0]["params"].items():
        assert torch.equal(value, states[1]["params"][name])
    found = engine.inspect(["a"])["a"]
    assert found["ages"].shape == found["resets"].shape == (2, 24)
    per_layer = np.stack([curves[f"resets/{layer}"][:, 0] for layer in range(2)])
    np.testing.assert_array_equal(found["resets"].sum(-1), per_layer.sum(-1))
    np.testing.assert_array_equal(per_layer.sum(0), curves["resets"][:, 0])
    assert per_layer.sum() > 0
    np.testing.assert_array_equal(found["dead"], (found["ages"] >= 10).sum(-1))
    for layer, leaves in enumerate(states[1]["params"]["qkv/kernel"]):
        assert found["norm/qkv"][layer] == pytest.approx(np.linalg.norm(leaves.numpy()), rel=1e-12)
    assert found["norm/head"] == pytest.approx(np.linalg.norm(states[1]["params"]["head/kernel"].numpy()), rel=1e-12)
    assert found["entropy_mean"][1] == curves["train_entropy_mean/1"][-1, 0]
    assert 0 < found["entropy_mean"][0] <= np.log(5) + 1e-12


def test_fresh_start_begins_every_task_like_a_first_one(cache_dir):
    program, hyper = build(
        depth=1, hidden=6, patch=4, batch=28, tasks=2, epochs_per_task=1, algorithm="shrink_perturb", fresh_start=1
    )
    engine = SerialEngine(FAMILY, program, arrays_of(FAMILY, program, cache_dir))
    engine.insert("a", hyper, 0)
    engine.advance(10)
    trained = engine.state("a")["params"]["qkv/kernel"]
    loss = engine.advance(1)["train_loss"][0, 0]
    after = engine.state("a")
    assert (after["params"]["qkv/kernel"] - trained).abs().max() > 0.1
    moved = after["params"]["ln/scale"] - 1  # one Adam step from the initial 1: lr, whatever the gradient
    assert moved.abs().max().item() == pytest.approx(hyper.lr, rel=1e-2)
    assert loss > 0.5


# --- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"data": "mnist"}, "data 'mnist' is not one of digits, imagenet32"),
        ({"algorithm": "l3"}, "algorithm 'l3'"),
        ({"covariates": ("age",)}, "covariates 'age'"),
        ({"hidden": 10}, "hidden = 10 cannot be split into heads = 3"),
        ({"patch": 3}, "patch = 3 does not divide digits's 8 pixels"),
        ({"batch": 281}, "batch = 281 is more than a task's 280"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"tasks": -1}, "tasks = -1 must not be negative"),
        ({"classes": 11}, "classes = 11"),
        ({"depth": 25}, "depth = 25"),
        ({"train_per_class": 141}, "digits has 140 of each class"),
        ({"test_per_class": 35}, "digits has 34 of each class"),
        ({"pixels": "shuffled"}, "pixels 'shuffled'"),
    ],
)
def test_programs_that_contradict_themselves_are_refused(values, complaint):
    with pytest.raises(BadValue, match=complaint):
        FAMILY.build(values)


def test_presets_are_the_notebook_s_nets():
    for name, width in (("L3", 48), ("L12", 192), ("L12@1e-3", 192)):
        program, hyper = FAMILY.build({**FAMILY.presets[name], "data": "imagenet32"})
        assert program.width == width
        assert FAMILY.schedule(program).steps == 60_000
        assert hyper.lr == {"L3": 1e-3, "L12": 1e-4, "L12@1e-3": 1e-3}[name]


def test_data_table_matches_what_is_bundled():
    from trainables.datasets.digits import load_digits

    counts = np.bincount(load_digits()["labels"])
    assert counts.min() == DATA["digits"].most_train + DATA["digits"].most_test
    assert dataclasses.replace(DATA["digits"], classes=len(counts)) == DATA["digits"]
