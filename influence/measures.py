"""First-order influence of a perturbation on the loss, from the metric tensor in class space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from influence.checks import require_labels, require_rtol
from influence.kernels.elimination import Factor, factor_of_jacobian, pivoted_cholesky
from influence.kernels.projection import weighted_projection
from influence.metric import MetricTensor, default_rtol

# A Gram is float64: pivots below this share of the first are its rounding noise (times K).
_GRAM_EPS = torch.finfo(torch.float64).eps
# Rounding moves a row of the Jacobian by up to this many eps of its precision, relative to its length.
_JACOBIAN_ROUNDING = 256.0
# A pivot is near the tolerance, which has a margin of its own, within this factor.
_PIVOT_BAND = 10.0


@dataclass(frozen=True)
class Exact:
    """FI = grad f^T G^+ grad f with the pseudo-inverse of exact arithmetic (Shu & Zhu 2019, section 2).

    ``rtol`` in [0, 1) is the tolerance on the pivots of the contrast Gram, relative to its largest, below which a
    direction counts as absent. None: from the precision of the Jacobian, ``metric.default_rtol``.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        require_rtol(self.rtol)


@dataclass(frozen=True)
class Released:
    """The estimator of the authors' released code, its constant and its cut included, in exact arithmetic.

    With e = epsilon, L0 has columns dP_k / (sqrt(P_k) + e), grad f = dP_y / (P_y + e), only singular values of L0
    above e are kept (an absolute cut, in the unit of omega^-1), and FI = 0 when none is. Inputs there are raw 0..255
    pixels, below the cut is the noise of float32, and e is 1e-3, or 1e-8 in the outlier simulation.
    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be finite and > 0, got {self.epsilon}. Use Exact() for no epsilon.")


@dataclass(frozen=True)
class Regularised:
    """FI_lambda = grad f^T (G + lambda I)^-1 grad f: from FI (lambda -> 0) to |grad f|^2 / lambda.

    ``lam`` > 0 is lambda, in the unit of G, (unit of omega)^-2.
    """

    lam: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise ValueError(f"lam must be finite and > 0, got {self.lam}. Use Exact() for the limit 0.")


Estimator = Exact | Released | Regularised


@dataclass(frozen=True)
class Influence:
    """First-order influence of each example and block, for f = -log P_y.

    Attributes:
        fi: ``(N, B)`` float64, the estimator's value; no unit.
        ceiling: ``(N,)`` float64, (1 - P_y) / P_y, the exact FI of any perturbation of full rank.
        alignment: ``(N, B)`` float64 in [0, 1], exact FI / ceiling: the part that depends on the perturbation, whatever
            the estimator. 0 where nothing of the perturbation reaches the logits.
        rank: ``(N, B)`` int64, the directions used: the rank of G; for ``Released`` the singular values above its cut.
        near_cut: ``(N, B)`` bool, whether rounding (of the Jacobian, each row by a few hundred eps of its precision, or
            of the float64 Gram) may have moved a direction across the cut, or made all that separates FI from its
            ceiling; compute these examples in float64 where it matters. Not seen is a ReLU that rounding puts on the
            other side of its kink, which changes PyTorch's gradients as well: FI of a single pixel may move by half.
            Nor is a block whose gradient cancels for every class, such as a bias before InstanceNorm or of the keys of
            an attention: what is left is rounding, which has a rank, and an FI up to the ceiling, of its own. Its trace
            says so, which is next to nothing beside that of other blocks.
        labels: ``(N,)`` int64, y.
        blocks: B names.
    """

    fi: Tensor
    ceiling: Tensor
    alignment: Tensor
    rank: Tensor
    near_cut: Tensor
    labels: Tensor
    blocks: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each block of each example: example, block, label, fi, ceiling, alignment, rank, near_cut."""
        examples, blocks = self.fi.shape
        numbers = {"example": torch.arange(examples)[:, None], "label": self.labels[:, None], "fi": self.fi}
        numbers |= {"ceiling": self.ceiling[:, None], "alignment": self.alignment}
        numbers |= {"rank": self.rank, "near_cut": self.near_cut}
        flat = {name: value.cpu().expand(examples, blocks).flatten().numpy() for name, value in numbers.items()}
        return pd.DataFrame({"example": flat.pop("example"), "block": list(self.blocks) * examples, **flat})


def first_order_influence(
    metric: MetricTensor,
    labels: Tensor | Sequence[int] | Literal["predicted"] | None = None,
    *,
    estimator: Estimator | None = None,
) -> Influence:
    r"""First-order influence of the perturbation on the loss f = -log P_y of each example.

    .. math:: FI = \nabla f^T G^+ \nabla f = \frac{1}{P_y} e_y^T M^+ M e_y \le \frac{1 - P_y}{P_y},
        \quad M = L_0^T L_0 \in R^{K \times K}

    (Shu & Zhu 2019, section 2, arXiv 1901.07152), with equality at rank K - 1, where the closed form is taken.

    Args:
        metric: From ``metric_tensor``.
        labels: ``(N,)`` integer classes y, or "predicted" for the class that the model predicts, whose FI says nothing
            of a wrong label. None: the same.
        estimator: ``Exact()`` (the default), ``Released(epsilon)`` or ``Regularised(lam)``.

    Raises:
        TypeError: If the labels are not integers or the estimator is none of the three.
        ValueError: If there are not N labels or one is outside ``0..K-1``.

    Example:
        >>> from influence.metric import metric_tensor
        >>> metric = metric_tensor(torch.nn.Identity(), torch.tensor([[0.0, 0.0, 0.0]]))
        >>> first_order_influence(metric, [1]).fi
        tensor([[2.]], dtype=torch.float64)
    """
    estimator = Exact() if estimator is None else estimator
    if not isinstance(estimator, Exact | Released | Regularised):
        raise TypeError(f"estimator must be Exact(), Released() or Regularised(lam), got {estimator!r}.")
    examples, blocks, classes, _ = metric.gram.shape
    given = given_labels(labels)
    given = metric.log_probs.argmax(dim=1) if given is None else given
    labels = require_labels(given, examples=examples, classes=classes, device=metric.log_probs.device)
    ceiling = log_ceiling(metric.log_probs, labels)

    # From here on one problem for each example and block.
    contrast = metric.contrast_gram().flatten(0, 1)
    example = torch.arange(examples, device=labels.device).repeat_interleave(blocks)
    problems = _Problems(metric.log_probs, labels, ceiling, metric.dtype)[example]
    rtol = estimator.rtol if isinstance(estimator, Exact) else None
    rtol = default_rtol(metric.dtype, classes=classes) if rtol is None else rtol
    fi, alignment, rank, near = _exact(problems, pivoted_cholesky(contrast, rtol=rtol, max_rank=classes - 1), rtol)
    if not isinstance(estimator, Exact):
        # These decide no rank: all that is not the Gram's own rounding counts.
        noise = classes * _GRAM_EPS
        factor = pivoted_cholesky(contrast, rtol=noise, max_rank=classes - 1)
        if isinstance(estimator, Released):
            fi, rank, near = _released(problems, factor, contrast.diagonal(dim1=-2, dim2=-1), estimator.epsilon)
        else:
            cut = _noise(problems, factor, noise)[:, None]
            fi, near = _reach(problems, factor.rows, cut, penalty=estimator.lam)[0], torch.zeros_like(near)
    fi, alignment, rank, near = (part.view(examples, blocks) for part in (fi, alignment, rank, near))
    return Influence(fi, ceiling.exp(), alignment, rank, near, labels, metric.blocks)


@dataclass(frozen=True)
class _Problems:
    """log P ``(M, K)``, labels and log of the ceiling ``(M,)`` of M problems, and the precision of their Jacobians."""

    log_probs: Tensor
    labels: Tensor
    log_ceiling: Tensor
    dtype: torch.dtype

    def __getitem__(self, chosen: Tensor) -> _Problems:
        return _Problems(self.log_probs[chosen], self.labels[chosen], self.log_ceiling[chosen], self.dtype)


def given_labels(labels: Tensor | Sequence[int] | str | None) -> Tensor | Sequence[int] | None:
    """The labels, or None where the predicted class is asked for; TypeError for another word than "predicted"."""
    if isinstance(labels, str) and labels != "predicted":
        raise TypeError(f"labels must be integer classes or the word 'predicted', got {labels!r}.")
    return None if isinstance(labels, str) else labels


def log_ceiling(log_probs: Tensor, labels: Tensor) -> Tensor:
    """log((1 - P_y) / P_y) from the other classes, so that 1 - P_y keeps its digits where P_y is near 1."""
    others = log_probs.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(dim=1) - log_probs.gather(1, labels[:, None]).squeeze(1)


def exact_of_jacobians(
    jacobian: Tensor, log_probs: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact FI from contrast Jacobians ``(M, K, p)`` float64 themselves, where values are few and classes many.

    The contrasts are those with any one class, whose row is zero, computed in ``dtype``.

    Returns:
        FI, alignment, rank and near_cut as in ``Influence``, each ``(M,)``.
    """
    classes = jacobian.shape[1]
    rtol = default_rtol(dtype, classes=classes)
    problems = _Problems(log_probs, labels, log_ceiling(log_probs, labels), dtype)
    return _exact(problems, factor_of_jacobian(jacobian, rtol=rtol, max_rank=classes - 1), rtol)


def _exact(problems: _Problems, factor: Factor, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FI, alignment, rank and near_cut: the closed form at full rank, a projection for what is left."""
    full = factor.rank == problems.log_probs.shape[1] - 1
    fi = torch.where(full, problems.log_ceiling.exp(), 0.0)
    alignment = full.to(fi.dtype)
    near = (factor.smallest < rtol * _PIVOT_BAND) | (factor.refused * _PIVOT_BAND > rtol)
    partial = (~full & (factor.rank > 0)).nonzero().squeeze(1)
    if len(partial):
        cut = _noise(problems, factor, rtol)[partial, None]
        fi[partial], alignment[partial], noise = _reach(problems[partial], factor.rows[partial], cut)
        near[partial] |= noise
    return fi, alignment, factor.rank, near & (factor.largest > 0)


def _noise(problems: _Problems, factor: Factor, rtol: float) -> Tensor:
    """Squared length up to which a row of the factor may be rounding: of the Jacobian, or of the Gram by its pivots.

    A row far below ``rtol`` of the longest still has its component along a direction that was kept, to many digits.
    """
    classes = problems.log_probs.shape[1]
    of_jacobian = 1024 * classes * torch.finfo(problems.dtype).eps ** 2
    of_gram = (classes * _GRAM_EPS) ** 2 / factor.smallest
    return factor.largest * of_gram.clamp(min=of_jacobian).clamp(max=rtol)


def _reach(problems: _Problems, rows: Tensor, cut: Tensor, *, penalty: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""FI and FI / ceiling below full rank, or under a penalty, from a factor of the contrast Gram.

    Also whether P_y / (1 - P_y) + sin^2 is no more than rounding of the Jacobian may put there.

    With t_k = (c_k - c_y) . u for a direction u of omega and Q_k = P_k / (1 - P_y) the distribution over the other
    classes, let cos^2 be the share of sum_k Q_k 1^2 that t explains in a least squares fit of the constant 1, and
    sin^2 the rest. Then maximising over u

    .. math:: FI = \max_u \frac{(\sum_k P_k t_k)^2}{Var_P(t)} = \frac{\cos^2}{P_y / (1 - P_y) + \sin^2}.

    A penalty lambda |u|^2 beside Var_P(t) adds the rows of the identity with weight lambda / (1 - P_y), target 0.
    """
    count, classes, width = rows.shape
    label = problems.labels[:, None]
    contrast = rows - rows.gather(1, label[..., None].expand(-1, 1, width))
    others = problems.log_probs.scatter(1, label, -torch.inf)
    log_rest = others.logsumexp(dim=1, keepdim=True)
    log_weights, target, limit = others - log_rest, torch.ones_like(others), cut.expand(-1, classes)
    if penalty > 0:
        identity = torch.eye(width, dtype=rows.dtype, device=rows.device).expand(count, -1, -1)
        contrast = torch.cat([contrast, identity], dim=1)
        # Above exp(1300) FI is below what float64 holds, and roots of the weight are not.
        weight = (math.log(penalty) - log_rest).clamp(max=1300.0)
        log_weights = torch.cat([log_weights, weight.expand(-1, width)], dim=1)
        target = torch.nn.functional.pad(target, (0, width))
        limit = torch.cat([limit, limit.new_full((count, width), classes * _GRAM_EPS)], dim=1)
    explained, unexplained, sensitivity = weighted_projection(contrast, log_weights, target, limit)
    explained = explained.clamp(max=1.0)
    odds = (-problems.log_ceiling).exp()
    fi = explained / (odds + unexplained)
    rounding = _JACOBIAN_ROUNDING * torch.finfo(problems.dtype).eps
    noise = rounding**2 * sensitivity > odds + unexplained
    # Two forms of fi / ceiling: neither multiplies by a ceiling that may have overflowed.
    sure = explained / (1 + problems.log_ceiling.clamp(max=0).exp() * unexplained)
    return fi, torch.where(problems.log_ceiling <= 0, sure, fi * odds), noise


def _released(problems: _Problems, factor: Factor, diagonal: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """FI, kept singular values and nearness to the cut of ``Released``; ``diagonal`` is that of the Gram.

    grad f is (sqrt(P_y) + e) / (P_y + e) times column y of L0, so with L0^T = U S V^T its FI is that factor squared
    times the squared length of row y of U on the kept directions. U and S come from L0^T in the coordinates of the
    contrast factor, not from the eigenvalues of a Gram, which loses singular values below 1e-8 of the largest.
    """
    if factor.rows.shape[2] == 0:
        zero = torch.zeros_like(problems.log_ceiling)
        return zero, zero.long(), zero.bool()
    probs, root = problems.log_probs.exp(), (0.5 * problems.log_probs).exp()
    weights = probs / (root + epsilon)
    scores = factor.rows - probs[:, None] @ factor.rows
    left, singular, _ = torch.linalg.svd(weights[..., None] * scores, full_matrices=False)
    label = problems.labels[:, None]
    kept = singular > epsilon
    row = left.gather(1, label[..., None].expand(-1, 1, left.shape[2])).squeeze(1)
    gain = ((root + epsilon) / (probs + epsilon)).gather(1, label).squeeze(1)
    fi = gain.square() * torch.where(kept, row.square(), 0.0).sum(dim=1)

    # Rounding of the Jacobian in its own precision and of the Gram in float64 may cross the cut. Two bounds on how far
    # a singular value moves, the smaller counts: relative to itself, by the conditioning of the contrasts (whatever the
    # probabilities); absolute, by the largest singular value.
    classes = weights.shape[1]
    jacobian, gram = _JACOBIAN_ROUNDING * torch.finfo(problems.dtype).eps, classes * _GRAM_EPS
    conditioned = jacobian / factor.smallest.sqrt() + gram / factor.smallest
    size = singular.square().sum(dim=1).sqrt()
    lost = gram * size.square()
    absolute = jacobian * size + torch.minimum(lost / epsilon, lost.sqrt())
    margin = torch.minimum(conditioned[:, None] * singular.clamp(min=epsilon), absolute[:, None])
    near = ((singular - epsilon).abs() <= margin).any(dim=1)
    # Directions that the factor left out as noise of the Gram may have stood above the cut.
    left_out = (weights.square() * torch.minimum(gram * factor.largest[:, None], diagonal)).sum(dim=1).sqrt()
    missing = (factor.rank < classes - 1) & (factor.rank > 0)
    return fi, kept.sum(dim=1), near | (missing & (epsilon <= jacobian * size + left_out))
