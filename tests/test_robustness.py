"""Certificates, attacks, and the experiments that use them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from influence.companion.artifacts.bridge import fig_trace
from influence.companion.artifacts.stability import table_certified
from influence.companion.ledger import reference
from influence.companion.ledger.reference import Estimate
from influence.companion.scores import attacks, smoothing


class Halfspace(nn.Module):
    """Class 1 where the first pixel exceeds 127.5: its smoothed version is known exactly."""

    def forward(self, x: Tensor) -> Tensor:
        margin = x[:, 0, 0, 0] - 127.5
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def image(first: int) -> Tensor:
    picture = torch.zeros(1, 2, 2, dtype=torch.uint8)
    picture[0, 0, 0] = first
    return picture


def certify(first: int, *, estimate: int = 2000, seed: int = 0) -> smoothing.Certificate:
    generator = torch.Generator().manual_seed(seed)
    return smoothing.certify(
        Halfspace(), image(first), sigma=0.2, select=50, estimate=estimate, level=0.001, generator=generator
    )


def test_lower_bound_is_clopper_pearson() -> None:
    assert smoothing.lower_bound(90, 100, level=0.05) == pytest.approx(stats.beta.ppf(0.05, 90, 11), rel=1e-9)
    assert smoothing.lower_bound(100, 100, level=0.001) == pytest.approx(0.001 ** (1 / 100), rel=1e-9)
    assert smoothing.lower_bound(0, 100, level=0.05) == 0


@pytest.mark.parametrize("first", [160, 190, 60])
def test_the_radius_is_below_the_true_one_and_near_it(first: int) -> None:
    found, true = certify(first), abs(first - 127.5) / 255
    assert found.predicted == int(first > 127.5)
    assert 0.8 * true < found.radius <= true


def test_abstains_at_the_boundary_and_without_evidence() -> None:
    assert certify(128).predicted == smoothing.ABSTAIN
    assert certify(160, estimate=3) == smoothing.Certificate(smoothing.ABSTAIN, 0.0)


def test_certificates_are_wrong_no_more_often_than_promised() -> None:
    true = 30.5 / 255
    wrong = sum(certify(158, estimate=100, seed=s).radius > true for s in range(100))
    assert wrong <= 2  # promised: 1 in 1,000


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"select": 0}, {"estimate": 0}])
def test_bad_settings(options: dict[str, float]) -> None:
    setting = {"sigma": 0.1, "select": 1, "estimate": 1} | options
    with pytest.raises(ValueError, match=r"positive|at least 1"):
        smoothing.certify(Halfspace(), image(9), level=0.01, generator=torch.Generator(), **setting)


def test_fgsm_is_the_sign_of_the_gradient_and_pgd_is_stronger() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    net[1].weight.data /= 40
    x, y = 255 * torch.rand(20, 1, 4, 4), torch.randint(3, (20,))
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(net(leaf), y).backward()
    assert leaf.grad is not None
    expected = (x + 255 * 0.1 * leaf.grad.sign()).clamp(0, 255)
    torch.testing.assert_close(attacks.fgsm(net, x, y, epsilon=0.1), expected)
    strong = attacks.pgd(net, x, y, epsilon=0.1, steps=20, step_size=0.02, generator=torch.Generator().manual_seed(0))
    assert (strong - x).abs().max() <= 25.5 + 1e-3 and strong.min() >= 0 and strong.max() <= 255

    def loss(images: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(net(images), y).detach())

    assert loss(x) < loss(expected) <= loss(strong) + 1e-3
    torch.testing.assert_close(attacks.pgd(net, x, y, epsilon=0.0, steps=3, step_size=0.1), x)
    with pytest.raises(ValueError, match="evaluation mode"):
        attacks.fgsm(net.train(), x, y, epsilon=0.1)


def test_table_and_findings() -> None:
    rows, hits = [], []
    for seed, image in itertools.product(range(3), range(10)):
        for arm, radius in (("control", 0.1), ("stability 1", 0.2)):
            common = {"seed": seed, "arm": arm, "image": image}
            wrong = image == 9
            rows.append({**common, "radius": 0.0 if wrong else radius + 0.001 * seed, "abstained": False})
            for attack in ("fgsm", "pgd"):
                hits += [
                    {**common, "attack": attack, "epsilon": e, "right": float(image < a)}
                    for e, a in ((0.0, 9), (0.1, 1))
                ]
    tables = {"certificates": pd.DataFrame(rows), "attacks": pd.DataFrame(hits)}
    findings = table_certified.claims(tables, {"alphas": [0.01, 1.0]})
    grows, no_robustness = findings["certified_radius_grows"], findings["no_adversarial_robustness"]
    assert isinstance(grows, Estimate) and isinstance(no_robustness, Estimate)
    # Ten images leave more open than three seeds that nearly agree.
    half = stats.t.ppf(0.975, 9) * np.std([0.1] * 9 + [0], ddof=1) / 10**0.5
    assert (grows.value, grows.n) == (pytest.approx(0.09), 10) and no_robustness.value == pytest.approx(0.35)
    assert (grows.low, grows.high) == (pytest.approx(0.09 - half), pytest.approx(0.09 + half))
    outcomes = {c.item: c.outcome for c in reference.compare("stability/table_certified", findings)}
    assert outcomes["certified_radius_grows"] == outcomes["no_adversarial_robustness"] == "checked"
    table = table_certified.summary(tables, [0.0, 0.15])
    assert set(table["quantity"]) == {"certified", "fgsm", "pgd"} and len(table) == 12
    certified = table[table["quantity"] == "certified"].set_index(["strength", "arm"])["value"]
    assert certified.round(9).to_dict() == {
        (0.0, "control"): 0.9, (0.0, "stability 1"): 0.9, (0.15, "control"): 0.0, (0.15, "stability 1"): 0.9
    }  # fmt: skip
    assert len(table_certified.draw(table, images=10).axes) == 3


def test_trace_tables() -> None:
    rows = [
        {"seed": seed, "arm": arm, "image": image, "sigma": sigma, "trace": trace, "lambda_max": trace / 2,
         "ceiling": 1.0, "fi": 1.0, "loss": sigma**2 / 2 * trace * 1.01,
         "loss_variance": (0.1 * sigma**2 / 2 * trace) ** 2, "limit": sigma**2 / 2 * trace,
         "quadratic": sigma**2 / 2 * trace * (1.01 if sigma < 0.01 else 1.01 / (1 + image)), "p_top": 1 - image / 10}
        for seed in range(3) for image in range(4) for sigma in (0.001, 0.1)
        for arm, trace in (("control", 8.0 + image), ("stability 1", (8.0 + image) / (2 + 0.01 * seed)))
    ]  # fmt: skip
    found = pd.DataFrame(rows)
    table, changes = fig_trace.losses(found), fig_trace.effect(found)
    assert table["ratio"].to_numpy() == pytest.approx(1.01)
    assert table["ratio_error"].to_numpy() == pytest.approx(0.1 / 12**0.5, rel=0.05)
    halved = changes.set_index("measure").loc["trace"]
    assert halved["ratio"] == pytest.approx(math.exp(-np.mean(np.log([2, 2.01, 2.02])))) and halved["high"] < 0.51
    reached = fig_trace.law({"measures": found})
    claims = fig_trace.claims(found, changes, reached, sigma=0.1)
    assert claims["loss_is_the_quadratic_form"] is True
    assert [e.value for e in claims["departure_at_the_training_noise"]] == pytest.approx([2.5, 2.5])
    assert [e.value for e in claims["departure_of_the_surest_third"]] == pytest.approx([1, 1])
    far = reached[(reached["sigma"] == 0.1) & (reached["network"] == "control")].set_index("third")["median"]
    assert far["least sure third"] > far["surest third"] == pytest.approx(1)
    assert claims["ratio_of_traces"].high < 0.51 and claims["ratio_of_traces"].n == 3
    assert all(
        claims[f"ratio_of_{name}"].df == 2 and claims[f"ratio_of_{name}"].ratio for name in ("traces", "mean_traces")
    )
    assert claims["ratio_of_mean_traces"].value == pytest.approx(claims["ratio_of_traces"].value)
    thirds = claims["ratio_of_traces_by_confidence"]
    assert [e.of for e in thirds] == list(fig_trace.CONFIDENCE) and {(e.n, e.df, e.ratio) for e in thirds} == {
        (3, 2, True)
    }
    assert [e.value for e in thirds] == pytest.approx(
        [claims["ratio_of_traces"].value] * 3
    )  # the arm divides all alike
    worse = fig_trace.claims(found, changes, reached.assign(median=1.02), sigma=0.1)
    assert worse["loss_is_the_quadratic_form"] is False
    assert len(fig_trace.draw(table, changes).axes) == 2 and len(fig_trace.draw_law(reached).axes) == 2
    alone = found[found["seed"] == 0]
    claims = fig_trace.claims(alone, fig_trace.effect(alone), fig_trace.law({"measures": alone}), sigma=0.1)
    ratios = [*claims["ratio_of_traces_by_confidence"], claims["ratio_of_traces"], claims["ratio_of_mean_traces"]]
    for ratio in ratios:  # one network leaves everything open, and a ledger takes no infinity
        assert (ratio.n, ratio.df) == (1, None) and 0 < ratio.low < 1e-40 < 1e40 < ratio.high < math.inf


def test_images_that_several_networks_share_are_counted_once() -> None:
    ratio = np.exp(np.random.default_rng(1).normal(0, 2, 60))

    def interval(*factors: float) -> tuple[float, float]:
        """Of the median of the ratio over 60 images and networks, each with the ratio of the first times a factor."""
        frames = [
            pd.DataFrame({"seed": seed, "image": range(60), "sigma": 0.04, "p_top": np.arange(60) / 60}).assign(
                loss=factor * ratio, quadratic=1.0
            )
            for seed, factor in enumerate(factors)
        ]
        whole = fig_trace.reach(pd.concat(frames, ignore_index=True)).set_index("third").loc["all"]
        assert (whole["images"], whole["seeds"]) == (60, len(factors))
        return np.log(whole["low"]), np.log(whole["high"])

    one, alike, different = interval(1), interval(1, 1, 1), interval(1 / 9, 1, 9)
    # Three networks that agree on every image say no more than one of them, and no less.
    assert alike == pytest.approx(one, rel=1e-12)
    assert different[1] - different[0] > 1.5 * (one[1] - one[0])


def test_the_quadratic_form_is_that_of_the_metric_tensor() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, noise = torch.randn(3, 3, 2, 2).double(), torch.randn(3, 3, 2, 2).double()
    log_p = network(x).detach().log_softmax(1)
    for image in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: network(z)[0].log_softmax(0), x[image : image + 1])
        slopes = jacobian.flatten(1) @ noise[image].flatten()
        expected = float((log_p[image].exp() * slopes.square()).sum() / 2)
        assert float(fig_trace._quadratic(network, x, noise)[image]) == pytest.approx(expected)
