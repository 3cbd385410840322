"""The small Inception, features of a classifier as an embedding, its arms, and what is measured on distances."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from influence.companion.artifacts.stability import (
    comparison,
    embeddings,
    fig_distance_distribution,
    fig_examples,
    fig_near_duplicates,
    table_ranking,
)
from influence.companion.images import data
from influence.companion.images.pictures import unpacked
from influence.companion.ledger import reference
from influence.companion.zoo import embedding, finetuning, inception, training
from influence.companion.zoo.embedding import EmbeddingArm
from influence.companion.zoo.recipes import Recipe

TINY = Recipe("tiny-0", "resnet50", "digits", 1, ((1, 1e-3),), width=0.125, batch_size=40)
ONE = {"steps": 1, "learning_rate": 1e-2}
PARAMETERS = {
    "dataset": "digits", "model": "resnet50", "seeds": [0, 1], "images": 0, "sigma": 0.04, "alphas": [0.01, 1.0], **ONE,
    "versions": ["thumb-36", "jpeg-50"], "negatives": 60, "precisions": [0.98], "recalls": [0.5], "threshold": 0.5,
    "queries": 7, "top": 5, "count": 2,
}  # fmt: skip


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path))
    whole = data.load("digits")
    few = {"train": whole.train.sample(80), "valid": whole.valid.sample(20), "test": whole.test.sample(30)}
    return dataclasses.replace(whole, **few)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 64, 48)])
def test_small_inception_takes_any_size_and_has_all_block_types(shape: tuple[int, int, int]) -> None:
    net = inception.SmallInception(shape[0], min(shape[1:]), width=0.125, n_classes=5).eval()
    assert {type(module).__name__ for module in net.modules()} >= {f"Inception{letter}" for letter in "ABCDE"}
    assert net(255 * torch.rand(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("side", "width", "words"), [(7, 0.125, "8x8"), (8, 0.1, "multiple of 1/16")])
def test_impossible_inceptions(side: int, width: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inception.SmallInception(3, side, width=width, n_classes=10)


# -- the embedding and its arms ---------------------------------------------------------------------------------------


def test_embedding_is_what_the_dense_layer_takes(digits: data.Dataset) -> None:
    network, seen = TINY.build(digits), []
    network.get_submodule("head").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = training.pixels(digits.test.images)
    with torch.no_grad():
        network(x)
        z = embedding.Embedding(network)(x)
    torch.testing.assert_close(z, seen[0] / seen[0].norm(dim=1, keepdim=True))


def test_triplets_are_of_one_class_and_another() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    drawn = torch.stack([embedding.triplets(labels) for _ in range(50)])
    query, positive, negative = drawn.unbind(1)
    assert (query == torch.tensor([0, 1, 2, 4, 5])).all()  # 3 is alone in its class
    assert (labels[query] == labels[positive]).all() and (query != positive).all()
    assert (labels[query] != labels[negative]).all() and set(negative[:, 0].tolist()) == {1, 3, 4, 5}
    with pytest.raises(ValueError, match="no triplet"):
        embedding.triplets(torch.zeros(4, dtype=torch.long))


def test_arms_move_the_features_and_leave_their_statistics(digits: data.Dataset) -> None:
    base = embedding.Embedding(training.fit(TINY, digits).model).state_dict()
    arms = {
        alpha: finetuning.finetune(TINY, EmbeddingArm("stability", alpha=alpha, **ONE), digits) for alpha in (0.0, 9.0)
    }
    control = finetuning.finetune(TINY, EmbeddingArm("control", **ONE), digits)
    for (name, before), after in zip(base.items(), arms[9.0].model.state_dict().values(), strict=True):
        if "running" in name:
            assert torch.equal(before, after), name
    moved = [not torch.equal(a, b) for a, b in zip(base.values(), arms[9.0].model.state_dict().values(), strict=True)]
    assert sum(moved) > 50
    pairs = zip(control.model.parameters(), arms[0.0].model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)  # the same images, noise and triplets
    assert arms[9.0].history[0]["loss"] > control.history[0]["loss"]


# -- distances --------------------------------------------------------------------------------------------------------


def test_negatives_are_pairs_of_a_class_each_at_most_once() -> None:
    labels = np.array([1, 0, 1, 0, 1, 2])
    everything = set(zip(*embeddings.negatives(labels, 1000), strict=True))
    assert everything == {(i, j) for i in range(6) for j in range(6) if i != j and labels[i] == labels[j]}
    first, second = embeddings.negatives(np.arange(1000) % 10, 5000)
    assert len(set(zip(first, second, strict=True))) == 5000 and (first % 10 == second % 10).all()
    assert abs(np.mean(first) - 499.5) < 20 and abs(np.mean(second) - 499.5) < 20


def test_distances_are_in_medians_of_the_negatives(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(digits, monkeypatch)
    z = np.random.default_rng(0).normal(size=(2, 30, 4))
    found = {"original": z[0], "thumb-36": z[1], "jpeg-50": z[0] * 3, "noise-0.04": z[1]}
    monkeypatch.setattr(embeddings, "vectors", lambda run: iter([(0, "control", found)]))
    first, second = embeddings.negatives(digits.test.labels.numpy(), 60)
    thumb, jpeg, _ = embeddings.distances(run)
    far = np.linalg.norm(z[0][first] - z[1][second], axis=1)
    np.testing.assert_allclose(thumb.far, far / np.median(far))
    np.testing.assert_allclose(thumb.near, np.linalg.norm(z[0] - z[1], axis=1) / np.median(far))
    assert np.median(jpeg.far) == pytest.approx(1) and jpeg.columns["distortion"] == "jpeg-50"


def test_curve_counts_equally_many_negatives() -> None:
    generator = np.random.default_rng(0)
    near, far = generator.normal(1, 1, 40), generator.normal(2, 1, 400)
    precision, recall = fig_near_duplicates.curve(near, far)
    truth, score = np.repeat([1, 0], [40, 400]), -np.concatenate([near, far])
    weight = np.repeat([1.0, 0.1], [40, 400])
    expected = dict(zip(*precision_recall_curve(truth, score, sample_weight=weight)[1::-1], strict=True))
    for p, r in zip(precision, recall, strict=True):
        assert expected[min(expected, key=lambda e: abs(e - r))] == pytest.approx(p)
    values = fig_near_duplicates.at_levels(precision, recall, [0.9, 1.1], [0.5, 1.0])
    assert values["average precision"] == pytest.approx(average_precision_score(truth, score, sample_weight=weight))
    assert values["recall@p0.9"] == recall[precision >= 0.9].max() and values["recall@p1.1"] == 0
    assert values["precision@r1"] == precision[-1] <= values["precision@r0.5"]


def test_ranking_counts_triplets_as_one_by_one() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=12)
    z = generator.normal(size=(12, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    gaps = np.linalg.norm(z[:, None] - z, axis=2)
    for top in (1, 4, 50):
        everything, at_top = [], []
        for q in range(12):
            others = [i for i in range(12) if i != q]
            nearest = sorted(others, key=lambda i: gaps[q, i])[:top]
            for p in (i for i in others if labels[i] == labels[q]):
                for n in (i for i in others if labels[i] != labels[q]):
                    everything.append(gaps[q, p] < gaps[q, n])
                    if p in nearest or n in nearest:
                        at_top.append(gaps[q, p] < gaps[q, n])
        found = table_ranking.ordered(z, labels, np.arange(12), top=top)
        assert found["triplets"] == len(everything) and found["triplet_accuracy"] == pytest.approx(np.mean(everything))
        assert found["triplets_at_top"] == len(at_top) and found["score_at_top"] == 2 * sum(at_top) - len(at_top)


# -- claims, by the committed rules -----------------------------------------------------------------------------------


def outcome(stem: str, item: str, claims: dict[str, object]) -> str | None:
    (compared,) = reference.compare(f"stability/{stem}", {item: claims[item]})
    return compared.outcome


def rows(gain: float, values: dict[str, float], **others: list[str]) -> pd.DataFrame:
    """Three seeds of every arm, the others than the control better by `gain`."""
    seeds, arms = range(3), ["control", "augmentation", "stability 0.01", "stability 1"]
    index = pd.MultiIndex.from_product([seeds, arms, *others.values()], names=["seed", "arm", *others])
    frame = index.to_frame(index=False)
    change = (frame["arm"] != "control") * (gain + 0.001 * (frame["seed"] - 1))
    return frame.assign(**{name: value + change for name, value in values.items()})


DISTORTIONS = ["thumb-36", "jpeg-50", "noise-0.04"]


@pytest.mark.parametrize(("gain", "expected"), [(0.1, "supported"), (0.0, "undetermined"), (-0.1, "contradicted")])
def test_claims_follow_their_rules(gain: float, expected: str) -> None:
    metrics = ["recall@p0.98", "precision@r0.5", "average precision"]
    levels = rows(gain, {"value": 0.5}, distortion=DISTORTIONS, metric=metrics)
    item = "better_for_all_distortions_and_levels"
    printed = fig_near_duplicates.claims(levels, {**PARAMETERS, "versions": ["jpeg-50"]})
    assert printed["recall_gain_at_precision_98_jpeg"].df == printed["mean_gain"].df == 2
    assert outcome("fig_near_duplicates", item, fig_near_duplicates.claims(levels, PARAMETERS)) == expected
    worst = (levels["distortion"] == "jpeg-50") & (levels["metric"] == "recall@p0.98") & (levels["arm"] != "control")
    levels.loc[worst, "value"] = 0.3 + 0.001 * levels["seed"]  # one of the levels is enough
    assert outcome("fig_near_duplicates", item, fig_near_duplicates.claims(levels, PARAMETERS)) == "contradicted"

    shares = rows(gain, {"below": 0.5, "median": 0.5, "unit": 1.0}, distortion=DISTORTIONS, kind=["near-duplicate"])
    negatives = shares.assign(kind="negative", below=0.0)
    claims = fig_distance_distribution.claims(pd.concat([shares, negatives]), PARAMETERS)
    assert outcome("fig_distance_distribution", "distances_concentrate_at_zero", claims) == expected
    assert claims["unit_ratio"].value == pytest.approx(1 + gain, abs=1e-4)

    runs = rows(gain, {"triplet_accuracy": 0.8, "score_share": 0.6}, distortion=["original", *DISTORTIONS])
    claims = table_ranking.claims(runs, PARAMETERS)
    assert outcome("table_ranking", "ranking_better_on_distorted", claims) == expected
    hurt = "contradicted" if gain < 0 else "supported"
    assert outcome("table_ranking", "ranking_not_hurt_on_clean", claims) == hurt


# -- from networks to figures -----------------------------------------------------------------------------------------


def _run(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for module in (comparison, embeddings, fig_examples):
        monkeypatch.setattr(module, "dataset", lambda run, name: digits)
    monkeypatch.setattr(comparison.recipes, "recipe", lambda *names, seed: dataclasses.replace(TINY, seed=seed))
    return SimpleNamespace(parameters=PARAMETERS, profile="smoke", device=torch.device("cpu"), stem="")


def test_the_artifacts_of_embeddings(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(digits, monkeypatch)
    near, spread, ranking, examples = (
        module.compute(run)  # type: ignore[arg-type]
        for module in (fig_near_duplicates, fig_distance_distribution, table_ranking, fig_examples)
    )
    assert len(near["levels"]) == 2 * 4 * 3 * 3 and len(near["curves"]) == 2 * 4 * 3 * 100
    assert (near["levels"]["positives"] == 30).all() and (near["levels"]["negatives"] <= 60).all()
    figure = fig_near_duplicates.draw(near["curves"], fig_near_duplicates.summary(near))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["thumb-36", "jpeg-50"] and len(figure.axes) == 4
    assert (spread["cumulative"].groupby(["seed", "arm", "distortion", "kind"])["share"].is_monotonic_increasing).all()
    assert len(fig_distance_distribution.draw(spread["cumulative"], threshold=0.5).axes) == 4
    assert len(ranking["runs"]) == 2 * 4 * 4 and (ranking["runs"]["queries"] == 7).all()
    table_ranking.draw(table_ranking.summary(ranking))

    pairs, pictures = examples["pairs"], examples["pictures"]
    assert len(pairs) == 2 * 2 * 5 and len(pictures) == 2 * len(pairs)
    assert (pairs.groupby("place")["control"].mean().loc[["smallest D", "largest D"]].diff().iloc[1]) > 0
    pair = pairs[pairs["place"] == "dissimilar"].iloc[0]
    assert pair["first"] != pair["second"] and pair["control"] == pytest.approx(1, abs=0.1)
    shown = pictures[(pictures["pair"] == pair.name) & (pictures["side"] == "original")].iloc[0]
    original = digits.test.images[digits.test.index.tolist().index(pair["first"])]
    assert (unpacked(shown) == original.permute(1, 2, 0).numpy()).all()
    assert len(fig_examples.draw(examples, arm="stability 1").axes) == 2 * 2 * 5
    assert len(fig_examples.claims(pairs, PARAMETERS)) == 6
