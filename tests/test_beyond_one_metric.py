"""The table of one metric: its scores and flips on a model solved by hand, and its rules on made-up tables."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from influence.companion.artifacts.beyond import table_one_metric as one
from influence.companion.artifacts.beyond import table_stability_family
from influence.companion.artifacts.stability import comparison
from influence.companion.images.data import Split
from influence.companion.ledger import reference
from influence.companion.scores.detection import agreement
from influence.companion.zoo import training
from influence.companion.zoo.recipes import RecipeError

CPU = torch.device("cpu")
SLOPES = torch.tensor([0.03, -0.05, 0.02, 0.04])  # of z_0 - z_1 in the four pixels


@pytest.fixture
def linear() -> nn.Module:
    """Two classes whose logits differ by SLOPES . (x - 100)."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([SLOPES, torch.zeros(4)]))
        layer.bias.copy_(torch.tensor([-100 * float(SLOPES.sum()), 0.0]))
    return nn.Sequential(nn.Flatten(), layer).eval()


@pytest.fixture
def split() -> Split:
    """Images in the middle of the range, far enough from its ends for every step that is taken here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 111, (40, 1, 2, 2), generator=generator).to(torch.uint8)
    margins = (images.flatten(1).float() - 100) @ SLOPES
    return Split(images, (margins < 0).long(), torch.arange(40))


def test_flips_and_the_worst_step_of_a_linear_model(linear: nn.Module, split: Split) -> None:
    radii = [1.0, 3.0]
    frame = one.flips(linear, split, sigma=0.0, copies=2, radii=radii, device=CPU)
    margin = ((split.images.flatten(1).double() - 100) @ SLOPES.double()).abs().numpy()
    for radius in radii:  # the ball's worst corner is against the sign of every slope
        reach = radius * float(SLOPES.abs().sum())
        sure = np.abs(margin - reach) > 1e-3
        assert (frame[one.attack(radius)].to_numpy() == (margin < reach))[sure].all()
    assert (frame[one.NOISE] == 0).all()  # no noise, no flip
    after = margin - radii[0] * 2 * float(SLOPES.norm())  # four pixels: the diagonal is twice the half side
    np.testing.assert_allclose(frame[one.WORST], np.log1p(np.exp(-after)), rtol=1e-4)
    p = 1 / (1 + np.exp(-margin))
    np.testing.assert_allclose(frame["lambda_max"], p * (1 - p) * float(SLOPES.square().sum()), rtol=1e-4)
    np.testing.assert_allclose(frame["trace"], frame["lambda_max"], rtol=1e-9)


def test_noise_flips_some_copies(linear: nn.Module, split: Split) -> None:
    frame = one.flips(linear, split, sigma=0.04, copies=8, radii=[1.0], device=CPU)
    assert set(frame[one.NOISE] * 8) <= set(range(9)) and 0 < frame[one.NOISE].mean() < 1
    with pytest.raises(ValueError, match="epsilon"):
        one.flips(linear, split, sigma=0.04, copies=1, radii=[-1.0], device=CPU)


def test_the_loss_keeps_its_digits() -> None:
    logits = torch.tensor([[60.0, 0.0, 1.0], [0.0, 200.0, 1.0]], dtype=torch.float64)
    found = one.loss(logits, torch.tensor([0, 0]))
    assert found[0].item() == pytest.approx(math.exp(-60) + math.exp(-59), rel=1e-12)
    assert found[1].item() == pytest.approx(200.0)


def made(sizes: dict[str, int]) -> dict[str, pd.DataFrame]:
    """Networks of 60 images each: the scores are random, the last image of each is classified wrongly."""
    generator, frames = np.random.default_rng(0), []
    for network, positives in sizes.items():
        frame = pd.DataFrame({score: generator.random(60) for score in one.SCORES}).assign(network=network)
        frame["kind"], frame["label"] = network.partition("-")[0], 0
        frame["predicted"] = (np.arange(60) == 59).astype(int)
        hit = np.arange(60) < positives
        frames.append(frame.assign(**{one.NOISE: hit / 2, "PGD 1/255": ~hit, "wrong": hit}))
    both = pd.concat(frames, ignore_index=True)
    return {"flips": both, "labels": both}


def test_aurocs_of_right_images_and_of_networks_with_enough_of_both() -> None:
    tables = made({"a-0": 20, "a-1": 30, "b-0": 3})
    found = one.aurocs(tables)
    assert set(found["network"]) == {"a-0", "a-1"}  # three positives are too few
    frame = tables["flips"].query("network == 'a-0' and predicted == 0")
    row = found.query("task == 'noise' and network == 'a-0' and score == 'trace'").iloc[0]
    expected = roc_auc_score(frame[one.NOISE] > 0, frame["trace"])
    assert row["images"] == 59 and row["positives"] == 20 and row["auroc"] == pytest.approx(expected)
    assert row["difference"] == pytest.approx(expected - roc_auc_score(frame[one.NOISE] > 0, frame["margin"]))
    assert found.query("task == 'wrong labels'")["images"].eq(60).all()
    table = one.summary(pd.concat([found, found[found["network"] == "a-0"].assign(kind="c", network="c-0")]))
    mean = table.query("task == 'noise' and score == 'trace'").iloc[0]
    of = found.query("task == 'noise' and score == 'trace'")["auroc"]
    assert mean["kinds"] == 2 and mean["auroc"] == pytest.approx((of.mean() + of.iloc[0]) / 2)  # kinds weigh the same
    assert one.aurocs(made({"b-0": 3})).empty


def lost(slope: float, kinds: int) -> pd.DataFrame:
    rank = np.arange(kinds, dtype=float)
    frame = pd.DataFrame({"kind": [f"k{i}" for i in range(kinds)], "network": [f"k{i}-0" for i in range(kinds)]})
    return frame.assign(**dict.fromkeys(one.MEASURES, rank), **{"PGD 1/255": slope * rank})


def outcomes(difference: float, half: float, ranked: pd.DataFrame) -> dict[str, Any]:
    """Of tables in which every score differs so much from what it is measured against."""
    ends = {"difference": difference, "difference_low": difference - half, "difference_high": difference + half}
    tasks = [one.LABELS, one.NOISE, "PGD 1/255"]
    rows = [{"task": task, "score": score, "kinds": 10, **ends} for task in tasks for score in one.SCORES]
    auroc = {"task": "noise", "network": "a", "score": ["exact", "loss"], "auroc": [0.9, 0.9 + abs(difference) * 1e-8]}
    claims = one.claims(pd.DataFrame(auroc), pd.DataFrame(rows), ranked)
    means = [e for item in ("noise_flips_metric", "wrong_labels_worst_direction") for e in claims[item]]  # type: ignore[union-attr]
    assert {(e.n, e.df) for e in means} == {(10, 9)}
    return {c.item: c.outcome for c in reference.compare("beyond/table_one_metric", claims)}


def test_claims_follow_the_rules() -> None:
    up, down = (one.ranks(lost(slope, 10)) for slope in (1.0, -1.0))
    better, worse, open_ = (
        outcomes(0.05, 0.02, up),
        outcomes(-0.05, 0.02, down),
        outcomes(0.0, 0.02, one.ranks(lost(1, 3))),
    )
    flips = ["noise_flips_metric", "noise_flips_worst_direction", "pgd_flips_metric", "pgd_flips_worst_direction"]
    assert {better[item] for item in flips} == {"checked"} and {worse[item] for item in flips} == {"check fails"}
    assert worse["wrong_labels_need_the_label"] == "checked" and better["wrong_labels_need_the_label"] == "check fails"
    assert better["lambda_max_ranks_kinds"] == "supported" and worse["lambda_max_ranks_kinds"] == "contradicted"
    assert {open_[item] for item in (*flips, "lambda_max_ranks_kinds")} == {"undetermined"}
    assert open_["fi_orders_as_the_loss"] == "checked" and better["fi_orders_as_the_loss"] == "checked"
    assert better["error_ranks_kinds"] is None


def test_what_a_network_loses() -> None:
    table = one.networks(made({"a-0": 20})["flips"]).iloc[0]
    assert table["accuracy"] == pytest.approx(59 / 60) and table["error"] == pytest.approx(1 / 60)
    assert table["PGD 1/255"] == pytest.approx(39 / 60)  # 40 flipped, one of them wrong before
    assert list(one.ranks(lost(1.0, 3)).iloc[0][["n", "spearman", "low", "high"]]) == [3, 1, -1, 1]


def test_the_correlation_is_scipys_and_its_bootstrap_that_of_agreement() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(12)
    second = first + 0.3 * generator.random(12)
    value, low, high = one.correlation(first, second)
    expected = agreement(first, second, repeats=300)
    assert value == pytest.approx(expected["spearman"])
    assert low == pytest.approx(expected["spearman_low"], abs=0.15) and high == pytest.approx(1, abs=0.05)
    assert one.correlation(first, np.zeros(12)) == (0, -1, 1)


ARM = {"sigma": 0.04, "alpha": 1.0, "steps": 2, "learning_rate": 0.005}


def asked(name: str) -> Any:
    parameters = {"networks": [name], "detectors": [], "seeds": [0], "images": 1, "label_images": 1}
    parameters |= {"copies": 1, "radii": [1.0], **ARM}
    return SimpleNamespace(parameters=parameters, device=CPU, profile="smoke", add_input=lambda *_: None)


@pytest.mark.parametrize("name", ["no-such-0", "no-such-0+stability", "smoke-resnet50-digits-0+no-such"])
def test_an_unknown_network_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", lambda recipe, *_, **__: training.Trained(nn.Identity(), recipe.name, [], 0.0))
    with pytest.raises(RecipeError, match="no-such"):
        one.compute(asked(name))


def test_a_continued_network_is_that_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", lambda recipe, *_, **__: training.Trained(nn.Identity(), recipe.name, [], 0.0))
    made: list[tuple[str, dict[str, Any]]] = []

    def once(name: str, key: str, model: nn.Module, make: Any, *, recipe: Any, **_: Any) -> training.Trained:
        made.append((key, asdict(recipe)))
        return training.Trained(nn.Flatten(), key, [], 0.0)

    monkeypatch.setattr(training, "made_once", once)
    run = asked("")
    found = one.network(run, "smoke-resnet50-digits-0+stability")
    parameters = {"model": "resnet50", "seeds": [0], **ARM}
    family = SimpleNamespace(parameters=parameters, device=CPU, profile="smoke", add_input=lambda *_: None)
    chosen = {"stability": table_stability_family.arms(parameters)["stability"]}
    ((_, _, trained),) = comparison.networks(family, "digits", chosen, task="")  # type: ignore[arg-type]
    assert found.key == trained.key and made[0] == made[1] and made[0][1]["alpha"] == 1
    assert found.family == "smoke-resnet50-digits+stability" and isinstance(found.model, nn.Flatten)
    assert one.network(run, "smoke-resnet50-digits-0").key == "smoke-resnet50-digits-0"


def test_figures_name_what_they_rest_on() -> None:
    tables = made({"a-0": 20, "a-1": 30, "b-0": 25})
    figure = one.draw(one.summary(one.aurocs(tables)))
    assert [axes.get_title() for axes in figure.axes][1] == "flips by noise\n3 networks of 2 kinds,\n59 images each"
    table = one.networks(tables["flips"])
    figure = one.draw_ranks(table, one.ranks(table))
    assert "n = 2 kinds" in figure.axes[0].get_title() and len(figure.axes[0].collections) == 2
    continued = table.assign(kind=["a", "a+stability", "b"])
    first, second, _ = one.draw_ranks(continued, one.ranks(continued)).axes[0].collections
    assert second.get_label() == "a + stability" and not len(second.get_facecolor())
    np.testing.assert_array_equal(first.get_edgecolor(), second.get_edgecolor())


def test_what_the_continued_networks_change() -> None:
    tables = made({"a-0": 20, "b-0": 25, "a+stability-0": 30})
    tables = {name: frame.assign(kind=frame["network"].str[:-2]) for name, frame in tables.items()}
    table = one.with_and_without(tables).set_index(["claim", "of"])
    row = table.loc[("noise_flips_worst_direction", "noise, worst_direction")]
    found = one.aurocs(tables).query("task == 'noise' and score == 'worst_direction'")
    found = found.set_index("network")["difference"]
    assert (row["n"], row["without_n"]) == (3, 2) and row["value"] == pytest.approx(found.mean())
    assert row["without_value"] == pytest.approx(found[["a-0", "b-0"]].mean())
