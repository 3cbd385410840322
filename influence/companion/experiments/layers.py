"""Setup 2 of Shu & Zhu (2019): FI of all parameters, and of each trainable layer alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import influence

from .. import cache
from ..detection import bootstrap_interval
from ..layerwise import score_layers
from ..results import Run
from ..zoo import training
from .common import classifier, dataset
from .keyed import bound


def layer_influence(
    run: Run, datasets: Sequence[str], models: Sequence[str], *, seed: int, images: int | None, epsilon: float
) -> pd.DataFrame:
    """Setup 2: FI of all parameters and of each layer, f = -log P(y_true), for training images of each network.

    Args:
        run: the artifact.
        datasets: names of `data.NAMES`.
        models: names of `models.NAMES`.
        seed: of the networks and of the choice of images.
        images: training images to score, drawn at random; None for all.
        epsilon: e of the released code.

    Returns:
        One row per data set, model, image and layer (number 0 and name `ALL` for all parameters, then from 1 in
        `named_modules()` order): image, label, position, loss, ceiling, number, layer, size (parameters), exact,
        released, rank, kept (singular values above the released cut), trace, effective_rank
        (tr(G)^2 / tr(G^2)), departs.
    """
    frames = []
    for name in datasets:
        for model in models:
            trained = classifier(run, name, model, seed=seed)
            split = dataset(run, name).train.sample(images, seed=seed)
            key = {"model": trained.key, "data": dataset(run, name).digest, "seed": seed, "images": images}
            key |= {"epsilon": epsilon, "device": run.device.type}
            compute = bound(score_layers, trained.model, split, epsilon=epsilon, device=run.device)
            frames.append(cache.table(f"setup2/{name}-{model}", key, compute).assign(dataset=name, model=model))
    return pd.concat(frames, ignore_index=True)


def layer_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per data set, model and layer: means over the images, the trace with its 95% bootstrap interval.

    `gap_at_full_rank` is the largest relative difference of exact FI and ceiling over the images where the layer has
    rank K - 1 (by definition of the estimator no more than rounding), `gap_to_all` that of a layer's exact FI and that
    of all parameters over the same images; `kept` the mean number of singular values above the released cut,
    `cut` the share of images that lost a direction to it, `zero` of those whose released FI is 0, and `constant` of
    those that lost none and yet differ from exact FI by more than 1%, through the constant e.
    """
    rows = []
    for (name, model), network in frame.groupby(["dataset", "model"], sort=False):
        whole = network[network["number"] == 0].set_index("image")["exact"]
        full_rank = network["rank"].max()
        for (number, layer), group in network.groupby(["number", "layer"], sort=True):
            full = group[group["rank"] == full_rank]
            trace, low, high = bootstrap_interval(group["trace"], repeats=200)
            rows.append(
                {
                    "dataset": name,
                    "model": model,
                    "number": number,
                    "layer": layer,
                    "size": int(group["size"].iloc[0]),
                    "images": len(group),
                    "rank": group["rank"].mean(),
                    "full_rank_share": len(full) / len(group),
                    "gap_at_full_rank": float((full["exact"] / full["ceiling"] - 1).abs().max()),
                    "gap_to_all": float((full["exact"] / full["image"].map(whole) - 1).abs().max()),
                    "alignment": (group["exact"] / group["ceiling"]).mean(),
                    "trace": trace,
                    "trace_low": low,
                    "trace_high": high,
                    "effective_rank": group["effective_rank"].mean(),
                    "kept": group["kept"].mean(),
                    "cut": float((group["kept"] < group["rank"]).mean()),
                    "zero": float((group["released"] == 0).mean()),
                    "constant": float((group["departs"] & (group["kept"] >= group["rank"])).mean()),
                    "largest_released": group["released"].max(),
                    "largest_exact": group["exact"].max(),
                }
            )
    return pd.DataFrame(rows)


def by_definition(run: Run, dataset_name: str, model: str, *, seed: int, images: int, layers: int) -> pd.DataFrame:
    """FI of single layers straight from the definition (float64, thin SVD of L0), for some images and layers.

    Returns:
        One row per image and layer: layer, image, by_definition, ceiling, exact, rank.
    """
    network = copy.deepcopy(classifier(run, dataset_name, model, seed=seed).model).double()
    split = dataset(run, dataset_name).train.sample(images, seed=seed)
    x = training.pixels(split.images, run.device).double()
    metric = influence.metric_tensor(network, x, wrt="layers")
    result = influence.first_order_influence(metric, split.labels.to(run.device))
    modules, rows = dict(network.named_modules()), []
    for number in np.linspace(0, len(metric.blocks) - 1, layers).round().astype(int):
        weights = list(modules[metric.blocks[number]].parameters(recurse=False))
        for i in range(len(split)):
            value = _definition(network, x[i : i + 1], int(split.labels[i]), weights)
            rows.append(
                {
                    "layer": metric.blocks[number],
                    "image": int(split.index[i]),
                    "by_definition": value,
                    "ceiling": float(result.ceiling[i]),
                    "exact": float(result.fi[i, number]),
                    "rank": int(result.rank[i, number]),
                }
            )
    return pd.DataFrame(rows)


def _definition(network: nn.Module, x: Tensor, label: int, weights: Sequence[nn.Parameter]) -> float:
    """FI of `weights`; scores from contrasts, as in `definition.influence_by_definition`."""
    with torch.enable_grad():
        logits = network(x)[0]
        rows = [torch.autograd.grad(z - logits[label], weights, retain_graph=True, allow_unused=True) for z in logits]
    contrasts = torch.stack(
        [
            torch.cat(
                [torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zip(row, weights, strict=True)]
            )
            for row in rows
        ]
    )
    log_p = logits.detach().log_softmax(0)
    scores = contrasts - log_p.exp() @ contrasts
    left, singular, _ = torch.linalg.svd(scores.T * (log_p / 2).exp(), full_matrices=False)
    kept = singular > 1e-12 * singular[0]
    return float(((left[:, kept].T @ -scores[label]) / singular[kept]).square().sum())


def claims(table: pd.DataFrame, definition: pd.DataFrame) -> dict[str, bool | float]:
    """Setup 2 by rules fixed before the run.

    * layers_differ_in_exact_fi (what the paper reads off the columns): for at least one network, at least half of the
      layers have a mean alignment below .99.
    * full_rank_layers_agree: at rank K - 1 every layer agrees per image with all parameters and the ceiling to 1e-6,
      and so does FI from its definition.
    * traces_differ: the largest trace of a layer is over ten times the smallest, for every network.
    """
    layers = table[table["number"] > 0]
    networks = layers.groupby(["dataset", "model"])
    full = definition[definition["rank"] == definition["rank"].max()]
    gaps = max(table["gap_at_full_rank"].max(), layers["gap_to_all"].max())
    by_definition_gap = float((full["by_definition"] / full["ceiling"] - 1).abs().max())
    return {
        "layers_differ_in_exact_fi": bool((networks["alignment"].agg(lambda a: (a < 0.99).mean()) >= 0.5).any()),
        "full_rank_layers_agree": bool(max(gaps, by_definition_gap) <= 1e-6),
        "traces_differ": bool((networks["trace"].max() / networks["trace"].min() > 10).all()),
    }
