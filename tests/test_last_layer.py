"""A narrow last layer, and copies of few examples: fewer and fuller passes for the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import influence
import truth
from influence import memory
from influence.inputs import forward
from influence.last_layer import NarrowLayer, head

CLASSES, FEATURES = 40, 6
X = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Scaled(nn.Module):
    """Logits that something changes after the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.model(x)


class TwoWays(nn.Module):
    """The parameters of a layer reach the logits a second time, through the weight of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(72, FEATURES), nn.Parameter(torch.randn(CLASSES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last * self.first.bias.sum()
        return nn.functional.linear(torch.tanh(self.first(x.flatten(1))), weight)


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, FEATURES), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES, bias=bias)).double().eval()


def normalised() -> nn.Sequential:
    model = network()
    parametrizations.weight_norm(model[-1])
    return model


def hooked() -> nn.Sequential:
    model = network()
    model[-1].register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


def two_ways() -> nn.Module:
    torch.manual_seed(0)
    return TwoWays().double().eval()


NETWORKS = {
    "narrow": (network, True),
    "without bias": (lambda: network(bias=False), True),
    "scaled afterwards": (lambda: Scaled(network()), False),
    "weight norm": (normalised, False),
    "hook": (hooked, False),
    "two ways": (two_ways, False),
}


def contrast_gram(logits: Tensor, jacobian: Tensor) -> Tensor:
    rows = jacobian - jacobian[logits.argmax()]
    return rows @ rows.T


@pytest.mark.parametrize("name", list(NETWORKS))
def test_against_brute_force(name: str) -> None:
    build, narrow = NETWORKS[name]
    model = build()
    assert (NarrowLayer.of(forward(model, X)) is not None) == narrow
    groups = {block: list(m.parameters(recurse=False)) for block, m in model.named_modules()}
    whole = influence.metric_tensor(model, X)
    layers = influence.metric_tensor(model, X, wrt="layers")
    for n, x in enumerate(X):
        expected = contrast_gram(*truth.input_jacobian(model, x))
        torch.testing.assert_close(whole.gram[n, 0], expected, rtol=1e-10, atol=1e-12 * float(expected.max()))
        for block, got in zip(layers.blocks, layers.gram[n], strict=True):
            expected = contrast_gram(*truth.parameter_jacobian(model, x, groups[block]))
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * float(expected.max()))
    assert (whole.rank() == FEATURES).all()


def test_as_many_features_as_contrasts_gain_nothing() -> None:
    for classes, narrow in ((FEATURES + 1, False), (FEATURES + 2, True)):
        logits = forward(nn.Linear(FEATURES, classes), torch.randn(2, FEATURES, requires_grad=True))
        assert (NarrowLayer.of(logits) is not None) == narrow


@pytest.mark.parametrize("bias", [True, False])
def test_a_reverse_pass_for_each_feature(bias: bool) -> None:
    """Not for each class: so many gradients reach the layer before."""
    model, sizes = network(bias=bias), []

    def listen(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda grad: sizes.append(len(grad)))

    model[2].register_forward_hook(listen)
    influence.metric_tensor(model, X)
    # And one in which each example has a weight of its own, and one each of the first and the last example alone.
    assert sizes == [len(X)] * (FEATURES + 1) + [1, 1]


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [1, 3, 20])
@pytest.mark.parametrize("wrt", ["input", influence.Patches(2)])
def test_copies_change_nothing_but_the_passes(examples: int, wrt: str | influence.Patches) -> None:
    torch.manual_seed(0)
    passes: list[int] = []

    class Counting(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            out.register_hook(lambda g: passes.append(len(g)))
            return out

    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 70), Counting(), nn.Linear(70, 65)).double().eval()
    x = torch.randn(examples, 2, 3, 3, dtype=torch.float64)
    metric = influence.metric_tensor(model, x, wrt=wrt)
    copies = {1: 4, 3: 4, 20: 1}[examples]  # 64 contrasts, at least 16 passes, at most 32 examples
    # One more in which each example has a weight of its own, and one each of the first and the last example alone.
    assert passes == [copies * examples] * (64 // copies + 1) + [1] * min(examples, 2)
    logits, jacobian = truth.input_jacobian(model, x[-1])
    if wrt == "input":
        torch.testing.assert_close(metric.gram[-1, 0], contrast_gram(logits, jacobian), rtol=1e-10, atol=1e-12)
    else:
        corner = jacobian.unflatten(1, (2, 3, 3))[:, 0, :2, :2].flatten(1)
        torch.testing.assert_close(metric.gram[-1, 0], contrast_gram(logits, corner), rtol=1e-10, atol=1e-12)


def test_a_number_of_classes_that_copies_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_FEWEST_PASSES", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 23)).double().eval()
    x = torch.randn(2, 20, dtype=torch.float64)  # 22 contrasts in parts of 5
    metric = influence.metric_tensor(model, x)
    for n in range(2):
        expected = contrast_gram(*truth.input_jacobian(model, x[n]))
        torch.testing.assert_close(metric.gram[n, 0], expected, rtol=1e-10, atol=1e-12)


def test_copies_that_do_not_fit_are_done_without() -> None:
    class Small(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise RuntimeError("CUDA out of memory")
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Small(100, 99), nn.Tanh(), nn.Linear(99, 70)).eval()
    x = torch.randn(2, 100)
    small = influence.metric_tensor(model, x)
    model[0].__class__ = nn.Linear
    torch.testing.assert_close(small.gram, influence.metric_tensor(model, x).gram, rtol=1e-4, atol=1e-6)


# -- FI from the features ---------------------------------------------------------------------------------------------


def shut() -> nn.Sequential:
    """Nine features behind a ReLU, three of them shut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, CLASSES)).double().eval()
    with torch.no_grad():
        model[1].bias[:3] = -1e3
        model[1].bias[3:] = 10.0
    return model


def test_scores_from_the_features_are_those_of_the_metric_tensor(tmp_path: Path) -> None:
    loader = [(X, torch.tensor([0, 5, 39])), (X.flip(2), torch.tensor([7, 8, 9]))]
    for name, model, rank in (("plain", network(), FEATURES), ("shut", shut(), 6)):
        tables = []
        for count in (None, 2):
            path = influence.score(model, loader, tmp_path / f"{name}{count}", closed_form=count, progress=False)
            tables.append(influence.read_scores(path))
        exact, short = tables
        assert (exact["rank"] == rank).all()
        same = ["example", "block", "label", "rank", "near_cut"]
        assert exact[same].equals(short[same])
        for column in ("fi", "ceiling", "alignment"):
            np.testing.assert_allclose(short[column], exact[column], rtol=1e-9)
        assert (short["fi"] < 0.99 * short["ceiling"]).all()  # not the ceiling by another way
        assert short["trace"].isna().all() and exact["trace"].notna().all()


def test_only_the_layer_that_makes_the_logits_is_the_last() -> None:
    model = network()
    layer, features = head(model, X)
    torch.testing.assert_close(layer(features), model(X))
    assert head(Scaled(model), X) is None
    assert head(nn.Sequential(nn.Conv2d(2, 5, 6), nn.Flatten()).double(), X) is None
