"""Triton kernels in Triton's interpreter against their references; run by test_triton.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import influence
from influence.grams import reverse
from influence.kernels import gram, relu_norm_backward, stability_loss
from influence.kernels.backend import is_better, using


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 660), (3, 16, 65), (2, 17, 4097), (1, 64, 9000)])
def test_gram(shape: tuple[int, ...]) -> None:
    rows = normal(*shape)
    reference, ours = gram.gram_torch(rows), gram.gram_triton(rows)
    assert ours.dtype == torch.float64 and ours.shape == reference.shape
    # Products of float32 are exact in float64: only the order of sums differs.
    assert (ours - reference).abs().max() <= 1e-14 * shape[2] ** 0.5 * reference.abs().max()
    turned = rows.mT.contiguous().mT
    assert torch.equal(gram.gram_triton(turned), ours)
    # One order of sums, whoever else is in the batch.
    assert torch.equal(gram.gram_triton(rows[:1]), ours[:1])


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Float32 zeros past 2^31 of them, in a file of which only the pages that are written to exist."""
    file = tmp_path_factory.mktemp("far") / "zeros"
    with file.open("wb") as handle:
        handle.truncate(4 * (3 * 2**31 + 4096))
    return torch.from_file(str(file), shared=True, size=3 * 2**31 + 4096)


def test_offsets_beyond_32_bits(far: torch.Tensor) -> None:
    rows = far.as_strided((2, 2, 40), (2**31, 2**31 + 7, 1))
    rows.copy_(normal(2, 2, 40))
    torch.testing.assert_close(gram.gram_triton(rows), gram.gram_torch(rows), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 2, 5, 4, 4), (2, 3, 7, 13, 13), (4, 2, 6)])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_norm_backward(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    if last and len(shape) != 5:
        pytest.skip("channels-last is for images")
    grad, scale = normal(*shape, dtype=dtype), normal(shape[2], seed=3, dtype=dtype)
    result = normal(*shape[1:], seed=2, dtype=dtype).relu()
    if last:
        result = result.contiguous(memory_format=torch.channels_last)
    expected = relu_norm_backward.relu_norm_backward_torch(grad, result, scale)
    ours = relu_norm_backward.relu_norm_backward_triton(grad, result, scale)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


class Residual(nn.Module):
    """``relu(norm(z))``, ``relu(norm(z) + identity)``, and a norm with a second user."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.head, self.shared = nn.Linear(3, 4), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norms[0](self.convs[0](x))
        x = torch.relu(z)
        x = torch.relu(self.norms[1](self.convs[1](x)) + (z if self.shared else x))
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("shared", [False, True])
def test_relu_norm_backward_in_the_reverse_pass(
    shared: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used: list[tuple[int, ...]] = []
    kernel = reverse.relu_norm_backward_triton
    monkeypatch.setattr(
        reverse, "relu_norm_backward_triton", lambda *given: used.append(given[0].shape) or kernel(*given)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual(shared=shared).double().eval()
    for seed, norm in enumerate(model.norms):
        norm.running_mean.copy_(normal(3, seed=seed))
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1e-3]))
        norm.weight.data.copy_(torch.tensor([1.0, -2.0, 0.5]))
    x = normal(2, 2, 6, 6, dtype=torch.float64)
    reference = influence.metric_tensor(model, x, wrt="layers", backend="torch")
    assert not used
    ours = influence.metric_tensor(model, x, wrt="layers", backend="triton")
    torch.testing.assert_close(ours.gram, reference.gram, rtol=1e-12, atol=1e-12)
    # Three contrasts of two examples, at both ReLUs; and no layer took the autograd path.
    assert used == [(3, 2, 3, 4, 4)] * 2 and not caplog.records


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
        result = influence.first_order_influence(metric, [0, 1])
        parts.append((metric.gram, result.fi, result.rank))
    torch.testing.assert_close(parts[0][0], parts[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts[0][1], parts[1][1], rtol=1e-12, atol=0)
    assert torch.equal(parts[0][2], parts[1][2])


def test_triton_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    right = gram.gram_triton
    monkeypatch.setattr(gram, "gram_triton", lambda rows: called.append(1) or right(rows))
    with using("triton"):
        gram.products(normal(1, 2, 3))
    with using("auto"):
        gram.products(normal(1, 2, 3))
    assert len(called) == 1


def test_real_kernels_agree_as_auto_asks() -> None:
    """The interpreter is slower by far, so the answer is no; a kernel that differs or fails would have said so."""
    rows = normal(2, 9, 100)
    slow = lambda: (gram.gram_torch(rows), [gram.gram_torch(rows) for _ in range(3000)])[0]  # noqa: E731
    assert is_better("gram", lambda: gram.gram_triton(rows), slow) is True
    assert is_better("gram", lambda: 1.01 * gram.gram_triton(rows), slow) is False


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
    few = tuple(t.detach()[:2, :3].clone().requires_grad_() for t in (z, w))  # each number twice in the interpreter
    assert torch.autograd.gradcheck(
        lambda a, b: influence.stability_loss(a, b, torch.tensor([0, 2]), alpha=0.5, backend="triton"), few
    )
    extreme = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 1e30, -1e30]], requires_grad=True)
    influence.stability_loss(extreme, other, torch.tensor([0]), alpha=1.0, backend="triton").backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()
    # What the host did not look at must not pass for a number.
    for label in (-1, 7, -100):
        loss = stability_loss.stability_loss_triton(
            z.detach(), w.detach(), torch.full((5,), label), 0.7, kl=True, stop=False
        )
        assert loss[0].isnan()
