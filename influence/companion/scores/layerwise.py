"""Scores of every layer of a network for a set of images: a network and a split in, a table out."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from ..images.data import Split
from ..zoo import training
from .imagewise import positions

ALL = "all parameters"
_CHUNK = 32
_DEPARTS = 0.01  # released FI departs from the exact one when it differs by more than this share


def score_layers(model: nn.Module, split: Split, *, epsilon: float, device: torch.device | str = "cpu") -> pd.DataFrame:
    """FI of all parameters and of each layer for every image of a split."""
    places = positions(split.labels.numpy())
    frames, done = [], 0
    pieces = zip(split.images.split(_CHUNK), split.labels.split(_CHUNK), split.index.split(_CHUNK), strict=True)
    for images, labels, index in progress_bar(list(pieces), desc="FI of the layers", unit="batch", leave=False):
        layers = influence.metric_tensor(model, training.pixels(images, device), wrt="layers")
        metric = with_all(layers)
        y = labels.to(device)
        exact = influence.first_order_influence(metric, y)
        released = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
        count, blocks = exact.fi.shape

        def repeated(values: Tensor | np.ndarray, blocks: int = blocks) -> np.ndarray:
            return np.repeat(np.asarray(values), blocks)

        def flat(values: Tensor) -> np.ndarray:
            return values.cpu().flatten().numpy()

        ceiling = exact.ceiling.cpu()
        frame = pd.DataFrame(
            {
                "image": repeated(index),
                "label": repeated(labels),
                "position": repeated(places[done : done + count]),
                "loss": repeated(ceiling.log1p()),
                "ceiling": repeated(ceiling),
                "number": np.tile(np.arange(blocks), count),
                "layer": list(metric.blocks) * count,
                "size": np.tile(metric.dims.cpu().numpy(), count),
                "exact": flat(exact.fi),
                "released": flat(released.fi),
                "rank": flat(exact.rank),
                "kept": flat(released.rank),
                "trace": flat(metric.trace()),
                "effective_rank": flat(effective_rank(metric)),
            }
        )
        frame["departs"] = (frame["released"] - frame["exact"]).abs() > _DEPARTS * frame["exact"]
        frames.append(frame)
        done += count
    return pd.concat(frames, ignore_index=True)


def with_all(layers: influence.MetricTensor) -> influence.MetricTensor:
    """The metric tensor of the layers with that of all parameters, the sum of their Grams, before the first."""
    return influence.MetricTensor(
        log_probs=layers.log_probs,
        gram=torch.cat([layers.gram.sum(dim=1, keepdim=True), layers.gram], dim=1),
        blocks=(ALL, *layers.blocks),
        dims=torch.cat([layers.dims.sum()[None], layers.dims]),
        dtype=layers.dtype,
    )


def effective_rank(metric: influence.MetricTensor) -> Tensor:
    """tr(G)^2 / tr(G^2), the number of directions that share the sensitivity, (N, B); 0 where G is 0."""
    root = (0.5 * metric.log_probs).exp()[:, None, :, None]
    m = root * metric.score_gram() * root.mT
    square = m.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    return torch.nan_to_num(square / m.square().sum(dim=(-2, -1)), nan=0.0)


def layer_noise_scores(
    model: nn.Module, split: Split, sigma: float, draws: int, seed: int, epsilon: float, device: torch.device
) -> pd.DataFrame:
    """Scores of each layer beside the divergence under noise; `fig_what_fi_measures.layer_noise` says what."""
    scored = score_layers(model, split, epsilon=epsilon, device=device)
    scored["alignment"] = scored["exact"] / scored["ceiling"]
    columns = ["size", "exact", "released", "alignment", "trace"]
    found = scored[scored["number"] > 0].groupby(["number", "layer"], sort=True)[columns].mean().reset_index()
    network, x = copy.deepcopy(model), training.pixels(split.images, device)
    modules = dict(network.named_modules())
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with torch.no_grad():
        log_p = F.log_softmax(network(x).double(), dim=1)
        for layer in found["layer"]:
            weights = list(modules[layer].parameters(recurse=False))
            kept = [w.clone() for w in weights]
            values = []
            for _ in range(draws):
                for w, original in zip(weights, kept, strict=True):
                    w.copy_(original + sigma * torch.randn(w.shape, generator=generator).to(w.device))
                noisy = F.log_softmax(network(x).double(), dim=1)
                values.append(float((log_p.exp() * (log_p - noisy)).sum(1).mean()))
            for w, original in zip(weights, kept, strict=True):
                w.copy_(original)
            rows.append((np.mean(values), np.std(values, ddof=1) / np.sqrt(draws) if draws > 1 else np.nan))
    found["divergence"], found["standard_error"] = (np.array(column) for column in zip(*rows, strict=True))
    return found
