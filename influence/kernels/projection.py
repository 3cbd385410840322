"""How much of the loss direction can a perturbation reach: weighted least squares for weights of any range."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond this rank a matrix leaves the cache, and writing its residual in every step costs more than all else.
_WIDE = 64
# Share of a squared length below which it is computed anew.
_LOST = 1e-6
# The algebra here moves a row by up to this many eps, relative to the lengths it is made of.
_ROUNDING = 16.0


def weighted_projection(
    rows: Tensor, log_weights: Tensor, target: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Fit ``target`` by a linear function of ``rows`` and return the explained and the unexplained sum of squares.

    For weights w and rows c_i the two parts of sum_i w_i t_i^2 under the best linear fit t_i ~ c_i . u. Probabilities
    as weights span hundreds of orders of magnitude, where normal equations and an ordinary QR lose every digit. So the
    rows are eliminated in the order of their *weighted* residual (complete pivoting): with pivots 1 and the rest 2,

    .. math:: E = D_2 C_2 C_1^{-1} D_1^{-1}, \quad h = D_2 (t_2 - C_2 C_1^{-1} t_1), \quad g = D_1 t_1 + E^T D_2 t_2,

    where D holds the square roots of the weights, the entries of E are of order one, and both parts come from well
    conditioned systems: explained = g^T (I + E^T E)^{-1} g, unexplained = h^T (I + E E^T)^{-1} h. Neither is formed
    as one minus the other, so the small one keeps its digits.

    What a row of the rest misses of its target, t_2 - C_2 C_1^{-1} t_1, is the end of a subtraction. Where it is no
    more than rounding leaves of one it counts as zero: times the weight of a row that repeats another it would
    otherwise pass for a miss beside weights of 1e-30.

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
    batch, _, width = rows.shape
    weight_root = (0.5 * log_weights).exp()
    if width == 0:
        nothing = rows.new_zeros(batch)
        return nothing, (weight_root * target).square().sum(dim=-1), nothing
    example = torch.arange(batch, device=rows.device)
    spent = torch.isneginf(log_weights)
    eliminate = _eliminate_once if width > _WIDE else _eliminate
    lower, pivots, used, spent = eliminate(rows, log_weights, cut, spent)

    # Rows left out and spent rows take no part in the second group.
    first = lower[example[:, None], pivots]
    first = torch.where(used[:, :, None], first, 0.0) + torch.diag_embed((~used).to(rows.dtype))
    coefficients = torch.linalg.solve_triangular(first, lower, upper=False, left=False)
    coefficients = torch.where(spent[..., None] | ~used[:, None, :], 0.0, coefficients)
    pivot_log = torch.where(used, log_weights[example[:, None], pivots], 0.0)
    gap = torch.where(spent, -torch.inf, log_weights)[:, :, None] - pivot_log[:, None, :]
    scaled = torch.where(coefficients == 0, 0.0, coefficients * (0.5 * gap).clamp(max=600.0).exp())
    pivot_target = torch.where(used, target[example[:, None], pivots], 0.0)
    rest_root = torch.where(spent, 0.0, weight_root)
    miss = target - (coefficients @ pivot_target[..., None]).squeeze(-1)
    moved = _moved(rows, first, coefficients, pivots, pivot_target)
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


def _moved(rows: Tensor, first: Tensor, coefficients: Tensor, pivots: Tensor, pivot_target: Tensor) -> Tensor:
    """How far the fit of the pivots' targets moves at each row ``(M, Q)``, as rows move relative to their length."""
    slope = torch.linalg.solve_triangular(first, pivot_target[..., None], upper=False).squeeze(-1)
    length = rows.square().sum(dim=-1).sqrt()
    made_of = length + (coefficients.abs() @ length.gather(1, pivots)[..., None]).squeeze(-1)
    return made_of * slope.square().sum(dim=-1, keepdim=True).sqrt()


# lower (M, Q, r), pivots (M, r), whether a step has one (M, r), and the rows that are spent (M, Q).
Elimination = tuple[Tensor, Tensor, Tensor, Tensor]


def _eliminate(rows: Tensor, log_weights: Tensor, cut: Tensor, spent: Tensor) -> Elimination:
    """Take the row of the largest weighted residual r times, and its direction out of all others."""
    batch, count, width = rows.shape
    example = torch.arange(batch, device=rows.device)
    residual = rows.clone()
    lower = rows.new_zeros(batch, count, width)
    pivots = torch.zeros(batch, width, dtype=torch.int64, device=rows.device)
    used = torch.zeros(batch, width, dtype=torch.bool, device=rows.device)
    for step in range(width):
        length = residual.square().sum(dim=-1)
        dependent = length <= cut
        residual = torch.where(dependent[..., None], 0.0, residual)
        score = torch.where(spent | dependent, -torch.inf, log_weights + length.log())
        value, index = score.max(dim=-1)
        kept = ~torch.isneginf(value)
        pivot = residual[example, index]
        unit = pivot / torch.where(kept, length[example, index], 1.0).sqrt()[:, None]
        unit = torch.where(kept[:, None], unit, 0.0)
        along = (residual @ unit[..., None]).squeeze(-1)
        residual = residual - along[..., None] * unit[:, None, :]
        lower[:, :, step] = along
        pivots[:, step], used[:, step] = index, kept
        newly = torch.zeros_like(spent)
        newly[example, index] = kept
        spent = spent | newly
        residual = torch.where(newly[..., None], 0.0, residual)
    return lower, pivots, used, spent


def _eliminate_once(rows: Tensor, log_weights: Tensor, cut: Tensor, spent: Tensor) -> Elimination:
    """The same without the residuals of all rows: that of the pivot alone, from the directions taken so far."""
    batch, count, width = rows.shape
    example = torch.arange(batch, device=rows.device)
    lower = rows.new_zeros(width, batch, count)
    units = rows.new_zeros(batch, width, width)
    pivots = torch.zeros(batch, width, dtype=torch.int64, device=rows.device)
    used = torch.zeros(batch, width, dtype=torch.bool, device=rows.device)
    length = rows.square().sum(dim=-1)
    sure = length.clone()
    gone = torch.zeros_like(spent)
    for step in range(width):
        before = units[:, :step]
        # What is left of a length by subtraction has lost its digits.
        lost = (length < _LOST * sure) & ~spent & ~gone
        if bool(lost.any()):
            exact = (rows - (rows @ before.mT) @ before).square().sum(dim=-1)
            length, sure = torch.where(lost, exact, length), torch.where(lost, exact, sure)
        gone = gone | (length <= cut)
        score = torch.where(spent | gone, -torch.inf, log_weights + length.clamp(min=0).log())
        value, index = score.max(dim=-1)
        kept = ~torch.isneginf(value)
        unit = rows[example, index]
        for _ in range(2):  # once more, as rounding leaves a little of them
            unit = unit - (before.mT @ (before @ unit[..., None])).squeeze(-1)
        unit = unit / torch.where(kept, unit.square().sum(dim=-1), 1.0).sqrt()[:, None]
        units[:, step] = torch.where(kept[:, None], unit, 0.0)
        along = torch.where(gone | spent, 0.0, (rows @ units[:, step, :, None]).squeeze(-1))
        lower[step] = along
        length = length - along.square()
        pivots[:, step], used[:, step] = index, kept
        spent[example, index] |= kept
        if not bool(kept.any()):
            break
    return lower.permute(1, 2, 0).contiguous(), pivots, used, spent
