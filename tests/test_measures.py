"""The influence measure against brute force, its identities, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import influence
import truth
from influence.measures import Estimator

# abs=0 below: approx's own 1e-12 would pass anything where 1 - P_y is 1e-12.
SEEDS = st.integers(0, 10**6)


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(logits: Tensor, jacobian: Tensor, dtype: torch.dtype = torch.float64) -> influence.MetricTensor:
    """The metric tensor of N examples and one block with given logits ``(N, K)`` and Jacobians ``(N, K, p)``."""
    return influence.MetricTensor(
        log_probs=logits.double().log_softmax(dim=1),
        gram=(jacobian @ jacobian.mT)[:, None],
        blocks=("block",),
        dims=torch.tensor([jacobian.shape[-1]]),
        dtype=dtype,
    )


def network(*, classes: int = 6, width: int = 10, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, classes)).double()
    for i, p in enumerate(model.parameters()):
        p.data = gauss(*p.shape, seed=seed + i)
    return model


@pytest.mark.parametrize("prob", [1e-12, 1e-6, 1e-3, 0.3, 0.9, 1 - 1e-6, 1 - 1e-9])
@pytest.mark.parametrize("wrt", ["input", "parameters", "layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_is_the_ceiling_at_full_rank(prob: float, wrt: str, dtype: torch.dtype) -> None:
    model, x = network().to(dtype), gauss(2, 12, seed=9).to(dtype)
    head = model[-1]
    with torch.no_grad():
        head.weight *= 0.05
        head.bias.zero_()
        head.bias[2] = truth.log_odds(prob, 6)
    result = influence.first_order_influence(influence.metric_tensor(model, x, wrt=wrt), [2, 2])
    assert (result.rank == 5).all()
    with torch.no_grad():
        logits = model(x).double()
    for n in range(2):
        rest = sum(math.exp(z - logits[n, 2].item()) for k, z in enumerate(logits[n].tolist()) if k != 2)
        # The forward pass may round logits of another batch size differently.
        slack = 1e-6 if dtype == torch.float64 else 2e-5
        assert result.ceiling[n].item() == pytest.approx(rest, rel=slack, abs=0)
        assert result.fi[n].tolist() == [result.ceiling[n].item()] * result.fi.shape[1]
        assert result.alignment[n].tolist() == [1.0] * result.fi.shape[1]


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_exact_against_the_thin_svd(wrt: str) -> None:
    # Width 3 < K - 1: the input and the first layer reach three directions, the head all.
    model, x, labels = network(width=3), gauss(5, 12, seed=9) * 0.3, [0, 1, 2, 3, 4]
    result = influence.first_order_influence(influence.metric_tensor(model, x, wrt=wrt), labels)
    groups = [list(m.parameters()) for m in (model[0], model[2])]
    assert result.rank.tolist() == [[3]] * 5 if wrt == "input" else [[3, 5]] * 5
    for n, label in enumerate(labels):
        jacobians = (
            [truth.input_jacobian(model, x[n])]
            if wrt == "input"
            else [truth.parameter_jacobian(model, x[n], group) for group in groups]
        )
        for b, (logits, jacobian) in enumerate(jacobians):
            value, rank = truth.influence(logits, jacobian, label)
            assert result.rank[n, b] == rank
            assert result.fi[n, b].item() == pytest.approx(value, rel=1e-6, abs=0)
            assert result.alignment[n, b].item() == pytest.approx(value / result.ceiling[n].item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("log_prob", [-69.0, -40.0, -10.0, -1.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_ceiling_keeps_ten_digits(log_prob: float, classes: int) -> None:
    # P_y from 1e-30 to 1 - 1e-12: the label is the unlikely class, then the likely one.
    logits = torch.full((2, classes), 0.0, dtype=torch.float64)
    logits[:, 0] = log_prob * 0.4
    logits[0, 0], logits[1, 1] = log_prob, min(-log_prob, 28.0)
    result = influence.first_order_influence(metric_of(logits, gauss(2, classes, 3)), [0, 1])
    for n, y in enumerate((0, 1)):
        _, ceiling = truth.influence_in_many_digits(logits[n].tolist(), gauss(classes, 1), y)
        assert result.ceiling[n].item() == pytest.approx(ceiling, rel=1e-10, abs=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    spread=st.sampled_from([1.0, 10.0, 35.0]),
    width=st.integers(1, 4),
    lam=st.sampled_from([0.0, 1e-6, 3.0]),
)
def test_below_full_rank_against_many_digits(seed: int, spread: float, width: int, lam: float) -> None:
    """Probabilities from 1 down to 1e-30 and beyond, where a float64 SVD of L0 keeps no digit."""
    classes = 6
    logits, jacobian = spread * gauss(1, classes, seed=seed), gauss(1, classes, width, seed=seed + 1)
    label = seed % classes
    estimator = influence.Regularised(lam) if lam else influence.Exact()
    result = influence.first_order_influence(metric_of(logits, jacobian), [label], estimator=estimator)
    value, ceiling = truth.influence_in_many_digits(logits[0].tolist(), jacobian[0], label, lam=lam)
    assert result.fi.item() == pytest.approx(value, rel=1e-6, abs=0)
    assert result.ceiling.item() == pytest.approx(ceiling, rel=1e-10, abs=0)
    if not lam:
        assert result.alignment.item() == pytest.approx(value / ceiling, rel=1e-6, abs=0)
    assert result.rank.item() == width


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, copies=st.integers(1, 3), spread=st.sampled_from([3.0, 30.0]))
@example(seed=33217, copies=3, spread=30.0)  # P_y = 4e-42 beside a copy of probability 3e-6
def test_classes_that_move_together_need_no_direction_of_their_own(seed: int, copies: int, spread: float) -> None:
    """Rows that repeat each other up to rounding must not be told apart by a large probability."""
    classes = 7
    logits, jacobian = spread * gauss(1, classes, seed=seed), gauss(1, classes, 3, seed=seed + 1)
    for k in range(1, copies + 1):
        jacobian[0, k] = jacobian[0, 0]
    result = influence.first_order_influence(metric_of(logits, jacobian), [classes - 1])
    value, _ = truth.influence_in_many_digits(logits[0].tolist(), jacobian[0], classes - 1)
    assert result.fi.item() == pytest.approx(value, rel=1e-6 if spread < 10 else 1e-4, abs=0)


@pytest.mark.parametrize("log_prob", [-10.0, -90.0])
@pytest.mark.parametrize("classes", [6, 140])
def test_copies_up_to_rounding_of_the_jacobian_are_marked(log_prob: float, classes: int) -> None:
    """What a float32 Jacobian leaves between two copies says nothing of FI, once P_y is below its square."""
    logits, jacobian = gauss(1, classes), gauss(1, classes, 3, seed=1)
    jacobian[0, 1:-1] = jacobian[0, 0]
    logits[0, -1] = log_prob
    copied = influence.first_order_influence(metric_of(logits, jacobian), [classes - 1])
    assert copied.alignment.item() == pytest.approx(1.0, rel=1e-4)
    jacobian *= 1 + 1e-6 * gauss(*jacobian.shape, seed=2)
    rounded = influence.first_order_influence(metric_of(logits, jacobian, torch.float32), [classes - 1])
    assert rounded.rank.item() == copied.rank.item() == 1
    assert rounded.near_cut.item() == (log_prob == -90.0)
    assert (rounded.alignment.item() > 0.999) == (log_prob == -10.0)


def test_one_parameter() -> None:
    logits, jacobian = 2 * gauss(4, 5, seed=3), gauss(4, 5, 1, seed=4)
    result = influence.first_order_influence(metric_of(logits, jacobian), [0, 1, 2, 3])
    probs = logits.softmax(1)
    score = (jacobian - (probs[:, :, None] * jacobian).sum(1, keepdim=True))[..., 0]
    expected = score[range(4), range(4)].square() / (probs * score.square()).sum(1)
    torch.testing.assert_close(result.fi[:, 0], expected, rtol=1e-12, atol=0)
    assert result.rank.flatten().tolist() == [1] * 4


def test_two_classes_and_no_influence() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    jacobian = torch.zeros(2, 2, 4, dtype=torch.float64)
    jacobian[0, 0, 1] = 1e-9
    result = influence.first_order_influence(metric_of(logits, jacobian), [1, 1])
    assert result.fi.flatten().tolist() == pytest.approx([math.exp(3.0), 0.0])
    assert result.alignment.flatten().tolist() == [1.0, 0.0]
    assert result.rank.flatten().tolist() == [1, 0]
    for estimator in (influence.Released(), influence.Regularised(1.0)):
        assert influence.first_order_influence(metric_of(logits, jacobian), [1, 1], estimator=estimator).fi[1] == 0
    common = metric_of(logits, torch.ones_like(jacobian))
    assert influence.first_order_influence(common, [1, 1]).rank.flatten().tolist() == [0, 0]


ESTIMATORS = [influence.Exact(), influence.Released(1e-3), influence.Regularised(0.1)]


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, width=st.integers(1, 8))
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_class_permutation_and_orthogonal_change(estimator: Estimator, seed: int, width: int) -> None:
    classes = 6
    logits, jacobian = 3 * gauss(1, classes, seed=seed), gauss(1, classes, width, seed=seed + 1)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    label = seed % classes
    place = int((order == label).nonzero())
    rotation = torch.linalg.qr(gauss(width, width, seed=seed + 2))[0]
    first = influence.first_order_influence(metric_of(logits, jacobian), [label], estimator=estimator)
    metric = metric_of(logits[:, order], jacobian[:, order] @ rotation)
    second = influence.first_order_influence(metric, [place], estimator=estimator)
    assert second.rank.item() == first.rank.item()
    assert second.fi.item() == pytest.approx(first.fi.item(), rel=1e-7, abs=0)
    assert second.alignment.item() == pytest.approx(first.alignment.item(), rel=1e-7, abs=0)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, width=st.integers(1, 8), unit=st.sampled_from([1 / 255, 1e-4, 255.0, 1e6]))
def test_the_unit_of_omega_does_not_matter(seed: int, width: int, unit: float) -> None:
    logits, jacobian = 3 * gauss(2, 6, seed=seed), gauss(2, 6, width, seed=seed + 1)
    one, other = metric_of(logits, jacobian), metric_of(logits, jacobian * unit)
    first, second = (influence.first_order_influence(m, [0, 1]) for m in (one, other))
    assert torch.equal(first.rank, second.rank)
    torch.testing.assert_close(first.fi, second.fi, rtol=1e-8, atol=0)
    torch.testing.assert_close(first.alignment, second.alignment, rtol=1e-8, atol=0)
    torch.testing.assert_close(other.trace(), unit**2 * one.trace(), rtol=1e-10, atol=0)
    torch.testing.assert_close(other.lambda_max(), unit**2 * one.lambda_max(), rtol=1e-10, atol=0)
    # lambda is in the unit of G.
    lam = [
        influence.first_order_influence(m, [0, 1], estimator=influence.Regularised(0.1 * s)).fi
        for m, s in ((one, 1.0), (other, unit**2))
    ]
    torch.testing.assert_close(*lam, rtol=1e-8, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_nested_perturbations_never_lose_influence(seed: int) -> None:
    logits, jacobian = 3 * gauss(1, 7, seed=seed), gauss(1, 7, 6, seed=seed + 1)
    metrics = [metric_of(logits, jacobian[..., :width]) for width in range(1, 7)]
    results = [influence.first_order_influence(metric, [seed % 7]) for metric in metrics]
    values = [result.alignment.item() for result in results]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] == 1.0
    assert all(0 <= value <= 1 for value in values)


class Pixels(nn.Module):
    """A saturating net on pixels in ``[0, unit]``-like units."""

    def __init__(self, model: nn.Module, unit: float) -> None:
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, pixels: Tensor) -> Tensor:
        return 3 * self.model(pixels / self.unit)


@pytest.mark.parametrize("unit", [1.0, 255.0])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-8])
def test_released_against_its_transcription(epsilon: float, unit: float) -> None:
    """200 images, confidence from chance to certainty, so that the cut leaves different ranks."""
    model = Pixels(network(classes=8, width=16, seed=4), unit)
    x = unit * gauss(200, 12, seed=5) * torch.logspace(-2, 1, 200, dtype=torch.float64)[:, None]
    labels = [n % 8 for n in range(200)]
    truths = [truth.released(*truth.input_jacobian(model, x[n]), y, epsilon=epsilon)[:2] for n, y in enumerate(labels)]
    value = torch.tensor([v for v, _ in truths], dtype=torch.float64)
    rank = torch.tensor([r for _, r in truths])

    def ours(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        metric = influence.metric_tensor(model.to(dtype), x.to(dtype))
        result = influence.first_order_influence(metric, labels, estimator=influence.Released(epsilon))
        return result.fi[:, 0], result.rank[:, 0], ~result.near_cut[:, 0]

    fi, kept, sure = ours(torch.float64)
    # A Gram in float64 resolves singular values down to 1e-8 of the largest: enough for 1e-3, not always for 1e-8.
    usual = epsilon > 1e-6
    assert sure.sum() >= (199 if usual else 180)
    assert len(rank[sure].unique()) >= 4
    assert torch.equal(kept[sure], rank[sure])
    torch.testing.assert_close(fi[sure], value[sure], rtol=1e-6 if usual else 1e-4, atol=1e-12)

    if usual:  # at 1e-8 a saturated tanh has lost all its digits in float32
        fi, kept, sure = ours(torch.float32)
        assert sure.sum() >= 190
        assert torch.equal(kept[sure], rank[sure])
        torch.testing.assert_close(fi[sure], value[sure], rtol=1e-3, atol=1e-5)


def test_released_depends_on_the_unit_and_peaks_where_the_loss_does_not() -> None:
    logits, jacobian = gauss(1, 6, seed=1), gauss(1, 6, 9, seed=2)
    small = metric_of(logits, jacobian * 1e-4)
    assert influence.first_order_influence(small, [0], estimator=influence.Released()).fi.item() == 0.0
    assert influence.first_order_influence(small, [0]).fi.item() > 0.0
    # theory.md, 3: the closed form at full rank, for e = 1e-3.
    e, logits = 1e-3, torch.tensor([[math.log(9.4e-4), math.log1p(-9.4e-4)]], dtype=torch.float64)
    result = influence.first_order_influence(
        metric_of(logits, 1e3 * gauss(1, 2, 3)), [0], estimator=influence.Released(e)
    )
    roots = logits[0].softmax(0).sqrt() + e
    expected = (roots[0] / (logits[0].softmax(0)[0] + e)) ** 2 * (1 - roots[0] ** 2 / roots.square().sum())
    assert result.fi.item() == pytest.approx(expected.item(), rel=1e-9, abs=0)
    assert 250 < result.fi.item() < 280


@pytest.mark.parametrize("lam", [1e-8, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("width", [2, 9])
def test_regularised_against_the_dense_tensor(lam: float, width: int) -> None:
    logits, jacobian = gauss(3, 6, seed=1), gauss(3, 6, width, seed=2)
    result = influence.first_order_influence(
        metric_of(logits, jacobian), [0, 1, 2], estimator=influence.Regularised(lam)
    )
    for n in range(3):
        expected = truth.regularised(logits[n], jacobian[n], n, lam=lam)
        assert result.fi[n, 0].item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_regularised_limits() -> None:
    logits, jacobian = gauss(1, 6, seed=1), gauss(1, 6, 3, seed=2)
    metric = metric_of(logits, jacobian)
    exact = influence.first_order_influence(metric, [4]).fi.item()
    fi = [
        influence.first_order_influence(metric, [4], estimator=influence.Regularised(lam)).fi.item()
        for lam in (1e-14, 1e12)
    ]
    _, score = truth.scores(logits[0], jacobian[0])
    assert fi == pytest.approx([exact, score[4].square().sum().item() / 1e12], rel=1e-9, abs=0)


def test_default_label_is_the_prediction() -> None:
    metric = metric_of(gauss(3, 4), gauss(3, 4, 2))
    predicted = metric.log_probs.argmax(1)
    result = influence.first_order_influence(metric)
    assert torch.equal(result.labels, predicted)
    assert torch.equal(result.fi, influence.first_order_influence(metric, predicted, estimator=influence.Exact()).fi)


def test_a_tolerance_chooses_the_rank() -> None:
    jacobian = torch.tensor([[[1.0, 0.0], [0.0, 1e-3], [0.0, 0.0]]], dtype=torch.float64)
    metric = metric_of(torch.zeros(1, 3, dtype=torch.float64), jacobian)
    ranks = [
        influence.first_order_influence(metric, [0], estimator=influence.Exact(r)).rank.item() for r in (None, 1e-4)
    ]
    assert ranks == [2, 1]
    assert influence.first_order_influence(metric, [0], estimator=influence.Exact(4e-7)).near_cut.item()
    assert not influence.first_order_influence(metric, [0]).near_cut.item()


def test_to_dataframe_is_long_and_sorted() -> None:
    model, x = network(), gauss(3, 12)
    result = influence.first_order_influence(influence.metric_tensor(model, x, wrt="layers"), [0, 1, 2])
    frame = result.to_dataframe()
    assert list(frame.columns) == ["example", "block", "label", "fi", "ceiling", "alignment", "rank", "near_cut"]
    assert frame["example"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["block"].tolist() == ["0", "2"] * 3
    assert frame["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["fi"].tolist() == result.fi.flatten().tolist()
    assert frame["ceiling"].tolist() == result.ceiling.repeat_interleave(2).tolist()


METRIC = metric_of(torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, r"0\.\.2", lambda: influence.first_order_influence(METRIC, [0, 3])),
        (ValueError, r"0\.\.2", lambda: influence.first_order_influence(METRIC, [-1, 0])),
        (ValueError, r"\(2,\)", lambda: influence.first_order_influence(METRIC, [0, 1, 2])),
        (ValueError, r"\(2,\)", lambda: influence.first_order_influence(METRIC, torch.tensor([[0], [1]]))),
        (TypeError, "integer", lambda: influence.first_order_influence(METRIC, torch.tensor([0.0, 1.0]))),
        (TypeError, "integer", lambda: influence.first_order_influence(METRIC, torch.tensor([True, False]))),
        (TypeError, "estimator", lambda: influence.first_order_influence(METRIC, estimator="exact")),
        (TypeError, "estimator", lambda: influence.first_order_influence(METRIC, estimator=influence.Exact)),
        (ValueError, "rtol", lambda: influence.Exact(rtol=-1.0)),
        (ValueError, "epsilon", lambda: influence.Released(epsilon=0.0)),
        (ValueError, "lam", lambda: influence.Regularised(lam=-1.0)),
        (
            ValueError,
            "gram must have shape",
            lambda: influence.MetricTensor(METRIC.log_probs, METRIC.gram[:, 0], ("b",), METRIC.dims, torch.float64),
        ),
    ],
)
def test_errors(error: type[Exception], words: str, call) -> None:
    with pytest.raises(error, match=words):
        call()


def test_trace_is_the_mean_divergence_under_noise() -> None:
    """E KL(p(x) || p(x + eps)) = sigma^2 / 2 tr G + O(sigma^4), by antithetic Monte Carlo."""
    model, x = network(width=8), 0.3 * gauss(3, 12, seed=9)
    trace = influence.metric_tensor(model, x).trace()[:, 0]
    sigma, draws = 1e-3, 20000
    noise = sigma * gauss(draws, 12, seed=1)
    for n in range(3):
        with torch.no_grad():
            log_probs = model(x[n : n + 1]).log_softmax(1)
            moved = torch.stack([model(x[n] + sign * noise).log_softmax(1) for sign in (1, -1)])
        divergence = (log_probs.exp() * (log_probs - moved)).sum(-1).mean(0)
        error = divergence.std().item() / math.sqrt(draws)
        expected = sigma**2 / 2 * trace[n].item()
        assert abs(divergence.mean().item() - expected) < 5 * error
        assert error < 0.02 * expected


def test_the_predicted_class_by_name() -> None:
    metric = metric_of(gauss(4, 5, seed=3), gauss(4, 5, 2, seed=4))
    predicted = influence.first_order_influence(metric, "predicted")
    assert torch.equal(predicted.labels, metric.log_probs.argmax(dim=1))
    assert torch.equal(predicted.fi, influence.first_order_influence(metric, predicted.labels).fi)
    assert torch.equal(predicted.fi, influence.first_order_influence(metric).fi)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), gauss(2, 1, 4, 4).float()
    by_name, bare = influence.patch_influence(model, x, "predicted"), influence.patch_influence(model, x)
    assert torch.equal(by_name.labels, bare.labels) and torch.equal(by_name.fi, bare.fi)
    for call in (
        lambda: influence.first_order_influence(metric, "true"),
        lambda: influence.patch_influence(model, x, "y"),
    ):
        with pytest.raises(TypeError, match="'predicted'"):
            call()
