"""Gram of the gradients of a weight, W_k = g_k^T A, from the gradients g of its output and its shared input A.

Two ways, by counted cost (``cheaper``). *Materialise*: W_k (P x D) for all classes, then their products. *Shared
ghost*: S = A A^T (T x T) is the same for all classes, so <W_k, W_l> = <g_k, S g_l> and no W is made. In single
precision the ghost is taken through a root of S, Y_k = R^T g_k with S = R R^T: as <S g_k, g_l> it would lose twice the
digits that W_k itself has lost, and with them the rank. All products of two gradients are added up in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.projected import projected_gram

# What a float64 multiplication costs, in float32 ones.
_DOUBLE = 2.0


def cheaper(*, positions: int, inputs: int, outputs: int, classes: int, double: bool, shared: float) -> str:
    """Count multiplications of both ways for one example.

    Args:
        positions: T.
        inputs: D.
        outputs: P.
        classes: m.
        double: Whether the gradients are float64, so that all costs the same.
        shared: Multiplications for S.

    Returns:
        "ghost" or "materialise".
    """
    price = 1.0 if double else _DOUBLE
    products = price * classes**2
    materialise = classes * positions * inputs * outputs + products * inputs * outputs
    root = 0 if double else price * positions**3
    ghost = price * shared + root + classes * positions**2 * outputs + products * positions * outputs
    return "ghost" if ghost < materialise else "materialise"


def materialised_gram(grads: Tensor, shared: Tensor) -> Tensor:
    """Gram of W_k = sum_t g_k[t] a[t]^T.

    Args:
        grads: ``(N, m, P, T)``.
        shared: ``(N, D, T)``.

    Returns:
        ``(N, m, m)`` float64.
    """
    return projected_gram(grads, shared.mT)


def ghost_gram(grads: Tensor, gram: Tensor) -> Tensor:
    """Gram of W_k from S = A A^T alone.

    Args:
        grads: ``(N, m, P, T)``.
        gram: S, ``(N, T, T)`` float64.

    Returns:
        ``(N, m, m)`` float64.
    """
    if grads.dtype == torch.float64:
        examples, classes, _, positions = grads.shape
        rows = grads.reshape(examples, -1, positions)
        turned = (rows @ gram).reshape(examples, classes, -1)
        product = turned @ rows.reshape(examples, classes, -1).mT
        return 0.5 * (product + product.mT)
    return projected_gram(grads, root(gram).to(grads.dtype))


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
