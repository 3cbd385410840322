"""Gram of projected gradients, <Y_k, Y_l> with Y_k = g_k B.

Both ways of a weight's Gram have this form: *materialise* with B = A^T (T x D), the input of the layer, so that Y_k is
the gradient W_k of the weight; the *shared ghost* with B a root of S = A A^T (T x T). Y is made in pieces by the
library's matrix product and goes to ``gram.products``: a piece, 32 MB, stays in the 50 MB cache of an H100, and a
kernel of our own that writes no Y would read B once for every output channel instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.gram import products

__all__ = ["products", "projected_gram"]

# Entries of Y made at once.
_PIECE = 2**23
# The same where one buffer serves all: it stays in a core's cache.
_TILE = 2**20
# A sum over many entries goes to so many sums side by side, which use all cores.
_SEGMENTS = 4
# Multiplications for one class from which on a call of its own costs nothing.
_LARGE = 2**18


def projected_gram(grads: Tensor, shared: Tensor) -> Tensor:
    """Gram of g_k B.

    Args:
        grads: g, ``(N, m, P, T)``.
        shared: B, ``(N, T, J)``.

    Returns:
        ``(N, m, m)`` float64: products of single precision are added up in double.
    """
    examples, classes, outputs, positions = grads.shape
    width = shared.shape[2]
    gram = grads.new_zeros(examples, classes, classes, dtype=torch.float64)
    if grads.device.type == "cpu" and outputs * positions * width >= _LARGE:
        for n in range(examples):
            _one_by_one(grads[n], shared[n], gram[n])
        return gram
    # Never more than a piece of all Y_k at once.
    tile = max(1, min(outputs, _PIECE // max(1, classes * width)))
    step = max(1, _PIECE // max(1, classes * width * tile))
    for start in range(0, examples, step):
        chunk = slice(start, start + step)
        right = shared[chunk]
        for first in range(0, outputs, tile):
            part = grads[chunk, :, first : first + tile]
            rows = part.reshape(len(part), -1, positions) @ right
            gram[chunk] += products(rows.reshape(len(part), classes, -1))
    return gram


def _one_by_one(grads: Tensor, shared: Tensor, gram: Tensor) -> None:
    """Add the Gram of one example, ``(m, P, T)`` and ``(T, J)``, to ``(m, m)``: in tiles that share their memory."""
    classes, outputs, positions = grads.shape
    width = shared.shape[1]
    tile = max(1, min(outputs, _TILE // max(1, classes * width)))
    rows = grads.new_empty(classes * tile * width)
    wide = grads.new_empty(classes * tile * width, dtype=torch.float64)
    # One product for all classes is faster, where a copy that lets them lie together is small beside it.
    together = width >= 4 * outputs
    for first in range(0, outputs, tile):
        part = grads[:, first : first + tile]
        entries = part.shape[:2].numel() * width
        made = rows[:entries].view(*part.shape[:2], width)
        if together:
            torch.mm(part.reshape(-1, positions), shared, out=made.view(-1, width))
        else:
            torch.bmm(part, shared.expand(classes, positions, width), out=made)
        copied = wide[:entries].view(classes, -1).copy_(made.flatten(1))
        gram += _sum_of_products(copied)


def _sum_of_products(wide: Tensor) -> Tensor:
    """Gram of the rows of a float64 matrix ``(m, p)``."""
    if wide.shape[1] % _SEGMENTS:
        return wide @ wide.T
    segments = wide.unflatten(1, (_SEGMENTS, -1)).transpose(0, 1)
    return torch.bmm(segments, segments.mT).sum(dim=0)
