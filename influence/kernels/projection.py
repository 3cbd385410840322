"""How much of the loss direction can a perturbation reach: weighted least squares for weights of any range."""

from __future__ import annotations

import torch
from torch import Tensor

from influence.kernels.elimination import eliminate_rows, in_tiles

# The algebra here moves a row by up to this many eps, relative to the lengths it is made of.
_ROUNDING = 16.0


def weighted_projection(rows: Tensor, log_weights: Tensor, target: Tensor, cut: Tensor) -> tuple[Tensor, ...]:
    r"""Fit ``target`` by a linear function of ``rows`` and return the explained and the unexplained sum of squares.

    The two parts of sum_i w_i t_i^2 under the best linear fit t_i ~ c_i . u. Probabilities as weights w span hundreds
    of orders of magnitude, where normal equations and an ordinary QR lose every digit. So the rows c are eliminated in
    the order of their *weighted* residual (complete pivoting): with pivots 1, the rest 2, and roots D of the weights,

    .. math:: E = D_2 C_2 C_1^{-1} D_1^{-1}, \quad h = D_2 (t_2 - C_2 C_1^{-1} t_1), \quad g = D_1 t_1 + E^T D_2 t_2,

    the entries of E are of order one, and both parts come from well conditioned systems: explained
    = g^T (I + E^T E)^{-1} g, unexplained = h^T (I + E E^T)^{-1} h. Neither is one minus the other, so the small one
    keeps its digits. Where t_2 - C_2 C_1^{-1} t_1 is no more than subtraction leaves by rounding it counts as zero:
    times a large weight it would pass for a miss beside weights of 1e-30.

    Args:
        rows: ``(M, Q, r)`` float64.
        log_weights: ``(M, Q)`` logarithms of the weights; minus infinity leaves a row out.
        target: ``(M, Q)``.
        cut: ``(M, Q)`` or ``(M, 1)``: a row whose squared residual (unweighted) falls to this is dependent on the
            pivots so far. Without it, rounding noise times a large weight would pass for a direction.

    Returns:
        explained ``(M,)``, unexplained ``(M,)``, and sensitivity ``(M,)``: moving each row by delta, relative to its
        length, may add about delta^2 sensitivity to the unexplained part.
    """
    given = rows, log_weights, target, cut.expand_as(log_weights)
    return in_tiles(_projection, *given, entries=rows.shape[1] * rows.shape[2])


def _projection(rows: Tensor, log_weights: Tensor, target: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, weight_root = rows.shape[2], (0.5 * log_weights).exp()
    if width == 0:
        nothing = rows.new_zeros(len(rows))
        return nothing, (weight_root * target).square().sum(dim=-1), nothing
    found = eliminate_rows(rows, log_weights, cut)
    lower, pivots, used = found.lower, found.pivots, found.used

    # Rows left out and pivots take no part in the second group.
    taken = torch.zeros_like(log_weights).scatter_add(1, pivots, used.to(log_weights.dtype))
    spent = torch.isneginf(log_weights) | (taken > 0)
    first = lower.gather(1, pivots[:, :, None].expand(-1, -1, width))
    first = torch.where(used[:, :, None], first, 0.0) + torch.diag_embed((~used).to(rows.dtype))
    coefficients = torch.linalg.solve_triangular(first, lower, upper=False, left=False)
    coefficients = torch.where(spent[..., None] | ~used[:, None, :], 0.0, coefficients)
    pivot_log = torch.where(used, log_weights.gather(1, pivots), 0.0)
    gap = torch.where(spent, -torch.inf, log_weights)[:, :, None] - pivot_log[:, None, :]
    scaled = torch.where(coefficients == 0, 0.0, coefficients * (0.5 * gap).clamp(max=600.0).exp())
    pivot_target = torch.where(used, target.gather(1, pivots), 0.0)
    rest_root = torch.where(spent, 0.0, weight_root)
    miss = target - (coefficients @ pivot_target[..., None]).squeeze(-1)
    # How far the fit of the pivots' targets moves at each row, as rows move relative to their length.
    slope = torch.linalg.solve_triangular(first, pivot_target[..., None], upper=False).squeeze(-1)
    length = rows.square().sum(dim=-1).sqrt()
    made_of = length + (coefficients.abs() @ length.gather(1, pivots)[..., None]).squeeze(-1)
    moved = made_of * slope.square().sum(dim=-1, keepdim=True).sqrt()
    miss = torch.where(miss.abs() <= _ROUNDING * torch.finfo(rows.dtype).eps * (moved + target.abs()), 0.0, miss)
    rest = rest_root * miss
    hit = (0.5 * pivot_log).exp() * pivot_target + (scaled.mT @ (rest_root * target)[..., None]).squeeze(-1)

    system = torch.linalg.cholesky(torch.eye(width, dtype=rows.dtype, device=rows.device) + scaled.mT @ scaled)
    right = torch.stack([hit, (scaled.mT @ rest[..., None]).squeeze(-1)], dim=-1)
    solved = torch.cholesky_solve(right, system)
    explained = (hit * solved[..., 0]).sum(dim=-1)
    left = rest - (scaled @ solved[..., 1:]).squeeze(-1)
    unexplained = left.square().sum(dim=-1) + (scaled.mT @ left[..., None]).squeeze(-1).square().sum(dim=-1)
    return explained, unexplained, (rest_root * moved).square().sum(dim=-1)
