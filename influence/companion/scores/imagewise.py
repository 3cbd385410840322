"""Every score of an example that FI is compared with, from one metric tensor and one forward pass.

Larger means more suspicious for all of them, so that one ROC routine serves all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from ..images.data import Split
from ..zoo import training

# name -> what it is. The order is that of tables and legends.
NAMES: dict[str, str] = {
    "exact": "FI, exact",
    "released_1e-8": "FI as released, e = 1e-8",
    "released_1e-3": "FI as released, e = 1e-3",
    "loss": "-log P_y",
    "jacobian_norm": "|d log P_y / dx|",
    "cook": "Cook's maximal local influence, largest |eigenvalue| of the Hessian of -log P_y in x",
    "el2n": "EL2N, |p - e_y| (Paul et al. 2021)",
    "grand": "GraNd, |gradient of the loss in all parameters| (Paul et al. 2021)",
    "margin": "1 - (P_y - largest other P)",
    "max_softmax": "1 - largest P (needs no label)",
    "trace": "trace of G for the image",
    "lambda_max": "largest eigenvalue of G for the image",
}
_CHUNK = 64


def chunks(split: Split, size: int, device: torch.device | str, title: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For `size` images of a split at a time: their rows, and pixels and labels on a device."""
    rows = torch.arange(len(split)).split(size)
    for chunk in progress_bar(rows, desc=title, unit="batch", leave=False):
        yield chunk, training.pixels(split.images[chunk], device), split.labels[chunk].to(device)


def table(columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row for each entry of tensors that are broadcast to one shape."""
    values = torch.broadcast_tensors(*(column.cpu() for column in columns.values()))
    return pd.DataFrame({name: value.flatten().numpy() for name, value in zip(columns, values, strict=True)})


def score_gradient(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of log P of a label in each image, or of the predicted class, in the shape of x, and log P (N, K)."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        log_p = F.log_softmax(model(leaf).double(), dim=1)
        chosen = log_p.amax(1) if labels is None else log_p.gather(1, labels[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
    return gradient, log_p.detach()


def released_at_full_rank(probs: np.ndarray, label: int | np.ndarray, *, epsilon: float = 1e-3) -> np.ndarray:
    r"""What the released code computes where no direction is cut, from the probabilities alone.

    .. math:: \Big(\frac{\sqrt{p_y} + e}{p_y + e}\Big)^2
        \Big(1 - \frac{(\sqrt{p_y} + e)^2}{\sum_k (\sqrt{p_k} + e)^2}\Big)

    A direction under the absolute cut can only lower it. Of probabilities (..., K) and labels y, one for all or (...,),
    as (...,) float64.
    """
    p = np.asarray(probs, dtype=np.float64)
    y = np.broadcast_to(np.asarray(label), p.shape[:-1])
    p_y = np.take_along_axis(p, y[..., None], axis=-1)[..., 0]
    root = np.sqrt(p_y) + epsilon
    others = (np.sqrt(p) + epsilon) ** 2
    return (root / (p_y + epsilon)) ** 2 * (1 - root**2 / others.sum(axis=-1))


def all_scores(
    model: nn.Module,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    without: Sequence[str] = (),
) -> pd.DataFrame:
    """Every score of `NAMES` for each image of a split, by a model of raw pixels in evaluation mode.

    `without` leaves scores out, such as the dear ones "grand" (gradients of all parameters) and "cook"; a ValueError
    where it names none.

    Returns:
        One row per image: image (position in the set's published order), label, predicted, p_label, ceiling, rank,
        near_cut (whether rounding may decide FI), then the scores.
    """
    if unknown := set(without) - set(NAMES):
        raise ValueError(f"unknown score {sorted(unknown)[0]!r}: there are {', '.join(NAMES)}")
    parts = []
    for rows, x, y in chunks(split, _CHUNK, device, "scores"):
        values = {"image": split.index[rows], "label": y}
        values |= _from_metric(influence.metric_tensor(model, x, wrt="input"), y)
        if "grand" not in without:
            values["grand"] = gradient_norm(influence.metric_tensor(model, x, wrt="parameters"), y)
        if "cook" not in without:
            values["cook"] = local_influence(model, x, y)
        parts.append(table(values))
    head = ["image", "label", "predicted", "p_label", "ceiling", "rank", "near_cut"]
    return pd.concat(parts, ignore_index=True)[[*head, *(name for name in NAMES if name not in without)]]


def gradient_norm(metric: influence.MetricTensor, labels: Tensor) -> Tensor:
    """|J^T (p - e_y)|, the norm of the gradient of -log P_y in what the (one) block of the metric perturbs, (N,).

    The entries of p - e_y sum to 0, so the Gram of the contrasts serves as that of the logits.
    """
    residual = metric.log_probs.exp()
    residual = residual.scatter_add(1, labels[:, None], -torch.ones_like(residual[:, :1]))
    gram = metric.contrast_gram()[:, 0]
    return torch.einsum("nk,nkl,nl->n", residual, gram, residual).clamp(min=0).sqrt()


def local_influence(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int | None = None) -> Tensor:
    """Cook's maximal local influence: the largest |eigenvalue| of the Hessian of -log P_y in the image, (N,).

    By Hessian-vector products alone: `steps` steps (None: K) of Lanczos' method with full reorthogonalisation, each
    image with a Krylov space of its own. K steps are exact for a network that is piecewise linear (ReLU, average
    pooling, batch normalisation in evaluation mode), whose Hessian has rank K - 1: there it equals the metric tensor,
    whatever y. The model, in evaluation mode, must treat the images independently.
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(logits.double(), labels, reduction="sum"), leaf, create_graph=True
        )

    def hessian(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(gradient, leaf, v.view_as(leaf).to(leaf.dtype), retain_graph=True)
        return product.flatten(1).double()

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.flatten(1).shape, generator=generator, dtype=torch.float64).to(x.device)
    basis = [v / v.norm(dim=1, keepdim=True)]
    products: list[Tensor] = []
    for _ in range(min(steps or logits.shape[1], v.shape[1])):
        products.append(hessian(basis[-1]))
        v = products[-1]
        for _repeat in range(2):
            q = torch.stack(basis, dim=1)
            v = v - torch.einsum("nmp,nm->np", q, torch.einsum("nmp,np->nm", q, v))
        norm = v.norm(dim=1, keepdim=True)
        # An exhausted Krylov space adds a zero vector, which adds an eigenvalue 0.
        negligible = norm <= 1e-6 * products[-1].norm(dim=1, keepdim=True)
        basis.append(torch.where(negligible, 0, v / norm.clamp(min=1e-300)))
    q, hq = torch.stack(basis[: len(products)], dim=1), torch.stack(products, dim=1)
    small = torch.einsum("nmp,nkp->nmk", q, hq)
    return torch.linalg.eigvalsh((small + small.mT) / 2).abs().amax(dim=1)


def _from_metric(metric: influence.MetricTensor, y: Tensor) -> dict[str, Tensor]:
    """The scores that follow from the metric tensor of the image."""
    log_p = metric.log_probs
    p, rows = log_p.exp(), torch.arange(len(y), device=y.device)
    exact = influence.first_order_influence(metric, y)
    values = {
        "predicted": log_p.argmax(1),
        "p_label": p[rows, y],
        "ceiling": exact.ceiling,
        "rank": exact.rank[:, 0],
        "exact": exact.fi[:, 0],
        # Not -log P_y, which cannot tell apart what is within 1e-16 of 0.
        "loss": exact.ceiling.log1p(),
        # 1 - P_y from the other classes keeps its digits where P_y is near 1.
        "el2n": (p.scatter(1, y[:, None], 0).square().sum(1) + (1 - p[rows, y]).square()).sqrt(),
        "margin": 1 - p[rows, y] + p.scatter(1, y[:, None], 0).amax(1),
        "max_softmax": p.scatter(1, log_p.argmax(1, keepdim=True), 0).sum(1),
        "jacobian_norm": gradient_norm(metric, y),
        "trace": metric.trace()[:, 0],
        "lambda_max": metric.lambda_max()[:, 0],
    }
    near = exact.near_cut
    for name, epsilon in (("released_1e-8", 1e-8), ("released_1e-3", 1e-3)):
        released = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
        values[name], near = released.fi[:, 0], near | released.near_cut
    return values | {"near_cut": near[:, 0]}


def predicted_class_scores(model: nn.Module, split: Split, epsilon: float, device: torch.device) -> pd.DataFrame:
    """FI of the whole image for f = -log P(y_pred), exact and released, and the losses, for each image of a split."""
    parts = []
    for rows, x, y in chunks(split, _CHUNK, device, "FI of the predicted class"):
        metric = influence.metric_tensor(model, x, wrt="input")
        exact = influence.first_order_influence(metric)
        released = influence.first_order_influence(metric, estimator=influence.Released(epsilon=epsilon))
        true = influence.first_order_influence(metric, y)
        values = {
            "image": split.index[rows],
            "label": y,
            "predicted": exact.labels,
            "p_predicted": metric.log_probs.amax(1).exp(),
            # log1p of the ceiling is -log P with all of its digits, also where P is within 1e-16 of 1.
            "loss": true.ceiling.log1p(),
            "margin": exact.ceiling.log1p(),
            "ceiling": exact.ceiling,
            "exact": exact.fi[:, 0],
            "released": released.fi[:, 0],
            "rank": exact.rank[:, 0],
            "near_cut": (exact.near_cut | released.near_cut)[:, 0],
        }
        parts.append(table(values))
    frame = pd.concat(parts, ignore_index=True)
    frame["position"] = positions(frame["label"].to_numpy())
    return frame


def positions(labels: np.ndarray) -> np.ndarray:
    """Images of class i spread evenly over [i, i+1), in stored order: the x of the paper's Manhattan plots."""
    x = pd.Series(labels)
    of_class = x.groupby(x)
    return (x + of_class.cumcount() / of_class.transform("size")).to_numpy()


def unit_scores(
    model: nn.Module, split: Split, factors: dict[str, float], epsilons: tuple[float, ...], device: torch.device
) -> pd.DataFrame:
    """Exact FI, released FI for each e, Jacobian norm and trace of each image in each unit of the pixels."""
    frames = []
    for rows, x, y in chunks(split, _CHUNK, device, "scores in each unit"):
        raw = influence.metric_tensor(model, x, wrt="input")
        for unit, factor in factors.items():
            metric = in_unit(raw, factor)
            exact = influence.first_order_influence(metric, y)
            found = [
                ("exact", np.nan, exact.fi[:, 0], exact.rank[:, 0]),
                ("jacobian_norm", np.nan, gradient_norm(metric, y), exact.rank[:, 0]),
                ("trace", np.nan, metric.trace()[:, 0], exact.rank[:, 0]),
            ]
            near = exact.near_cut
            for epsilon in epsilons:
                released = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
                found.append(("released", epsilon, released.fi[:, 0], released.rank[:, 0]))
                near = near | released.near_cut
            common = {"image": split.index[rows], "loss": exact.ceiling.log1p(), "ceiling": exact.ceiling}
            common["near_cut"] = near[:, 0]
            for name, epsilon, value, rank in found:
                frame = table({**common, "value": value, "rank": rank})
                frames.append(frame.assign(unit=unit, score=name, epsilon=epsilon))
    return pd.concat(frames, ignore_index=True)


def in_unit(metric: influence.MetricTensor, factor: float) -> influence.MetricTensor:
    """The metric tensor for omega / factor: its Grams times factor^2."""
    return replace(metric, gram=metric.gram * factor**2)
