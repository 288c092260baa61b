"""vgg_decay's decay rates, topographic multipliers and what it measures, against closed forms and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lanes.engine import put
from lanes.serial import SerialEngine
from tests.vgg_decay_reference import assert_equal, build, specific_sgd, train_both, var_rates
from trainables import draws
from trainables.draws import counter
from trainables.family import hyper_tensors
from trainables.vgg_decay import FAMILY, decay, measures
from trainables.vgg_decay.augment import augmented
from trainables.vgg_decay.program import layers

# wd = base * fan_in / 2 * dup^-pools at base 1.6e-4, as printed in the original's logs (two or three digits)
TABLES = {
    1.0: (0.0022, 0.023, 0.023, 0.046, 0.046, 0.092, 0.092, 0.184, 0.184, 0.184, 0.0205, 0.0205),
    2.0: (0.0022, 0.023, 0.0115, 0.023, 0.0115, 0.023, 0.0115, 0.023, 0.0115, 0.0115, 6.4e-4, 6.4e-4),
    4.0: (0.0022, 0.023, 0.0058, 0.0115, 0.0029, 0.0058, 0.0014, 0.0029, 7.2e-4, 7.2e-4, 2e-5, 2e-5),
}


@pytest.fixture(scope="module")
def notebook():
    program, hyper = FAMILY.build({**FAMILY.presets["dxp4"], "precision": "float64"})
    tensors = hyper_tensors(program, hyper, "cpu")
    return program, tensors, FAMILY.init(program, tensors, counter(0))


def rates_of(notebook, variance, **changes):
    program, tensors, _ = notebook
    changed = {**tensors, **{name: torch.tensor(value, dtype=torch.float64) for name, value in changes.items()}}
    return [rate.item() for rate in decay.rates(program, changed, variance).values()]


@pytest.mark.parametrize("dup", TABLES)
def test_rates_equal_the_published_tables(notebook, dup):
    program, _, state = notebook
    exact = torch.tensor([2 / layer.fan_in for layer in layers(program)], dtype=torch.float64)
    table = rates_of(notebook, exact, dup_mult=dup)
    np.testing.assert_allclose(table, TABLES[dup], rtol=0.04)
    closed = [1.6e-4 * layer.fan_in / 2 * dup**-layer.pools for layer in layers(program)]
    np.testing.assert_allclose(table, closed, rtol=1e-12)
    # a run takes the sample variance of its own initial weights: close to it (the first layer has 864 weights)
    np.testing.assert_allclose(rates_of(notebook, state["init_variance"], dup_mult=dup), closed, rtol=0.2)
    assert rates_of(notebook, state["init_variance"], dup_mult=dup) != pytest.approx(closed, rel=1e-6)


def test_factors_reach_their_layers_only(notebook):
    _, _, state = notebook
    plain = np.array(rates_of(notebook, state["init_variance"]))

    def factors(**changes):
        return (np.array(rates_of(notebook, state["init_variance"], **changes)) / plain).round(9).tolist()

    assert factors(last1_mult=10.0) == [1.0] * 11 + [10.0]
    assert factors(last2_mult=0.1) == [1.0] * 10 + [0.1, 0.1]
    assert factors(last1_mult=10.0, last2_mult=3.0) == [1.0] * 10 + [3.0, 30.0]
    assert factors(stage2_mult=2.0, stage5_mult=0.5) == [1, 1, 2, 2, 1, 1, 1, 1, 0.5, 0.5, 1, 1]
    assert rates_of(notebook, state["init_variance"], logit_wd=0.0, last1_mult=10.0)[-1] == 0.0
    assert rates_of(notebook, state["init_variance"], wd=0.0, logit_wd=0.06)[-2:] == [0.0, 0.06]
    flat = rates_of(notebook, state["init_variance"], wd=0.016, inverse_variance=0.0, dup_mult=1.0)
    assert flat == pytest.approx([0.016] * 12)
    half = rates_of(notebook, state["init_variance"], inverse_variance=0.5, dup_mult=1.0)
    assert half[3] == pytest.approx(1.6e-4 / math.sqrt(state["init_variance"][3].item()))


def test_ixp2_logit_rate_is_near_the_logged_one(notebook):
    _, _, state = notebook
    assert rates_of(notebook, state["init_variance"], last1_mult=10.0)[-1] == pytest.approx(6.3e-3, rel=0.1)


def test_bn_and_bias_decay_are_apart():
    program, _, tensors = build(wd=0.1)
    variance = torch.ones(len(layers(program)), dtype=torch.float64)
    for bn, bias in ((0.0, 1.0), (1.0, 0.0)):
        hyper = {**tensors, "bn_decay": torch.tensor(bn), "bias_decay": torch.tensor(bias)}
        table = decay.coefficients(program, hyper, variance)
        found = {name: decay.term(table[name], torch.ones(3)).mean().item() for name in layers(program)[0].tensors}
        expected = (0.1, 0.1 * bias, 0.1 * bn, 0.1 * bn)
        assert tuple(found.values()) == pytest.approx(expected)


# --- topographic ----------------------------------------------------------------------------------------------------


def plain_distances(outputs, inputs):
    """compute_i_to_coord and get_topographic_decay_multiplier, as the original loops."""

    def coordinate(i, units):
        cell = i // math.ceil(units / 9)
        return cell % 3, cell // 3

    return [
        [math.floor(math.dist(coordinate(i, outputs), coordinate(j, inputs))) for j in range(inputs)]
        for i in range(outputs)
    ]


@pytest.mark.parametrize(("outputs", "inputs"), [(256, 256), (32, 10), (10, 7)])
def test_topographic_distances_follow_the_original_loops(outputs, inputs):
    found = decay.distances(outputs, inputs, torch.device("cpu"))
    assert found.tolist() == plain_distances(outputs, inputs)


def test_topographic_pairs_and_mean_multiplier():
    apart = decay.distances(256, 256, torch.device("cpu"))
    fractions = [(apart == i).double().mean().item() for i in range(3)]
    assert fractions == pytest.approx([0.111, 0.5, 0.389], abs=2e-3)
    for base, mean in ((1.5, 1.74), (2.0, 2.67), (6.0, 17.2)):
        assert sum(f * base**i for i, f in enumerate(fractions)) == pytest.approx(mean, rel=0.01)


TOPO = {"wd": 1e-2, "inverse_variance": 1.0, "dup_mult": 2.0, "last1_mult": 10.0}


@pytest.mark.parametrize("where", ["a", "b", "ab"])
@pytest.mark.parametrize("coded", [0.0, 1.0])
def test_topographic_decay_follows_the_original_loop(where, coded):
    """The original's multiplier list has three entries for four parameters, and zip leaves beta out."""
    names = [name for letter, name in (("a", "fc6"), ("b", "conv2_2")) if letter in where]

    def update(net, step, memory):
        mults = {}
        for name in names:
            grid = torch.tensor(plain_distances(10, 10), dtype=torch.float64)[:, :, None, None]
            mults[name] = [3.0**grid, None, None] + [None] * (not coded)
        specific_sgd(net, memory, 0.1, var_rates(net, memory, 1e-2, 2.0, last1=10.0), mults=mults)

    flags = {"topo_a": float("a" in where), "topo_b": float("b" in where)}
    state, net, _, _ = train_both(6, update, topo_base=3.0, topo_frozen_beta=coded, **flags, **TOPO)
    assert_equal(state, net)
    for name in ("fc6", "conv2_2"):
        assert bool(state["params"][f"{name}.beta"].any()) == (name not in names or not coded)


def trained(**values):
    program, hyper, _ = build(**{**TOPO, **values})
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, None), "cpu"))
    engine.insert("me", hyper, 4)
    for _ in range(4):
        engine.advance(3)
    return engine.state("me")


def test_base_one_is_no_topographic_decay_once_mended():
    without, mended = trained(), trained(topo_a=1.0, topo_b=1.0, topo_base=1.0)
    coded = trained(topo_a=1.0, topo_base=1.0, topo_frozen_beta=1.0)
    for name, value in without["params"].items():
        torch.testing.assert_close(mended["params"][name], value, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(coded["params"]["fc6.beta"], without["params"]["fc6.beta"])
    assert not torch.allclose(trained(topo_a=1.0)["params"]["fc6.weight"], without["params"]["fc6.weight"])


def test_uniform_control_decays_by_the_mean_multiplier():
    program, _, tensors = build(topo_a=1.0, topo_base=2.0, topo_uniform=1.0)
    multiplier = decay.topo_multiplier(tensors, tensors["topo_a"], layers(program)[-2], torch.device("cpu"))
    expected = np.mean([2.0**d for row in plain_distances(10, 10) for d in row])
    assert multiplier.unique().tolist() == pytest.approx([expected])


# --- measures -------------------------------------------------------------------------------------------------------


def test_dead_units_of_a_net_made_by_hand():
    program, _, tensors = build()
    state = FAMILY.init(program, tensors, counter(0))
    # conv2_1 reads conv1_2's three units: one silenced, one nearly; fc6 reads ten, two of them at 1e-12
    state["params"]["conv2_1.weight"][:, 0] = 0.0
    state["params"]["conv2_1.weight"][:, 1] = 2e-6
    state["params"]["fc6.weight"][:, 3:5] = -1e-12
    per_layer = {
        limit: dict(
            zip(
                (s.name for s in layers(program)), measures.dead_per_layer(program, state["params"], limit), strict=True
            )
        )
        for limit in (1e-20, 1e-9, 1e-5)
    }
    assert [int(per_layer[limit]["conv2_1"]) for limit in (1e-20, 1e-9, 1e-5)] == [1, 1, 2]
    assert [int(per_layer[limit]["fc6"]) for limit in (1e-20, 1e-9, 1e-5)] == [0, 2, 2]
    found = {name: int(value) for name, value in measures.weight_measures(program, state).items()}
    assert found == {"dead_units_1e20": 1, "dead_units": 3, "dead_units_1e5": 4}


def test_a_silenced_unit_decays_until_it_counts_as_dead():
    """Gamma and beta 0: nothing passes and no gradient returns, so decay alone shrinks what reads the unit."""
    program, hyper, _ = build(wd=9.0, stage1_mult=0.0, last2_mult=0.0, bn_decay=0.0)
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, None), "cpu"))
    engine.insert("first", hyper, 4)
    state = engine.state("first")
    engine.remove(["first"])
    for kind in ("gamma", "beta"):
        state["params"][f"conv1_2.{kind}"][1] = 0.0
    engine.insert("me", hyper, 4, state=state)
    size = state["params"]["conv2_1.weight"][:, 1].abs().mean().item()
    counts = []
    for i in range(1, 6):
        engine.advance(3)
        per_layer = engine.inspect(["me"])["me"]["dead_units"]  # below 1e-20, 1e-9, 1e-5
        counts.append(per_layer[:, 2].tolist())
        assert counts[-1] == [int(size * 0.1 ** (3 * i) < limit) for limit in (1e-20, 1e-9, 1e-5)]
        total = engine.evaluate(["me"])["me"]
        assert [total[n] for n in ("dead_units_1e20", "dead_units", "dead_units_1e5")] == per_layer.sum(1).tolist()
    assert counts[0] == [0, 0, 0]
    assert counts[-1] == [0, 1, 1]


def test_inspected_norms_are_those_of_the_last_step():
    program, hyper, tensors = build(**TOPO)
    engine = SerialEngine(FAMILY, program, put(FAMILY.load(program, None, None), "cpu"))
    engine.insert("me", hyper, 4)
    engine.advance(2)
    before = engine.state("me")
    ratio = engine.advance(1)["update_ratio"][0, 0]
    after, found = engine.state("me"), engine.inspect(["me"])["me"]
    names = [f"{layer.name}.weight" for layer in layers(program)]
    update = [(after["params"][n] - before["params"][n]).norm().item() for n in names]
    weight = [before["params"][n].norm().item() for n in names]
    np.testing.assert_allclose(found["update_norm"], update, rtol=1e-12)
    np.testing.assert_allclose(found["update_ratio"], np.divide(update, weight), rtol=1e-12)
    np.testing.assert_allclose(found["weight_norm"], [after["params"][n].norm().item() for n in names], rtol=1e-12)
    rates = [rate.item() for rate in decay.rates(program, tensors, before["init_variance"]).values()]
    np.testing.assert_allclose(found["decay_norm"], np.multiply(rates, weight), rtol=1e-12)
    # plain SGD: update = -lr (g + c), so |update|^2 / lr^2 = |g|^2 + |c|^2 + 2 c.g
    inner = found["gradient_on_decay"] * (found["decay_norm"] + 1e-8)
    expected = found["gradient_norm"] ** 2 + found["decay_norm"] ** 2 + 2 * inner
    np.testing.assert_allclose(np.array(update) ** 2 / 0.01, expected, rtol=1e-9)
    np.testing.assert_allclose(found["effective_lr"], 0.1 / found["weight_norm"] ** 2, rtol=1e-12)
    whole = [sum((value - before["params"][n]).norm().item() ** 2 for n, value in after["params"].items())]
    whole.append(sum(value.norm().item() ** 2 for value in before["params"].values()))
    assert ratio == pytest.approx(math.sqrt(whole[0] / whole[1]))


def test_grouping_tells_a_grouped_layer_from_a_random_one():
    program, _, tensors = build(widths=(4, 18), covariates=("grouping",))
    state = FAMILY.init(program, tensors, counter(1))
    hidden = {name: torch.randn(50, 2, 2, 18, dtype=torch.float64).abs() for name in ("conv2_2", "fc6")}
    real = torch.arange(50) < 40
    random = measures.grouping(program, state, hidden, real)
    apart = torch.tensor(plain_distances(18, 18), dtype=torch.float64)
    state["params"]["fc6.weight"] = (10.0**-apart)[:, :, None, None]
    hidden["fc6"][..., 1::2] = hidden["fc6"][..., ::2]  # two units a cell
    hidden["fc6"][40:] = 1e6  # padding
    grouped = measures.grouping(program, state, hidden, real)
    sums = [float((10.0**-apart)[apart == i].sum()) for i in range(3)]
    assert grouped["fc6_share"].item() == pytest.approx(sums[0] / sum(sums))
    assert grouped["fc6_share_permuted"] < 0.5 * grouped["fc6_share"]
    assert grouped["fc6_correlation"].item() == pytest.approx(1.0, abs=0.1)
    assert grouped["fc6_similarity"] > 0.3
    assert random["fc6_share"].item() == pytest.approx(1 / 9, abs=0.03)
    assert abs(random["fc6_correlation"]) < 0.1
    assert grouped["conv_last_share"] == random["conv_last_share"]


# --- augmentation ---------------------------------------------------------------------------------------------------


def views(count=64, **values):
    program, _, tensors = build(**values)
    images = torch.arange(count * 64, dtype=torch.int64).reshape(count, 1, 8, 8) % 17
    return program, images, augmented(program, tensors, counter(5), counter(9), images.to(torch.uint8)), tensors


def normal(images):
    return (images.double() - 0.3053 * 16) / (0.3760 * 16)


def test_no_augmentation_is_normalisation():
    _, images, seen, _ = views(flip=0.0)
    torch.testing.assert_close(seen, normal(images))


@pytest.mark.parametrize("padding", ["reflect", "mean"])
def test_views_follow_a_plain_loop(padding):
    """Mirror, shift, cut out, one example at a time with NumPy's own padding."""
    _, images, seen, _ = views(flip=0.5, translate=2.0, cutout=3.0, padding=padding)
    seed, step, shape = counter(5), counter(9), (64, 1)

    def drawn(purpose, count):
        return (draws.uniform(seed, step, purpose, shape, torch.float64) * count).floor().int()[:, 0].tolist()

    mirrored = draws.bernoulli(seed, step, "flip", torch.tensor(0.5, dtype=torch.float64), shape)[:, 0].tolist()
    down, right = drawn("shift/rows", 5), drawn("shift/columns", 5)
    row, column = drawn("cutout/rows", 8), drawn("cutout/columns", 8)
    assert set(down) == set(right) == set(range(5))
    assert 20 < sum(mirrored) < 44
    for i in range(64):
        image = normal(images[i, 0]).numpy()
        image = image[:, ::-1] if mirrored[i] else image
        padded = np.pad(image, 2, mode="reflect") if padding == "reflect" else np.pad(image, 2)
        view = padded[down[i] : down[i] + 8, right[i] : right[i] + 8].copy()
        view[max(0, row[i] - 1) : row[i] + 2, max(0, column[i] - 1) : column[i] + 2] = 0
        np.testing.assert_allclose(seen[i, 0].numpy(), view, rtol=1e-12, atol=1e-12, err_msg=str(i))


def test_digits_are_magnified_where_the_net_has_more_pools():
    program, _, _ = build(widths=(2, 2, 2, 2, 2))
    small, _, _ = build(widths=(2, 2, 2))
    big = FAMILY.load(program, None, None)["train_images"]
    assert big.shape == (40, 32, 32, 1)
    assert np.array_equal(big[:, ::4, ::4], FAMILY.load(small, None, None)["train_images"])
    assert np.array_equal(big[:, 3::4, 3::4], big[:, ::4, ::4])


@pytest.mark.heavy
def test_cifar10_reaches_the_net(data_dir, cache_dir):
    """Real images through the notebook's geometry: the short last batch of 80, and a loss that falls."""
    values = {**FAMILY.presets["ixp2"], "widths": (4, 4, 8, 8, 8), "train_images": 976, "test_images": 500, "epochs": 9}
    values |= {"lr": 0.05, "halve_every": 3.0}
    program, hyper = FAMILY.build(values)
    arrays = put(FAMILY.load(program, data_dir, cache_dir), "cpu")
    engine = SerialEngine(FAMILY, program, arrays)
    engine.insert("me", hyper, 0)
    losses = [engine.advance(8)["train_loss"].mean() for _ in range(9)]
    assert losses[-1] < losses[0] - 0.2
    assert engine.evaluate(["me"])["me"]["test_acc"] > 0.13
