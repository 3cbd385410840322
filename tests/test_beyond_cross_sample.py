"""Leave-one-out of a last layer, what predicts it, and the claims about cross-sample FI."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import influence
from influence.companion.artifacts.beyond import fig_cross_sample
from influence.companion.artifacts.beyond.fig_cross_sample import PREDICTORS, TOTAL, WITHIN
from influence.companion.ledger import reference
from influence.companion.scores.leave_one_out import Regression, cross_sample_influence


@pytest.fixture(scope="module")
def fitted() -> Regression:
    torch.manual_seed(0)
    features = torch.cat([torch.randn(40, 3), torch.ones(40, 1)], dim=1).double()
    return Regression.fit(features, torch.randint(0, 4, (40,)), classes=4, penalty=0.5)


@pytest.fixture(scope="module")
def tests() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])


def gradient(weights: torch.Tensor, phi: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of -log P_y by the weights, flat, by automatic differentiation."""
    return torch.func.grad(lambda w: F.cross_entropy(w @ phi, label))(weights).flatten()


def objective(weights: torch.Tensor, fitted: Regression, kept: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(fitted.features[kept] @ weights.T, fitted.labels[kept], reduction="sum")
    return losses + fitted.penalty / 2 * weights.square().sum()


def test_cross_sample_fi_is_the_definition_with_a_pseudo_inverse(
    fitted: Regression, tests: tuple[torch.Tensor, torch.Tensor]
) -> None:
    found = cross_sample_influence(fitted.weights, fitted.features[:6], *tests)
    for i, phi in enumerate(fitted.features[:6]):
        scores = torch.func.jacrev(lambda w, phi=phi: F.log_softmax(w @ phi, dim=0))(fitted.weights).flatten(1)
        metric = (scores.T * (fitted.weights @ phi).softmax(0)) @ scores  # sum_k P_k s_k s_k^T
        inverse = torch.linalg.pinv(metric, rtol=1e-10, hermitian=True)
        for j, (other, label) in enumerate(zip(*tests, strict=True)):
            g = gradient(fitted.weights, other, label)
            torch.testing.assert_close(found[i, j], g @ inverse @ g, rtol=1e-9, atol=0)


def test_for_the_example_itself_it_is_the_librarys_fi(fitted: Regression) -> None:
    layer = torch.nn.Linear(4, 4, bias=False).double()
    layer.weight.data = fitted.weights
    metric = influence.metric_tensor(layer, fitted.features, wrt="parameters")
    expected = influence.first_order_influence(metric, fitted.labels)
    own = cross_sample_influence(fitted.weights, fitted.features, fitted.features, fitted.labels).diag()
    torch.testing.assert_close(own, expected.fi[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(fitted.ceiling(fitted.features, fitted.labels), expected.ceiling, rtol=1e-9, atol=0)


def test_predictions_are_their_formulas(fitted: Regression, tests: tuple[torch.Tensor, torch.Tensor]) -> None:
    chosen, everything = torch.tensor([3, 17]), torch.ones(40, dtype=torch.bool)
    hessian = torch.func.hessian(objective)(fitted.weights, fitted, everything).reshape(16, 16)
    torch.testing.assert_close(fitted.hessian, hessian, rtol=1e-10, atol=1e-12)
    found = fitted.predicted_changes(chosen, *tests)
    others = torch.stack([gradient(fitted.weights, phi, y) for phi, y in zip(*tests, strict=True)])
    for i, z in enumerate(chosen):
        kept = torch.arange(40) != z
        without = torch.func.hessian(objective)(fitted.weights, fitted, kept).reshape(16, 16)
        g = gradient(fitted.weights, fitted.features[z], fitted.labels[z])
        for name, expected in {
            "influence": others @ torch.linalg.solve(hessian, g),
            "newton": others @ torch.linalg.solve(without, g),
            "tracin": others @ g,
        }.items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("short_steps", [40, 0])
def test_leave_one_out_is_a_fit_without_the_example(
    fitted: Regression, short_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence.companion.scores.leave_one_out._SHORT_STEPS", short_steps)
    chosen = torch.tensor([0, 20, 39])
    weights, norm = fitted.leave_one_out(chosen)
    assert norm < 1e-11 and float(fitted.gradient(fitted.weights[None]).norm()) < 1e-11
    for found, z in zip(weights, chosen, strict=True):
        kept = torch.arange(40) != z
        again = Regression.fit(fitted.features[kept], fitted.labels[kept], classes=4, penalty=0.5)
        torch.testing.assert_close(found, again.weights, rtol=0, atol=1e-10)
        slope = torch.func.grad(objective)(found, fitted, kept)
        assert float(slope.norm()) < 1e-10


def test_what_cannot_be_fitted_is_refused(fitted: Regression) -> None:
    with pytest.raises(ValueError, match="float64"):
        Regression.fit(fitted.features.float(), fitted.labels, classes=4, penalty=1.0)
    with pytest.raises(ValueError, match="penalty > 0"):
        Regression.fit(fitted.features, fitted.labels, classes=4, penalty=0.0)
    with pytest.raises(ValueError, match="its metric tensor is 0"):
        cross_sample_influence(fitted.weights, torch.zeros(1, 4).double(), fitted.features, fitted.labels)


def test_agreement_by_hand() -> None:
    change = np.array([[1.0, -1.0], [-2.0, 2.0], [3.0, 0.5]])
    values = {"change": change, "influence": -change, "cross_fi": np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])}
    found = fig_cross_sample.measures(values, np.array([7, 8, 9]), np.array([4, 5])).set_index(["quantity", "of"])
    assert found.loc[("influence", "test"), "size"].tolist() == pytest.approx([1, 1])
    assert found.loc[("influence", "test"), "signed"].tolist() == pytest.approx([-1, -1])
    # |change| of the second test image is 1, 2, .5: ranks 2, 3, 1 against 1, 2, 3.
    assert found.loc[("cross_fi", "test"), "size"].tolist() == pytest.approx([-1, -0.5])
    assert found.loc[("cross_fi", "test"), "signed"].isna().all()
    assert found.loc[("change", "training"), "size"].tolist() == [1, 2, 1.75]
    assert found.loc[("change", "training"), "signed"].tolist() == [0, 0, 1.75]


def correlations(fi: float, by_seed: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Those of three networks at two penalties, of which the second has the smaller validation loss."""
    cells = [(s, l2) for s in range(3) for l2 in (0, 0.5)]
    fits = pd.DataFrame({"seed": s, "l2": l2, "validation_loss": 1 - l2, "identity": 0.0} for s, l2 in cells)
    rows = [
        {"seed": s, "l2": l2, "quantity": name, "among": among, "signed": math.nan,
         "size": (fi + by_seed * (s - 1) if name == "cross_fi" else 0.5) if l2 else -1.0}
        for s, l2 in cells for name in PREDICTORS for among in (WITHIN, TOTAL)
    ]  # fmt: skip
    return fits, pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("fi", "by_seed", "less", "orders"),
    [(0.2, 0.01, "checked", "checked"), (-0.2, 0.01, "checked", "check fails"), (0.8, 0.01, "check fails", "checked"),
     (0.5, 0.5, "undetermined", "undetermined")],
)  # fmt: skip
def test_claims(fi: float, by_seed: float, less: str, orders: str) -> None:
    fits, found = correlations(fi, by_seed)
    claims = fig_cross_sample.claims(fits, found)
    assert {e.df for e in claims.values() if isinstance(e, reference.Estimate)} == {2}
    outcomes = {c.item: c.outcome for c in reference.compare("beyond/fig_cross_sample", claims)}
    assert outcomes["cross_sample_fi_less_influence_functions"] == less
    assert outcomes["cross_sample_fi_orders_changes"] == outcomes["cross_sample_fi_orders_totals"] == orders
    assert outcomes["identity_of_the_image_itself"] == "checked"
    assert not fig_cross_sample.claims(fits.assign(identity=1e-3), found)["identity_of_the_image_itself"]
