"""Which rank does a Gram have: the pivots alone, for millions of small matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Matrices worked on at once: a few hundred kB stay in a core's cache, and calls are few.
_TILE_ENTRIES = 2**16


@dataclass(frozen=True)
class Pivots:
    """What decides a rank; attributes as those of ``Factor``.

    Attributes:
        rank: ``(M,)`` int64.
        largest: ``(M,)`` first pivot, in the unit of the Gram.
        smallest: ``(M,)`` last pivot kept, relative to the first; infinity at rank 0.
        refused: ``(M,)`` first pivot left out, relative to the first; 0 where none was.
    """

    rank: Tensor
    largest: Tensor
    smallest: Tensor
    refused: Tensor


def pivots(gram: Tensor, *, rtol: float, max_rank: int | None = None) -> Pivots:
    """Decide ranks as ``pivoted_cholesky`` does, several times as fast and without the factor.

    Args:
        gram: ``(M, K, K)`` float64, symmetric positive semi-definite.
        rtol: Tolerance on the pivots, relative to the largest.
        max_rank: Stop here. None: K.

    Returns:
        The ranks and what decided them.
    """
    batch, classes, _ = gram.shape
    steps = classes if max_rank is None else min(max_rank, classes)
    tile = max(64, _TILE_ENTRIES // classes**2) if gram.device.type == "cpu" else max(1, batch)
    parts = [_tile(part, rtol, steps) for part in gram.split(tile)] if batch else [_tile(gram, rtol, steps)]
    return Pivots(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _tile(gram: Tensor, rtol: float, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, classes, _ = gram.shape
    # The batch comes last, so that every operation runs along it; the copy is ours to work in.
    work = torch.empty(classes, classes, batch, dtype=gram.dtype, device=gram.device)
    work.copy_(gram.permute(1, 2, 0))
    diagonal = work.diagonal().T.clone()
    largest = diagonal.amax(dim=0).clamp(min=0) if batch else diagonal.new_zeros(0)
    # A Gram of nothing but zeros has no pivot to keep.
    inverse = torch.where(largest > 0, 1.0 / largest, 0.0)
    relative = largest.new_zeros(steps, batch)
    for step in range(steps):
        pivot, index = diagonal.max(dim=0)
        torch.mul(pivot, inverse, out=relative[step])
        column = work.gather(0, index.expand(1, classes, batch)).squeeze(0)
        scale = pivot.clamp(min=1e-300).rsqrt()
        column *= torch.where(relative[step] > rtol, scale, 0.0)
        if step < steps - 1:
            work.addcmul_(column[:, None], column[None], value=-1)
        diagonal.addcmul_(column, column, value=-1)
        # A class that has been a pivot is spent: exactly zero, not rounding noise.
        diagonal.scatter_(0, index[None], 0.0)
    kept = relative > rtol
    # Largest first: the first that is refused ends it.
    kept = kept.to(torch.int8).cummin(dim=0).values.bool() if steps else kept
    rank = kept.sum(dim=0)
    padded = torch.cat([relative.new_full((1, batch), torch.inf), relative, relative.new_zeros(1, batch)])
    smallest = padded.gather(0, rank[None]).squeeze(0)
    refused = padded.gather(0, rank[None] + 1).squeeze(0).clamp(min=0)
    return rank, largest, smallest, torch.where(largest > 0, refused, 0.0)
