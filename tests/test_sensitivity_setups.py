"""Setups 2 and 4, units and the practitioner's table, on small networks and made-up tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import influence
from influence.companion import data, experiments, figures, layerwise, pixelwise
from influence.companion.experiments.keyed import bound
from truth import influence as brute_force


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
    table = experiments.layers.layer_table(frame.assign(dataset="digits", model="resnet50"))
    assert table["number"].tolist() == [0, 1, 2, 3] and (table["gap_to_all"] <= 1e-6).all()


def test_patches_of_nine_values_are_flat_by_definition_too(digits: data.Split) -> None:
    model, x = network().double(), digits.images[:1].double()
    frame = pixelwise.patch_maps(network(), digits.take([0]), 1e-3, torch.device("cpu"))
    flat = experiments.vulnerability.flatness(frame.assign(kind="correct"), 10).set_index("size")
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


def test_masks_of_the_intervention() -> None:
    score = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    score[0, 1, 2:5, 1:4] = 1
    score[0, 0, 0, 0] = 5
    entries = pixelwise._top_entries(score, 10)
    assert int(entries.sum()) == 10 and bool(entries[0, 0, 0, 0]) and bool(entries[0, 1, 2:5, 1:4].all())
    patch = pixelwise._top_patch(score, 3)
    assert int(patch.sum()) == 9 and bool(patch[0, 1, 2:5, 1:4].all())


def test_intervention_favours_what_moves_the_output(digits: data.Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():  # one pixel decides: class 0 where it is bright, else class 1
        model[1].weight.zero_()
        model[1].weight[0, 5] = 0.05
        model[1].bias.copy_(5.0 * (torch.arange(10) == 1))
    frame = pixelwise.intervene(model, digits, (1,), 3, 1e-3, 0, torch.device("cpu"))
    table = experiments.vulnerability.intervention_table(frame.assign(dataset="digits", model="resnet50"))
    rows = table[(table["target"] == "entries") & (table["change"] == "farther")].set_index("ranking")
    assert rows.loc["saliency", "drop"] == rows.loc["trace", "drop"] > rows.loc["random", "drop"]
    assert (table["images"] == 6).all() and rows.loc["random", "beyond_random"] == 0
    assert len(figures.vulnerability.intervention(table).axes) == 2


def test_exact_fi_does_not_know_the_unit_and_the_jacobian_does(digits: data.Split) -> None:
    metric = influence.metric_tensor(network().double(), digits.images.double())
    other = experiments.meaning.scores.in_unit(metric, 255.0)
    before, after = (influence.first_order_influence(m, digits.labels).fi for m in (metric, other))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.trace(), 255**2 * metric.trace())


def test_practice_takes_the_cheapest_of_the_best() -> None:
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
    table = experiments.meaning.practice(outlier=outlier, layer=layer, generalisation=gap, pixels=pixels, classes=10)
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
    assert call.__module__ == "influence.companion.layerwise"


def test_notebooks_show_figures_as_small_pictures() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1])
    assert figures.style.small_png(figure).startswith(b"\x89PNG")
