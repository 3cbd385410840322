"""FI of patches from their Jacobians: what the Grams give, and the definition where these do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import influence
import truth
from influence import areas, memory

X = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(classes: int, width: int = 45) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten()]
        if width != 45:
            layers += [nn.Linear(45, width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(width, classes)).double().eval()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (2, 1), ((1, 3), 2), (9, 1)])
@pytest.mark.parametrize(("classes", "width"), [(4, 45), (30, 45), (30, 6), (150, 45)])
def test_against_grams(classes: int, width: int, size, stride: int, per_channel: bool) -> None:
    model, labels = network(classes, width), torch.tensor([0, 3, 2])
    patches = influence.Patches(size, per_channel=per_channel, stride=stride)
    expected = influence.first_order_influence(influence.metric_tensor(model, X, wrt=patches), labels)
    found = influence.patch_influence(model, X, labels, patches=patches)
    assert found.blocks == expected.blocks and torch.equal(found.labels, labels)
    torch.testing.assert_close(found.ceiling, expected.ceiling)
    sure = ~expected.near_cut  # where rounding decides, two ways may differ
    assert sure.double().mean() > 0.9
    assert torch.equal(found.rank[sure], expected.rank[sure])
    torch.testing.assert_close(found.fi[sure], expected.fi[sure], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.alignment[sure], expected.alignment[sure], rtol=1e-6, atol=1e-12)


def test_against_the_definition() -> None:
    model = network(40)
    found = influence.patch_influence(model, X, patches=influence.Patches(3, per_channel=False))
    for n, x in enumerate(X):
        logits, jacobian = truth.input_jacobian(model, x)
        log_probs = logits.log_softmax(0)
        scores = (jacobian - log_probs.exp() @ jacobian).view(40, *x.shape)
        for b, (r, c) in enumerate((r, c) for r in range(5) for c in range(7)):
            rows = scores[:, :, max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].flatten(1)
            fisher = rows.T @ (log_probs.exp()[:, None] * rows)
            gradient = rows[found.labels[n]]
            fi = gradient @ torch.linalg.pinv(fisher, rtol=1e-12, hermitian=True) @ gradient
            torch.testing.assert_close(found.fi[n, b], fi, rtol=1e-6, atol=0)


def test_how_many_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(30)
    whole = influence.patch_influence(model, X).fi
    monkeypatch.setattr(areas, "_ENTRIES", 1)
    torch.testing.assert_close(influence.patch_influence(model, X).fi, whole, rtol=1e-12, atol=0)


def test_single_precision_and_patches_that_move_nothing() -> None:
    class Left(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :3]

    model = nn.Sequential(Left(), nn.Flatten(), nn.Linear(30, 40)).eval()
    found = influence.patch_influence(model, X.float())
    at = found.fi.view(3, 2, 5, 7)
    assert (at[..., 4:] == 0).all() and (at[..., :4] > 0).all()
    assert (found.rank.view(at.shape)[..., 4:] == 0).all() and (found.rank.view(at.shape)[..., 1:4, 1] == 9).all()
    exact = influence.patch_influence(model.double(), X)
    torch.testing.assert_close(found.fi, exact.fi, rtol=1e-3, atol=1e-9)


def test_refusals() -> None:
    model = network(30)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.29"):
        influence.patch_influence(model, X, [0, 1, 30])
    with pytest.raises(TypeError, match="x must be floating"):
        influence.patch_influence(model, (X * 255).byte())
    with pytest.raises(ValueError, match="Patches need images"):
        influence.patch_influence(model, X[:, 0])
    with pytest.raises(RuntimeError, match="evaluation mode"):
        influence.patch_influence(nn.Sequential(model, nn.Dropout()).train(), X)


def test_grams_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = influence.Patches(1)
    needed = 3 * 8 * 70 * 30**2
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    influence.metric_tensor(network(30), X[:1], wrt=patches)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"Grams of 70 blocks with K = 30 .* influence\.patch_influence"):
        influence.metric_tensor(network(30), X[:1], wrt=patches)


def test_a_batch_by_name() -> None:
    class Named(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return network(4)(image)

    plain, named = (influence.patch_influence(Named().eval(), x, [0, 1]).fi for x in (X[:2], {"image": X[:2]}))
    assert torch.equal(plain, named)
