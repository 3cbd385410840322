"""Brute force: the papers' formulas as written, float64 autograd, one example and one class at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath
import torch
from torch import Tensor, nn


def input_jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(K,)`` and their Jacobian ``(K, p)`` w.r.t. one input ``x``."""
    leaf = x.detach().clone().requires_grad_()
    logits = model(leaf[None])[0]
    rows = [torch.autograd.grad(z, leaf, retain_graph=True)[0].flatten() for z in logits]
    return logits.detach(), torch.stack(rows)


def parameter_jacobian(model: nn.Module, x: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Logits ``(K,)`` of one input and their Jacobian ``(K, p)`` w.r.t. the parameters, concatenated."""
    logits = model(x[None])[0]
    rows = []
    for z in logits:
        grads = torch.autograd.grad(z, list(parameters), retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
    return logits.detach(), torch.stack(rows)


def scores(logits: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """P ``(K,)`` and the scores s_k = d log P_k / d omega ``(K, p)``."""
    probs = logits.softmax(0)
    return probs, jacobian - probs @ jacobian


def root_matrix(logits: Tensor, jacobian: Tensor) -> Tensor:
    """L0 ``(p, K)``, columns sqrt(P_k) d log P_k / d omega."""
    probs, score = scores(logits, jacobian)
    return (probs.sqrt()[:, None] * score).T


def influence(logits: Tensor, jacobian: Tensor, label: int, *, rtol: float = 1e-11) -> tuple[float, int]:
    """FI by the thin SVD of L0, as in Shu & Zhu (2019), section 2, and the rank kept."""
    _, score = scores(logits, jacobian)
    left, singular, _ = torch.linalg.svd(root_matrix(logits, jacobian), full_matrices=False)
    rank = int((singular > rtol * singular[0]).sum())
    gradient = -score[label]
    return float(((left.T @ gradient)[:rank] / singular[:rank]).square().sum()), rank


def released(logits: Tensor, jacobian: Tensor, label: int, *, epsilon: float) -> tuple[float, int, Tensor]:
    """The released estimator transcribed: its value, the singular values kept, and all of them."""
    probs = logits.softmax(0)
    derivative = probs[:, None] * (jacobian - probs @ jacobian)
    columns = (derivative / (probs.sqrt() + epsilon)[:, None]).T
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    gradient = derivative[label] / (probs[label] + epsilon)
    rank = int((singular > epsilon).sum())
    value = float(((left.T @ gradient)[:rank] / singular[:rank]).square().sum()) if rank else 0.0
    return value, rank, singular


def regularised(logits: Tensor, jacobian: Tensor, label: int, *, lam: float) -> float:
    """grad f^T (G + lambda I)^-1 grad f with the p x p matrix."""
    probs, score = scores(logits, jacobian)
    tensor = score.T @ (probs[:, None] * score)
    solved = torch.linalg.solve(tensor + lam * torch.eye(len(tensor), dtype=tensor.dtype), score[label])
    return float(score[label] @ solved)


def influence_in_many_digits(
    logits: Sequence[float], jacobian: Tensor, label: int, *, lam: float = 0.0, digits: int = 200
) -> tuple[float, float]:
    """FI and ceiling for a ``(K, p)`` Jacobian of full column rank p < K, in ``digits`` digits."""
    with mpmath.workdps(digits):
        weights = [mpmath.exp(mpmath.mpf(z)) for z in logits]
        probs = [w / mpmath.fsum(weights) for w in weights]
        rows = [[mpmath.mpf(value) for value in row] for row in jacobian.tolist()]
        width = len(rows[0])
        mean = [mpmath.fsum(p * row[j] for p, row in zip(probs, rows, strict=True)) for j in range(width)]
        score = [[row[j] - mean[j] for j in range(width)] for row in rows]
        tensor = mpmath.matrix(width, width)
        for i in range(width):
            for j in range(width):
                tensor[i, j] = mpmath.fsum(p * s[i] * s[j] for p, s in zip(probs, score, strict=True))
            tensor[i, i] += lam
        gradient = mpmath.matrix(score[label])
        value = (gradient.T * mpmath.lu_solve(tensor, gradient))[0]
        rest = mpmath.fsum(p for k, p in enumerate(probs) if k != label)
        return float(value), float(rest / probs[label])


def log_odds(prob: float, classes: int) -> float:
    """The logit of one class against K - 1 equal others at 0 that gives it ``prob``."""
    return math.log(prob) - math.log1p(-prob) + math.log(classes - 1)
