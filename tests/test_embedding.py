"""Inception, the triplet-trained embedding, and what is measured on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from influence.companion.artifacts.stability import (
    embeddings,
    fig_distance_distribution,
    fig_near_duplicates,
    table_ranking,
)
from influence.companion.images import data
from influence.companion.zoo import embedding, inception, training
from influence.companion.zoo.embedding import EmbeddingArm, EmbeddingRecipe

ARM = "stability 1"
TINY = EmbeddingRecipe(steps=60, triplets=8, dimensions=8)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "cache"))
    return data.load("photos", size=16)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 64, 48)])
def test_small_inception_takes_any_size_and_has_all_block_types(shape: tuple[int, int, int]) -> None:
    state = torch.get_rng_state()
    net = inception.small_embedding(shape, dimensions=5, seed=1).eval()
    assert torch.equal(state, torch.get_rng_state())
    kinds = {type(module).__name__ for module in net.modules()}
    assert kinds >= {f"Inception{letter}" for letter in "ABCDE"}
    z = net(255 * torch.rand(2, *shape))
    assert z.shape == (2, 5)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    twin = inception.small_embedding(shape, dimensions=5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("side", "width", "words"), [(7, 0.125, "8x8"), (8, 0.1, "multiple of 1/16")])
def test_impossible_inceptions(side: int, width: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inception.SmallInception(3, side, width=width)


def test_triplets_are_of_one_class_and_another(photos: data.Dataset) -> None:
    where = {image.numpy().tobytes(): int(k) for image, k in zip(photos.train.images, photos.train.labels, strict=True)}
    stream = embedding.Triplets(photos.train, TINY.triplets)
    for _, batch in zip(range(5), stream, strict=False):
        q, p, n = (np.array([where[i.numpy().tobytes()] for i in part]) for part in batch.chunk(3))
        assert (q == p).all() and (q != n).all()
        assert not torch.equal(batch[0], batch[len(q)])


def test_training_learns_is_cached_and_arms_share_the_base(photos: data.Dataset) -> None:
    base = embedding.fit(TINY, photos)
    losses = [row["loss"] for row in base.history]
    assert losses[-1] < losses[0] and [row["steps"] for row in base.history] == [50, 60]
    again = embedding.fit(TINY, photos)
    assert again.history == base.history and not again.model.training
    one = {"steps": 1, "learning_rate": 1e-3}
    control = embedding.finetune(TINY, EmbeddingArm("control", **one), photos)
    weightless = embedding.finetune(TINY, EmbeddingArm("stability", alpha=0.0, **one), photos)
    stable = embedding.finetune(TINY, EmbeddingArm("stability", alpha=10.0, **one), photos)
    pairs = zip(control.model.parameters(), weightless.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert stable.history[0]["loss"] > control.history[0]["loss"]


def test_a_killed_training_goes_on_with_the_same_weights(
    photos: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedding.fit(TINY, photos)
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "other"))
    loss, count = embedding._loss, iter(range(1000))

    def dies(*arguments: object) -> torch.Tensor:
        if next(count) == 55:
            raise KeyboardInterrupt
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        embedding.fit(TINY, photos)
    assert list(training.folder().glob("*.resume.pt"))
    monkeypatch.setattr(embedding, "_loss", loss)
    again = embedding.fit(TINY, photos)
    assert again.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


# -- what is made of the distances ------------------------------------------------------------------------------------


def pairs_with(gain: float, *, collapse: float = 0.0) -> pd.DataFrame:
    """Distances in which stability brings near-duplicates nearer by `gain`, and negatives by `collapse`."""
    rows = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        near, far = generator.uniform(0.05, 0.6, 60), generator.uniform(0.3, 1.2, 400)
        for arm, factor, other in (("control", 1.0, 1.0), (ARM, 1 - gain, 1 - collapse)):
            for distortion in ("jpeg-50", "crop-1"):
                common = {"seed": seed, "arm": arm, "distortion": distortion, "second": 0}
                for kind, values in (("near-duplicate", near * factor), ("negative", far * other)):
                    rows.append(pd.DataFrame({**common, "kind": kind, "first": range(len(values)), "distance": values}))
    return pd.concat(rows, ignore_index=True)


def test_detection_at_fixed_levels() -> None:
    pairs = pd.DataFrame(
        {
            "seed": 0, "arm": "control", "distortion": "d", "first": 0, "second": 0,
            "kind": ["near-duplicate", "near-duplicate", "negative", "near-duplicate"],
            "distance": [0.1, 0.2, 0.3, 0.4],
        }
    )  # fmt: skip
    values = fig_near_duplicates.detection(pairs, levels=[0.7, 0.9]).set_index("metric")["value"]
    assert values["recall@p0.9"] == pytest.approx(2 / 3) and values["recall@p0.7"] == 1
    assert values["precision@r0.9"] == pytest.approx(3 / 4)
    assert values["average precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)


@pytest.mark.parametrize(("gain", "holds"), [(0.5, True), (0.0, False), (-0.5, False)])
def test_claims_iii_and_iv_follow_their_rules(gain: float, holds: bool) -> None:
    pairs = pairs_with(gain)
    found = fig_near_duplicates.detection(pairs, levels=[0.9, 0.95])
    assert fig_near_duplicates.claims(found, ARM)["better_for_all_distortions_and_levels"] is holds
    shares = fig_distance_distribution.concentration(pairs, threshold=0.2)
    claim = fig_distance_distribution.claims(shares, ARM)
    assert claim["distances_concentrate_at_zero"] is holds and claim["gain_of_negatives"] == 0
    figure = fig_near_duplicates.draw(fig_near_duplicates.curves(pairs))
    assert [axes.get_title() for axes in figure.axes] == ["jpeg-50", "crop-1"]


def test_a_collapse_shows_in_the_negatives_and_gains_nothing() -> None:
    pairs = pairs_with(0.9, collapse=0.9)
    claim = fig_distance_distribution.claims(fig_distance_distribution.concentration(pairs, threshold=0.2), ARM)
    assert claim["distances_concentrate_at_zero"] and claim["gain_of_negatives"] > 0.9
    found = fig_near_duplicates.detection(pairs, levels=[0.9])
    assert fig_near_duplicates.claims(found, ARM)["better_for_all_distortions_and_levels"] is False


def test_ranking_counts_triplets() -> None:
    labels = np.array([0, 0, 1, 1])
    x = np.array([0.0, 1.0, 5.0, 1.5])  # the query 3 has two of the other class nearer than its own
    gaps = np.abs(x[:, None] - x[None])
    # per query (positive, two negatives): 0 and 1: both right, both right; 2: 3.5 < 4, 5; 3: 3.5 > 1.5, 0.5
    found = table_ranking.ordered(gaps, labels, top=3)
    assert found["triplets"] == found["triplets_at_top"] == 8
    assert found["triplet_accuracy"] == pytest.approx(
        np.mean([gaps[0, 1] < gaps[0, 2], gaps[0, 1] < gaps[0, 3], gaps[1, 0] < gaps[1, 2], gaps[1, 0] < gaps[1, 3],
                 gaps[2, 3] < gaps[2, 0], gaps[2, 3] < gaps[2, 1], gaps[3, 2] < gaps[3, 0], gaps[3, 2] < gaps[3, 1]])
    )  # fmt: skip
    assert found["score_at_top"] == 2 * 8 * found["triplet_accuracy"] - 8
    assert table_ranking.ordered(gaps, labels, top=1)["triplets_at_top"] < 8


@pytest.mark.parametrize(("clean", "distorted"), [(0.0, 0.05), (-0.05, 0.05), (0.0, 0.0)])
def test_claim_v_follows_its_rule(clean: float, distorted: float) -> None:
    rows = []
    for seed in range(3):
        for distortion, gain in (("original", clean), ("jpeg-50", distorted)):
            for arm, change in (("control", 0.0), (ARM, gain + 0.001 * (seed - 1))):
                value = 0.8 + change
                rows.append(
                    {"seed": seed, "arm": arm, "distortion": distortion, "triplet_accuracy": value,
                     "score_at_top": 9, "score_share": value}
                )  # fmt: skip
    runs = pd.DataFrame(rows)
    claim = table_ranking.claims(runs, ARM)
    assert claim["ranking_not_hurt_on_clean"] is (clean == 0) and claim["ranking_better_on_distorted"] is (
        distorted > 0
    )
    table = table_ranking.summary(runs)
    assert len(table) == 12
    table_ranking.draw(table)


def test_distances_of_a_network_that_is_known(photos: data.Dataset) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) / 255

    part = photos.test.sample(6)
    found = embeddings._distances(
        training.Trained(Mean(), "", [], 0.0), part, ["original", "brightness-0.1"], torch.device("cpu")
    )
    same = found[(found["kind"] == "near-duplicate") & (found["distortion"] == "original")]
    assert (same["distance"] < 1e-6).all() and len(same) == 6
    negatives = found[(found["kind"] == "negative") & (found["distortion"] == "original")]
    labels = part.labels.numpy()
    assert (labels[negatives["first"]] == labels[negatives["second"]]).all() and (negatives["distance"] > 0).all()
