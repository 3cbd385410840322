"""Greedy pivoted elimination, the one of this package: ranks and factors of Grams, and the order of least squares.

A pivot is the squared distance of a row of a Jacobian from the span of the rows taken before it. From a Gram this is
the pivoted Cholesky factorisation (Higham 1990); from the rows themselves it is Gram-Schmidt with row pivoting, which
keeps the digits that a Gram squares away. Both are the loop ``_eliminate``; they differ in how one column is made.

No Triton kernel: all Grams of 50,000 examples x 107 layers, K = 10, are 4.3 GB, read once in 1.3 ms on an H100, and
0.1 s when PyTorch's operations move 80 times that, of a scan that takes a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# From the components so far (steps, Q, M), the row taken (M,) and its squared residual (M,), infinite where none is, to
# the components (Q, M) of all rows along that residual, zero where none is.
Column = Callable[[Tensor, Tensor, Tensor], Tensor]
# From the number of steps so far and which problems (m,) to their squared residuals (Q, m), computed anew.
Remainder = Callable[[int, Tensor], Tensor]
# What the loop knows of the rows: their squared lengths (M, Q), and these two.
Rows = tuple[Tensor, Column, Remainder | None]

# Entries worked on at once on a CPU: half a MB stays in a core's cache, and calls are few.
_TILE_ENTRIES = 2**16
# Matrices of more entries than this fill a matrix product each; smaller ones lie side by side along the batch.
_WIDE = 2**12
# Share of a squared length below which what subtraction has left of it is computed anew.
_LOST = 1e-6
# Share of it that rounding leaves of a row in the span of others.
_NOISE = 256 * torch.finfo(torch.float64).eps ** 2


@dataclass(frozen=True)
class Factor:
    """A rank-revealing factor of M Grams, ``gram ~ rows @ rows^T``."""

    rows: Tensor  # (M, K, R) float64, R the largest rank of all; columns from a Gram's own rank on are zero
    rank: Tensor  # (M,) int64
    largest: Tensor  # (M,) first pivot, in the unit of the Gram
    smallest: Tensor  # (M,) last pivot kept, relative to the first; infinity at rank 0
    refused: Tensor  # (M,) first pivot left out, relative to the first; 0 where none was


@dataclass(frozen=True)
class Elimination:
    """What the loop did; a step that found no pivot left zeros."""

    lower: Tensor  # (M, Q, steps) components of the rows along the direction of each step
    pivots: Tensor  # (M, steps) int64, the row taken in each step
    used: Tensor  # (M, steps) bool, whether it took one
    values: Tensor  # (M, steps) squared residual of the row taken
    left: Tensor  # (M, Q) squared residuals at the end; zero for a row that was taken


def pivoted_cholesky(gram: Tensor, *, rtol: float, max_rank: int | None = None) -> Factor:
    """Factor positive semi-definite matrices ``(M, K, K)`` float64, largest pivot (squared length) first.

    It ends where a pivot falls to ``rtol`` of the first, so that no unit matters, or at ``max_rank``, K - 1 for a
    contrast Gram.
    """
    return _factor(_cholesky, gram, rtol, max_rank)


def factor_of_jacobian(jacobian: Tensor, *, rtol: float, max_rank: int | None = None) -> Factor:
    """Factor ``J J^T`` without forming it, from J ``(M, K, p)`` float64 with many classes and few values."""
    return _factor(_gram_schmidt, jacobian, rtol, max_rank)


def eliminate_rows(rows: Tensor, log_weights: Tensor, cut: Tensor) -> Elimination:
    """Take the row of largest weighted residual, and its direction out of all others; see ``weighted_projection``."""
    return _eliminate(_gram_schmidt(rows, rows.shape[2]), rows.shape[2], cut, log_weights)


def in_tiles(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, entries: int) -> tuple[Tensor, ...]:
    """``function`` of problems along the first dimension, on a CPU as many at a time as the cache holds."""
    count, step = len(tensors[0]), max(64, _TILE_ENTRIES // max(1, entries))
    if count <= step or entries > _WIDE or tensors[0].device.type != "cpu":
        return function(*tensors)
    parts = [function(*part) for part in zip(*(tensor.split(step) for tensor in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _factor(way: Callable[[Tensor, int], Rows], matrix: Tensor, rtol: float, max_rank: int | None) -> Factor:
    _, classes, values = matrix.shape
    steps = min(values, classes if max_rank is None else max_rank)

    def factor(part: Tensor) -> tuple[Tensor, ...]:
        rows = way(part, steps)
        largest = rows[0].amax(dim=-1).clamp(min=0)
        found = _eliminate(rows, steps, rtol * largest[:, None])
        rank = found.used.sum(dim=1)
        unit = torch.where(largest > 0, largest, 1.0)
        smallest = pad(torch.where(found.used, found.values, torch.inf), (0, 1), value=torch.inf).amin(dim=1)
        refused = found.left.amax(dim=1).clamp(min=0).masked_fill((rank == steps) | (largest == 0), 0.0)
        return found.lower, rank, largest, smallest / unit, refused / unit

    lower, rank, *pivots = in_tiles(factor, matrix, entries=classes * values)
    return Factor(lower[:, :, : int(rank.max()) if len(rank) else 0], rank, *pivots)


def _cholesky(gram: Tensor, steps: int) -> Rows:
    turned = gram.permute(1, 2, 0)

    def column(lower: Tensor, index: Tensor, pivot: Tensor) -> Tensor:
        entries = turned.gather(0, index.expand(1, *turned.shape[1:])).squeeze(0)
        before = lower.gather(1, index.expand(len(lower), 1, -1)).squeeze(1)
        return (entries - _dot(lower, before)) * pivot.rsqrt()

    return gram.diagonal(dim1=-2, dim2=-1), column, None


def _gram_schmidt(rows: Tensor, steps: int) -> Rows:
    batch, count, width = rows.shape
    turned = _zeros(width, count, rows).copy_(rows.permute(2, 1, 0))
    units = _zeros(steps, width, rows)

    def column(lower: Tensor, index: Tensor, pivot: Tensor) -> Tensor:
        before = units[: len(lower)]
        unit = turned.gather(1, index.expand(width, 1, batch)).squeeze(1)
        for _ in range(2):  # once more, as rounding leaves a little of them
            unit = unit - _dot(before, _dot(before.transpose(0, 1), unit))
        length = unit.square().sum(dim=0).sqrt()
        units[len(lower)] = unit / torch.where((length > 0) & (pivot < torch.inf), length, torch.inf)
        return _dot(turned, units[len(lower)])

    def remainder(step: int, chosen: Tensor) -> Tensor:
        before, some = units[:step, :, chosen].permute(2, 0, 1), rows[chosen]
        return (some - (some @ before.mT) @ before).square().sum(dim=-1).T

    return rows.square().sum(dim=-1), column, remainder


def _eliminate(rows: Rows, steps: int, cut: Tensor, log_weights: Tensor | None = None) -> Elimination:
    """The loop; with ``log_weights`` a row whose residual fell to the cut has no component along later directions."""
    length, column, remainder = rows
    batch, count = length.shape
    lower = _zeros(steps, count, length)
    length, cut = length.T.clone(), cut.T
    weights = None if log_weights is None else log_weights.T.contiguous()
    sure, least = length.clone(), _NOISE * length
    pivots = torch.zeros(steps, batch, dtype=torch.int64, device=length.device)
    used, values = torch.zeros_like(pivots, dtype=torch.bool), length.new_zeros(steps, batch)
    gone = torch.zeros_like(length, dtype=torch.bool)
    for step in range(steps):
        if remainder is not None:
            lost = ((length < _LOST * sure) & ~gone).any(dim=0).nonzero().squeeze(1)
            if len(lost):
                length[:, lost] = sure[:, lost] = remainder(step, lost).masked_fill(gone[:, lost], 0.0)
            gone |= length <= least
        if weights is None:
            value, index = length.max(dim=0)
            kept = value > cut[0]
        else:
            gone |= length <= cut
            score, index = torch.where(gone, -torch.inf, weights + length.log()).max(dim=0)
            kept, value = ~torch.isneginf(score), length.gather(0, index[None]).squeeze(0)
        if not bool(kept.any()):
            break
        pivots[step], used[step], values[step] = index, kept, value
        found = column(lower[:step], index, torch.where(kept, value, torch.inf))
        if remainder is not None:
            found = torch.where(gone, 0.0, found)
        lower[step] = found
        length = length - found.square()
        # A row that has been taken is spent: exactly zero, not rounding noise.
        length.scatter_(0, index[None], torch.where(kept, 0.0, value)[None])
        if remainder is not None:
            gone.scatter_(0, index[None], kept | gone.gather(0, index[None]))
    return Elimination(lower.permute(2, 1, 0).contiguous(), pivots.T, used.T, values.T, length.T)


def _zeros(first: int, second: int, like: Tensor) -> Tensor:
    """``(first, second, M)``: stored batch first for matrix products, else batch last, to run along it."""
    if first * second > _WIDE:
        return like.new_zeros(len(like), first, second).permute(1, 2, 0)
    return like.new_zeros(first, second, len(like))


def _dot(matrix: Tensor, vector: Tensor) -> Tensor:
    """Sum over the first dimension of ``(J, Q, M)`` times ``(J, M)``: ``(Q, M)``."""
    if matrix.shape[0] * matrix.shape[1] > _WIDE:
        return (vector.T.contiguous()[:, None] @ matrix.permute(2, 0, 1)).squeeze(1).T
    return (matrix * vector[:, None]).sum(dim=0)
