"""What the removal of a training example does to the loss of another: exactly, and by what predicts it.

For multinomial logistic regression on given features, the last layer of a network, everything has a closed form or
converges to rounding: weights w (K, D), the loss L(z) = -log P_y, its gradient r kron phi with r = p - e_y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from influence.measures import log_ceiling

TOLERANCE = 1e-11  # norm of the gradient of the summed loss at which a fit has converged
_STEPS = 100
_SHORT_STEPS = 40


@dataclass(frozen=True)
class Regression:
    """Weights that minimise the sum of the losses of n examples + penalty / 2 |w|^2, to `TOLERANCE`."""

    weights: Tensor  # ``(K, D)`` float64
    features: Tensor  # ``(n, D)`` float64, phi; one constant where a bias is wanted, penalised like the others
    labels: Tensor  # ``(n,)`` classes
    penalty: float  # of the sum, not of the mean; the same after an example has been removed

    @classmethod
    def fit(
        cls, features: Tensor, labels: Tensor, *, classes: int, penalty: float, start: Tensor | None = None
    ) -> Regression:
        """Newton's method from `start` (0 where None), its step halved while the objective grows.

        Raises:
            ValueError: features and labels do not fit together, or are not finite float64, or the penalty is not
                positive, without which the minimum is not unique.
            RuntimeError: no convergence.
        """
        if features.ndim != 2 or labels.shape != (len(features),) or features.dtype != torch.float64:
            raise ValueError(f"expected float64 (n, D) and (n,), got {features.dtype} {features.shape}, {labels.shape}")
        if not (penalty > 0 and bool(features.isfinite().all())):
            raise ValueError(f"features must be finite and the penalty > 0, got a penalty of {penalty}")
        weights = features.new_zeros(classes, features.shape[1]) if start is None else start
        fitted = cls(weights, features, labels, penalty)
        for _ in range(_STEPS):
            gradient = fitted.gradient(fitted.weights[None])[0]
            if gradient.norm() < TOLERANCE:
                return fitted
            step = torch.cholesky_solve(gradient.reshape(-1, 1), fitted._factor).reshape(gradient.shape)
            before, rate = fitted._objective(), 1.0
            while True:
                moved = cls(fitted.weights - rate * step, features, labels, penalty)
                # At the minimum the objective is flat to rounding.
                if moved._objective() <= before + 1e-12 * abs(before) or rate < 1e-6:
                    break
                rate /= 2
            fitted = moved
        raise RuntimeError(f"logistic regression: a gradient of norm {gradient.norm():.1e} after {_STEPS} steps")

    def _objective(self) -> float:
        return float(self.loss(self.features, self.labels).sum() + self.penalty / 2 * self.weights.square().sum())

    def gradient(self, weights: Tensor) -> Tensor:
        """Of the objective at several weights ``(m, K, D)``: ``(m, K, D)``."""
        residuals = (weights @ self.features.T).softmax(dim=1) - F.one_hot(self.labels, weights.shape[1]).T
        return residuals @ self.features + self.penalty * weights

    def probabilities(self, features: Tensor) -> Tensor:
        """P of examples ``(N, D)``: ``(N, K)``."""
        return (features @ self.weights.T).softmax(dim=1)

    def residuals(self, features: Tensor, labels: Tensor) -> Tensor:
        """Residuals r = p - e_y of examples: ``(N, K)``, rows that add up to 0."""
        return self.probabilities(features) - F.one_hot(labels, len(self.weights))

    def ceiling(self, features: Tensor, labels: Tensor) -> Tensor:
        """(1 - P_y) / P_y of examples, ``(N,)``, without the cancellation of 1 - P_y where the model is sure."""
        return log_ceiling(features @ self.weights.T, labels).exp()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """-log P_y of examples, ``(N,)`` nats."""
        return F.cross_entropy(features @ self.weights.T, labels, reduction="none")

    @cached_property
    def hessian(self) -> Tensor:
        """Of the objective, ``(K D, K D)``: sum of (diag p - p p^T) kron phi phi^T, + penalty I."""
        p = self.probabilities(self.features)
        weighted = (p[:, :, None] * self.features[:, None]).flatten(1)
        blocks = torch.einsum("nk,nd,ne->kde", p, self.features, self.features)
        return torch.block_diag(*blocks) - weighted.T @ weighted + self.penalty * torch.eye(weighted.shape[1]).to(p)

    @cached_property
    def _factor(self) -> Tensor:
        return torch.linalg.cholesky(self.hessian)

    def leave_one_out(self, chosen: Tensor) -> tuple[Tensor, float]:
        """Weights without each of some training examples, fitted to `TOLERANCE` from the weights with all.

        Steps are Newton's with the Hessian of the examples that are left at the weights with all: one example in n
        moves little, and where they end the gradient is 0 all the same. Where they do not end, Newton's own are taken;
        a RuntimeError where these do not either.

        Returns:
            For ``(m,)`` positions, each removed alone, ``(m, K, D)``, and the largest norm of the m gradients.
        """
        solve = _Without(self, chosen)
        weights = self.weights + solve.newton_step()
        for _ in range(_SHORT_STEPS):
            gradient = self._gradient_without(chosen, weights)
            if not bool((gradient.flatten(1).norm(dim=1) >= TOLERANCE).any()):
                break
            weights = weights - solve(gradient)
        norms = self._gradient_without(chosen, weights).flatten(1).norm(dim=1)
        for i in (~(norms < TOLERANCE)).nonzero()[:, 0].tolist():
            kept = torch.arange(len(self.labels)) != chosen[i]
            rest, labels = self.features[kept], self.labels[kept]
            refitted = Regression.fit(rest, labels, classes=len(self.weights), penalty=self.penalty, start=self.weights)
            weights[i] = refitted.weights
        return weights, float(self._gradient_without(chosen, weights).flatten(1).norm(dim=1).max())

    def _gradient_without(self, chosen: Tensor, weights: Tensor) -> Tensor:
        """Of the objective without the i-th chosen example at the i-th weights, ``(m, K, D)``."""
        phi, labels = self.features[chosen], self.labels[chosen]
        residuals = torch.einsum("mkd,md->mk", weights, phi).softmax(dim=1) - F.one_hot(labels, len(self.weights))
        return self.gradient(weights) - residuals[:, :, None] * phi[:, None]

    def predicted_changes(self, chosen: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What predicts the change of the loss of test examples z' by the removal of training examples z.

        * influence: d L(z') H^-1 d L(z), the influence function (Koh & Liang 2017, arXiv 1703.04730, eq. 2) with the
          sign of a removal.
        * newton: d L(z') (H - H_z)^-1 d L(z), the first step of Newton's method without z.
        * tracin: d L(z') . d L(z), the gradients at the end of the training (Pruthi et al. 2020, arXiv 2002.08484).
        * cross_fi: d L(z') G_z^+ d L(z')^T, FI with the loss of another example (Yu et al., ICLR 2025); no sign.

        Of ``(m,)`` positions of training examples and the features ``(t, D)`` and labels ``(t,)`` of test examples, as
        ``(m, t)`` each.
        """
        gradients = (self.residuals(features, labels)[:, :, None] * features[:, None]).flatten(1)
        phi, y = self.features[chosen], self.labels[chosen]
        removed = (self.residuals(phi, y)[:, :, None] * phi[:, None]).flatten(1)
        step = _Without(self, chosen).newton_step().flatten(1)
        return {
            "influence": torch.cholesky_solve(removed.T, self._factor).T @ gradients.T,
            "newton": step @ gradients.T,
            "tracin": removed @ gradients.T,
            "cross_fi": cross_sample_influence(self.weights, phi, features, labels),
        }


def cross_sample_influence(weights: Tensor, features: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    r"""FI of the loss of other examples z' under the metric tensor of examples z, for the weights of a last layer.

    .. math:: FI(z', z) = \nabla L(z') G_z^+ \nabla L(z')^T
        = \frac{(\phi' \cdot \phi)^2}{|\phi|^4} \sum_k \frac{r_k'^2}{P_k(z)}

    G_z is (diag p - p p^T) kron phi phi^T. With Pi = I - 1 1^T / K, the pseudo-inverse of the first factor is
    Pi diag(1 / p) Pi, since their product is Pi from either side; that of phi phi^T is phi phi^T / \|phi\|^4; that of a
    Kronecker product is the product of the two. The gradient of z' is r' kron phi', and Pi r' = r'. For z' = z this is
    (1 - P_y) / P_y. Of weights ``(K, D)`` float64, `features` phi ``(m, D)``, `others` phi' ``(t, D)`` and labels of
    these, ``(t,)``, as ``(m, t)``.

    Raises:
        ValueError: features that are all 0, of which the weights move nothing: G_z is 0.
    """
    squared = features.square().sum(dim=1)
    if not bool((squared > 0).all()):
        raise ValueError("an example has no feature other than 0: its metric tensor is 0")
    residuals = (others @ weights.T).softmax(dim=1) - F.one_hot(labels, len(weights))
    inverse = (-(features @ weights.T).log_softmax(dim=1)).exp()  # 1 / P_k(z)
    return ((features @ others.T) / squared[:, None]).square() * (inverse @ residuals.square().T)


class _Without:
    """Multiplication by (H - H_z)^-1 for each of some training examples z, by Woodbury's formula.

    H_z = U U^T with U = R kron phi, R = diag(sqrt p) - p sqrt(p)^T, of which R R^T = diag p - p p^T.
    """

    def __init__(self, fitted: Regression, chosen: Tensor) -> None:
        self.fitted, self.phi = fitted, fitted.features[chosen]
        p = fitted.probabilities(self.phi)
        self.residuals = fitted.residuals(self.phi, fitted.labels[chosen])
        (m, classes), width = p.shape, self.phi.shape[1]
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]  # R, (m, K, K)
        columns = torch.einsum("mkj,md->mjkd", root, self.phi).reshape(m * classes, -1)  # U^T
        solved = torch.cholesky_solve(columns.T, fitted._factor).T.reshape(m, classes, classes, width)
        inner = torch.einsum("mjkd,md,mki->mji", solved, self.phi, root)
        self.root = root
        self.correction = torch.linalg.solve(torch.eye(classes).to(p) - inner, solved.flatten(2))  # (m, K, K D)

    def __call__(self, right: Tensor) -> Tensor:
        """(H - H_z)^-1 right, ``(m, K, D)``."""
        plain = torch.cholesky_solve(right.flatten(1).T, self.fitted._factor).T.reshape(right.shape)
        along = torch.einsum("mkd,md,mkj->mj", plain, self.phi, self.root)  # U^T H^-1 right
        return plain + torch.einsum("mj,mjx->mx", along, self.correction).reshape(right.shape)

    def newton_step(self) -> Tensor:
        """(H - H_z)^-1 d L(z): what one step of Newton's method adds to the weights, ``(m, K, D)``."""
        return self(self.residuals[:, :, None] * self.phi[:, None])
