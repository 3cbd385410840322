"""Setups 2 and 4, units and the practitioner's table, on small networks and made-up tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from sklearn.metrics import roc_auc_score
from torch import nn

import influence
from influence.companion import style
from influence.companion.artifacts import common
from influence.companion.artifacts.common import Subject, bound
from influence.companion.artifacts.sensitivity import (
    fig_layers,
    fig_outlier_simulation,
    fig_vulnerable_areas,
    fig_what_fi_measures,
)
from influence.companion.images import data
from influence.companion.ledger import reference
from influence.companion.scores import detection, imagewise, layerwise, pixelwise
from influence.companion.zoo import pretrained, training
from truth import influence as brute_force
from truth import input_jacobian


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(384, 24), nn.Tanh(), nn.Linear(24, 10)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        net[0].weight.mul_(0.02)
    return net


@pytest.fixture(scope="module")
def digits() -> data.Split:
    return data.load("digits").test.sample(6)


def test_an_estimate_over_seeds_has_the_wider_interval() -> None:
    found = pd.DataFrame({"a": [0.59, 0.6, 0.61], "a_low": [0.3, 0.4, 0.5], "a_high": [0.7, 0.8, 0.9], "images": 9})
    one = common.over_seeds(found[:1].assign(a=0.5), "a", of="a")
    assert one == reference.Estimate(0.5, 0.3, 0.7, 9, "a")
    alike = common.over_seeds(found, "a")
    assert (alike.low, alike.high, alike.n, alike.df) == pytest.approx((0.4, 0.8, 9, None))
    apart = common.over_seeds(found.assign(a=[0.4, 0.6, 0.8]), "a")
    half = 4.302653 * 0.2 / 3**0.5
    assert (apart.low, apart.high, apart.n, apart.df) == pytest.approx((0.6 - half, 0.6 + half, 3, 2))


def test_all_parameters_are_the_sum_of_the_layers(digits: data.Split) -> None:
    x = digits.images.float()
    both = layerwise.with_all(influence.metric_tensor(network(), x, wrt="layers"))
    whole = influence.metric_tensor(network(), x, wrt="parameters")
    assert both.blocks[0] == layerwise.ALL and int(both.dims[0]) == int(whole.dims[0])
    torch.testing.assert_close(both.trace()[:, 0], whole.trace()[:, 0], rtol=1e-5, atol=0)


def test_full_rank_layers_agree_per_image(digits: data.Split) -> None:
    frame = layerwise.score_layers(network(), digits, epsilon=1e-3)
    full = frame[frame["rank"] == 9]
    assert set(full["number"]) == {0, 1, 2, 3}  # all parameters, and each of the three layers
    whole = full[full["number"] == 0].set_index("image")["exact"]
    assert (full["exact"] / full["image"].map(whole) - 1).abs().max() <= 1e-6
    assert (full["exact"] / full["ceiling"] - 1).abs().max() <= 1e-6
    assert full["effective_rank"].between(1, 9).all()
    table = fig_layers.summary(frame)
    assert table["number"].tolist() == [0, 1, 2, 3] and (table["gap_to_all"] <= 1e-6).all()


def test_layers_from_the_definition_and_the_claims(digits: data.Split) -> None:
    whole = data.Dataset("digits", tuple("0123456789"), digits, digits, digits)
    subject = Subject(training.Trained(network(), "", [], 0.0), whole, "resnet50", 0)
    definition = fig_layers.by_definition(subject, images=2, layers=3, device=torch.device("cpu"))
    assert definition["layer"].unique().tolist() == ["0", "3", "5"] and len(definition) == 6
    np.testing.assert_allclose(definition["by_definition"], definition["exact"], rtol=1e-6)
    frame = layerwise.score_layers(network(), digits, epsilon=1e-3)
    tables = {"layers": fig_layers.summary(frame).assign(**subject.columns, type="dense"), "definition": definition}
    tables["rounded"] = layerwise.rounding_scores(network(), digits, bits=4).assign(**subject.columns)
    claims = fig_layers.claims(tables)
    assert claims["full_rank_layers_agree"] and claims["layers_differ_in_exact_fi"].high == 0
    lower = tables["layers"].assign(
        released_share=0.9, released_share_low=0.8, released_share_high=[1.0, 1.0, 0.95, 0.95]
    )
    (share,) = [fig_layers.claims(tables | {"layers": lower})["layers_differ_in_released_fi"]]
    assert (share.value, share.low, share.high) == (1, pytest.approx(2 / 3), 1)
    assert claims["digits_resnet50_largest_released_all"] == frame.loc[frame["number"] == 0, "released"].max()
    released = frame.loc[frame["number"] > 0, ["number", "layer", "image", "released"]].assign(**subject.columns)
    full, zoomed = fig_layers.draw_by_layer(released).axes
    assert sum(len(line.get_xdata()) for line in full.lines) == 3 * len(digits)
    assert zoomed.get_ylim()[1] <= full.get_ylim()[1]


def test_rounded_layers(digits: data.Split) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coarse = layerwise.rounding_scores(model, digits, bits=2)
    assert coarse["layer"].tolist() == ["0", "3", "5"] and coarse["changed"].max() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Three values: nothing, and the largest weight with either sign.
    values = layerwise.rounded(model[5].weight.detach(), 2)
    assert set((values / model[5].weight.abs().max()).unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(layerwise.rounded(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    # Of fine steps the divergence is half the variance, under P, of the change of the logits to first order.
    fine, x = layerwise.rounding_scores(model, digits, bits=9).set_index("layer"), digits.images.float()
    for layer, row in fine.iterrows():
        weight = model.get_submodule(str(layer)).weight.detach()
        delta = layerwise.rounded(weight, 9) - weight
        assert row["error"] == pytest.approx(float(delta.double().square().mean()), rel=1e-6)
        name = f"{layer}.weight"
        logits, change = torch.func.jvp(
            lambda w, name=name: torch.func.functional_call(model, {name: w}, (x,)), (weight,), (delta,)
        )
        p, change = logits.double().softmax(1), change.double()
        second = ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean() / 2
        assert row["divergence"] == pytest.approx(float(second.detach()), rel=0.05), layer


def test_the_trace_orders_rounded_layers_where_it_does(digits: data.Split) -> None:
    of = {"dataset": "digits", "model": "resnet50", "seed": 0}
    layer = [str(i) for i in range(40)]
    numbers = np.random.default_rng(0).permutation(40) + 1.0
    layers = pd.DataFrame({"layer": layer, "number": range(40), "type": "dense", "size": 10, "trace": numbers, **of})
    layers = layers.assign(size=numbers[::-1], released_share=1 + 1e-3 * np.random.default_rng(1).random(40))
    rounded = pd.DataFrame({"layer": layer, "error": 2.0, "divergence": numbers**2, **of})
    found = fig_layers.by_rounding({"layers": layers, "rounded": rounded})
    assert (found["predicted"] == numbers).all()
    gained = fig_layers._order_gained(found, "size", "a network")
    expected = 1 - found["size"].corr(found["divergence"], method="spearman")
    assert gained.value == pytest.approx(expected) and gained.low > 0 and gained.n == 40
    assert fig_layers._order_gained(found.assign(size=numbers), "size", "").value == pytest.approx(0, abs=1e-12)
    assert len(fig_layers.draw_rounded(found).axes) == 3


def test_patches_of_nine_values_are_flat_by_definition_too(digits: data.Split) -> None:
    model, x = network().double(), digits.images[:1].double()
    frame = pixelwise.patch_maps(network(), digits.take([0]), 1e-3, torch.device("cpu"))
    flat = fig_vulnerable_areas.flatness(frame.assign(kind="correct"), 10).set_index("size")
    assert (flat.loc[[3, 5, 7], "spread"] <= 1e-6).all() and flat.loc[7, "full_rank_share"] == 1
    assert flat.loc[1, "full_rank_share"] == 0 and flat.loc[1, "alignment_low"] < 0.9
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z)[0], x)[:, 0, 0]
    logits = model(x)[0].detach()
    y = int(logits.argmax())
    for size, row, column in ((3, 3, 4), (5, 2, 2), (1, 5, 5)):
        half = size // 2
        window = jacobian[:, row - half : row + half + 1, column - half : column + half + 1].reshape(10, -1)
        expected = brute_force(logits, window, y)[0]
        at = (frame["size"] == size) & (frame["row"] == row) & (frame["column"] == column)
        assert frame.loc[at, "exact"].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_patches_of_a_trained_network_are_flat_where_their_rank_is_nine(name: str, data_dir: Path) -> None:
    """FI from the singular values of L0 in float64, on real images, against the ceiling and against the package."""
    if not (file := data_dir / "checkpoints" / pretrained.SOURCES[name].file).is_file():
        pytest.skip(f"INFLUENCE_DATA has no {file.name}")
    model = pretrained.load(name, data_dir)[0].double()
    sample = data.load("cifar10", data_dir).test.sample(32).images.double()
    with torch.no_grad():
        images = sample[model(sample).softmax(1).amax(1).argsort()[::8]]  # from unsure to sure
    # Centres at 0, 5, ..., 30: the border clips the patches of the first row and column, and no others.
    metric = influence.metric_tensor(model, images, wrt=influence.Patches((1, 3), stride=5))
    ours = influence.first_order_influence(metric)
    assert sorted(set(metric.dims.tolist())) == [1, 4, 6, 9]
    single_shares = []
    for n, image in enumerate(images):
        logits, jacobian = input_jacobian(model, image)
        y = int(logits.argmax())
        # The contrasts z_k - z_y have the scores of the logits, and keep the digits of s_y where P_y is near 1.
        contrasts = (jacobian - jacobian[y]).view(10, *image.shape)
        found = [brute_force(logits, window, y) for window in windows(contrasts, sizes=(1, 3), stride=5)]
        fi, rank = torch.tensor(found, dtype=torch.float64).T
        # None of these patches is degenerate: each has as many directions as values.
        assert torch.equal(rank.long(), metric.dims) and torch.equal(ours.rank[n], metric.dims)
        torch.testing.assert_close(ours.fi[n], fi, rtol=1e-9, atol=0)
        others = torch.cat([logits[:y], logits[y + 1 :]])
        share = fi / (others.logsumexp(0) - logits[y]).exp()  # of the ceiling (1 - P_y) / P_y
        torch.testing.assert_close(share[rank == 9], torch.ones_like(share[rank == 9]), rtol=1e-9, atol=0)
        # A single value falls short of it: FI = s_y^2 / sum_k P_k s_k^2.
        assert share[rank == 1].max() < 1 - 1e-9
        probs, single = logits.softmax(0), contrasts[:, :, ::5, ::5].flatten(1)
        imagewise = single - probs @ single
        torch.testing.assert_close(fi[rank == 1], imagewise[y] ** 2 / (probs @ imagewise**2), rtol=1e-9, atol=0)
        single_shares.append(share[rank == 1])
    # Not by much where two classes share nearly all of P, for then one direction is nearly all there is.
    assert torch.cat(single_shares).min() < 0.1


def windows(jacobian: torch.Tensor, *, sizes: tuple[int, ...], stride: int) -> Iterator[torch.Tensor]:
    """The ``(K, p)`` columns of each patch of odd size, of a Jacobian ``(K, C, H, W)``, in the order of `Patches`."""
    _, channels, height, width = jacobian.shape
    for half in (size // 2 for size in sizes):
        for channel in range(channels):
            for row in range(0, height, stride):
                for column in range(0, width, stride):
                    rows = slice(max(0, row - half), row + half + 1)
                    columns = slice(max(0, column - half), column + half + 1)
                    yield jacobian[:, channel, rows, columns].flatten(1)


def test_masks_of_the_intervention() -> None:
    score = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    score[0, 1, 2:5, 1:4] = 1
    score[0, 0, 0, 0] = 5
    entries = pixelwise.top_entries(score, 10)
    assert int(entries.sum()) == 10 and bool(entries[0, 0, 0, 0]) and bool(entries[0, 1, 2:5, 1:4].all())
    pooled = torch.nn.functional.avg_pool2d(score, 3, stride=1)
    patch = pixelwise._top_patch(pooled, 3)
    assert int(patch.sum()) == 9 and bool(patch[0, 1, 2:5, 1:4].all())
    # The first is alone, the second one of nine.
    assert pixelwise._near_cut(score, 1).tolist() == [False] and pixelwise._near_cut(score, 2).tolist() == [True]


def test_intervention_favours_what_moves_the_output(digits: data.Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():  # one pixel decides: class 0 where it is bright, else class 1
        model[1].weight.zero_()
        model[1].weight[0, 5] = 0.05
        model[1].bias.copy_(5.0 * (torch.arange(10) == 1))
    frame = pixelwise.intervene(model, digits, (1,), 3, 1e-3, 0, torch.device("cpu"))
    some = pixelwise.intervene(model, digits, (1,), 3, 1e-3, 0, torch.device("cpu"), only=[1, 4])
    assert_frame_equal(some, frame[frame["image"].isin(some["image"])].reset_index(drop=True))
    table = fig_vulnerable_areas.intervention_table(frame.assign(dataset="digits", model="resnet50", seed=0))
    rows = table[(table["target"] == "entries") & (table["change"] == "farther")].set_index("ranking")
    assert rows.loc["saliency", "drop"] == rows.loc["trace", "drop"] > rows.loc["random", "drop"]
    assert (table["images"] == 6).all() and rows.loc["random", "beyond_random"] == 0
    assert len(fig_vulnerable_areas.draw_intervention(table).axes) == 3
    step = table[(table["target"] == "entries") & (table["change"] == "step 32")].set_index("ranking")
    assert step.loc["saliency", "drop"] > max(0, step.loc["random", "drop"])  # 32 levels downhill
    flat = pd.DataFrame({"size": [1, 3], "spread": [np.nan, 1e-9]})
    claims = fig_vulnerable_areas.claims(table, flat)
    (found,) = claims["fi_finds_vulnerable_pixels"]
    columns = ["beyond_random", "beyond_random_low", "beyond_random_high"]
    assert [found.value, found.low, found.high] == rows.loc["released", columns].tolist()
    assert found.of == "digits resnet50, 1 value" and found.n == 6 and found.low > 0
    assert claims["patches_of_full_rank_are_flat"] and not claims["saliency_finds_more_than_fi"]


def test_images_of_vulnerable_areas(digits: data.Split) -> None:
    model, whole = network(), data.Dataset("digits", tuple("0123456789"), digits, digits, digits)
    subject = Subject(training.Trained(model, "", [], 0.0), whole, "resnet50", 0)
    chosen = pd.DataFrame({"kind": ["correct", "wrong"], "row": [4, 1], "label": 3, "predicted": [3, 8]})
    frame = pixelwise.patch_maps(model, digits.take([4, 1]), 1e-3, torch.device("cpu"))
    frame = frame.assign(kind=frame["place"].map({0: "correct", 1: "wrong"})).drop(columns="place")
    shown = fig_vulnerable_areas.pictures(SimpleNamespace(device="cpu"), subject, chosen.assign(p_predicted=1), frame)
    for i, (row, place) in enumerate(((4, "correct"), (1, "wrong"))):
        image, found = digits.images[row], shown.iloc[i]
        single = frame[(frame["kind"] == place) & (frame["size"] == 1)].set_index(["row", "column"])["exact"]
        assert (found["pixel_row"], found["pixel_column"]) == single.idxmax() and found["pixel_fi"] == single.max()
        changed = image.clone()
        changed[:, found["pixel_row"], found["pixel_column"]] = int(found["pixel_value"])
        p = model(changed[None].float()).softmax(1)[0, chosen["predicted"][i]]
        assert found["p_changed"] == pytest.approx(float(p.detach()), rel=1e-5)
    tables = {"pictures": shown.assign(**subject.columns), "maps": frame.assign(**subject.columns)}
    figures = fig_vulnerable_areas.draw_shown(tables)
    assert list(figures) == ["correct_exact", "correct_alignment", "wrong_exact", "wrong_alignment"]
    titles = [axes.get_title() for axes in figures["wrong_exact"].axes]
    assert titles[:4] == ["1x1", "3x3", "5x5", "7x7"] and titles[4].startswith("true 3, predicted 8")
    words = [[text.get_text() for text in axes.texts] for axes in figures["wrong_exact"].axes[:4]]
    assert words[0] == [] and all(text.startswith("flat: ceiling ") for text in words[2] + words[3])
    assert [text.get_text() for text in figures["wrong_alignment"].axes[3].texts] == ["flat: 1"]
    before, after = (figures["wrong_exact"].axes[k].images[0].get_array() for k in (4, 5))
    np.testing.assert_array_equal(before, digits.images[1, 0])
    assert (before != after).sum() <= 1


def test_the_advantage_of_a_score_is_paired() -> None:
    generator = np.random.default_rng(0)
    hit = pd.Series(generator.uniform(size=300) < 0.3)
    score = pd.Series(np.round(generator.normal(size=300) + hit, 1))  # with ties
    other = pd.Series(np.where(generator.uniform(size=300) < 0.1, np.inf, score))
    value, low, high = detection.auroc_difference(score, other, hit, repeats=1000)
    pair = [roc_auc_score(hit, x.rank()) for x in (score, other)]
    assert value == pytest.approx(pair[0] - pair[1], abs=1e-12) and low < value < high
    single = detection.detection(score, hit)
    assert high - low < single["auroc_high"] - single["auroc_low"]  # the two scores go up and down together
    assert detection.auroc_difference(score, 2 * score, hit) == (0, 0, 0)


def test_the_simulation_and_its_claims(digits: data.Split) -> None:
    frames = [
        imagewise.all_scores(network(), digits, device="cpu").assign(outlier=o, weight=1.0) for o in (True, False)
    ]
    scores = pd.concat(frames, ignore_index=True).assign(model="resnet50", state="before", seed=0)
    generator = np.random.default_rng(0)
    scores["loss"] = scores["exact"] = generator.normal(size=len(scores))
    scores["jacobian_norm"], scores["released_1e-8"] = generator.normal(size=len(scores)), scores["outlier"] + 0.0
    claims = fig_outlier_simulation.claims(scores)
    (found,) = claims["fi_beats_jacobian_norm"]
    assert found.of == "resnet50" and found.n == len(scores) and 0 < found.low < found.value
    assert set(claims) == {"fi_beats_jacobian_norm", "auroc_of_exact_fi_is_that_of_the_loss"}
    assert claims["auroc_of_exact_fi_is_that_of_the_loss"]
    later = fig_outlier_simulation.claims(pd.concat([scores, scores.assign(state="after")]))
    assert later["fi_beats_jacobian_norm_after"] == later["fi_beats_jacobian_norm"] == [found]
    assert not fig_outlier_simulation.claims(scores.assign(loss=-scores["exact"]))[
        "auroc_of_exact_fi_is_that_of_the_loss"
    ]
    table = fig_outlier_simulation.detection_table(scores)
    assert table["score"].tolist() == list(imagewise.NAMES) and (table["outliers"] == len(digits)).all()
    curves = fig_outlier_simulation.curves(scores)
    drawn_curves = fig_outlier_simulation.draw_curves(curves, table, "before").axes
    assert [len(axes.lines) for axes in drawn_curves] == [4, 4]
    intervals = fig_outlier_simulation.draw_intervals(table)
    chance = [np.asarray(axes.lines[-1].get_xdata()) for axes in intervals.axes]
    np.testing.assert_allclose(chance, [[0.5, 0.5], [1 / 21, 1 / 21]])
    shown = fig_outlier_simulation.examples(digits, "0123456789", count=3).assign(seed=0)
    assert shown["label"].tolist() == [str(int(digits.labels[i])) for i in (0, 2, 5)]
    drawn = fig_outlier_simulation.draw_examples(shown).axes[2].images[0].get_array()
    np.testing.assert_array_equal(drawn, digits.images[5, 0])


def test_exact_fi_does_not_know_the_unit_and_the_jacobian_does(digits: data.Split) -> None:
    metric = influence.metric_tensor(network().double(), digits.images.double())
    other = imagewise.in_unit(metric, 255.0)
    before, after = (influence.first_order_influence(m, digits.labels).fi for m in (metric, other))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.trace(), 255**2 * metric.trace())


def test_the_tasks_take_the_cheapest_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    outlier = pd.DataFrame(
        {
            "score": ["exact", "loss", "trace"],
            "auroc": [0.9, 0.9, 0.6],
            "auroc_low": [0.88, 0.88, 0.5],
            "auroc_high": [0.92, 0.92, 0.7],
        }
    )
    x = np.arange(1.0, 30)
    layer = pd.DataFrame({"trace": x, "released": x[::-1], "exact": 0.3, "alignment": 1.0, "divergence": x**2})
    gap = pd.DataFrame({"measure": ["exact"], "effect": [0.6], "effect_low": [0.5], "effect_high": [0.7]})
    pixels = pd.DataFrame(
        {
            "target": "entries",
            "change": "farther",
            "count": 1,
            "ranking": ["exact", "random"],
            "drop": [0.1, 0.0],
            "drop_low": [0.05, -0.01],
            "drop_high": [0.2, 0.01],
        }
    )
    for name in ("detection_table", "gap"):
        monkeypatch.setattr(fig_what_fi_measures, name, lambda table: table)
    table = fig_what_fi_measures.tasks({"labels": outlier, "layers": layer, "parts": gap, "pixels": pixels})
    used = table[table["use"]].set_index("task")["score"].to_dict()
    assert used == {
        "1 find outliers": "loss",
        "2 compare layers": "trace",
        "3 train against test": "exact",
        "4 find vulnerable pixels": "exact",
    }
    found = table.set_index(["task", "score"])["value"]
    assert found["2 compare layers", "exact"] == 0 and found["2 compare layers", "trace"] == pytest.approx(1)


def test_bound_keeps_the_module() -> None:
    call = bound(layerwise.score_layers, network(), None, epsilon=1e-3)
    assert call.__module__ == "influence.companion.scores.layerwise"


def test_notebooks_show_figures_as_small_pictures() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1])
    assert style.small_png(figure).startswith(b"\x89PNG")


def test_networks_of_others_come_once_beside_those_of_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(common.pretrained, "NAMES", ("theirs-digits",))
    monkeypatch.setattr(common.pretrained, "load", lambda name, folder, device: (model, f"sha256 of {name}"))
    monkeypatch.setattr(common.training, "fit", lambda recipe, whole, device: SimpleNamespace(seed=recipe.seed))
    inputs: dict[str, str] = {}
    run = SimpleNamespace(
        parameters={"datasets": ["digits"], "models": ["resnet50", "theirs"], "seeds": [0, 1]},
        profile="smoke", stem="", device=torch.device("cpu"), add_input=inputs.setdefault,
    )  # fmt: skip
    found = list(common.networks(run))  # type: ignore[arg-type]
    assert [(s.model, s.seed) for s in found] == [("resnet50", 0), ("resnet50", 1), ("theirs", 0)]
    assert found[2].trained.model is model and found[2].trained.key == inputs["theirs-digits"]


def test_logged_pairs_are_the_ceiling_and_another_value_would_show() -> None:
    pairs = fig_what_fi_measures.logged_pairs()
    assert pairs["mnist_densenet121_fi"] == pytest.approx((1 - 0.7040077) / 0.7040077) and len(pairs) == 3
    for factor, outcome in ((1.0, "checked"), (1.02, "check fails")):
        found = {item: factor * value for item, value in pairs.items()}
        compared = reference.compare("sensitivity/fig_what_fi_measures", found)
        assert [c.outcome for c in compared if c.item in pairs] == [outcome] * 3
