"""Scores of every pixel and patch of images, and what changing the first of them does to the output."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..images.data import Split
from ..zoo import training
from .imagewise import chunks, score_gradient, table

SIZES = (1, 3, 5, 7)
STEPS = (8, 32)  # grey levels
_CHUNK = 8
_ROUNDING = 1e-3  # of a score, relative; ten times what an audit allows a value


def patch_maps(model: nn.Module, split: Split, epsilon: float, device: torch.device) -> pd.DataFrame:
    """Exact and released FI, alignment, rank and near_cut of every k x k patch of each image, f = -log P(y_pred).

    In float64: in float32 another processor puts a ReLU here and there on the other side of its kink, which moves FI of
    a single pixel by up to a factor of two.
    """
    channels, height, width = split.images.shape[1:]
    x = training.pixels(split.images, device).double()
    metric = influence.metric_tensor(copy.deepcopy(model).double(), x, wrt=influence.Patches(size=SIZES))
    exact = influence.first_order_influence(metric)
    released = influence.first_order_influence(metric, estimator=influence.Released(epsilon=epsilon))
    axes = {"place": range(len(x)), "size": SIZES, "channel": range(channels), "row": range(height)}
    frame = pd.MultiIndex.from_product([*axes.values(), range(width)], names=[*axes, "column"]).to_frame(index=False)
    found = {"exact": exact.fi, "released": released.fi, "alignment": exact.alignment, "rank": exact.rank}
    found["near_cut"] = exact.near_cut | released.near_cut
    return frame.assign(**{name: values.cpu().flatten().numpy() for name, values in found.items()})


def intervene(
    model: nn.Module,
    split: Split,
    counts: tuple[int, ...],
    patch: int,
    epsilon: float,
    seed: int,
    device: torch.device,
    only: list[int] | None = None,
) -> pd.DataFrame:
    """Change the entries that each ranking puts first; `fig_vulnerable_areas.intervention` says how.

    With `only` for the images at these places of the split alone, by the same random numbers. The column near_cut says
    whether rounding may decide which entries are the first.
    """
    noise = torch.rand(split.images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if only is not None:
        split, noise = split.take(only), noise[only]
    frames = []
    for rows, x, _ in chunks(split, _CHUNK, device, "intervention"):
        ranked, gradient, log_p = rankings(model, x, epsilon=epsilon, noise=noise[rows].to(device))
        farther = torch.where(x < 127.5, 255.0, 0.0)
        downhill = -gradient.sign()  # the gradient is that of log P
        changes = {"farther": farther} | {f"step {step}": (x + step * downhill).clamp(0, 255) for step in STEPS}
        before, predicted = log_p.exp().max(1)
        for name, score in ranked.items():
            masks = {("entries", count): (top_entries(score, count), _near_cut(score, count)) for count in counts}
            pooled = F.avg_pool2d(score, patch, stride=1)
            masks["patch", patch * patch] = _top_patch(pooled, patch), _near_cut(pooled, 1)
            for (target, count), (mask, near) in masks.items():
                for change, value in changes.items():
                    with torch.no_grad():
                        p = model(torch.where(mask, value, x)).double().softmax(1)
                    after = p.gather(1, predicted[:, None])[:, 0]
                    found = {"image": split.index[rows], "p_before": before, "p_after": after, "drop": before - after}
                    frame = table(found | {"flipped": p.argmax(1) != predicted, "near_cut": near})
                    frames.append(frame.assign(ranking=name, target=target, count=count, change=change))
    return pd.concat(frames, ignore_index=True)


def rankings(model: nn.Module, x: Tensor, *, epsilon: float, noise: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Each ranking's score of every entry (N, C, H, W), the gradient of log P_pred, and log P (N, K).

    Within an image alignment orders the entries as exact FI does, the ceiling being one number; `noise`
    (N, C, H, W), random in [0, 1), breaks ties, of which released FI (0 for many entries) and black borders have many.
    """
    metric = influence.metric_tensor(model, x, wrt=influence.Patches(size=1))
    exact = influence.first_order_influence(metric)
    released = influence.first_order_influence(metric, estimator=influence.Released(epsilon=epsilon))
    gradient, log_p = score_gradient(model, x)
    found = {
        "exact": exact.fi.view(x.shape),
        "released": released.fi.view(x.shape),
        "saliency": gradient.double().abs(),
        "trace": metric.trace().view(x.shape),
    }
    ranked = {
        name: score + 1e-9 * noise * score.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-300)
        for name, score in found.items()
    }
    return ranked | {"random": noise}, gradient, log_p


def top_entries(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores of each image, in the shape of the scores (N, ...)."""
    flat = score.flatten(1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter(1, flat.topk(count, dim=1).indices, True).view_as(score)


def _near_cut(score: Tensor, count: int) -> Tensor:
    """Whether the last of the `count` largest scores of each image is within rounding of the one after it, (N,)."""
    last, after = score.flatten(1).topk(count + 1, dim=1).values[:, -2:].unbind(1)
    return last - after <= _ROUNDING * last


def _top_patch(pooled: Tensor, size: int) -> Tensor:
    """The k x k window in one channel of largest mean score `pooled`; a mask of the entries' shape."""
    best = F.one_hot(pooled.flatten(1).argmax(1), pooled[0].numel()).view_as(pooled).to(pooled.dtype)
    kernel = pooled.new_ones(pooled.shape[1], 1, size, size)
    return F.conv_transpose2d(best, kernel, groups=pooled.shape[1]) > 0.5
