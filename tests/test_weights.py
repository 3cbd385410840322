"""Influence of single weights against brute force."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brute_force
import influence
import networks
import random_models
import random_parts
from influence.grams import gradients, parameters, rules

NUMBERS = ("fi", "trace", "gradient")


def brute(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``(3, *shape)`` of each parameter, means over examples: every class, every parameter, one example at a time."""
    leaves = {name: p.requires_grad_() for name, p in model.named_parameters()}
    means = {name: torch.zeros(3, *p.shape, dtype=torch.float64) for name, p in leaves.items()}
    for n in range(len(x)):
        log_probs = brute_force.logits_of(model, x[n : n + 1])[0].log_softmax(dim=0)
        rows = [torch.autograd.grad(z, [*leaves.values()], retain_graph=True, allow_unused=True) for z in log_probs]
        for name, grads in zip(leaves, zip(*rows, strict=True), strict=True):
            if grads[0] is None:
                continue
            score = torch.stack([g.to_dense() if g.is_sparse else g for g in grads])
            trace = torch.tensordot(log_probs.detach().exp(), score.square(), 1)
            own = score[labels[n]]
            fi = torch.where(trace > 0, own.square() / trace, 0.0)
            means[name] += torch.stack([fi, trace, -own]) / len(x)
    return means


def compare(found: influence.WeightInfluence, expected: dict[str, Tensor], limit: float = 1e-8) -> None:
    assert found.fi.keys() == expected.keys()
    # A weight that moves the output by no more than rounding has an FI of rounding, in brute force too.
    floor = 1e-10 * max(float(truth[1].max()) for truth in expected.values()) ** 0.5
    for name, truth in expected.items():
        real = truth[1].sqrt() > floor
        for number, one in zip(NUMBERS, truth, strict=True):
            ours = getattr(found, number)[name]
            assert ours.shape == one.shape and ours.dtype == torch.float64
            gap = torch.where(real | torch.tensor(number != "fi"), (ours - one).abs(), 0.0)
            # A gradient that cancels leaves rounding of what cancels, 1e-15 of the largest gradient.
            scale = max(float(one.abs().max()), 1e3 * floor if number == "gradient" else floor**2)
            assert float(gap.max()) <= limit * scale, (name, number)


@pytest.mark.parametrize("name", ["convolutions", "functional", "bert", "gpt", "tied", "lstm", "swin"])
def test_every_kind_of_layer(name: str) -> None:
    model, x = networks.build(name, 4), networks.inputs(name, 3, torch.float64)
    labels = torch.tensor([1, 3, 0])
    found = influence.weight_influence(model, x, labels, chunk_size=2)
    assert found.examples == 3
    compare(found, brute(model, x, labels))


def ordinary(seed: int) -> brute_force.Case | None:
    case = random_models.random_case(seed)
    whole = brute_force.coarsest(case) == torch.float64 and case.fate == random_parts.RIGHT and case.change is None
    return case if whole and len(case.x) < 6 and not brute_force.misbehaves(case) else None


def test_random_networks() -> None:
    """Those that the engine takes; what it refuses, it refuses here too."""
    judged = 0
    for seed in range(70):
        case = ordinary(seed)
        if case is None:
            continue
        labels = case.labels
        try:
            found = influence.weight_influence(case.model, case.x, labels, chunk_size=case.chunk_size)
        except (RuntimeError, ValueError) as error:
            assert brute_force.refusal(error).kind == brute_force.REFUSED, seed
            continue
        compare(found, brute(case.model, case.x, labels), 1e-6)
        judged += 1
    assert judged >= 15


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5)).double().eval()
    return model, torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2])


def test_it_is_the_metric_tensor_of_one_weight() -> None:
    model, x, labels = small()
    bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.bias = model, bias

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x + self.bias)

    metric = influence.metric_tensor(Shifted(), x, wrt=["bias"])
    expected = influence.first_order_influence(metric, labels).fi.mean()
    found = influence.weight_influence(Shifted(), x, labels, wrt=["bias"])
    assert torch.allclose(found.fi["bias"], expected, rtol=1e-10)
    assert torch.allclose(found.trace["bias"], metric.trace().mean(), rtol=1e-10)


def test_labels_and_blocks() -> None:
    model, x, labels = small()
    predicted = model(x).argmax(dim=1)
    for given in (None, "predicted"):
        found = influence.weight_influence(model, x, given, wrt=["3"])
        assert set(found.fi) == {"3.weight", "3.bias"}
        compare(found, {name: one for name, one in brute(model, x, predicted).items() if name.startswith("3")})
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in influence.weight_influence(model, x, labels, trainable_only=True).fi


def test_chunks_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, labels = small()
    whole = influence.weight_influence(model, x, labels)
    monkeypatch.setitem(influence.weights._PIECE, "cpu", 1)
    made: list[int] = []
    entries = gradients.ProductGradient.entries

    def counted(self: gradients.ProductGradient, chosen: slice) -> Tensor:
        found = entries(self, chosen)
        made.append(len(found))
        return found

    monkeypatch.setattr(gradients.ProductGradient, "entries", counted)
    compare(influence.weight_influence(model, x, labels, chunk_size=3), {n: stacked(whole, n) for n in whole.fi}, 1e-12)
    assert set(made) == {1}  # never the Jacobian of more than one example


def stacked(found: influence.WeightInfluence, name: str) -> Tensor:
    return torch.stack([getattr(found, number)[name] for number in NUMBERS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_has_no_influence(dtype: torch.dtype) -> None:
    """No softmax sees the bias of an attention's keys: what is left of its gradient is rounding."""
    model, x = networks.build("bert", 4).to(dtype), networks.inputs("bert", 3, dtype)
    found = influence.weight_influence(model, x, [1, 3, 0])
    assert float(found.fi["layers.0.key.bias"].max()) == float(found.trace["layers.0.key.bias"].max()) == 0.0
    assert float(found.fi["layers.0.query.bias"].min()) > 0.0


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_what_may_be_rounding_alone_is_found(groups: int, wide: bool) -> None:
    random = torch.Generator().manual_seed(0)
    rows, inputs = torch.randn(4, 2, groups, 5, 2, generator=random), torch.randn(4, groups, 7, 2, generator=random)
    inputs[:, :, :2, 1] = inputs[:, :, :2, 0]
    rows[1, :, :, 3, 1] = -rows[1, :, :, 3, 0] * (1 + 2e-7)
    rows[2, :, 0, :, 1] = -rows[2, :, 0, :, 0] * 1.1  # too much for rounding
    rows[3, :, :, 2], inputs[:, :, 3] = 0.0, 0.0
    part = gradients.ProductGradient(None, rows, inputs, (5 * groups, 7))  # type: ignore[arg-type]
    chosen, limit = slice(1, 4), 1e-12
    squares = part.entries(chosen).square().sum(dim=1)
    squares = squares.double() if wide else squares
    expected = ((squares <= limit * part.terms(chosen, torch.float64)) & (squares > 0)).flatten().nonzero()[:, 0]
    assert len(expected) == 2 * groups and part.cancelled(chosen, squares, limit).tolist() == expected.tolist()


class Attention(nn.Module):
    """Tokens that a sharp attention all but leaves out, through a tanh."""

    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.value, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 3)
        self.query = torch.tensor([0.0, sharp, 0.0, 0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.query.to(x)).softmax(dim=1)
        return self.head(torch.tanh((weights[:, None] @ self.value(x))[:, 0]))


@pytest.mark.parametrize(("dtype", "sharp"), [(torch.float32, 18.0), (torch.float64, 45.0)])
def test_one_small_term_does_not_cancel(dtype: torch.dtype, sharp: float) -> None:
    torch.manual_seed(0)
    model, x = Attention(sharp).double(), nn.functional.one_hot(torch.tensor([[0, 1, 2]]), 5).double()
    expected = brute(model, x, torch.tensor([0]))
    found = influence.weight_influence(model.to(dtype), x.to(dtype), [0])
    assert float(found.fi["value.weight"][:, [0, 2]].min()) > 0.0
    compare(found, expected, 1e-5)


def test_what_cancels_without_a_rule() -> None:
    """Keys' bias of an attention to other tokens, of whose packed parameter autograd makes the gradient."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x, x)[:, -1])

    torch.manual_seed(1)
    model, x = Decoder().double().eval(), torch.randn(3, 3, 4, dtype=torch.float64)
    found = influence.weight_influence(model, x, [0, 1, 2])
    for name in ("layer.self_attn.in_proj_bias", "layer.multihead_attn.in_proj_bias"):
        assert not found.fi[name][4:8].any() and not found.trace[name][4:8].any()
        assert float(found.fi[name][[0, 1, 2, 3, 8, 9, 10, 11]].min()) > 0.0


@pytest.mark.parametrize("unit", [1e-25, 1e-21, 1e20, 1e25])
def test_squares_outside_single_precision(unit: float) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) * unit))

    torch.manual_seed(0)
    model, x, labels = Scaled(), torch.randn(2, 3).double(), torch.tensor([0, 1])
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter.mul_(min(1.0, 1 / unit))  # so that a tanh is not at its end
    model.double()
    expected = brute(model, x, labels)
    found = influence.weight_influence(model.float(), x.float(), labels)
    for number, truth in zip(NUMBERS, expected["first.weight"], strict=True):
        assert torch.allclose(getattr(found, number)["first.weight"], truth, rtol=1e-3, atol=0.0), number


def test_gradients_whose_squares_leave_double_precision() -> None:
    class Scaled(nn.Module):
        def __init__(self, unit: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
            self.unit = unit

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.unit

    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    # At either unit every class is as probable, and FI is free of the size of a gradient.
    small, least = (
        influence.weight_influence(Scaled(unit).double().eval(), x, [0, 1, 2, 0]).fi for unit in (1e-100, 1e-165)
    )
    for name, fi in small.items():
        assert bool((fi > 0).all()), name
        torch.testing.assert_close(least[name], fi, rtol=1e-6, atol=0.0)


def test_a_label_less_probable_than_single_precision() -> None:
    torch.manual_seed(0)
    model, x, labels = nn.Linear(3, 2).double(), torch.randn(2, 3).double(), torch.tensor([1, 1])
    model.bias.data[0] = 95.0
    expected = brute(model, x, labels)["bias"][0]
    assert torch.allclose(influence.weight_influence(model.float(), x.float(), labels).fi["bias"], expected, rtol=1e-3)


def test_a_wrong_rule_is_not_believed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, x, labels = small()
    rule = rules.RULES["ConvolutionBackward0"]

    def turned(*arguments: Any) -> Any:
        """Right in length, wrong in place: no Gram would show it."""
        for found in rule.gradients(*arguments):
            rows = found.rows.flip(3) if isinstance(found, gradients.ProductGradient) else found.rows
            yield replace(found, rows=rows)

    monkeypatch.setitem(rules.RULES, "ConvolutionBackward0", replace(rule, gradients=turned))
    parameters._ANNOUNCED.clear()
    with caplog.at_level(logging.WARNING, logger="influence"):
        compare(influence.weight_influence(model, x, labels), brute(model, x, labels))
    assert "0.weight: its gradient is not autograd's" in caplog.text


def test_samples_are_unbiased_and_below_the_ceiling() -> None:
    model, x, labels = small()
    exact = influence.weight_influence(model, x, labels)
    generator = torch.Generator().manual_seed(0)
    draws = [influence.weight_influence(model, x, labels, samples=4, generator=generator) for _ in range(200)]
    ceiling = influence.first_order_influence(influence.metric_tensor(model, x), labels).ceiling.mean()
    for name in exact.trace:
        traces = torch.stack([draw.trace[name] for draw in draws])
        error = traces.std(dim=0) / len(draws) ** 0.5
        assert float(((traces.mean(dim=0) - exact.trace[name]).abs() / error.clamp(min=1e-300)).max()) < 5
        # Of one example sqrt(2 / m) at most.
        assert float((traces.std(dim=0) / exact.trace[name].clamp(min=1e-300)).max()) < 1.1 * (2 / 4) ** 0.5
        assert torch.allclose(draws[0].gradient[name], exact.gradient[name], atol=1e-12)
        assert all(float(draw.fi[name].max()) <= float(ceiling) for draw in draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """Raw pixels: squares of the inputs are beyond the largest float16, which must not pass for rounding."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 2, 3)
    model = nn.Sequential(first, nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype).double()
    x, labels = (800 * torch.rand(2, 1, 4, 4)).to(dtype).double(), [0, 1]
    with torch.no_grad():
        first.weight.mul_(2**-10)  # so that a whole output and its gradient fit
    expected = influence.weight_influence(model, x, labels)
    found = influence.weight_influence(model.to(dtype), x.to(dtype), labels)
    for number in NUMBERS[:2]:
        for name, truth in getattr(expected, number).items():
            total, ours = float(truth.sum()), float(getattr(found, number)[name].sum())
            assert ours == pytest.approx(total, rel=0.1), (name, number)


def test_the_same_in_single_precision() -> None:
    model, x, labels = small()
    expected = brute(model, x, labels)
    found = influence.weight_influence(model.float(), x.float(), labels)
    compare(found, expected, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 1]}, "4"),
        ({"labels": [0, 1, 2, 5]}, "0..4"),
        ({"labels": [0.5, 1, 2, 3]}, "integer"),
        ({"labels": "loss"}, "predicted"),
        ({"wrt": "input"}, "list of modules"),
        ({"wrt": ["9"]}, "unknown module '9'"),
        ({"samples": 0}, "samples"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model, x, labels = small()
    with pytest.raises((TypeError, ValueError), match=message):
        influence.weight_influence(model, x, options.pop("labels", labels), **options)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        influence.weight_influence(lambda x: x, x, labels)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="training mode"):
        influence.weight_influence(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.randn(4, 5), [0, 0, 0, 0])


@pytest.mark.parametrize("wrt", ["input", "input:x", "layers", influence.Patches(1)])
def test_what_is_no_parameter_is_refused(wrt: object) -> None:
    with pytest.raises(ValueError, match="wrt must be 'parameters' or a list"):
        influence.weight_influence(nn.Linear(5, 3), torch.zeros(2, 5), [0, 1], wrt=wrt)  # type: ignore[arg-type]
