"""Which rank does a Gram have, and what is its factor: pivoted Cholesky, vectorised over a batch."""

from __future__ import annotations

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
    batch, classes, _ = gram.shape
    steps = classes if max_rank is None else min(max_rank, classes)
    example = torch.arange(batch, device=gram.device)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clone()
    largest = diagonal.amax(dim=-1).clamp(min=0)
    rows = gram.new_zeros(batch, classes, steps)
    rank = torch.zeros(batch, dtype=torch.int64, device=gram.device)
    smallest = gram.new_full((batch,), torch.inf)
    refused = gram.new_zeros(batch)
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
        column = gram[example, index]
        column = column - (rows[:, :, :step] @ rows[example, index, :step, None]).squeeze(-1)
        column = column / torch.where(kept, pivot, 1.0).sqrt()[:, None]
        column = torch.where(kept[:, None], column, 0.0)
        rows[:, :, step] = column
        diagonal = diagonal - column.square()
        # A class that has been a pivot is spent: exactly zero, not rounding noise.
        diagonal[example, index] = torch.where(kept, 0.0, diagonal[example, index])
    return Factor(rows=rows, rank=rank, largest=largest, smallest=smallest, refused=refused)
