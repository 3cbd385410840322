"""The relatives of the stability loss against their definitions, the corruptions, and the claims about them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional as F

import influence
from influence.companion.artifacts import audits
from influence.companion.artifacts.beyond import table_stability_family as family_table
from influence.companion.artifacts.stability import comparison
from influence.companion.images import corruptions, data
from influence.companion.images.data import DataError
from influence.companion.ledger import cache, paths, reference
from influence.companion.runner import needs
from influence.companion.zoo import family, training
from influence.companion.zoo.family import PENALTIES, FamilyArm
from influence.companion.zoo.finetuning import Arm
from influence.companion.zoo.recipes import Recipe

ONE = {"steps": 1, "learning_rate": 1e-2}
TINY = Recipe("tiny-0", "resnet50", "digits", 1, ((1, 1e-3),), width=0.125, batch_size=40)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return 2 * torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True))


def test_divergences_are_their_definitions() -> None:
    log_probs = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(2)
    found = {name: family.divergence(name, log_probs) for name in ("symmetric", "consistency", "jsd")}  # type: ignore[arg-type]
    for i in range(5):
        p, q1, q2 = log_probs[:, i].exp()
        assert float(found["symmetric"][i]) == pytest.approx((plain_kl(p, q1) + plain_kl(q1, p)) / 2)
        noisy, everything = (q1 + q2) / 2, (p + q1 + q2) / 3
        assert float(found["consistency"][i]) == pytest.approx(plain_kl(noisy, q1) + plain_kl(noisy, q2))
        jsd = sum(plain_kl(one, everything) for one in (p, q1, q2)) / 3
        assert float(found["jsd"][i]) == pytest.approx(9 / 4 * jsd)


def test_all_on_noise_weigh_the_same_where_it_is_small(model: nn.Module, x: torch.Tensor) -> None:
    sigma, generator = 1e-3, torch.Generator().manual_seed(3)
    limit = sigma**2 / 2 * influence.trace(model, x, wrt="input").mean()
    draws = [x + sigma * torch.randn(2, *x.shape, generator=generator, dtype=x.dtype) for _ in range(4000)]
    with torch.no_grad():
        outputs = [torch.stack([model(x), *map(model, pair)]).log_softmax(2) for pair in draws]
        for name in ("symmetric", "consistency", "jsd"):
            mean = torch.stack([family.divergence(name, one).mean() for one in outputs]).mean()  # type: ignore[arg-type]
            torch.testing.assert_close(mean, limit, rtol=0.04, atol=0)


def test_trace_probe_has_the_trace_as_its_mean_over_all_signs(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = influence.trace(model, x, wrt="input")[:, 0]
    total = torch.zeros(len(x), dtype=torch.float64)
    for signs in torch.cartesian_prod(*[torch.tensor([0, 1])] * 4):
        monkeypatch.setattr(family.torch, "randint", lambda *a, signs=signs, **k: signs.expand(len(x), -1))
        moving = x.clone().requires_grad_(True)
        total += family.trace_probe(model(moving), moving).detach() / 16
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)


def test_gradient_of_the_trace_penalty_is_that_of_its_value(model: nn.Module, x: torch.Tensor) -> None:
    weight = model[1].weight  # type: ignore[index]

    def penalty() -> torch.Tensor:
        moving = x.clone().requires_grad_(True)
        return family.trace_probe(model(moving), moving, generator=torch.Generator().manual_seed(4)).mean()

    (slope,) = torch.autograd.grad(penalty(), weight)
    step = torch.zeros_like(weight)
    step[2, 3] = 1e-6
    with torch.no_grad():
        weight += step
    above = penalty().detach()
    with torch.no_grad():
        weight -= 2 * step
    torch.testing.assert_close((above - penalty().detach()) / 2e-6, slope[2, 3], rtol=1e-6, atol=1e-9)


def test_losses_of_the_arms(model: nn.Module, x: torch.Tensor) -> None:
    images, labels = (100 * x).requires_grad_(False), torch.tensor([0, 1, 2, 3, 0, 1])
    noisy = images + 1
    task = F.cross_entropy(model(images), labels)
    for name in PENALTIES:
        state = torch.random.get_rng_state()
        loss = FamilyArm("stability", penalty=name, alpha=2.0, **ONE).loss(model, images, noisy, labels)
        assert torch.equal(state, torch.random.get_rng_state())  # the next step's images are those of other arms
        (slope,) = torch.autograd.grad(loss, model[1].weight)  # type: ignore[index]
        assert loss > task and bool((slope != 0).any())
    both = torch.stack([model(images), model(noisy)]).float().log_softmax(2)
    expected = task + 2 * family.divergence("symmetric", both).mean()
    symmetric = FamilyArm("stability", penalty="symmetric", alpha=2.0, **ONE).loss(model, images, noisy, labels)
    torch.testing.assert_close(symmetric.double(), expected, rtol=1e-5, atol=0, check_dtype=False)


def test_the_ascent_stays_in_the_ball_and_climbs(model: nn.Module, x: torch.Tensor) -> None:
    images = 100 * x
    moved = family.ascended(model, images, epsilon=8 / 255, steps=3, generator=torch.Generator().manual_seed(5))
    assert float((moved - images).abs().max()) <= 8 + 1e-9 and float(moved.min()) >= 0 and float(moved.max()) <= 255
    random = (images + 8 * torch.randn_like(images).sign()).clamp(0, 255)

    def far(other: torch.Tensor) -> torch.Tensor:
        return family.kl(model(images).log_softmax(1), model(other).log_softmax(1)).mean()

    assert far(moved) > far(random)


def test_arms_keep_the_keys_of_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The key of a published network: a change of it would train them all anew.
    assert cache.fingerprint(dataclasses.asdict(Arm("stability", 400, 0.005, alpha=1.0))) == KEY
    chosen = family_table.arms({"sigma": 0.04, "alpha": 1.0, **ONE})
    assert list(chosen) == ["control", "augmentation", "stability", *PENALTIES]
    assert {type(arm) for arm in list(chosen.values())[:3]} == {Arm} and len(set(map(repr, chosen.values()))) == 8
    for bad in ({"penalty": "none"}, {"penalty": "consistency", "copies": 1}, {"penalty": "trades", "ascents": 0}):
        with pytest.raises(ValueError, match=r"unknown penalty|too few"):
            FamilyArm("stability", **bad, **ONE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to the objective"):
        FamilyArm("control", **ONE)


KEY = "a481c4611b8fa1e17417a370a78975ae4e7dad223e0f015126a2b37fba0426ad"


@pytest.fixture
def frost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with five photographs of noise in the place of frost."""
    (tmp_path / "frost").mkdir()
    digests = {}
    for number, name in enumerate(corruptions.FROST_SHA256):
        pixels = np.random.default_rng(number).integers(0, 256, (170 + number, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frost" / name, format="PNG")
        digests[name] = cache.sha256(tmp_path / "frost" / name)
    monkeypatch.setattr(corruptions, "FROST_SHA256", digests)
    return tmp_path


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_corruptions_grow_with_severity(name: str, frost: Path) -> None:
    smooth = F.interpolate(torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(6)), 32, mode="bicubic")
    images = (40 + 170 * smooth.clamp(0, 1)).to(torch.uint8)
    mild, strong = (corruptions.corrupt(name, images, severity=s, data_dir=frost) for s in (1, 5))
    assert mild.shape == images.shape and mild.dtype == torch.uint8
    assert torch.equal(mild, corruptions.corrupt(name, images, severity=1, data_dir=frost))
    one, five = ((version.float() - images.float()).abs().mean() for version in (mild, strong))
    assert min(one, five) > 0
    # The stronger elastic transforms move corners less, and neighbours apart: a smooth image does not show these.
    assert one < five or name == "elastic_transform"


def test_corruptions_by_hand() -> None:
    grey = torch.full((4, 3, 32, 32), 100, dtype=torch.uint8)
    grey[:, 0] = 50
    for name in ("contrast", "defocus_blur", "zoom_blur", "glass_blur", "pixelate"):
        assert int((corruptions.corrupt(name, grey, severity=3).int() - grey.int()).abs().max()) <= 1, name
    bright = corruptions.corrupt("brightness", grey, severity=5)  # 100 + .3 * 255 = 176.5; red is half of the largest
    assert bright[0, :, 0, 0].tolist() == [88, 176, 176]
    hit = corruptions.corrupt("impulse_noise", grey, severity=5) != grey
    assert float(hit.float().mean()) == pytest.approx(0.07, abs=0.01)
    spread = (corruptions.corrupt("gaussian_noise", grey, severity=1).float() - grey).std() / 255
    assert float(spread) == pytest.approx(0.04, rel=0.03)
    counts = corruptions.corrupt("shot_noise", grey, severity=5)[:, 1].float() / 255
    assert float(counts.var()) == pytest.approx(100 / 255 / 50, rel=0.1)
    for images, message in ((grey[:, :1], "32, 32"), (grey.float(), "uint8")):
        with pytest.raises((ValueError, TypeError), match=message):
            corruptions.corrupt("fog", images, severity=1)
    with pytest.raises(ValueError, match="severity"):
        corruptions.corrupt("fog", grey, severity=6)
    with pytest.raises(ValueError, match="unknown corruption"):
        corruptions.corrupt("rain", grey, severity=1)


def test_motion_blur_is_that_of_imagemagick() -> None:
    """Two points and an edge, as `convert -motion-blur 3x1.5+30` and `3x2-100` of ImageMagick 6.9.11 blur them."""
    image = np.full((8, 8, 1), 20.0)
    image[3, 4], image[6, 1], image[:, 7] = 250, 130, 90
    row = [20, 20, 20, 20, 24, 37, 60, 90]
    forwards = [row, [20, 22, *row[2:]], [20, 33, 59, *row[3:]], [20, 20, 20, 97, 121, 37, 60, 90]]
    forwards += [row, row, [57, 66, *row[2:]], row]
    row = [20, 20, 20, 20, 20, 20, 20, 78]
    down = [row, row, row, [*row[:4], 96, 20, 20, 78], [*row[:4], 87, 20, 20, 78], [*row[:4], 66, 20, 20, 78]]
    down += [[20, 56, 20, 20, 20, 44, 20, 78], [20, 52, 20, 20, 20, 30, 20, 78]]
    for sigma, degrees, expected in ((1.5, 30, forwards), (2, -100, down)):
        found = 255 * corruptions._moved(image / 255, 3, sigma, degrees)[..., 0]
        assert np.abs(found - expected).max() < 1.01, degrees  # ImageMagick rounds twice


def test_elastic_transform_by_hand() -> None:
    """Where nothing but the corners moves, a plane stays a plane, whose slopes the three corners decide."""
    rows, columns = np.indices((32, 32)) / 31
    plane = torch.from_numpy(np.stack([rows, columns, (rows + columns) / 2])[None] * 200 + 20).to(torch.uint8)
    moved = corruptions.corrupt("elastic_transform", plane, severity=1)[0, :, 4:28, 4:28].double()  # away from borders
    design = np.stack([rows[4:28, 4:28].ravel(), columns[4:28, 4:28].ravel(), np.ones(576)], axis=1)
    slopes, residues, *_ = np.linalg.lstsq(design, moved.reshape(3, -1).T.numpy(), rcond=None)
    assert (np.sqrt(residues / 576) < 0.6).all()  # grey levels: rounding down has .3, twice
    # 21 pixels between corners, each of which moves by up to 2.56 pixels.
    assert np.abs(slopes[:2, :2] - 200 * np.eye(2)).max() < 200 * 2 * 2.56 / 20 * 1.3
    assert np.abs(slopes[:2, :2] - 200 * np.eye(2)).max() > 1


def test_frost_is_a_fifth_of_a_photograph(frost: Path) -> None:
    black = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    found = corruptions.corrupt("frost", black, severity=3, data_dir=frost)
    thirds = [np.asarray(Image.open(file))[2::5, 2::5] for file in sorted((frost / "frost").iterdir())]
    windows = [np.floor(0.4 * one[i : i + 32, j : j + 32] + 1e-6) for one in thirds for i in range(3) for j in range(9)]
    for image in found.permute(0, 2, 3, 1).numpy():
        assert any(np.array_equal(image, window) for window in windows)
    with pytest.raises(DataError, match=r"frost1\.png is missing: take it from imagecorruptions/frost of the wheel"):
        corruptions.corrupt("frost", black, severity=3)
    (frost / "frost/frost4.jpg").write_bytes(b"another")
    corruptions.frost_photographs.cache_clear()
    with pytest.raises(DataError, match=r"frost4\.jpg is another file"):
        corruptions.corrupt("frost", black, severity=3, data_dir=frost)


def test_frost_is_named_among_what_a_run_needs(frost: Path) -> None:
    assert needs.of({"dataset": "cifar10", "corruptions": ["fog", "frost"]}) == ["cifar10", "frost"]
    assert needs.of({"dataset": "cifar10", "corruptions": ["fog", "blur-1"]}) == ["cifar10"]
    words = needs.described("frost")
    assert "PyPI" in words and "Apache-2.0" in words and all(file in words for file in corruptions.FROST_SHA256)
    assert needs.problem("frost", frost) == "" and "frost1.png is missing" in needs.problem("frost", frost / "frost")


@pytest.mark.data
def test_the_photographs_of_frost(data_dir: Path) -> None:
    if not (data_dir / "frost").is_dir():
        pytest.skip("INFLUENCE_DATA has no frost")
    shapes = [photograph.shape[:2] for photograph in corruptions.frost_photographs(data_dir)]
    assert shapes == [(120, 180), (63, 112), (63, 112), (70, 105), (99, 132)]


def test_every_arm_is_measured_and_published_networks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "ZOO", tmp_path / "zoo")
    whole = data.load("digits")
    few = dataclasses.replace(
        whole, train=whole.train.sample(80), valid=whole.valid.sample(20), test=whole.test.sample(20)
    )
    for module in (comparison, family_table):
        monkeypatch.setattr(module, "dataset", lambda run, name: few)
    monkeypatch.setattr(comparison.recipes, "recipe", lambda *names, seed: dataclasses.replace(TINY, seed=seed))
    parameters = {
        "dataset": "digits", "model": "resnet50", "seeds": [0], "sigma": 0.04, "alpha": 1.0, "tested": ["jpeg-10"],
        "corruptions": [], "severities": [1], "images": 0, "attacked": 8, "traced": 4, "draws": 1, **ONE,
    }  # fmt: skip
    run = SimpleNamespace(parameters=parameters, profile="cpu", device=torch.device("cpu"), stem="")
    tables = family_table.compute(run)  # type: ignore[arg-type]
    runs = family_table.together(tables)
    assert len(runs) == 8 * 6 and runs[runs["kind"] != "output"]["value"].between(0, 1).all()
    assert runs.groupby("measure")["n"].first().to_dict() == {
        "original": 20, "jpeg-10": 20, "noise-0.04": 20, "PGD": 8, "KL": 4, "trace": 4
    }  # fmt: skip
    table = family_table.table(runs)
    assert len(family_table.draw(table).axes) == 2 and len(family_table.draw_outputs(table).axes) == 2

    (audit,) = audits.AUDITS["beyond/table_stability_family"].values()
    examples = audit.choose(tables["images"], 20, seed=0)
    rows = tables["images"].merge(examples, on=list(audit.example))
    anew = audit.again(run, examples)  # type: ignore[arg-type]
    compared, left_out, wrong = audit.compare(rows, anew)
    assert (compared + left_out, wrong) == (len(rows), []) and compared > len(rows) / 2
    assert len(audit.compare(rows.assign(value=1.01 * rows["value"] + 0.01), anew)[2]) == compared
    for file in training.published_folder().glob("*-trades-*"):
        file.unlink()
    with pytest.raises(training.TrainingError, match="continued by trades, is not published"):
        family_table.again(run, runs[runs["arm"] == "trades"])  # type: ignore[arg-type]


def tables_with(gain: float, spread: float = 0.001, images: int = 40) -> dict[str, pd.DataFrame]:
    """Three seeds, in which every member but TRADES gains as much on what is distorted, and 9 times that on noise."""
    rows = []
    for seed in range(3):
        moved = gain + spread * (seed - 1)
        for arm in ("control", "augmentation", "stability", *PENALTIES):
            step = 0.0 if arm == "control" else moved
            by = {"original": 0.9, "jpeg-10": 0.6 + step, "noise-0.04": 0.5 + 9 * step, "fog": 0.5 + step,
                  "gaussian_noise": 0.5 + 9 * step, "shot_noise": 0.5 + 9 * step,
                  "PGD": 0.3 + step * (2 if arm == "trades" else 1),
                  "KL": 1.0, "trace": 100 * math.exp(-10 * step)}  # fmt: skip
            common = {"seed": seed, "arm": arm}
            rows += [{**common, "measure": m, "image": i, "value": v} for m, v in by.items() for i in range(images)]
    kinds = dict.fromkeys(("fog", "gaussian_noise", "shot_noise"), "corruption")
    kinds |= {"PGD": "attack", "KL": "output", "trace": "output"}
    frame = pd.DataFrame(rows)
    return {"images": frame.assign(kind=frame["measure"].map(kinds).fillna("distortion"))}


def test_images_count_where_they_leave_more_open_than_the_seeds() -> None:
    tables = tables_with(0.05)
    images = tables["images"]
    moved = (images["arm"] == "trades") & (images["measure"] == "fog")
    images.loc[moved, "value"] += np.where(images.loc[moved, "image"] % 2, 1.0, -1.0)
    found = {e.of: e for e in family_table.claims(tables)["family_gains_on_distorted"]}  # type: ignore[union-attr]
    # Half of each image's gain is that on fog, which is now one more or less.
    half = stats.t.ppf(0.975, 39) * np.std([0.5, -0.5] * 20, ddof=1) / 40**0.5
    assert found["trades"].n == 40 and found["trades"].high - found["trades"].value == pytest.approx(half)
    assert found["stability"].n == 3


@pytest.mark.parametrize(
    ("gain", "spread", "expected"),
    [(0.05, 0.001, "checked"), (-0.05, 0.001, "check fails"), (0.0, 0.02, "undetermined")],
)
def test_claims(gain: float, spread: float, expected: str) -> None:
    claims = family_table.claims(tables_with(gain, spread))
    outcomes = {c.item: c.outcome for c in reference.compare("beyond/table_stability_family", claims)}
    judged = ("family_gains_on_distorted", "trace_penalty_lowers_the_trace", "trades_resists_the_attack")
    of_three_networks = [e for item in judged for e in reference.finding(item, claims[item])]  # type: ignore[union-attr]
    assert {e.df for e in of_three_networks} == {2}
    assert [outcomes[item] for item in judged] == [expected] * 3
    assert [round(e.value, 6) for e in claims["family_gains_on_distorted"]] == [gain] * 6  # type: ignore[union-attr]
    before = [e.value for e in claims["family_gains_with_other_noise"]]  # type: ignore[union-attr]
    assert np.allclose(before, 11 * gain / 3)  # of jpeg-10, fog and shot noise
    assert np.isclose(claims["trace_penalty_lowers_the_trace"].value, -10 * gain)  # type: ignore[union-attr]
