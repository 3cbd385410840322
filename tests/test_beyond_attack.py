"""The swarm on functions solved by hand, the choices of values against their formula, and the rules of fig_attack."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from influence.companion.artifacts.beyond import fig_attack
from influence.companion.images.data import Split
from influence.companion.images.pictures import unpacked
from influence.companion.ledger import reference
from influence.companion.scores import pixelwise, swarm
from truth import input_jacobian

CPU = torch.device("cpu")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_swarm_finds_the_minimum_of_each_box() -> None:
    centres = torch.tensor([[1.0, -2.0, 0.5], [0.0, 9.0, 0.5]], dtype=torch.float64)
    low, high = -3 * torch.ones_like(centres), 3 * torch.ones_like(centres)
    low[:, 2] = high[:, 2] = 0.25  # held where it is

    def bowl(places: Tensor) -> Tensor:
        return (places - centres).square().sum(-1)

    place, value = swarm.minimise(bowl, low, high, particles=30, steps=200, generator=seeded())
    expected = torch.tensor([[1.0, -2.0, 0.25], [0.0, 3.0, 0.25]], dtype=torch.float64)  # 9 lies outside the box
    torch.testing.assert_close(place, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(value, bowl(place), rtol=1e-12, atol=0)
    # A longer search is never worse: the best place so far is kept.
    _, few = swarm.minimise(bowl, low, high, particles=30, steps=3, generator=seeded())
    assert (value <= few).all()


def test_one_step_by_the_formula() -> None:
    low, high = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    looked: list[Tensor] = []

    def objective(places: Tensor) -> Tensor:
        looked.append(places.clone())
        return places[..., 0]

    swarm.minimise(objective, low, high, particles=2, steps=2, generator=seeded())
    draws = torch.Generator().manual_seed(0)
    start, r1, r2, s1, s2 = (torch.rand(2, 1, 1, generator=draws, dtype=torch.float64) for _ in range(5))
    torch.testing.assert_close(looked[0], start)
    largest = swarm.LARGEST_STEP
    speed = (2.0 * r2 * (start.min() - start)).clamp(-largest, largest)  # at rest, each at its own best
    torch.testing.assert_close(looked[1], (start + speed).clamp(0, 1))
    own, now = torch.minimum(start, looked[1]), looked[1]
    speed = (0.6 * speed + 2 * s1 * (own - now) + 2 * s2 * (own.min() - now)).clamp(-largest, largest)
    torch.testing.assert_close(looked[2], (now + speed).clamp(0, 1))
    assert r1.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"), [({"particles": 0, "steps": 1}, "particles"), ({"particles": 1, "steps": -1}, "steps")]
)
def test_the_swarm_refuses(options: dict[str, int], message: str) -> None:
    box = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        swarm.minimise(lambda places: places.sum(-1), box, box, generator=seeded(), **options)
    with pytest.raises(ValueError, match="low <= high"):
        swarm.minimise(lambda places: places.sum(-1), box + 1, box, particles=1, steps=1, generator=seeded())


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[1].weight.mul_(0.02)
    return net


@pytest.fixture
def split() -> Split:
    images = torch.randint(0, 256, (9, 2, 3, 3), generator=seeded()).to(torch.uint8)
    return Split(images, torch.zeros(9, dtype=torch.int64), torch.arange(9))


def test_choices_rank_by_their_formula(network: nn.Module, split: Split) -> None:
    x = split.images.float()
    predicted, target, scores = fig_attack.ranked(network, x, generator=seeded())
    for n, image in enumerate(x.double()):
        logits, jacobian = input_jacobian(network.double(), image)
        p = logits.softmax(0)
        assert [int(predicted[n]), int(target[n])] == p.argsort(descending=True)[:2].tolist()
        s = jacobian.reshape(4, -1) - p @ jacobian.reshape(4, -1)  # d log P_k of each value
        trace = p @ s.square()
        expected = {"fi": s[target[n]].square() / trace, "saliency": s[target[n]].abs(), "trace": trace}
        for name, value in expected.items():
            torch.testing.assert_close(scores[name][n], value, rtol=1e-3, atol=1e-9)
    mask = pixelwise.top_entries(scores["fi"], 3)
    assert (mask.sum(1) == 3).all() and scores["fi"][mask].min() >= 0
    assert (scores["fi"].masked_fill(mask, -1).amax(1) <= scores["fi"].masked_fill(~mask, 9e9).amin(1)).all()


def test_attacked_moves_what_it_says(network: nn.Module, split: Split) -> None:
    frame = fig_attack.attacked(network.float(), split, share=0.2, reach=0.15, particles=3, steps=2, seed=0, device=CPU)
    again = fig_attack.attacked(network.float(), split, share=0.2, reach=0.15, particles=3, steps=2, seed=0, device=CPU)
    pd.testing.assert_frame_equal(frame, again)
    assert len(frame) == 9 * len(fig_attack.CHOICES)
    chosen = frame[frame["choice"] != fig_attack.PUBLISHED]
    assert (chosen["values"] == 4).all()  # a fifth of 18
    published = frame[frame["choice"] == fig_attack.PUBLISHED]
    assert (published["values"] == (18 * published["passing"]).round()).all()
    assert not (frame["reached"] & ~frame["changed"]).any()
    still = fig_attack.attacked(network.float(), split, share=0.2, reach=0.0, particles=2, steps=1, seed=0, device=CPU)
    assert not still["changed"].any()  # nowhere to go


def test_the_image_that_is_shown(network: nn.Module, split: Split) -> None:
    split = Split(split.images.view(9, 1, 3, 6), split.labels, split.index)
    options = {"share": 0.2, "reach": 0.15, "particles": 3, "steps": 2, "seed": 0, "device": CPU}
    attacks = fig_attack.attacked(network.float(), split, **options)  # type: ignore[arg-type]
    attacks["changed"] = attacks["image"] == 5
    dataset = SimpleNamespace(classes=list("abcd"))
    subject = SimpleNamespace(dataset=dataset, trained=SimpleNamespace(model=network))
    tables = fig_attack.shown(subject, split, attacks, device=CPU)  # type: ignore[arg-type]
    before, after = (row for _, row in tables["pictures"].iterrows())
    assert before["image"] == 5 and (unpacked(before) == split.images[5].permute(1, 2, 0).numpy()).all()
    change = unpacked(after).astype(int) - unpacked(before)
    assert 0 < abs(change).max() <= 0.15 * 255 + 0.5
    predicted, target, scores = fig_attack.ranked(network, split.images[5:6].float(), generator=seeded())
    assert (before["predicted"], before["target"]) == ("abcd"[int(predicted)], "abcd"[int(target)])
    torch.testing.assert_close(torch.tensor(tables["maps"]["fi"]), scores["fi"][0], rtol=1e-5, atol=0)
    at = tables["maps"].iloc[7]
    assert (at["channel"], at["row"], at["column"]) == (0, 1, 1)
    about = {"dataset": "mnist", "model": "resnet50", "seed": 0}
    figure = fig_attack.draw_maps({name: frame.assign(**about) for name, frame in tables.items()})
    assert "test image 5" in figure.axes[0].get_ylabel()


def made(changed: dict[str, int]) -> pd.DataFrame:
    """A hundred images of which each choice changes so many."""
    frames = [
        pd.DataFrame({"image": range(100), "choice": choice, "changed": [i < changed[choice] for i in range(100)]})
        for choice in fig_attack.CHOICES
    ]
    about = {"dataset": "mnist", "model": "m", "seed": 0, "values": 5, "passing": 0.9, "reached": False}
    return pd.concat(frames, ignore_index=True).assign(**about)


@pytest.mark.parametrize(
    ("fi", "outcome"), [(90, "checked"), (10, "check fails"), (51, "undetermined"), (50, "undetermined")]
)
def test_claims_follow_the_rules(fi: int, outcome: str) -> None:
    others = dict.fromkeys(("saliency", "random", "trace", fig_attack.PUBLISHED), 50)
    table = fig_attack.summary(made({"fi": fi, **others}))
    claims = fig_attack.claims(table)
    found = {c.item: c.outcome for c in reference.compare("beyond/fig_attack", claims)}
    assert found["fi_beats_gradient"] == found["fi_beats_random"] == outcome
    assert found["fi_against_trace"] is None and found["threshold_passes"] is None
    (estimate,) = claims["fi_beats_gradient"]
    assert estimate.value == pytest.approx((fi - 50) / 100) and estimate.n == 100
    assert claims["threshold_passes"][0].value == pytest.approx(0.9)
    figure = fig_attack.draw(table)
    assert "n = 100 images" in figure.axes[0].get_title(loc="left")
