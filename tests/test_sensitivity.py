"""The trace from a few backward passes, and the worst direction, against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import influence
import truth
from influence.contrasts import ScoreSums

WRT: list[str | list[str] | influence.Patches] = ["input", "parameters", "layers", ["0"], influence.Patches(2)]


def network(classes: int = 6, *, sure: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Linear(12, classes)
        last.weight.data *= sure
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), last).eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def _draws(wrt: str | list[str] | influence.Patches, *, count: int, samples: int, sure: float = 1.0) -> Tensor:
    """Independent estimates for one image, ``(count, B)``: copies of it have signs of their own."""
    x, generator = images(1).expand(count, -1, -1, -1), torch.Generator().manual_seed(2)
    return influence.trace(network(sure=sure), x, wrt=wrt, samples=samples, generator=generator, chunk_size=500)


def _z(draws: Tensor, exact: Tensor) -> Tensor:
    return (draws.mean(dim=0) - exact) / (draws.std(dim=0) / math.sqrt(len(draws)))


@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_estimate_is_unbiased(wrt: str | list[str] | influence.Patches) -> None:
    exact = influence.trace(network(), images(1), wrt=wrt)[0]
    draws = _draws(wrt, count=4000, samples=1)
    assert (_z(draws, exact).abs() < 4).all()
    # A bias of a tenth would be seen in every block.
    assert (draws.std(dim=0) / math.sqrt(4000) < 0.025 * exact).all()


def test_a_biased_estimate_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_softmax(log_probs: Tensor, coefficients: Tensor) -> ScoreSums:
        return ScoreSums(log_probs, coefficients, torch.ones_like(coefficients[..., 0]))

    exact = influence.trace(network(), images(1))[0]
    monkeypatch.setattr(ScoreSums, "of", staticmethod(without_softmax))
    assert (_z(_draws("input", count=4000, samples=1), exact).abs() > 4).all()


@pytest.mark.parametrize("sure", [1.0, 400.0])
@pytest.mark.parametrize("samples", [1, 5])
def test_standard_deviation(samples: int, sure: float) -> None:
    exact = influence.trace(network(sure=sure), images(1), wrt="layers")[0]
    draws = _draws("layers", count=2000, samples=samples, sure=sure)
    assert (draws.std(dim=0) <= math.sqrt(2 / samples) * exact).all()
    assert (_z(draws, exact).abs() < 4).all()


def test_traces_of_a_network_that_is_sure_do_not_underflow() -> None:
    model = nn.Linear(4, 3)
    model.weight.data = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4], [4, 3, 2, -1]])
    model.bias.data = torch.tensor([300.0, 0.0, 0.0])  # P of the others: 1e-130, its root no float32 number
    x = torch.zeros(1, 4)
    exact = influence.trace(model.double(), x.double())
    found = influence.trace(model.float(), x.expand(3000, -1), samples=1, generator=torch.Generator().manual_seed(0))
    assert 0 < exact < 1e-120
    assert abs(_z(found, exact[0])) < 4


@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_without_samples_it_is_the_metric_tensors(wrt: str | list[str] | influence.Patches) -> None:
    expected = influence.metric_tensor(network(), images(), wrt=wrt).trace()
    assert torch.equal(influence.trace(network(), images(), wrt=wrt), expected)
    assert influence.trace(network(), images(), wrt=wrt, samples=2).shape == expected.shape


@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_signs_belong_to_the_example_and_not_to_the_chunk(wrt: str | list[str] | influence.Patches) -> None:
    def estimate(seed: int, chunk_size: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return influence.trace(network(), images(5), wrt=wrt, samples=3, generator=generator, chunk_size=chunk_size)

    torch.testing.assert_close(estimate(0, 2), estimate(0, None), rtol=1e-5, atol=0)
    assert not torch.allclose(estimate(0, 2), estimate(1, 2))


class Counted(torch.autograd.Function):
    """The identity; counts its backward passes, and asks for a value in each, so that none runs batched."""

    passes = 0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        Counted.passes += int(bool(grad.isfinite().all()))
        return grad


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Counted.apply(x)


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_passes_do_not_depend_on_the_classes(wrt: str) -> None:
    """One for each sample; one more shows that the examples are independent, two are of single examples, and the rules
    of the parameters check themselves with a few.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Counting(), nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 1000)).eval()
    x = torch.randn(2, 6)

    def passes(samples: int) -> int:
        Counted.passes = 0
        influence.trace(model, x, wrt=wrt, samples=samples, chunk_size=2)
        return Counted.passes

    passes(1)
    assert passes(20) - passes(8) == 12
    assert passes(8) == 11 if wrt == "input" else 10 <= passes(8) <= 14


def test_errors() -> None:
    for samples in (0, True, 1.5):
        with pytest.raises(ValueError, match="samples must be a whole number >= 1"):
            influence.trace(network(), images(), samples=samples)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown module 'nothing'"):
        influence.trace(network(), images(), wrt=["nothing"], samples=2)
    with pytest.raises(ValueError, match="Patches need images"):
        influence.trace(nn.Linear(4, 3), torch.zeros(2, 4), wrt=influence.Patches(), samples=2)
    with pytest.raises(RuntimeError, match="in training mode"):
        influence.trace(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), torch.zeros(2, 4), samples=2)
    with pytest.raises(TypeError, match="integers cannot be perturbed"):
        influence.trace(nn.Linear(4, 3), torch.zeros(2, 4, dtype=torch.int64), samples=2)
    with pytest.raises(ValueError, match="wrt must be 'input' or 'input:NAME', got 'layers'"):
        influence.worst_direction(network(), images(), wrt="layers")


class Pair(nn.Module):
    """Two inputs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.model(image * mask)


def test_several_inputs() -> None:
    x = {"image": images(), "mask": torch.ones(3, 1, 3, 3)}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = influence.trace(Pair(), x, wrt="input:image", samples=3, generator=generators[0])
    expected = influence.trace(network(), images(), samples=3, generator=generators[1])
    torch.testing.assert_close(found, expected)
    direction, value = influence.worst_direction(Pair(), x, wrt="input:image")
    torch.testing.assert_close((direction, value), influence.worst_direction(network(), images()))


# -- the worst direction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 6, 30])
def test_worst_direction_is_the_first_eigenvector(classes: int) -> None:
    model, x = network(classes, sure=5.0).double(), images().double()
    direction, value = influence.worst_direction(model, x, chunk_size=2)
    assert direction.shape == x.shape and value.dtype == torch.float64
    for n in range(len(x)):
        logits, jacobian = truth.input_jacobian(model, x[n])
        root = truth.root_matrix(logits, jacobian)
        values, vectors = torch.linalg.eigh(root @ root.T)
        torch.testing.assert_close(value[n], values[-1], rtol=1e-8, atol=0)
        flat = direction[n].flatten()
        torch.testing.assert_close(flat.norm(), torch.tensor(1.0, dtype=torch.float64))
        assert abs(abs(float(flat @ vectors[:, -1])) - 1) < 1e-8
        # The loss of the predicted class rises along it.
        _, scores = truth.scores(logits, jacobian)
        assert -scores[logits.argmax()] @ flat > 0


@pytest.mark.parametrize("sure", [1.0, 10.0])
def test_divergence_along_it_is_half_its_value_times_the_square(sure: float) -> None:
    model, x = network(sure=sure).double(), images().double()
    direction, value = influence.worst_direction(model, x)

    def divergence(v: Tensor, t: float = 1e-4) -> Tensor:
        with torch.no_grad():
            before, after = (model(z).log_softmax(dim=1) for z in (x, x + t * v))
        return (before.exp() * (before - after)).sum(dim=1) / (t**2 / 2)

    torch.testing.assert_close(divergence(direction), value, rtol=2e-3, atol=0)
    for seed in range(20):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other /= other.flatten(1).norm(dim=1)[:, None, None, None]
        assert (divergence(other) < value).all()


def test_worst_direction_has_the_precision_of_the_input_and_leaves_the_model_alone() -> None:
    model = network()
    direction, value = influence.worst_direction(model, images())
    expected, largest = influence.worst_direction(network().double(), images().double())
    assert direction.dtype == torch.float32 and not direction.requires_grad
    torch.testing.assert_close(direction, expected.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(value, largest, rtol=1e-4, atol=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_where_nothing_moves_the_output_there_is_no_direction() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    model[0].bias.data.fill_(-100.0)
    direction, value = influence.worst_direction(model, torch.zeros(2, 4))
    assert not direction.any() and not value.any()


@pytest.mark.parametrize("gap", [700.0, 800.0, 1400.0])
def test_worst_direction_is_zero_where_the_eigenvalue_is(gap: float) -> None:
    """Where the probabilities of the other classes underflow."""
    direction, value = influence.worst_direction(nn.Identity(), torch.tensor([[gap, 0.0, 0.0, -3.0]]).double())
    assert bool((value > 0).all()) == (gap == 700)
    assert float(direction.norm()) == pytest.approx(1.0 if gap == 700 else 0.0)
