from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from scipy import special, stats
from torch import nn

from influence.companion.artifacts.common import Subject
from influence.companion.artifacts.sensitivity import fig_outlier_ranking, table_accuracy
from influence.companion.artifacts.stability import comparison, fig_jpeg_quality
from influence.companion.images import data
from influence.companion.images.pictures import unpacked
from influence.companion.ledger import reference
from influence.companion.ledger.reference import Estimate
from influence.companion.scores.definition import influence_by_definition
from influence.companion.zoo import training
from truth import influence as brute_force
from truth import input_jacobian


def test_definition_agrees_with_brute_force_below_full_rank_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()  # p = 3 < K - 1 = 5
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    ours = influence_by_definition(model, x, labels)
    expected = [
        brute_force(*input_jacobian(model, example), int(label))[0] for example, label in zip(x, labels, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_scores_of_setup_1() -> None:
    torch.manual_seed(0)
    digits = data.load("digits").test.sample(70)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        model[1].weight.mul_(0.05)
    scores = fig_outlier_ranking.score_images(model, digits, epsilon=1e-3)
    assert scores["image"].tolist() == digits.index.tolist() and scores["label"].tolist() == digits.labels.tolist()
    with torch.no_grad():
        log_p = model(digits.images.float()).double().log_softmax(1)
    np.testing.assert_allclose(scores["loss"], -log_p.gather(1, digits.labels[:, None])[:, 0], rtol=1e-5)
    np.testing.assert_allclose(scores["ceiling"], np.expm1(scores["loss"]), rtol=1e-9)
    np.testing.assert_allclose(scores["exact"], scores["ceiling"], rtol=1e-6)
    assert (scores["classes"] == 10).all() and (scores["rank"] == 9).all()
    for k in range(10):  # images of class k spread over [k, k + 1)
        x = scores.loc[scores["label"] == k, "position"]
        assert x.min() == k and x.is_monotonic_increasing and x.max() < k + 1


def runs_with(gain: dict[str, float]) -> pd.DataFrame:
    """Three seeds; `gain` of the arm over the control at each distortion, with a little seed noise."""
    rows = []
    for seed in range(3):
        for distortion, value in gain.items():
            rows.append({"seed": seed, "arm": "control", "distortion": distortion, "n": 10, "precision_at_1": 0.6})
            p = 0.6 + value + 0.001 * (seed - 1)
            rows.append({"seed": seed, "arm": "stability 1", "distortion": distortion, "n": 10, "precision_at_1": p})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("gain", "clean", "grows"),
    [
        ({"original": 0.0, "jpeg-50": 0.01, "jpeg-10": 0.05}, "supported", "supported"),
        ({"original": 0.0, "jpeg-50": 0.0, "jpeg-10": 0.001}, "supported", "supported"),
        ({"original": -0.05, "jpeg-50": 0.0, "jpeg-10": 0.05}, "contradicted", "supported"),
        ({"original": -0.009, "jpeg-50": 0.0, "jpeg-10": -0.02}, "undetermined", "contradicted"),
    ],
)
def test_claims_follow_the_rules(gain: dict[str, float], clean: str, grows: str) -> None:
    parameters = {"alphas": [1.0], "qualities": [50, 10], "sigma": 0.04}
    claims = fig_jpeg_quality.claims(runs_with(gain | {"noise-0.04": 0.1}), parameters)
    found = {c.item: c.outcome for c in reference.compare("stability/fig_jpeg_quality", claims)}
    assert found["clean_accuracy_does_not_fall"] == clean and found["gain_grows_as_quality_falls"] == grows
    assert found["improves_under_its_own_noise"] is None and found["clean_accuracy_does_not_fall_strong"] is None
    assert claims["clean_accuracy_does_not_fall"].value == pytest.approx(gain["original"], abs=1e-9)
    growth = gain["jpeg-10"] - gain["original"]
    assert claims["gain_grows_as_quality_falls_strong"].value == pytest.approx(growth, abs=1e-9)
    assert claims["improves_under_its_own_noise"].value == pytest.approx(0.1)
    weak = runs_with({"original": 0.0, "jpeg-50": 0.0, "jpeg-10": 0.5, "noise-0.04": 0.1})
    runs = pd.concat(
        [runs_with(gain | {"noise-0.04": 0.1}).replace("stability 1", f"stability {alpha}") for alpha in ("0.01", "1")]
        + [weak[weak["arm"] != "control"].replace("stability 1", "stability 0.1")],
        ignore_index=True,
    ).drop_duplicates(["seed", "arm", "distortion"])
    between = fig_jpeg_quality.claims(runs, parameters | {"alphas": [0.01, 0.1, 1.0]})
    assert between["gain_grows_as_quality_falls_at_0.1"].value == pytest.approx(0.5)
    assert {name: between[name] for name in claims} == claims


def test_where_the_gain_grows() -> None:
    runs = runs_with({"original": 0.0, "jpeg-90": 0.02, "jpeg-50": 0.06, "jpeg-10": 0.05})
    found = fig_jpeg_quality.by_quality(runs, {"alphas": [1.0], "qualities": [90, 50, 10]})
    expected = {"gain_at_90": 0.02, "gain_at_50": 0.06, "gain_at_10": 0.05,
                "gain_at_10_less_50": -0.01, "gain_at_10_less_90": 0.03}  # fmt: skip
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)


def test_one_seed_decides_nothing() -> None:
    estimate = comparison.paired([0.5], "mnist")
    assert (estimate.low, estimate.high, estimate.n, estimate.of, estimate.df) == (-2, 2, 1, "mnist", None)


def test_a_mean_over_seeds_is_judged_by_the_t_law() -> None:
    estimate = comparison.paired([0.1, 0.2, 0.4])
    assert (estimate.n, estimate.df) == (3, 2)
    half = (estimate.high - estimate.low) / 2
    quantile = stats.t.ppf(0.975, 2)
    effect = half / quantile * special.nctdtrinc(2, 0.2, quantile)
    assert estimate.smallest_effect == pytest.approx(effect)


def test_jpeg_table_pairs_by_seed() -> None:
    table = fig_jpeg_quality.summary({"runs": runs_with({"original": 0.0, "jpeg-10": 0.05})})
    row = table.set_index(["distortion", "arm"]).loc[("jpeg-10", "stability 1")]
    assert row["gain"] == pytest.approx(0.05) and row["gain_low"] < 0.05 < row["gain_high"] < 0.054
    control = table[table["arm"] == "control"]
    assert (control[["gain", "gain_low", "gain_high"]] == 0).all(axis=None)
    figure = fig_jpeg_quality.draw(table)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert lines[r"stability, $\alpha$ = 1"] == pytest.approx([0.6, 0.65])


def accuracies(networks: Sequence[str], values: Sequence[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"dataset": "digits", "network": name, "seed": seed, "part": part, "n": 10, "accuracy": value, "loss": 0.1,
         "calibration_error": (1 - value) / 2, "gate": 0.85 if part == "test" else np.nan}
        for name in networks for part in ("train", "validation", "test") for seed, value in enumerate(values)
    )  # fmt: skip


def test_accuracy_table_and_its_figure() -> None:
    runs = accuracies(["smoke-resnet50-digits", "group-resnet32-mnist"], [0.8, 0.9, 1.0])
    table = table_accuracy.summary({"networks": runs})
    assert len(table) == 6 and table["accuracy"].to_numpy() == pytest.approx(0.9)
    assert (table["high"] == 1).all() and table["low"].to_numpy() == pytest.approx(
        0.9 - 4.302652729911275 * 0.1 / 3**0.5
    )
    assert table["gate_met"].tolist() == [True, True, False] * 2  # one seed of three is below
    figure = table_accuracy.draw(table)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["gate (test)", "test", "train", "validation"]
    half = 4.302652729911275 * 0.05 / 3**0.5
    accuracy, calibration = (drawn_intervals(axes) for axes in figure.axes)
    assert accuracy == pytest.approx(np.tile([0.9 - 2 * half, 0.9, 1], (6, 1)))
    assert calibration == pytest.approx(np.tile([0, 0.05, 0.05 + half], (6, 1)))  # cut at 0: no error is negative
    assert [axes.get_xlabel() for axes in figure.axes] == ["accuracy", "expected calibration error"]
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert rows == ["ResNet50, smoke", "group's ResNet-32"]


def drawn_intervals(axes: Axes) -> np.ndarray:
    """Low end, point and high end of each error bar, ``(points, 3)``, part by part."""
    rows = []
    for container in axes.containers:
        points, _, (bars,) = container.lines
        ends = [segment[:, 0] for segment in bars.get_segments()]
        rows += [(low, x, high) for x, (low, high) in zip(points.get_xdata(), ends, strict=True)]
    return np.array(rows)


def test_one_seed_is_drawn_without_an_interval() -> None:
    figure = table_accuracy.draw(table_accuracy.summary({"networks": accuracies(["resnet20"], [0.9])}))
    accuracy, calibration = (drawn_intervals(axes) for axes in figure.axes)
    assert (accuracy == 0.9).all() and calibration == pytest.approx(0.05)


def test_outlier_figures_draw_every_image() -> None:
    generator = np.random.default_rng(0)
    loss = generator.exponential(size=200)
    scores = pd.DataFrame(
        {
            "dataset": "digits", "model": "resnet50", "seed": 0, "image": range(200), "label": np.arange(200) % 10,
            "predicted": 0, "position": generator.uniform(0, 10, 200), "loss": loss, "ceiling": np.expm1(loss),
            "exact": np.expm1(loss), "released": np.where(loss > 0.1, np.expm1(loss), 0), "rank": 9, "classes": 10,
        }
    )  # fmt: skip
    figure = fig_outlier_ranking.draw(scores)
    left, zoomed, middle, right = figure.axes
    assert zoomed.get_ylim()[1] < left.get_ylim()[1]
    assert all(sum(len(line.get_xdata()) for line in axes.lines) == 200 for axes in (left, middle))
    assert middle.get_yscale() == "log" and left.get_xlim() == (0, 10)
    assert [text.get_text() for text in right.texts] == [f"{(loss <= 0.1).mean():.0%} are 0"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["released", "exact", "ceiling", "released = 0"]
    check = scores.assign(by_definition=scores["ceiling"] * 1.5)
    table = fig_outlier_ranking.summary({"scores": scores, "check": check})
    summary = table.iloc[0]
    assert summary["largest_gap_of_definition_to_ceiling"] == pytest.approx(0.5)
    assert summary["released_zero_share"] == pytest.approx((loss <= 0.1).mean())
    assert summary["full_rank_share"] == 1 and summary["top100_exact_in_loss"] == 100
    rankings = fig_outlier_ranking.rankings(scores)
    assert "fi_finds_disputed_images" not in fig_outlier_ranking.claims(table, rankings, pd.DataFrame())
    people = np.where(loss > 2, 3, np.where(loss > 1, 0, 1))  # who was asked agrees on what the network is sure of
    disputed = fig_outlier_ranking.disputed(scores.assign(answers=people))
    assert (
        disputed["disputed"].tolist() == [(people > 1).sum()] * 2 and (disputed["images"] == (people > 0).sum()).all()
    )
    claims = fig_outlier_ranking.claims(table, rankings, disputed)
    assert [e.value for e in claims["fi_finds_disputed_images"] + claims["the_loss_finds_disputed_images"]] == [1, 1]
    assert claims["digits_resnet50_largest_released"] == scores["released"].max()
    assert not claims["exact_fi_is_the_ceiling"]
    tau = claims["digits_resnet50_kendall_released_loss"]
    assert isinstance(tau, Estimate) and tau.low <= tau.value <= tau.high < 1 and tau.n == 200


def test_the_images_of_largest_fi() -> None:
    whole = data.load("digits")
    network = Subject(training.Trained(nn.Identity(), "", [], 0.0), whole, "resnet50", 0)
    score = np.arange(len(whole.train), dtype=float)
    scores = pd.DataFrame({"image": whole.train.index, "label": whole.train.labels, "predicted": 0, "seed": 0})
    scores = scores.assign(dataset="digits", model="resnet50", released=score, exact=-score)
    people = pd.DataFrame({"first": "a cat", "second": "a dog"}, index=whole.train.index.numpy())
    found = fig_outlier_ranking.largest(network, scores, people, count=3)
    assert found["place"].tolist() == [1, 2, 3] * 2
    assert found["image"].tolist() == whole.train.index[[-1, -2, -3, 0, 1, 2]].tolist()
    np.testing.assert_array_equal(unpacked(found.iloc[0]), whole.train.images[-1].permute(1, 2, 0))
    figure = fig_outlier_ranking.draw_images(found)
    assert len(figure.axes) == 6 and figure.axes[0].get_title().endswith(f"FI {score[-1]:.3g}\n1 a cat, 1 a dog")
