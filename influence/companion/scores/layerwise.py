"""Scores of every layer of a network for a set of images: a network and a split in, a table out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from ..images.data import Split
from ..zoo import training
from ..zoo.family import kl
from .imagewise import chunks, positions, table

ALL = "all parameters"
_CHUNK = 32
_DEPARTS = 0.01  # released FI departs from the exact one when it differs by more than this share


def score_layers(model: nn.Module, split: Split, *, epsilon: float, device: torch.device | str = "cpu") -> pd.DataFrame:
    """FI of all parameters and of each layer for every image of a split."""
    places = torch.tensor(positions(split.labels.numpy()))
    frames = []
    for rows, x, y in chunks(split, _CHUNK, device, "FI of the layers"):
        metric = with_all(influence.metric_tensor(model, x, wrt="layers"))
        exact = influence.first_order_influence(metric, y)
        released = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
        by_image = {"image": split.index[rows], "label": y, "position": places[rows]}
        by_image |= {"loss": exact.ceiling.log1p(), "ceiling": exact.ceiling}
        frame = table(
            {
                **{name: values[:, None] for name, values in by_image.items()},
                "number": torch.arange(len(metric.blocks)),
                "size": metric.dims,
                "exact": exact.fi,
                "released": released.fi,
                "rank": exact.rank,
                "kept": released.rank,
                "trace": metric.trace(),
                "effective_rank": effective_rank(metric),
                "near_cut": exact.near_cut | released.near_cut,
            }
        )
        frame.insert(6, "layer", list(metric.blocks) * len(rows))
        frame["departs"] = (frame["released"] - frame["exact"]).abs() > _DEPARTS * frame["exact"]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def with_all(layers: influence.MetricTensor) -> influence.MetricTensor:
    """The metric tensor of the layers with that of all parameters, the sum of their Grams, before the first."""
    gram = torch.cat([layers.gram.sum(dim=1, keepdim=True), layers.gram], dim=1)
    dims = torch.cat([layers.dims.sum()[None], layers.dims])
    return replace(layers, gram=gram, blocks=(ALL, *layers.blocks), dims=dims)


def effective_rank(metric: influence.MetricTensor) -> Tensor:
    """tr(G)^2 / tr(G^2), the number of directions that share the sensitivity, (N, B); 0 where G is 0."""
    m = metric.root_gram()
    square = m.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    return torch.nan_to_num(square / m.square().sum(dim=(-2, -1)), nan=0.0)


def rounding_scores(model: nn.Module, split: Split, *, bits: int, device: torch.device | str = "cpu") -> pd.DataFrame:
    """What rounding the weights of one layer does to the output, for every convolution and dense layer in turn.

    Returns:
        One row per layer: layer, error (mean square of the rounding of a weight), divergence (mean of KL(p || p') over
        the images, nats), changed (share of images with another predicted class), lost (accuracy before less after).
    """
    labels, before = split.labels, training.predict(model, split.images, device=device)
    log_p, rows = F.log_softmax(before.double(), dim=1), []
    weights = [(name, w) for name, w in model.named_parameters() if w.ndim > 1]
    for name, weight in progress_bar(weights, desc="rounding", unit="layer", leave=False):
        nearest = rounded(weight.detach(), bits)
        error = float((nearest - weight.detach()).double().square().mean())
        with restored([weight]), torch.no_grad():
            weight.copy_(nearest)
            after = training.predict(model, split.images, device=device)
        log_q = F.log_softmax(after.double(), dim=1)
        row = {"layer": name.rpartition(".")[0], "error": error}
        row["divergence"] = float(kl(log_p, log_q).mean())
        row["changed"] = float((before.argmax(dim=1) != after.argmax(dim=1)).double().mean())
        hits = [float((logits.argmax(dim=1) == labels).double().mean()) for logits in (before, after)]
        rows.append(row | {"lost": hits[0] - hits[1]})
    return pd.DataFrame(rows)


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Weights may be changed within; they are what they were after it."""
    before = [w.detach().clone() for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits - 1 evenly spaced values from -max|w| to max|w|; weights of zeros stay as they are."""
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (weight / step).round() * step, weight)


def layer_noise_scores(
    model: nn.Module, split: Split, sigma: float, draws: int, seed: int, epsilon: float, device: torch.device
) -> pd.DataFrame:
    """Scores of each layer beside the divergence under noise; `fig_what_fi_measures.layer_noise` says what."""
    scored = score_layers(model, split, epsilon=epsilon, device=device)
    scored["alignment"] = scored["exact"] / scored["ceiling"]
    columns = ["size", "exact", "released", "alignment", "trace"]
    found = scored[scored["number"] > 0].groupby(["number", "layer"], sort=True)[columns].mean().reset_index()
    x, generator = training.pixels(split.images, device), torch.Generator().manual_seed(seed)

    def noisy(w: Tensor) -> Tensor:
        # In the weight's own order in memory, which decides how a convolution rounds.
        return torch.empty_like(w).copy_(w + sigma * torch.randn(w.shape, generator=generator).to(w.device))

    rows = []
    with torch.no_grad():
        log_p = F.log_softmax(model(x).double(), dim=1)
        for layer in found["layer"]:
            own, values = dict(model.get_submodule(layer).named_parameters(layer, recurse=False)), []
            for _ in range(draws):
                moved = functional_call(model, {name: noisy(w) for name, w in own.items()}, (x,))
                values.append(float(kl(log_p, F.log_softmax(moved.double(), dim=1)).mean()))
            rows.append((np.mean(values), np.std(values, ddof=1) / np.sqrt(draws) if draws > 1 else np.nan))
    found["divergence"], found["standard_error"] = np.array(rows).T
    return found
