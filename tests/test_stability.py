"""The objective of stability training: values, gradients, limits and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import influence
from influence.kernels.stability_loss import stability_loss_torch


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, generator=g, dtype=torch.float64)
    noisy = z + 0.3 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), noisy.to(dtype).requires_grad_(), torch.randint(5, (6,), generator=g)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_value_is_the_formula(divergence: str, stop_gradient: bool) -> None:
    z, noisy, labels = batch()
    p, q = z.softmax(1), noisy.softmax(1)
    ratio = p / q if divergence == "kl" else 1 / q
    expected = F.cross_entropy(z, labels) + 0.7 * (p * ratio.log()).sum(1).mean()
    loss = influence.stability_loss(z, noisy, labels, alpha=0.7, divergence=divergence, stop_gradient=stop_gradient)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=0)


def test_cross_entropy_is_kl_plus_entropy() -> None:
    z, noisy, labels = batch()
    kl, ce = (influence.stability_loss(z, noisy, labels, alpha=1.0, divergence=d) for d in ("kl", "ce"))
    assert (ce - kl).item() == pytest.approx(entropy(z).item(), rel=1e-12, abs=0)


def test_branches_and_stop_gradient() -> None:
    z, noisy, labels = batch()

    def gradients(divergence: str, stop_gradient: bool) -> tuple[Tensor, ...]:
        loss = influence.stability_loss(z, noisy, labels, alpha=1.0, divergence=divergence, stop_gradient=stop_gradient)
        return torch.autograd.grad(loss - F.cross_entropy(z, labels), (z, noisy))

    both, stopped = gradients("kl", False), gradients("kl", True)
    expected = (noisy.softmax(1) - z.softmax(1)).detach() / len(z)
    torch.testing.assert_close(both[1], expected)
    torch.testing.assert_close(stopped[1], expected)
    # The published "no effect" came from a stop-gradient round the whole term.
    assert both[0].abs().max() > 1e-3
    assert both[1].abs().max() > 1e-3
    torch.testing.assert_close(stopped[0], torch.zeros_like(z), atol=1e-15, rtol=0)
    # With the target held constant KL and CE have the same gradient; through both branches they do not.
    for ours, other in zip(stopped, gradients("ce", True), strict=True):
        torch.testing.assert_close(ours, other)
    (expected_gap,) = torch.autograd.grad(entropy(z), z)
    torch.testing.assert_close(gradients("ce", False)[0] - both[0], expected_gap)


@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_gradcheck(divergence: str) -> None:
    z, noisy, labels = batch()
    assert torch.autograd.gradcheck(
        lambda a, b: influence.stability_loss(a, b, labels, alpha=0.5, divergence=divergence), (z, noisy)
    )


def test_alpha_zero_is_plain_training() -> None:
    z, noisy, labels = batch()
    assert influence.stability_loss(z, noisy, labels, alpha=0.0).item() == pytest.approx(
        F.cross_entropy(z, labels).item(), rel=1e-14
    )


def test_mean_not_sum_over_the_batch() -> None:
    z, noisy, labels = batch()
    once = influence.stability_loss(z, noisy, labels, alpha=1.0)
    twice = influence.stability_loss(z.repeat(2, 1), noisy.repeat(2, 1), labels.repeat(2), alpha=1.0)
    assert once.item() == pytest.approx(twice.item(), rel=1e-14, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_stable_for_any_finite_logits(dtype: torch.dtype, divergence: str) -> None:
    big = torch.finfo(dtype).max / 8
    z = torch.tensor([[big, -big, 0.0], [0.0, 0.0, -big]], dtype=dtype, requires_grad=True)
    noisy = torch.tensor([[big, 0.0, -big], [0.0, -1.0, -big]], dtype=dtype, requires_grad=True)
    loss = influence.stability_loss(z, noisy, torch.tensor([0, 1]), alpha=1.0, divergence=divergence)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert noisy.grad is not None
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(noisy.grad).all()
    expected = (noisy.detach().double().softmax(1) - z.detach().double().softmax(1)) / 2
    torch.testing.assert_close(noisy.grad.double(), expected, rtol=1e-2, atol=1e-6)


def test_tiny_divergence_keeps_its_digits_in_float32() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]])
    noisy = z + torch.tensor([[2.0**-13, 0.0, 0.0]])
    labels = torch.tensor([0])
    full = influence.stability_loss(z.double(), noisy.double(), labels, alpha=1e8)
    assert influence.stability_loss(z, noisy, labels, alpha=1e8).item() == pytest.approx(full.item(), rel=1e-6, abs=0)
    p = z.double().softmax(1)[0, 0].item()
    divergence = full.item() - F.cross_entropy(z.double(), labels).item()
    assert divergence == pytest.approx(1e8 * 2.0**-27 * p * (1 - p), rel=1e-3, abs=0)


def test_small_noise_limit_is_the_trace_of_the_metric_tensor() -> None:
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    x, sigma, draws = torch.rand(1, 6, generator=g, dtype=torch.float64), 1e-3, 20_000
    noisy = influence.gaussian_perturbation(x.expand(draws, -1), sigma=sigma, generator=g, clip=None)
    with torch.no_grad():
        z, z_noisy = model(x).expand(draws, -1), model(noisy)
    labels = torch.zeros(draws, dtype=torch.int64)
    both = influence.stability_loss(z, z_noisy, labels, alpha=1.0)
    divergence = (both - F.cross_entropy(z, labels)).item() / (sigma**2 / 2)
    trace = influence.metric_tensor(model, x).trace().item()
    single = (z.softmax(1) * (z.log_softmax(1) - z_noisy.log_softmax(1))).sum(1) / (sigma**2 / 2)
    error = single.std().item() / draws**0.5
    assert abs(divergence - trace) < 4 * error + 1e-3 * trace
    assert error < 0.02 * trace


def test_embedding_loss_is_the_mean_of_norms() -> None:
    g = torch.Generator().manual_seed(2)
    z, noisy = (torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = influence.embedding_stability_loss(z, noisy)
    expected = torch.stack([(a - b).square().sum().sqrt() for a, b in zip(z, noisy, strict=True)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14, abs=0)
    assert torch.autograd.gradcheck(influence.embedding_stability_loss, (z, noisy))


def test_embedding_gradient_is_finite_where_embeddings_agree() -> None:
    z = torch.ones(2, 3, requires_grad=True)
    noisy = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    influence.embedding_stability_loss(z, noisy).backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.5, 0.0]]))


def test_embedding_loss_of_extreme_values() -> None:
    z = torch.full((2, 4), 1e-30)
    assert influence.embedding_stability_loss(z, torch.zeros(2, 4)).item() == pytest.approx(2e-30, rel=1e-6, abs=0)
    assert influence.embedding_stability_loss(torch.full((2, 4), 1e30), 0 * z).item() == pytest.approx(
        2e30, rel=1e-6, abs=0
    )


def test_gaussian_perturbation() -> None:
    x = torch.full((20_000,), 0.5)
    draw = [influence.gaussian_perturbation(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert (draw[0] - x).std().item() == pytest.approx(0.04, rel=0.03, abs=0)
    assert (draw[0] - x).mean().item() == pytest.approx(0.0, abs=0.002)
    assert torch.equal(x, torch.full((20_000,), 0.5))
    wild = influence.gaussian_perturbation(x, sigma=10.0, generator=torch.Generator().manual_seed(0))
    assert (wild.min().item(), wild.max().item()) == (0.0, 1.0)
    assert torch.equal(influence.gaussian_perturbation(x, sigma=0.0), x)
    half = influence.gaussian_perturbation(x.bfloat16(), generator=torch.Generator().manual_seed(0))
    assert half.dtype == torch.bfloat16


def test_a_given_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    influence.gaussian_perturbation(torch.zeros(3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])
NAN = torch.tensor([[0.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])
INF = torch.tensor([[0.0, float("inf"), 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "logits must be finite", lambda: influence.stability_loss(NAN, Z, Y)),
        (ValueError, "logits_perturbed must be finite", lambda: influence.stability_loss(Z, INF, Y)),
        (ValueError, "alpha", lambda: influence.stability_loss(Z, Z, Y, alpha=-1.0)),
        (ValueError, "alpha", lambda: influence.stability_loss(Z, Z, Y, alpha=float("nan"))),
        (ValueError, "divergence", lambda: influence.stability_loss(Z, Z, Y, divergence="js")),
        (ValueError, "same shape", lambda: influence.stability_loss(Z, torch.zeros(2, 4), Y)),
        (ValueError, "same shape", lambda: influence.stability_loss(Z, torch.zeros(3, 3), Y)),
        (ValueError, r"\(N, K\)", lambda: influence.stability_loss(torch.zeros(3), torch.zeros(3), Y)),
        (ValueError, "K >= 2", lambda: influence.stability_loss(torch.zeros(2, 1), torch.zeros(2, 1), Y)),
        (TypeError, "floating", lambda: influence.stability_loss(Z.long(), Z, Y)),
        (ValueError, r"0\.\.2", lambda: influence.stability_loss(Z, Z, torch.tensor([0, 3]))),
        (ValueError, r"\(2,\)", lambda: influence.stability_loss(Z, Z, torch.tensor([0]))),
        (TypeError, "integer", lambda: influence.stability_loss(Z, Z, Y.float())),
        (ValueError, "distance", lambda: influence.embedding_stability_loss(Z, Z, distance="cosine")),
        (ValueError, "same shape", lambda: influence.embedding_stability_loss(Z, torch.zeros(2, 4))),
        (ValueError, r"\(N, D\)", lambda: influence.embedding_stability_loss(Z[0], Z[0])),
        (ValueError, "finite", lambda: influence.embedding_stability_loss(Z, NAN)),
        (TypeError, "floating", lambda: influence.embedding_stability_loss(Z.long(), Z)),
        (ValueError, "sigma", lambda: influence.gaussian_perturbation(Z, sigma=-0.1)),
        (TypeError, "255", lambda: influence.gaussian_perturbation(Z.to(torch.uint8))),
        (ValueError, "clip", lambda: influence.gaussian_perturbation(Z + 2)),
        (ValueError, "clip", lambda: influence.gaussian_perturbation(Z - 1)),
        (ValueError, "low < high", lambda: influence.gaussian_perturbation(Z, clip=(1.0, 0.0))),
        (ValueError, "finite", lambda: influence.gaussian_perturbation(NAN)),
    ],
)
def test_errors(error: type[Exception], words: str, call) -> None:
    with pytest.raises(error, match=words):
        call()


def test_closed_form_gradients_are_autograds() -> None:
    z, noisy, labels = batch()
    for divergence in ("kl", "ce"):
        for stop in (False, True):
            loss = influence.stability_loss(z, noisy, labels, alpha=0.7, divergence=divergence, stop_gradient=stop)
            expected = (loss, *torch.autograd.grad(loss, (z, noisy)))
            ours = stability_loss_torch(z.detach(), noisy.detach(), labels, 0.7, kl=divergence == "kl", stop=stop)
            for mine, theirs in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-15)


def test_jacobian_norm_is_the_small_noise_limit_of_embeddings() -> None:
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    x, sigma, draws = torch.rand(6, generator=g, dtype=torch.float64), 1e-3, 20_000
    noisy = influence.gaussian_perturbation(x.expand(draws, -1), sigma=sigma, generator=g, clip=None)
    with torch.no_grad():
        squared = (model(noisy) - model(x)).square().sum(1) / sigma**2
    limit = torch.autograd.functional.jacobian(model, x).square().sum().item()
    error = squared.std().item() / draws**0.5
    assert abs(squared.mean().item() - limit) < 4 * error + 1e-3 * limit
    assert error < 0.02 * limit


def test_triplet_loss_is_the_hinge() -> None:
    g = torch.Generator().manual_seed(4)
    q, near, far = (torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = F.triplet_margin_loss(q, near, far, margin=0.5, eps=0.0)
    assert influence.triplet_loss(q, near, far, margin=0.5).item() == pytest.approx(expected.item(), rel=1e-12, abs=0)
    assert torch.autograd.gradcheck(lambda *t: influence.triplet_loss(*t, margin=0.5), (q, near, far))
    same = torch.ones(2, 3, requires_grad=True)
    influence.triplet_loss(same, same, same + 1, margin=9.0).backward()
    assert torch.isfinite(same.grad).all()


def test_objective_is_the_loss_on_fresh_noise_and_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, labels = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    ours = influence.StabilityObjective(alpha=0.3, sigma=0.1, generator=torch.Generator().manual_seed(1))
    noisy = influence.gaussian_perturbation(x, sigma=0.1, generator=torch.Generator().manual_seed(1))
    expected = influence.stability_loss(model(x), model(noisy), labels, alpha=0.3)
    first = ours(model, x, labels)
    assert first.item() == pytest.approx(expected.item(), rel=1e-12, abs=0)
    assert ours(model, x, labels).item() != first.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = ours(model, x, labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < first.item()


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "alpha", lambda: influence.StabilityObjective(alpha=-1.0)),
        (ValueError, "sigma", lambda: influence.StabilityObjective(sigma=-1.0)),
        (ValueError, "divergence", lambda: influence.StabilityObjective(divergence="js")),
        (ValueError, "backend", lambda: influence.stability_loss(Z, Z, Y, backend="jax")),
        (TypeError, "255", lambda: influence.StabilityObjective()(nn.Flatten(), Z.to(torch.uint8), Y)),
        (ValueError, "clip", lambda: influence.StabilityObjective()(nn.Flatten(), Z + 2, Y)),
        (ValueError, "same shape", lambda: influence.triplet_loss(Z, Z, torch.zeros(2, 4))),
        (ValueError, "margin", lambda: influence.triplet_loss(Z, Z, Z, margin=-0.1)),
        (ValueError, "negative must be finite", lambda: influence.triplet_loss(Z, Z, NAN)),
    ],
)
def test_errors_of_objective_and_triplets(error: type[Exception], words: str, call) -> None:
    with pytest.raises(error, match=words):
        call()


class Waits(TorchDispatchMode):
    """Operations for which the host waits for a GPU: those that bring a value of a tensor to it."""

    NAMES = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.partition("::")[2].lstrip("_").startswith(tuple(n.lstrip("_") for n in self.NAMES)):
            self.found.append(str(function))
        return function(*args, **kwargs or {})


def step(validate: bool) -> list[str]:
    """What the host waits for in one training step with every loss, forward and backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    objective = influence.StabilityObjective(alpha=0.3, sigma=0.1, validate=validate)
    x, labels = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Waits() as waits:
        loss = objective(model, x, labels)
        z = model(x)
        loss = loss + influence.embedding_stability_loss(z, model(x.flip(0)), validate=validate)
        loss = loss + influence.triplet_loss(z, z + 1, z - 1, validate=validate)
        loss.backward()
        optimizer.step()
    return waits.found


def test_a_training_step_waits_for_nothing_where_nothing_is_validated() -> None:
    assert step(validate=False) == []
    assert len(step(validate=True)) >= 10


def test_without_validation_bad_input_is_loud() -> None:
    z, noisy, labels = batch()
    both = [influence.stability_loss(z, noisy, labels, alpha=0.5, validate=v).item() for v in (True, False)]
    assert both[0] == both[1]
    assert influence.stability_loss(NAN, Z, Y, validate=False).isnan()
    assert influence.embedding_stability_loss(NAN, Z, validate=False).isnan()
    assert influence.triplet_loss(Z, Z, NAN, validate=False).isnan()
    for label in (3, -1, -100):
        with pytest.raises((IndexError, RuntimeError)):
            influence.stability_loss(Z, Z, torch.tensor([0, label]), validate=False)
    x = torch.tensor([0.5, 1.5, -0.5, float("nan")])
    noisy = influence.gaussian_perturbation(x, sigma=0.1, validate=False)
    assert noisy.isnan().tolist() == [False, True, True, True]
    # What no one needs to look at is still refused.
    with pytest.raises(ValueError, match="same shape"):
        influence.stability_loss(Z, torch.zeros(2, 4), Y, validate=False)
    with pytest.raises(TypeError, match="integer"):
        influence.stability_loss(Z, Z, Y.float(), validate=False)
