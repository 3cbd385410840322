"""Scores of every pixel and patch of images, and what changing the first of them does to the output."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ..images.data import Split
from ..zoo import training
from .imagewise import chunks, table

SIZES = (1, 3, 5, 7)
STEPS = (8, 32)  # grey levels
_CHUNK = 8


def patch_maps(model: nn.Module, split: Split, epsilon: float, device: torch.device) -> pd.DataFrame:
    """Exact and released FI, alignment and rank of every k x k patch of each image, f = -log P(y_pred)."""
    channels, height, width = split.images.shape[1:]
    x = training.pixels(split.images, device)
    metric = influence.metric_tensor(model, x, wrt=influence.Patches(size=SIZES))
    exact = influence.first_order_influence(metric)
    released = influence.first_order_influence(metric, estimator=influence.Released(epsilon=epsilon))
    axes = {"place": range(len(x)), "size": SIZES, "channel": range(channels), "row": range(height)}
    frame = pd.MultiIndex.from_product([*axes.values(), range(width)], names=[*axes, "column"]).to_frame(index=False)
    found = {"exact": exact.fi, "released": released.fi, "alignment": exact.alignment, "rank": exact.rank}
    return frame.assign(**{name: values.cpu().flatten().numpy() for name, values in found.items()})


def intervene(
    model: nn.Module, split: Split, counts: tuple[int, ...], patch: int, epsilon: float, seed: int, device: torch.device
) -> pd.DataFrame:
    """Change the entries that each ranking puts first; `fig_vulnerable_areas.intervention` says how."""
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for rows, x, _ in chunks(split, _CHUNK, device, "intervention"):
        ranked, gradient, log_p = rankings(model, x, epsilon=epsilon, generator=generator)
        farther = torch.where(x < 127.5, 255.0, 0.0)
        downhill = -gradient.sign()  # the gradient is that of log P
        changes = {"farther": farther} | {f"step {step}": (x + step * downhill).clamp(0, 255) for step in STEPS}
        before, predicted = log_p.exp().max(1)
        for name, score in ranked.items():
            masks = {("entries", count): top_entries(score, count) for count in counts}
            masks["patch", patch * patch] = _top_patch(score, patch)
            for (target, count), mask in masks.items():
                for change, value in changes.items():
                    with torch.no_grad():
                        p = model(torch.where(mask, value, x)).double().softmax(1)
                    after = p.gather(1, predicted[:, None])[:, 0]
                    found = {"image": split.index[rows], "p_before": before, "p_after": after, "drop": before - after}
                    frame = table(found | {"flipped": p.argmax(1) != predicted})
                    frames.append(frame.assign(ranking=name, target=target, count=count, change=change))
    return pd.concat(frames, ignore_index=True)


def rankings(
    model: nn.Module, x: Tensor, *, epsilon: float, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Each ranking's score of every entry (N, C, H, W), the gradient of log P_pred, and log P (N, K).

    Within an image alignment orders the entries as exact FI does, the ceiling being one number; random numbers break
    ties, of which released FI (0 for many entries) and black borders have many.
    """
    metric = influence.metric_tensor(model, x, wrt=influence.Patches(size=1))
    exact = influence.first_order_influence(metric)
    released = influence.first_order_influence(metric, estimator=influence.Released(epsilon=epsilon))
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        log_p = F.log_softmax(model(leaf).double(), dim=1)
        (gradient,) = torch.autograd.grad(log_p.amax(1).sum(), leaf)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
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
    return ranked | {"random": noise}, gradient, log_p.detach()


def top_entries(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores of each image, in the shape of the scores (N, ...)."""
    flat = score.flatten(1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter(1, flat.topk(count, dim=1).indices, True).view_as(score)


def _top_patch(score: Tensor, size: int) -> Tensor:
    """The k x k window in one channel, wholly inside the image, of largest mean score; a mask of the entries' shape."""
    pooled = F.avg_pool2d(score, size, stride=1)
    best = F.one_hot(pooled.flatten(1).argmax(1), pooled[0].numel()).view_as(pooled).to(score.dtype)
    kernel = score.new_ones(score.shape[1], 1, size, size)
    return F.conv_transpose2d(best, kernel, groups=score.shape[1]) > 0.5
