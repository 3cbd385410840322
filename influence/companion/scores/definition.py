"""FI straight from its definition, without any of the package's algebra: what the package is checked against."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence.progress import progress_bar


def influence_by_definition(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """FI = grad f^T V S^-2 V^T grad f of the whole input, f = -log P_y, from the thin SVD of L0 (Shu & Zhu, section 2).

    Of inputs (N, ...) and labels (N,), as (N,) float64, one example and one class at a time; the model, in evaluation
    mode, is left as it is. Singular values below 1e-12 of the largest are taken for rounding errors; no constant is
    added anywhere, no rank is assumed and no closed form used. The scores are formed from the contrasts with the label,
    d log P_k = d(z_k - z_y) - sum_j P_j d(z_j - z_y), because differentiating log P_y itself loses all digits where P_y
    is within 1e-9 of 1.
    """
    network = copy.deepcopy(model).double()
    values = []
    for example, label in progress_bar(
        zip(x.double(), labels.tolist(), strict=True), total=len(x), desc="definition", unit="image", leave=False
    ):
        leaf = example[None].clone().requires_grad_()
        values.append(of_logits(network(leaf)[0], label, [leaf]))
    return torch.stack(values)


def of_logits(logits: Tensor, label: int, perturbed: Sequence[Tensor]) -> Tensor:
    """The same of one example from its logits (K,) with their graph, for some leaves of it that are perturbed."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = (torch.autograd.grad(z - logits[label], perturbed, **options) for z in logits)
    contrasts = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    log_p = F.log_softmax(logits.detach(), dim=0)
    scores = contrasts - log_p.exp() @ contrasts
    l0 = scores.T * (log_p / 2).exp()  # (p, K), columns sqrt(P_k) d log P_k
    left, singular, _ = torch.linalg.svd(l0, full_matrices=False)
    kept = singular > 1e-12 * singular[0]
    return ((left[:, kept].T @ -scores[label]) / singular[kept]).square().sum()
