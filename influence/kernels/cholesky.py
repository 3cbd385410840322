"""Which rank does a Gram have, and what is its factor: pivoted Cholesky, vectorised over a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A rank-revealing factor of a batch of Grams, ``gram ~ rows @ rows^T``.

    Attributes:
        rows: ``(M, K, R)`` float64, R the largest rank of the batch; columns from an example's rank on are zero.
        rank: ``(M,)`` int64.
        largest: ``(M,)`` first pivot, in the unit of the Gram.
        smallest: ``(M,)`` last pivot kept, relative to the first; infinity at rank 0.
        refused: ``(M,)`` first pivot left out, relative to the first; 0 where none was.
    """

    rows: Tensor
    rank: Tensor
    largest: Tensor
    smallest: Tensor
    refused: Tensor


def pivoted_cholesky(gram: Tensor, *, rtol: float, max_rank: int | None = None) -> Factor:
    """Factor positive semi-definite matrices, largest pivot first, until a pivot falls to ``rtol`` of the first.

    A pivot is the squared distance of a row of the Jacobian from the span of the rows taken before it, so the rule
    does not depend on the unit of the perturbation.

    Args:
        gram: ``(M, K, K)`` float64, symmetric positive semi-definite.
        rtol: Tolerance on the pivots (squared lengths), relative to the largest.
        max_rank: Stop here; K - 1 for a contrast Gram. None: K.

    Returns:
        The factor.
    """
    classes = gram.shape[1]
    steps = classes if max_rank is None else min(max_rank, classes)
    example = torch.arange(len(gram), device=gram.device)
    return _factor(gram.diagonal(dim1=-2, dim2=-1).clone(), lambda index: gram[example, index], rtol, steps)


def factor_of_jacobian(jacobian: Tensor, *, rtol: float, max_rank: int | None = None) -> Factor:
    """Factor ``jacobian @ jacobian^T`` without forming it, where there are many classes and few values.

    Args:
        jacobian: ``(M, K, p)`` float64.
        rtol: As for ``pivoted_cholesky``.
        max_rank: As for ``pivoted_cholesky``.

    Returns:
        The factor.
    """
    batch, classes, values = jacobian.shape
    steps = min(values, classes if max_rank is None else max_rank)
    example = torch.arange(batch, device=jacobian.device)

    def column(index: Tensor) -> Tensor:
        return (jacobian @ jacobian[example, index, :, None]).squeeze(-1)

    return _factor(jacobian.square().sum(dim=-1), column, rtol, steps)


def _factor(diagonal: Tensor, column_of: Callable[[Tensor], Tensor], rtol: float, steps: int) -> Factor:
    """The steps, from the diagonal ``(M, K)`` of the Grams and what gives one column ``(M, K)`` of each."""
    batch, classes = diagonal.shape
    example = torch.arange(batch, device=diagonal.device)
    largest = diagonal.amax(dim=-1).clamp(min=0)
    rows = diagonal.new_zeros(batch, classes, steps)
    rank = torch.zeros(batch, dtype=torch.int64, device=diagonal.device)
    smallest = diagonal.new_full((batch,), torch.inf)
    refused = diagonal.new_zeros(batch)
    going = largest > 0
    for step in range(steps):
        pivot, index = diagonal.max(dim=-1)
        relative = pivot / torch.where(largest > 0, largest, 1.0)
        kept = going & (relative > rtol)
        refused = torch.where(going & ~kept, relative.clamp(min=0), refused)
        going = kept
        if not bool(going.any()):
            rows = rows[:, :, :step]
            break
        smallest = torch.where(kept, relative, smallest)
        rank += kept
        column = column_of(index)
        column = column - (rows[:, :, :step] @ rows[example, index, :step, None]).squeeze(-1)
        column = column / torch.where(kept, pivot, 1.0).sqrt()[:, None]
        column = torch.where(kept[:, None], column, 0.0)
        rows[:, :, step] = column
        diagonal = diagonal - column.square()
        # A class that has been a pivot is spent: exactly zero, not rounding noise.
        diagonal[example, index] = torch.where(kept, 0.0, diagonal[example, index])
    return Factor(rows=rows, rank=rank, largest=largest, smallest=smallest, refused=refused)
