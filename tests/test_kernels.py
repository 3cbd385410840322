"""The batched factor and projection against dense algebra."""

from __future__ import annotations

import pytest
import torch

from influence.kernels.cholesky import pivoted_cholesky
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
    explained, unexplained = weighted_projection(rows, weights.log(), target, torch.full((7, 1), 1e-20).double())
    for i in range(7):
        root = weights[i].sqrt()
        fit = torch.linalg.lstsq(root[:, None] * rows[i], (root * target[i])[:, None]).solution
        shown = (root[:, None] * rows[i] @ fit).square().sum()
        assert explained[i].item() == pytest.approx(shown.item(), rel=1e-10, abs=0)
        assert unexplained[i].item() == pytest.approx(
            ((root * target[i]).square().sum() - shown).item(), rel=1e-10, abs=0
        )
