"""The two statements on which the companion rests, and every artifact with its verdict."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import influence

from ..ledger.notebook import LAST, discover
from ..ledger.results import Run, published
from ..scores.definition import influence_by_definition
from ..zoo import training
from .common import classifier, dataset


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Both identities on test images of a trained network, in float64.

    FI of the whole image, straight from its definition, over its ceiling (1 - P_y) / P_y; and the KL between outputs
    on an image and on its noisy copy over (sigma^2 / 2) tr G. Noise is not clipped: the identity is about the function,
    not about pictures.

    Returns:
        "identities", one row per sigma: sigma, images, draws, ratio (KL over its small-noise limit, mean over images
        and draws), standard_error (of the ratio, over draws), fi_over_ceiling_low and _high (smallest and largest over
        images).
    """
    p, seed = run.parameters, run.parameters["seeds"][0]
    dataset_name, model, images, draws = p["dataset"], p["model"], p["images"], p["draws"]
    network = copy.deepcopy(classifier(run, dataset_name, model, seed=seed).model).double()
    split = dataset(run, dataset_name).test.sample(images, seed=seed)
    x, labels = training.pixels(split.images, run.device).double(), split.labels.to(run.device)
    metric = influence.metric_tensor(network, x, wrt="input")
    ceiling = influence.first_order_influence(metric, labels).ceiling
    share = influence_by_definition(network, x, labels) / ceiling
    limit = metric.trace()[:, 0] / 2
    generator = torch.Generator(run.device).manual_seed(seed)
    rows = []
    for sigma in p["sigmas"]:
        scale = sigma * 255
        ratios = []
        for _ in range(draws):
            noise = torch.randn(x.shape, generator=generator, device=run.device, dtype=x.dtype)
            with torch.no_grad():
                noisy = F.log_softmax(network(x + scale * noise), dim=1)
            ratios.append(float((divergence(metric.log_probs, noisy) / (scale**2 * limit)).mean()))
        spread = torch.tensor(ratios, dtype=torch.float64)
        rows.append(
            {
                "sigma": sigma,
                "images": len(split),
                "draws": draws,
                "ratio": float(spread.mean()),
                "standard_error": float(spread.std() / draws**0.5),
                "fi_over_ceiling_low": float(share.min()),
                "fi_over_ceiling_high": float(share.max()),
            }
        )
    return {"identities": pd.DataFrame(rows)}


def claims(table: pd.DataFrame) -> dict[str, bool]:
    """Whether FI is its ceiling to 1e-6 on every image, and the ratio at the smallest sigma 1 within 4 errors."""
    smallest = table.nsmallest(1, "sigma").iloc[0]
    ends = table[["fi_over_ceiling_low", "fi_over_ceiling_high"]]
    return {
        "fi_equals_ceiling": bool(((ends - 1).abs() <= 1e-6).all(axis=None)),
        "stability_loss_is_trace": bool(abs(smallest["ratio"] - 1) <= 4 * smallest["standard_error"] < 0.4),
    }


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row as sum_k p_k (e^u - 1 - u), u = log q - log p: no term is negative, so none cancels."""
    u = log_q - log_p
    return (log_p.exp() * (torch.expm1(u) - u)).sum(dim=1)


def artifacts(run: Run) -> pd.DataFrame:
    """One row per artifact: artifact (stem), title, verdict ("not run" where this profile has no results yet)."""
    rows = []
    for stem, notebook in discover().items():
        if stem != LAST:
            row = published(stem, run.profile)[1] or {"verdict": "not run"}
            rows.append({"artifact": stem, "title": notebook.title, "verdict": row["verdict"]})
    return pd.DataFrame(rows)
