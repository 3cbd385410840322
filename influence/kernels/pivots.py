"""Which rank does a Gram have: the pivots alone, for millions of small matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence.kernels.backend import HAS_TRITON, takes_triton
from influence.kernels.cholesky import pivoted_cholesky

# Matrices worked on at once: a few hundred kB stay in a core's cache, and calls are few.
_TILE_ENTRIES = 2**16
_MOST_CLASSES = 32
# Beyond so many classes a matrix leaves the cache.
WIDE = 128


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
    return decide(gram, gram.new_zeros(len(gram)), rtol=rtol, max_rank=max_rank)[0]


def decide(gram: Tensor, log_ceiling: Tensor, *, rtol: float, max_rank: int | None = None) -> tuple[Pivots, Tensor]:
    """Decide ranks, and give the influence where the closed form holds.

    Args:
        gram: ``(M, K, K)`` float64, symmetric positive semi-definite.
        log_ceiling: ``(M,)`` float64, log((1 - P_y) / P_y).
        rtol: Tolerance on the pivots, relative to the largest.
        max_rank: The full rank, K - 1 for a contrast Gram. None: K.

    Returns:
        The ranks and what decided them, and FI ``(M,)``: the ceiling at full rank, 0 elsewhere.
    """
    classes = gram.shape[1]
    steps = classes if max_rank is None else min(max_rank, classes)
    # A matrix stands in the registers of one warp: larger ones do not fit there.
    if classes <= _MOST_CLASSES and len(gram) and takes_triton("decide", gram.device, _check):
        return decide_triton(gram, log_ceiling, rtol, steps)
    return decide_torch(gram, log_ceiling, rtol, steps)


def decide_torch(gram: Tensor, log_ceiling: Tensor, rtol: float, steps: int) -> tuple[Pivots, Tensor]:
    """The reference: all matrices of a tile at once, step by step."""
    batch, classes, _ = gram.shape
    if classes > WIDE:
        # A large matrix is read in every step, not written: the factor costs less than what is left of the matrix.
        factor = pivoted_cholesky(gram, rtol=rtol, max_rank=steps)
        found = Pivots(factor.rank, factor.largest, factor.smallest, factor.refused)
        return found, torch.where(found.rank == steps, log_ceiling.exp(), 0.0)
    tile = max(64, _TILE_ENTRIES // classes**2) if gram.device.type == "cpu" else max(1, batch)
    parts = [_tile(part, rtol, steps) for part in gram.split(tile)] if batch else [_tile(gram, rtol, steps)]
    found = Pivots(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found, torch.where(found.rank == steps, log_ceiling.exp(), 0.0)


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


if TYPE_CHECKING or not HAS_TRITON:
    _kernel: Any = None
else:
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(
        gram,
        log_ceiling,
        rank_out,
        largest_out,
        smallest_out,
        refused_out,
        fi_out,
        rtol,
        classes,
        steps,
        SIDE: tl.constexpr,  # noqa: N803
    ):
        # One program: one matrix, in registers from its first pivot to its influence.
        m = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, SIDE)
        inside = k < classes
        work = tl.load(
            gram + m * classes * classes + k[:, None] * classes + k[None, :],
            mask=inside[:, None] & inside[None, :],
            other=0.0,
        )
        diagonal = tl.sum(tl.where(k[:, None] == k[None, :], work, 0.0), axis=1)
        largest = tl.maximum(tl.max(diagonal, axis=0), 0.0)
        inverse = tl.where(largest > 0, 1.0 / tl.where(largest > 0, largest, 1.0), 0.0)
        rank = largest.to(tl.int64) * 0
        smallest = largest * 0.0 + float("inf")
        refused = largest * 0.0
        going = largest > 0
        for _ in range(steps):
            pivot = tl.max(diagonal, axis=0)
            index = tl.argmax(diagonal, axis=0)
            relative = pivot * inverse
            kept = going & (relative > rtol)
            refused = tl.where(going & (relative <= rtol), tl.maximum(relative, 0.0), refused)
            smallest = tl.where(kept, relative, smallest)
            rank += kept.to(tl.int64)
            going = kept
            root = tl.sqrt(tl.where(kept, pivot, 1.0))
            column = tl.sum(tl.where(k[:, None] == index, work, 0.0), axis=0) / root
            column = tl.where(kept, column, 0.0)
            work -= column[:, None] * column[None, :]
            diagonal = tl.where(k == index, 0.0, diagonal - column * column)
        tl.store(rank_out + m, rank)
        tl.store(largest_out + m, largest)
        tl.store(smallest_out + m, smallest)
        tl.store(refused_out + m, refused)
        ceiling = tl.exp(tl.load(log_ceiling + m))
        tl.store(fi_out + m, tl.where(rank == steps, ceiling, 0.0))


def decide_triton(gram: Tensor, log_ceiling: Tensor, rtol: float, steps: int) -> tuple[Pivots, Tensor]:
    """The same, one matrix in one warp."""
    import triton

    batch, classes, _ = gram.shape
    rank = torch.empty(batch, dtype=torch.int64, device=gram.device)
    largest, smallest, refused, fi = (gram.new_empty(batch) for _ in range(4))
    _kernel[(batch,)](
        gram.contiguous(),
        log_ceiling.contiguous(),
        rank,
        largest,
        smallest,
        refused,
        fi,
        rtol,
        classes,
        steps,
        SIDE=triton.next_power_of_2(classes),
        num_warps=1,
    )
    return Pivots(rank, largest, smallest, refused), fi


def _check(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 10, 9, generator=generator, dtype=torch.float64)
    rows *= (torch.arange(9) < torch.arange(40)[:, None] % 10)[:, None]
    gram, ceiling = (rows @ rows.mT).to(device), torch.linspace(-3, 3, 40, dtype=torch.float64).to(device)
    ours, reference = decide_triton(gram, ceiling, 1e-10, 9), decide_torch(gram, ceiling, 1e-10, 9)
    same = bool((ours[0].rank == reference[0].rank).all())
    return same and bool(torch.allclose(ours[1], reference[1], rtol=1e-12, atol=0))
