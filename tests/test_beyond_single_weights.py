"""Taking single weights and pixels away, by rankings, and what the notebook claims of it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from influence.companion import style
from influence.companion.artifacts.beyond import fig_single_weights
from influence.companion.images.data import Split
from influence.companion.ledger.reference import load
from influence.companion.scores import weightwise
from influence.companion.zoo import training

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).eval()


def split(count: int = 6) -> Split:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 5, 5), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3, torch.arange(count))


def test_rankings_of_weights() -> None:
    model, images = network(), split()
    found = weightwise.weight_rankings(model, images, seed=0, device=CPU)
    weights = [model[0].weight, model[3].weight]
    assert all(len(score) == 18 + 54 for score in found.values())  # no bias among them
    loss = nn.functional.cross_entropy(model(training.pixels(images.images, CPU)), images.labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()
    size = torch.cat([w.detach().flatten() for w in weights]).double().abs()
    assert torch.allclose(found["saliency"], gradient.abs(), rtol=1e-3, atol=1e-6)
    assert torch.allclose(found["snip"], size * gradient.abs(), rtol=1e-3, atol=1e-6)
    assert torch.equal(found["size"], size)
    assert torch.allclose(found["fisher"], size.square() * found["trace"])


def test_ablations_take_the_first_and_give_them_back() -> None:
    model, images = network(), split()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frame = weightwise.ablations(model, images, images, [0.1, 1.0], seed=0, device=CPU)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(frame) == 1 + 7 * 2 * 2
    by = frame.set_index(["ranking", "treatment", "share"])
    assert by.loc[("size", "set to 0", 0.1), "weights"] == 7
    # By hand: the seven largest weights.
    flat = torch.cat([before["0.weight"].flatten(), before["3.weight"].flatten()])
    flat[flat.abs().argsort(descending=True)[:7]] = 0.0
    with torch.no_grad():
        model[0].weight.copy_(flat[:18].view_as(model[0].weight))
        model[3].weight.copy_(flat[18:].view_as(model[3].weight))
        logits = model(training.pixels(images.images, CPU)).double()
    assert by.loc[("size", "set to 0", 0.1), "loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, images.labels)), rel=1e-6
    )
    # All of them, whatever came first.
    everything = frame[(frame["share"] == 1.0) & (frame["treatment"] == "set to 0")]
    assert everything["loss"].nunique() == 1


def test_four_bits() -> None:
    model = network()
    weight = model[3].weight.detach().clone()
    with weightwise.without(model, torch.arange(18, 18 + 54), "4 bits"):
        step = weight.abs().max() / 7
        assert torch.allclose(model[3].weight, (weight / step).round() * step)
        assert model[3].weight.unique().numel() <= 15
    assert torch.equal(model[3].weight, weight)


def test_occlusions_cover_pixels() -> None:
    model, images = network(), split()
    frame = weightwise.occlusions(model, images, [0.04, 1.0], value=100.0, seed=0, device=CPU).set_index(
        ["ranking", "share"]
    )
    assert frame.loc[("exact", 0.04), "pixels"] == 1 and frame.loc[("trace", 1.0), "pixels"] == 25
    grey = model(torch.full((6, 1, 5, 5), 100.0)).double()
    expected = float(nn.functional.cross_entropy(grey, images.labels).detach())
    for ranking in ("exact", "saliency", "trace", "random"):
        assert frame.loc[(ranking, 1.0), "loss"] == pytest.approx(expected, rel=1e-6)
    clean = model(training.pixels(images.images, CPU)).double()
    assert frame.loc[("none", 0.0), "loss"] == pytest.approx(
        float(nn.functional.cross_entropy(clean, images.labels).detach())
    )


def tables(gap: float, spread: float = 0.001) -> dict[str, pd.DataFrame]:
    """Three networks where FI costs so much more accuracy than every other ranking."""
    rows: dict[str, list[dict[str, object]]] = {"weights": [], "pixels": []}
    for what, names in (("weights", style.RANKINGS), ("pixels", ("exact", "saliency", "trace", "random"))):
        for seed in range(3):
            of = {"dataset": "cifar10", "model": "resnet20", "seed": seed, "images": 100, "loss": 1.0, what: 5}
            rows[what].append({**of, "ranking": "none", "treatment": "none", "share": 0.0, "accuracy": 0.9})
            for name in names:
                accuracy = 0.8 - (gap + spread * (seed - 1) if name == "exact" else 0.0)
                rows[what].append({**of, "ranking": name, "treatment": "set to 0", "share": 0.01, "accuracy": accuracy})
    pixels = pd.DataFrame(rows["pixels"]).drop(columns="treatment")
    return {"weights": pd.DataFrame(rows["weights"]), "pixels": pixels}


def test_one_network_leaves_an_interval_open_and_finite() -> None:
    one = {what: frame[frame["seed"] == frame["seed"].min()] for what, frame in tables(0.1, 0.001).items()}
    for found in fig_single_weights.claims(one).values():
        for estimate in found if isinstance(found, list) else [found]:
            assert (estimate.low, estimate.high, estimate.n) == (-2.0, 2.0, 1)


@pytest.mark.parametrize(
    ("gap", "spread", "outcome"),
    [(0.1, 0.001, "supported"), (-0.1, 0.001, "contradicted"), (0.0, 0.05, "undetermined")],
)
def test_claims_can_have_every_outcome(gap: float, spread: float, outcome: str) -> None:
    found = fig_single_weights.claims(tables(gap, spread))
    rules = {r.item: r for r in load() if r.artifact == "beyond/fig_single_weights"}
    assert rules.keys() == found.keys()
    for item, estimates in found.items():
        given = tuple(estimates) if isinstance(estimates, list) else (estimates,)
        assert rules[item].outcome(given) == outcome


def test_what_stands_beside_the_claims() -> None:
    given = tables(0.1)
    weights = given["weights"]
    rounded = weights[weights["ranking"] != "none"].assign(treatment="4 bits")
    found = fig_single_weights.beside({"weights": pd.concat([weights, rounded])})
    judged = fig_single_weights.claims(given)["fi_weights_hurt_more_than_random"]
    assert [one.value for one in found["fi_beyond_random_weights"]] == [judged.value]  # type: ignore[union-attr]
    assert found["weights_set_to_0_at_0.01"] == found["weights_in_4_bits_at_0.01"]
    last = next(one for one in found["other_weights_beyond_fi_at_0.01"] if one.of == "at random")
    assert last.value == pytest.approx(-found["fi_beyond_random_weights"][0].value)


def test_the_table_has_every_interval() -> None:
    summary = fig_single_weights.table(tables(0.1))
    row = summary.set_index(["what", "ranking"]).loc[("weights", "exact")]
    assert row["networks"] == 3 and row["lost_low"] < row["lost"] < row["lost_high"]
    assert row["lost"] == pytest.approx(0.2, abs=0.01)
    assert fig_single_weights.draw(pd.concat([summary, summary.assign(treatment="4 bits")])) is not None
