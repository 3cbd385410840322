"""Triton kernels in Triton's interpreter against their references; run by test_triton.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import influence
from influence.kernels import pivots, projected, stability_loss
from influence.kernels.backend import using
from influence.kernels.tolerances import KERNEL

CPU = torch.device("cpu")
CLOSE = KERNEL[(torch.float32, "cpu")]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 9, 5, 33, 20), (2, 3, 70, 16, 7), (1, 16, 2, 40, 50)])
def test_projected_gram(shape: tuple[int, ...]) -> None:
    examples, classes, outputs, positions, width = shape
    grads, shared = normal(examples, classes, outputs, positions), normal(examples, positions, width, seed=1)
    reference = projected.projected_gram_torch(grads, shared)
    ours = projected.projected_gram_triton(grads, shared)
    assert ours.dtype == torch.float64
    assert (ours - reference).abs().max() <= CLOSE * reference.abs().max()
    # Any strides.
    turned = grads.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert torch.equal(projected.projected_gram_triton(turned, shared), ours)


@pytest.mark.parametrize("classes", [2, 3, 10, 17])
def test_decide(classes: int) -> None:
    rows = normal(30, classes, classes - 1, dtype=torch.float64)
    rows *= (torch.arange(classes - 1) < torch.arange(30)[:, None] % classes)[:, None]
    gram = rows @ rows.mT * torch.logspace(-9, 9, 30, dtype=torch.float64)[:, None, None]
    ceiling = normal(30, dtype=torch.float64)
    for rtol in (1e-12, 1e-2):
        ours = pivots.decide_triton(gram, ceiling, rtol, classes - 1)
        reference = pivots.decide_torch(gram, ceiling, rtol, classes - 1)
        assert torch.equal(ours[0].rank, reference[0].rank)
        for name in ("largest", "smallest"):
            torch.testing.assert_close(getattr(ours[0], name), getattr(reference[0], name), rtol=1e-8, atol=0)
        torch.testing.assert_close(ours[0].refused, reference[0].refused, rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(ours[1], reference[1], rtol=1e-13, atol=0)


def test_self_checks_pass_and_notice() -> None:
    assert projected._check(CPU)
    assert pivots._check(CPU)
    right = projected.projected_gram_triton
    projected.projected_gram_triton = lambda *args: 1.01 * right(*args)
    try:
        assert not projected._check(CPU)
    finally:
        projected.projected_gram_triton = right


def test_whole_path() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 20, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4)
        )
    x = normal(2, 2, 6, 6)
    parts = []
    for backend in ("torch", "triton"):
        metric = influence.metric_tensor(model.eval(), x, wrt="layers", backend=backend)
        result = influence.first_order_influence(metric, [0, 1], backend=backend)
        parts.append((metric.gram, result.fi, result.rank))
    torch.testing.assert_close(parts[0][0], parts[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts[0][1], parts[1][1], rtol=1e-12, atol=0)
    assert torch.equal(parts[0][2], parts[1][2])


def test_triton_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    right = projected.projected_gram_triton
    monkeypatch.setattr(projected, "projected_gram_triton", lambda *args: called.append(1) or right(*args))
    with using("triton"):
        projected.projected_gram(normal(1, 2, 3, 4), normal(1, 4, 5))
    with using("auto"):
        projected.projected_gram(normal(1, 2, 3, 4), normal(1, 4, 5))
    assert len(called) == 1


@pytest.mark.parametrize("classes", [2, 10, 33, 4100])
@pytest.mark.parametrize(("kl", "stop"), [(True, False), (False, False), (True, True), (False, True)])
def test_stability_loss(classes: int, kl: bool, stop: bool) -> None:
    z = 5 * normal(4, classes)
    w = z + 0.3 * normal(4, classes, seed=1)
    labels = torch.tensor([0, 1, classes - 1, classes // 2])
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = stability_loss.stability_loss_triton(z.to(dtype), w.to(dtype), labels, 0.7, kl=kl, stop=stop)
        reference = stability_loss.stability_loss_torch(z.to(dtype), w.to(dtype), labels, 0.7, kl=kl, stop=stop)
        assert ours[0].item() == pytest.approx(reference[0].item(), rel=1e-12)
        for mine, theirs in zip(ours[1:], reference[1:], strict=True):
            assert mine.dtype == dtype
            assert (mine - theirs).abs().max() <= rtol * theirs.abs().max()


def test_stability_loss_through_the_public_face() -> None:
    z, w = (normal(5, 7, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    values = []
    for backend in ("torch", "triton"):
        loss = influence.stability_loss(z, w, torch.arange(5), alpha=0.7, backend=backend)
        values.append((loss.detach(), *torch.autograd.grad(3 * loss, (z, w))))
    for ours, reference in zip(*values, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(
        lambda a, b: influence.stability_loss(a, b, torch.arange(5), alpha=0.5, backend="triton"), (z, w)
    )
    extreme = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 1e30, -1e30]], requires_grad=True)
    influence.stability_loss(extreme, other, torch.tensor([0]), alpha=1.0, backend="triton").backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()
    assert stability_loss._check(CPU)
