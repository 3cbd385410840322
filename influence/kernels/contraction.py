"""Gram of the gradients of a weight, W_k = g_k^T A, from the gradients g of its output and its shared input A.

Two ways, by counted cost (``cheaper``), both the Gram of Y_k = g_k B. *Materialise*: B = A (T x D), so that Y_k is W_k.
*Shared ghost*: S = A A^T (T x T) is the same for all classes, so <W_k, W_l> = <g_k, S g_l> and no W is made; in single
precision B is a root of S, as <S g_k, g_l> would lose twice the digits that W_k itself has lost, and with them the
rank. Y is made in pieces by the library's matrix product and goes to ``gram.products``: a piece, 32 MB, stays in the
50 MB cache of an H100, and a kernel that writes no Y would read B once for every output channel instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.gram import products

# What a float64 multiplication costs, in float32 ones.
_DOUBLE = 2.0
# Entries of Y made at once, and where one buffer, which stays in a core's cache, serves all.
_PIECE, _TILE = 2**23, 2**20
# A sum over many entries goes to so many sums side by side, which use all cores.
_SEGMENTS = 4
# Multiplications for one class from which on a call of its own costs nothing.
_LARGE = 2**18


def cheaper(*, positions: int, inputs: int, outputs: int, classes: int, double: bool, shared: float) -> str:
    """The way, "ghost" or "materialise", that takes fewer multiplications for one example; S takes ``shared``."""
    price = 1.0 if double else _DOUBLE
    products = price * classes**2
    materialise = classes * positions * inputs * outputs + products * inputs * outputs
    root = 0 if double else price * positions**3
    ghost = price * shared + root + classes * positions**2 * outputs + products * positions * outputs
    return "ghost" if ghost < materialise else "materialise"


def materialised_gram(grads: Tensor, shared: Tensor) -> Tensor:
    """Gram ``(N, m, m)`` float64 of W_k = sum_t g_k[t] a[t]^T from g ``(N, m, P, T)`` and a ``(N, D, T)``."""
    return _projected_gram(grads, shared.mT)


def ghost_gram(grads: Tensor, gram: Tensor) -> Tensor:
    """Gram ``(N, m, m)`` float64 of W_k from g ``(N, m, P, T)`` and S ``(N, T, T)`` float64."""
    if grads.dtype != torch.float64:
        return _projected_gram(grads, root(gram).to(grads.dtype))
    rows = grads.flatten(1, 2)
    product = (rows @ gram).view(*grads.shape[:2], -1) @ grads.flatten(2).mT
    return 0.5 * (product + product.mT)


def root(gram: Tensor) -> Tensor:
    """R with S = R R^T for positive semi-definite ``(N, T, T)`` matrices, to about T eps of float64."""
    if gram.shape[-1] == 1:
        return gram.clamp(min=0).sqrt()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    slack = gram.shape[-1] * torch.finfo(gram.dtype).eps * diagonal.amax(dim=-1, keepdim=True)
    lower, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed((slack + 1e-280).expand_as(diagonal)))
    if bool(failed.any()):
        bad = failed > 0
        values, vectors = torch.linalg.eigh(gram[bad])
        lower[bad] = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return lower


def _projected_gram(grads: Tensor, shared: Tensor) -> Tensor:
    """Gram ``(N, m, m)`` float64 of g_k B from g ``(N, m, P, T)`` and B ``(N, T, J)``."""
    examples, classes, outputs, positions = grads.shape
    width = shared.shape[2]
    gram = grads.new_zeros(examples, classes, classes, dtype=torch.float64)
    if grads.device.type == "cpu" and outputs * positions * width >= _LARGE:
        _one_by_one(grads, shared, gram)
        return gram
    # Never more than a piece of all Y_k at once.
    tile = max(1, min(outputs, _PIECE // max(1, classes * width)))
    step = max(1, _PIECE // max(1, classes * width * tile))
    for start in range(0, examples, step):
        chunk = slice(start, start + step)
        for first in range(0, outputs, tile):
            part = grads[chunk, :, first : first + tile]
            rows = part.reshape(len(part), -1, positions) @ shared[chunk]
            gram[chunk] += products(rows.reshape(len(part), classes, -1))
    return gram


def _one_by_one(grads: Tensor, shared: Tensor, gram: Tensor) -> None:
    """Add the Gram of each example, in tiles that share their memory: a system is slow to give new one."""
    _, classes, outputs, positions = grads.shape
    width = shared.shape[2]
    tile = max(1, min(outputs, _TILE // max(1, classes * width)))
    rows = grads.new_empty(classes * tile * width)
    wide = torch.empty_like(rows, dtype=torch.float64)
    # One product for all classes is faster, where a copy that lets them lie together is small beside it.
    together = width >= 4 * outputs
    for example, columns, total in zip(grads, shared, gram, strict=True):
        for part in example.split(tile, dim=1):
            made = rows[: part.shape[:2].numel() * width].view(*part.shape[:2], width)
            if together:
                torch.mm(part.reshape(-1, positions), columns, out=made.view(-1, width))
            else:
                torch.bmm(part, columns.expand(classes, positions, width), out=made)
            copied = wide[: made.numel()].view(classes, -1).copy_(made.flatten(1))
            segments = _SEGMENTS if copied.shape[1] % _SEGMENTS == 0 else 1
            side = copied.unflatten(1, (segments, -1)).transpose(0, 1)
            total += torch.bmm(side, side.mT).sum(dim=0)
