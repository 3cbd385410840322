"""The batched factor and projection against dense algebra."""

from __future__ import annotations

import pytest
import torch

from influence.kernels import elimination
from influence.kernels.elimination import factor_of_jacobian, pivoted_cholesky
from influence.kernels.projection import weighted_projection


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_factor_has_the_rank_and_gives_the_gram_back(rank: int) -> None:
    a = torch.randn(5, 6, rank, generator=generator(), dtype=torch.float64)
    gram = a @ a.mT
    factor = pivoted_cholesky(gram, rtol=1e-12)
    assert factor.rank.tolist() == [rank] * 5
    assert factor.rows.shape == (5, 6, rank)
    torch.testing.assert_close(factor.rows @ factor.rows.mT, gram, rtol=1e-12, atol=1e-12)


def test_factor_of_a_mixed_batch() -> None:
    ranks = [0, 2, 4, 1]
    grams = []
    for seed, rank in enumerate(ranks):
        a = torch.randn(5, rank, generator=generator(seed), dtype=torch.float64) * 10.0 ** (seed * 3 - 4)
        grams.append(a @ a.mT)
    gram = torch.stack(grams)
    factor = pivoted_cholesky(gram, rtol=1e-12, max_rank=4)
    assert factor.rank.tolist() == ranks
    scale = gram.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(factor.rows @ factor.rows.mT / scale, gram / scale, rtol=1e-12, atol=1e-12)


def test_tolerance_is_on_squared_lengths() -> None:
    gram = torch.diag_embed(torch.tensor([[1.0, 1e-4, 1e-8]], dtype=torch.float64))
    assert [int(pivoted_cholesky(gram, rtol=rtol).rank) for rtol in (1e-9, 1e-7, 1e-3)] == [3, 2, 1]
    factor = pivoted_cholesky(gram, rtol=1e-7)
    assert factor.smallest.item() == pytest.approx(1e-4, abs=0)
    assert factor.refused.item() == pytest.approx(1e-8, abs=0)


def test_projection_equals_least_squares() -> None:
    rows = torch.randn(7, 9, 3, generator=generator(), dtype=torch.float64)
    weights = torch.rand(7, 9, generator=generator(1), dtype=torch.float64)
    target = torch.randn(7, 9, generator=generator(2), dtype=torch.float64)
    explained, unexplained, _ = weighted_projection(rows, weights.log(), target, torch.full((7, 1), 1e-20).double())
    for i in range(7):
        root = weights[i].sqrt()
        fit = torch.linalg.lstsq(root[:, None] * rows[i], (root * target[i])[:, None]).solution
        shown = (root[:, None] * rows[i] @ fit).square().sum()
        assert explained[i].item() == pytest.approx(shown.item(), rel=1e-10, abs=0)
        assert unexplained[i].item() == pytest.approx(
            ((root * target[i]).square().sum() - shown).item(), rel=1e-10, abs=0
        )


def weighted(spread: float, width: int) -> tuple[torch.Tensor, ...]:
    """Dependent rows, rows left out and weights over hundreds of orders of magnitude included."""
    rows = torch.randn(5, 50, width, generator=generator(), dtype=torch.float64)
    rows[0, :20] = rows[0, 20:40]  # the same again
    rows[1, :, width // 2 :] = 0  # a lower rank
    rows[2, 10] = 0
    log_weights = -spread * torch.rand(5, 50, generator=generator(1), dtype=torch.float64)
    log_weights[3, 5:9] = -torch.inf
    target = torch.randn(5, 50, generator=generator(2), dtype=torch.float64)
    return rows, log_weights, target, torch.full((5, 1), 1e-20, dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 7, 30])
@pytest.mark.parametrize("spread", [0.0, 60.0, 600.0])
def test_the_layout_in_memory_and_the_tiles_do_not_matter(
    width: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weighted_projection(*weighted(spread, width))
    monkeypatch.setattr(elimination, "_WIDE", 0)
    for ours, other in zip(weighted_projection(*weighted(spread, width)), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=0)
    monkeypatch.setattr(elimination, "_WIDE", 10**6)
    many = tuple(torch.cat([tensor] * 40) for tensor in weighted(spread, width))
    for ours, other in zip(weighted_projection(*many), expected, strict=True):
        torch.testing.assert_close(ours, other.repeat(40), rtol=1e-9, atol=0)


@pytest.mark.parametrize("width", [1, 7, 30])
@pytest.mark.parametrize("spread", [0.0, 60.0, 600.0])
def test_each_pivot_is_the_largest_weighted_residual(width: int, spread: float) -> None:
    """The residuals by a dense QR of the pivots before, one problem at a time."""
    rows, log_weights, _, cut = weighted(spread, width)
    found = elimination.eliminate_rows(rows, log_weights, cut)
    for n in range(len(rows)):
        residual = rows[n].clone()
        for step in range(width):
            length = residual.square().sum(dim=1)
            score = torch.where(length <= 1e-20, -torch.inf, log_weights[n] + length.log())
            assert bool(found.used[n, step]) == bool(score.max() > -torch.inf)
            if not found.used[n, step]:
                continue
            pivot = int(found.pivots[n, step])
            assert score[pivot].item() == pytest.approx(score.max().item(), abs=1e-6)
            assert found.values[n, step].item() == pytest.approx(length[pivot].item(), rel=1e-6, abs=0)
            basis = torch.linalg.qr(rows[n, found.pivots[n, : step + 1]].T)[0]
            residual = rows[n] - (rows[n] @ basis) @ basis.T


@pytest.mark.parametrize("classes", [2, 3, 10, 33, 150])
@pytest.mark.parametrize("rtol", [1e-12, 1e-2])
def test_gram_and_jacobian_have_the_same_pivots(classes: int, rtol: float) -> None:
    ranks = [*range(0, classes, max(1, classes // 10)), classes - 1]
    rows = torch.zeros(len(ranks), classes, classes - 1, dtype=torch.float64)
    for n, rank in enumerate(ranks):
        a = torch.randn(classes, rank, generator=generator(n), dtype=torch.float64) * 10.0 ** (rank % 5 - 3)
        rows[n, :, :rank] = a
    ours = pivoted_cholesky(rows @ rows.mT, rtol=rtol, max_rank=classes - 1)
    other = factor_of_jacobian(rows, rtol=rtol, max_rank=classes - 1)
    assert torch.equal(ours.rank, other.rank)
    torch.testing.assert_close(ours.largest, other.largest, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.smallest, other.smallest, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.refused, other.refused, rtol=1e-8, atol=1e-13)
    for factor in (ours, other):
        left = rows.square().sum(dim=2) - factor.rows.square().sum(dim=2)
        assert (left.amax(dim=1) <= (rtol + 1e-13) * factor.largest).all()


def test_a_jacobian_tells_pivots_apart_that_its_gram_cannot() -> None:
    rows = torch.diag(torch.tensor([1.0, 1e-6, 1e-10], dtype=torch.float64)) + torch.tensor([[0.0], [1.0], [1.0]])
    rows = torch.cat([rows, torch.ones(3, 1, dtype=torch.float64)], dim=1)[None]
    factor = factor_of_jacobian(rows, rtol=1e-30)
    assert factor.rank.item() == 3 and pivoted_cholesky(rows @ rows.mT, rtol=1e-12).rank.item() == 2
