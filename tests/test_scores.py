"""The rival scores against autograd, and the closed form of the released estimator against the logged values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import influence
from influence.companion.images import data
from influence.companion.scores import imagewise
from influence.companion.scores.detection import detection


def relu_network(smooth: bool = False) -> nn.Module:
    torch.manual_seed(0)
    act = nn.Tanh() if smooth else nn.ReLU()
    layers = [nn.Conv2d(1, 4, 3, padding=1), act, nn.Flatten(), nn.Linear(256, 32), act, nn.Linear(32, 10)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        net[0].weight.mul_(0.01)
    return net


@pytest.fixture(scope="module")
def images() -> data.Split:
    return data.load("digits").test.sample(12)


def test_scores_against_autograd(images: data.Split) -> None:
    model = relu_network()
    table = imagewise.all_scores(model, images)
    assert table.columns[7:].tolist() == list(imagewise.NAMES)
    for i in range(len(images)):
        x, y = images.images[i : i + 1].double().requires_grad_(), images.labels[i]
        network = relu_network().double()
        loss = F.cross_entropy(network(x), y[None])
        p = network(x).softmax(1)[0].detach().numpy()
        gradient = torch.autograd.grad(loss, [x, *network.parameters()], create_graph=True)
        row = table.iloc[i]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["exact"] == pytest.approx(np.expm1(loss.item()), rel=1e-4)
        assert row["jacobian_norm"] == pytest.approx(gradient[0].norm().item(), rel=1e-4)
        assert row["grand"] == pytest.approx(sum(g.square().sum() for g in gradient[1:]).sqrt().item(), rel=1e-4)
        assert row["el2n"] == pytest.approx(np.linalg.norm(p - np.eye(10)[y]), rel=1e-4)
        assert row["max_softmax"] == pytest.approx(1 - p.max(), rel=1e-4)
        assert row["margin"] == pytest.approx(1 - p[y] + np.delete(p, y).max(), rel=1e-4)


@pytest.mark.parametrize("smooth", [False, True])
def test_local_influence_is_the_largest_eigenvalue_of_the_hessian(images: data.Split, smooth: bool) -> None:
    model = relu_network(smooth).double()
    x = images.images[:4].double()
    found = imagewise.local_influence(model, x, images.labels[:4], steps=64 if smooth else None)
    for i in range(4):
        hessian = torch.autograd.functional.hessian(
            lambda z, i=i: F.cross_entropy(model(z.view(1, 1, 8, 8)), images.labels[i : i + 1]), x[i].flatten()
        )
        assert float(found[i]) == pytest.approx(float(torch.linalg.eigvalsh(hessian).abs().max()), rel=1e-6)
    largest = influence.metric_tensor(model, x).lambda_max()[:, 0]
    # Piecewise linear in the image: the Hessian is the metric tensor, whatever the label; not of a smooth network.
    assert torch.allclose(found, largest, rtol=1e-6) is not smooth


def test_an_unknown_score_cannot_be_left_out(images: data.Split) -> None:
    with pytest.raises(ValueError, match="unknown score 'curvature'"):
        imagewise.all_scores(relu_network(), images, without=["curvature"])


def test_exact_fi_and_loss_have_one_auroc_at_full_rank() -> None:
    table = imagewise.all_scores(relu_network(), data.load("digits").test, without=["cook", "grand"])
    table = table[table["rank"] == 9]
    assert len(table) > 200
    wrong = table["label"] != table["predicted"]
    exact, loss = (detection(table[name], wrong, repeats=2)["auroc"] for name in ("exact", "loss"))
    assert abs(exact - loss) <= 1e-12


# -- the released estimator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 1e-8])
def test_closed_form_is_the_released_estimator_at_full_rank(epsilon: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    with torch.no_grad():
        model[0].weight.mul_(300)  # far above the cut
    x, y = torch.randn(20, 12, dtype=torch.float64) / 300, torch.arange(20) % 10
    metric = influence.metric_tensor(model, x)
    found = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
    assert (found.rank == 9).all()
    expected = imagewise.released_at_full_rank(metric.log_probs.exp().numpy(), y.numpy(), epsilon=epsilon)
    np.testing.assert_allclose(found.fi[:, 0], expected, rtol=1e-9)


def test_closed_form_peaks_near_266() -> None:
    p = np.geomspace(1e-6, 0.5, 100_001)
    values = imagewise.released_at_full_rank(np.column_stack([p, 1 - p]), 0)
    assert values.max() == pytest.approx(266.05, abs=0.05) and p[values.argmax()] == pytest.approx(9.4e-4, rel=0.01)
    assert imagewise.released_at_full_rank(np.array([1e-12, 1 - 1e-12]), 0) == pytest.approx(1, abs=5e-3)


# P_pred and FI as logged in the released code, and how far that FI is from (1 - P) / P at most.
LOGGED = [(0.50197196, 0.991784453, 4e-4), (0.5075366, 0.968201160, 2.2e-3), (0.7040077, 0.420629054, 5e-4)]


@pytest.mark.parametrize(("p", "logged", "stated"), LOGGED)
def test_logged_pairs(p: float, logged: float, stated: float) -> None:
    """P alone leaves the closed form free within .4%: the rest of the probability on one class, or on all nine."""
    one, even = [p, 1 - p, *[0] * 8], [p, *[(1 - p) / 9] * 9]
    low, high = (float(imagewise.released_at_full_rank(np.array(probs), 0)) for probs in (one, even))
    assert low < high < low * 1.006
    assert abs(logged / ((1 - p) / p) - 1) <= stated
    # Inside that range, or no farther below it than the digits stated; below, since a cut direction only lowers FI.
    assert low * (1 - stated) <= logged <= high
