"""The arms of a comparison, the grid and claim (vi)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from influence.companion.artifacts.stability import (
    comparison,
    fig_alpha_sigma,
    fig_generalisation,
    fig_jpeg_quality,
    table_classification,
)
from influence.companion.images import data
from influence.companion.ledger import paths, reference
from influence.companion.ledger.reference import Estimate
from influence.companion.zoo import finetuning, last_layer, training
from influence.companion.zoo.finetuning import Arm
from influence.companion.zoo.recipes import Recipe

TINY = Recipe("tiny-0", "resnet50", "digits", 1, ((1, 1e-3),), width=0.125, batch_size=40)
ONE = {"steps": 1, "learning_rate": 1e-2}


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path))
    whole = data.load("digits")
    few = {"train": whole.train.sample(80), "valid": whole.valid.sample(20), "test": whole.test.sample(20)}
    return dataclasses.replace(whole, **few)


def test_a_published_network_is_loaded_and_its_checksum_verified(
    digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "ZOO", tmp_path / "zoo")
    arm = Arm("stability", alpha=1.0, **ONE)
    made = finetuning.finetune(TINY, arm, digits, publish=True)
    assert all(torch.equal(p, p.half().float()) for p in made.model.parameters())
    assert not list(training.folder().glob("*stability*.safetensors"))
    (weights,) = training.published_folder().glob("*.safetensors")
    monkeypatch.setattr(finetuning, "_continue", lambda *_: pytest.fail("trained again"))
    again = finetuning.finetune(TINY, arm, digits)
    assert again.key == made.key and all(map(torch.equal, again.model.parameters(), made.model.parameters()))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(training.TrainingError, match="another checksum"):
        finetuning.finetune(TINY, arm, digits)


def test_variants_differ_where_they_should(digits: data.Dataset) -> None:
    def head(**options: object) -> torch.Tensor:
        arm = Arm("stability", alpha=5.0, steps=2, learning_rate=1e-2, **options)  # type: ignore[arg-type]
        return finetuning.finetune(TINY, arm, digits).model.get_parameter("head.weight")

    kl, ce = head(), head(divergence="ce")
    assert not torch.allclose(kl, ce, atol=1e-5)
    stopped, stopped_ce = head(stop_gradient=True), head(stop_gradient=True, divergence="ce")
    torch.testing.assert_close(stopped, stopped_ce, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(kl, stopped, atol=1e-6)


def test_augmentation_with_a_distortion(digits: data.Dataset) -> None:
    weights = [
        finetuning.finetune(TINY, Arm("augmentation", perturbation=p, **ONE), digits).model
        for p in ("noise", "jpeg-10", "blur-1")
    ]
    heads = [model.get_parameter("head.weight") for model in weights]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    with pytest.raises(ValueError, match="only augmentation"):
        Arm("stability", perturbation="jpeg-10", **ONE)


def test_mixed_is_the_mean_of_control_and_augmentation() -> None:
    torch.manual_seed(0)
    model, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.tensor([0, 2])
    x, noisy = torch.rand(2, 2, 3, 1, 4)
    control, augmentation, mixed = (
        Arm(objective, **ONE).loss(model, x, noisy, labels)  # type: ignore[arg-type]
        for objective in ("control", "augmentation", "mixed")
    )
    assert control != augmentation
    torch.testing.assert_close(mixed, (control + augmentation) / 2)


def test_standard_arms() -> None:
    parameters = {"alphas": [0.01, 1.0], "sigma": 0.1, "steps": 5, "learning_rate": 1e-3}
    chosen = comparison.standard({**parameters, "variants": True})
    assert list(chosen) == [
        "control", "augmentation", "stability 0.01", "stability 1", "stability 1 CE", "stability 1 stopped"
    ]  # fmt: skip
    assert {(a.steps, a.sigma, a.learning_rate) for a in chosen.values()} == {(5, 0.1, 1e-3)}
    assert chosen["stability 1 CE"].divergence == "ce" and chosen["stability 1 stopped"].stop_gradient
    assert comparison.standard(parameters) == dict(list(chosen.items())[:4])
    assert comparison.own_noise(parameters) == "noise-0.1"


def test_rivals_are_augmentation_with_what_is_tested() -> None:
    parameters = {"alphas": [1.0], "sigma": 0.1, "steps": 5, "learning_rate": 1e-3, "trained": ["blur-1"]}
    chosen = fig_generalisation.arms(parameters)
    assert list(chosen) == ["control", "augmentation", "stability 1", "mixed", "augmentation blur-1"]
    assert chosen["mixed"] == Arm("mixed", 5, 1e-3, sigma=0.1)
    assert chosen["augmentation blur-1"] == Arm("augmentation", 5, 1e-3, sigma=0.1, perturbation="blur-1")


def test_every_arm_is_measured_under_every_distortion(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "dataset", lambda run, name: digits)
    monkeypatch.setattr(comparison.recipes, "recipe", lambda *names, seed: dataclasses.replace(TINY, seed=seed))
    parameters = {
        "dataset": "digits", "model": "resnet50", "seeds": [0, 1], "images": 0, "qualities": [10], "sigma": 0.04,
        "alphas": [1.0], **ONE,
    }  # fmt: skip
    run = SimpleNamespace(parameters=parameters, profile="smoke", device=torch.device("cpu"), stem="")
    tables = fig_jpeg_quality.compute(run)  # type: ignore[arg-type]
    assert list(tables) == ["runs"] and isinstance(tables["runs"].index, pd.RangeIndex)
    runs = tables["runs"]
    assert list(runs["distortion"].unique()) == ["original", "jpeg-10", "noise-0.04"]
    assert len(runs) == 2 * 3 * 3 and (runs["n"] == 20).all()
    assert (runs["precision_at_5"] >= runs["precision_at_1"]).all()
    claims = fig_jpeg_quality.claims(runs, parameters)
    assert claims["improves_under_its_own_noise"].n == 2 and len(claims) == 6
    figure = fig_jpeg_quality.draw(fig_jpeg_quality.summary(tables))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["original", "10"]
    both = table_classification.compute(
        SimpleNamespace(**{**vars(run), "parameters": {**parameters, "datasets": ["digits"]}})  # type: ignore[arg-type]
    )
    pd.testing.assert_frame_equal(both["runs"].drop(columns="dataset"), runs)


def outcome(stem: str, item: str, claims: Mapping[str, object]) -> str | None:
    """What becomes of a claim by the committed rule."""
    (comparison,) = reference.compare(stem, {item: claims[item]})
    return comparison.outcome


def runs_with(gain: dict[str, float], arm: str = "stability 1") -> pd.DataFrame:
    return pd.DataFrame(
        {"seed": seed, "arm": name, "distortion": distortion, "n": 10,
         "precision_at_1": 0.6 + (value + 0.001 * (seed - 1)) * (name != "control"), "precision_at_5": 0.9}
        for seed in range(3) for name in ("control", arm) for distortion, value in gain.items()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "expected", "share"),
    [
        ({"original": 0.0, "jpeg-10": 0.05, "blur-1": 0.02}, "supported", 1.0),
        ({"original": 0.0, "jpeg-10": 0.05, "blur-1": -0.05}, "undetermined", 0.5),
        ({"original": 0.5, "noise-0.1": 0.5, "jpeg-10": -0.01}, "contradicted", 0.0),
    ],
)
def test_claim_vi_leaves_noise_and_originals_out(gain: dict[str, float], expected: str, share: float) -> None:
    runs = runs_with(gain | {"noise-0.04": 0.3})
    ours = runs[runs["arm"] != "control"]
    mixed = ours.assign(arm="mixed", precision_at_1=ours["precision_at_1"] - 0.01)
    runs = pd.concat([runs, ours.assign(arm="augmentation"), mixed], ignore_index=True)
    claims = fig_generalisation.claims(runs, {"alphas": [1.0], "sigma": 0.04})
    assert outcome("stability/fig_generalisation", "gaussian_training_generalises", claims) == expected
    assert claims["distortions_gained"] == pytest.approx(share)
    own, other = (claims[f"improves_under_its_own_noise{arm}"] for arm in ("", "_augmentation"))
    assert isinstance(own, Estimate) and own.value == pytest.approx(0.3) and own == other
    beyond = claims["strong_less_mixed"]
    assert isinstance(beyond, Estimate) and beyond.value == pytest.approx(0.01)
    figure = fig_generalisation.draw(comparison.summary(runs_with(gain)))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == list(gain)


def test_classification_claims_need_every_data_set() -> None:
    noise = {"noise-0.04": 0.1}
    good = runs_with({"original": 0.0, "jpeg-50": 0.01, "jpeg-10": 0.05} | noise).assign(dataset="mnist")
    bad = runs_with({"original": -0.05, "jpeg-50": 0.0, "jpeg-10": 0.0} | noise).assign(dataset="cifar10")
    both = pd.concat([good, bad], ignore_index=True)
    parameters = {"alphas": [1.0], "qualities": [50, 10], "sigma": 0.04}
    stem, clean, grows = "stability/table_classification", "clean_accuracy_does_not_fall", "gain_grows_as_quality_falls"
    assert outcome(stem, clean, table_classification.claims(good, parameters)) == "supported"
    claims = table_classification.claims(both, parameters)
    assert outcome(stem, clean, claims) == "contradicted" and outcome(stem, grows, claims) == "supported"
    assert [estimate.of for estimate in claims[clean]] == ["mnist", "cifar10"]
    table = table_classification.summary({"runs": both})
    assert len(table) == 2 * 2 * 4 * 2 and set(table["at"]) == {1, 5}
    assert len(table_classification.draw(table).axes) == 4


def test_the_cell_is_chosen_on_validation_images_and_judged_on_test_images() -> None:
    accuracies = {  # clean and distorted, on validation images
        "last control": (0.8, 0.4), "last 0.01 0.04": (0.8, 0.41), "last 1 0.04": (0.795, 0.42),
        "last 10 0.04": (0.5, 0.7),
        "all control": (0.8, 0.4), "all 0.01 0.04": (0.8, 0.41), "all 1 0.04": (0.795, 0.5),
    }  # fmt: skip
    rows = [
        {"seed": seed, "arm": arm, "part": part, "distortion": version, "precision_at_1": value + 0.01 * seed - lost}
        for seed in range(3) for part, lost in (("valid", 0.0), ("test", 0.1))
        for arm, pair in accuracies.items() for version, value in zip(("original", "jpeg-10"), pair, strict=True)
    ]  # fmt: skip
    runs = pd.DataFrame(rows)
    test = runs["part"] == "test"
    runs.loc[test & (runs["arm"] == "last 10 0.04") & (runs["distortion"] == "original"), "precision_at_1"] = 0.9
    runs.loc[test & (runs["arm"] == "all 1 0.04") & (runs["distortion"] == "jpeg-10"), "precision_at_1"] += 0.02
    gained = fig_alpha_sigma.gains(runs)
    assert fig_alpha_sigma.best(gained) == {"all": "all 1 0.04", "last": "last 1 0.04"}  # 10 costs too much
    claims = fig_alpha_sigma.claims(gained)
    assert (
        claims["last_distorted_gain"].value == pytest.approx(0.02) and claims["last_distorted_gain"].of == "last 1 0.04"
    )
    assert claims["of_paper_distorted_gain"].value == pytest.approx(0.01)
    assert claims["all_layers_gain_more_than_last"].value == pytest.approx(0.1)
    assert len(fig_alpha_sigma.draw(runs).axes) == 4


def test_the_last_layer_learns_from_cached_features(digits: data.Dataset) -> None:
    torch.manual_seed(0)
    model = TINY.build(digits).eval()
    start = last_layer.layer(model)
    copies = last_layer.with_noisy_copies(model, digits.train.images, sigma=0.2, copies=2, seed=0)
    assert copies.shape == (len(digits.train), 3, start.in_features)
    assert torch.equal(start(copies[:, 0]), training.predict(model, digits.train.images))
    assert not torch.equal(copies[:, 1], copies[:, 2])

    @torch.no_grad()
    def divergence(layer: nn.Linear) -> float:
        clean, noisy = (layer(copies[:, i]).log_softmax(1) for i in (0, 1))
        return float((clean.exp() * (clean - noisy)).sum(1).mean())

    before = start.weight.clone()
    control, stable = (
        last_layer.tune(start, copies, digits.train.labels, alpha=alpha, steps=60, seed=(0,)) for alpha in (0.0, 10.0)
    )
    assert torch.equal(start.weight, before)
    assert divergence(stable) < divergence(control)
