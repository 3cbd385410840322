"""Setup 1 of Shu & Zhu (2019): do the training images of largest FI look like outliers?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import influence
from influence.progress import progress_bar

from ... import style
from ...images.data import Split
from ...ledger import cache
from ...ledger.results import Run
from ...scores.detection import agreement
from ...scores.evaluation import rank_agreement
from ...scores.imagewise import positions
from ...zoo import training
from ..common import bound, classifier, dataset
from .common import manhattan

_CHUNK = 64


def outlier_ranking(
    run: Run, datasets: Sequence[str], models: Sequence[str], *, seed: int, images: int | None, epsilon: float
) -> pd.DataFrame:
    """Setup 1: FI of the whole image, f = -log P(y_true), for the training images of each network.

    Args:
        run: the artifact.
        datasets: names of `data.NAMES`.
        models: names of `models.NAMES`.
        seed: of the networks and of the choice of images.
        images: how many training images to score, drawn at random; None for all.
        epsilon: e of the released code.

    Returns:
        One row per data set, model and image: image (position in the set's published order), label, predicted, p_label,
        loss (nats), position (the x of a Manhattan plot: images of class i spread over [i, i+1)), ceiling
        (1 - P_y) / P_y, exact and released (FI), rank (of the metric tensor), classes (K).
    """
    frames = []
    for name in datasets:
        for model in models:
            trained = classifier(run, name, model, seed=seed)
            split = dataset(run, name).train.sample(images, seed=seed)
            key = {"model": trained.key, "data": dataset(run, name).digest, "seed": seed, "images": images}
            frames.append(
                cache.table(
                    f"setup1/{name}-{model}",
                    key | {"epsilon": epsilon, "device": run.device.type},
                    bound(score_images, trained.model, split, epsilon=epsilon, device=run.device),
                ).assign(dataset=name, model=model)
            )
    return pd.concat(frames, ignore_index=True)


def score_images(
    model: torch.nn.Module, split: Split, *, epsilon: float, device: torch.device | str = "cpu"
) -> pd.DataFrame:
    """Exact and released FI of the whole image for every image of a split, f = -log P(y_true)."""
    parts = []
    chunks = list(zip(split.images.split(_CHUNK), split.labels.split(_CHUNK), split.index.split(_CHUNK), strict=True))
    for pictures, labels, index in progress_bar(chunks, desc="FI of the image", unit="batch", leave=False):
        metric = influence.metric_tensor(model, training.pixels(pictures, device), wrt="input")
        exact = influence.first_order_influence(metric, labels.to(device))
        released = influence.first_order_influence(
            metric, labels.to(device), estimator=influence.Released(epsilon=epsilon)
        )
        log_p = metric.log_probs.gather(1, labels.to(device)[:, None])[:, 0].cpu()
        parts.append(
            pd.DataFrame(
                {
                    "image": index.numpy(),
                    "label": labels.numpy(),
                    "predicted": metric.log_probs.argmax(1).cpu().numpy(),
                    "p_label": log_p.exp().numpy(),
                    "loss": -log_p.numpy(),
                    "ceiling": exact.ceiling.cpu().numpy(),
                    "exact": exact.fi[:, 0].cpu().numpy(),
                    "released": released.fi[:, 0].cpu().numpy(),
                    "rank": exact.rank[:, 0].cpu().numpy(),
                    "classes": metric.log_probs.shape[1],
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    frame["position"] = positions(frame["label"].to_numpy())
    return frame


def outlier_summary(scores: pd.DataFrame, check: pd.DataFrame) -> pd.DataFrame:
    """What the Manhattan plots of `outlier_ranking` show, in numbers, for each data set and network.

    Args:
        scores: of `outlier_ranking`.
        check: of `ceiling_check`, for the same data sets and networks.
    """
    gap = (check["by_definition"] / check["ceiling"] - 1).abs()
    rows = []
    for (name, model), group in scores.groupby(["dataset", "model"], sort=False):
        checked = (check["dataset"] == name) & (check["model"] == model)
        top = {kind: set(group.nlargest(100, kind)["image"]) for kind in ("exact", "released", "loss")}
        rows.append(
            {
                "dataset": name,
                "model": model,
                "images": len(group),
                "wrong": int((group["label"] != group["predicted"]).sum()),
                "full_rank_share": float((group["rank"] == group["classes"] - 1).mean()),
                "largest_gap_of_definition_to_ceiling": float(gap[checked].max()),
                "largest_exact": group["exact"].max(),
                "largest_released": group["released"].max(),
                "released_zero_share": float((group["released"] == 0).mean()),
                "spearman_exact_loss": rank_agreement(group["exact"], group["loss"]),
                "spearman_released_loss": rank_agreement(group["released"], group["loss"]),
                "top100_exact_in_loss": len(top["exact"] & top["loss"]),
                "top100_released_in_loss": len(top["released"] & top["loss"]),
            }
        )
    return pd.DataFrame(rows)


def outlier_agreement(scores: pd.DataFrame) -> pd.DataFrame:
    """How far the rankings agree: released FI with exact FI and with the loss, exact FI with the loss.

    Returns:
        One row per data set, model and pair: images, Spearman's rho and Kendall's tau-b with 95% bootstrap intervals
        over the images, for one network of each kind.
    """
    rows = []
    pairs = (("released", "exact"), ("released", "loss"), ("exact", "loss"))
    for (name, model), group in scores.groupby(["dataset", "model"], sort=False):
        for first, second in pairs:
            row = {"dataset": name, "model": model, "first": first, "second": second, "images": len(group)}
            rows.append({**row, **agreement(group[first], group[second], repeats=100)})
    return pd.DataFrame(rows)


def outlier_images(run: Run, scores: pd.DataFrame, *, count: int = 5) -> pd.DataFrame:
    """The `count` images of largest FI, released and exact, for each data set and network.

    Returns:
        The rows of `scores` with estimator ("released" or "exact"), place (1 = largest), fi, class names and pixels
        (an (H, W, C) uint8 array).
    """
    frames = []
    for (name, _model), group in scores.groupby(["dataset", "model"], sort=False):
        everything = dataset(run, str(name))
        where = {int(image): row for row, image in enumerate(everything.train.index)}
        for estimator in ("released", "exact"):
            top = group.nlargest(count, estimator).assign(estimator=estimator, place=range(1, count + 1))
            top["fi"] = top[estimator]
            pixels = [everything.train.images[where[int(i)]].permute(1, 2, 0).numpy() for i in top["image"]]
            top["pixels"] = pd.Series(pixels, index=top.index, dtype=object)
            for column in ("label", "predicted"):
                top[f"{column}_name"] = [everything.classes[k] for k in top[column]]
            frames.append(top)
    return pd.concat(frames, ignore_index=True)


def draw(scores: pd.DataFrame) -> Figure:
    """Setup 1: Manhattan plots of released FI (full, zoomed) and exact FI, and both against their ceiling."""
    groups = list(scores.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH * 1.4, 2.3 * len(groups)))
    grid = figure.subplots(len(groups), 4, squeeze=False)
    for (left, zoomed, middle, right), ((name, model), group) in zip(grid, groups, strict=True):
        for axes in (left, zoomed):
            manhattan(axes, group["position"], group["released"], group["label"])
            axes.set_ylim(0)
        top = float(np.quantile(group["released"], 0.95))
        zoomed.set_ylim(0, top if top > 0 else 1.0)
        zoomed.set_title("as released, lower 95%")
        left.set_ylabel(f"{style.name(name)}\n{style.name(model)}\nFI (dimensionless)")
        left.set_title("as released")
        manhattan(middle, group["position"], group["exact"], group["label"])
        middle.set_yscale("log")
        middle.set_title("exact (log scale)")
        _against_ceiling(right, group)
        right.set_title("against the ceiling")
    for axes in grid[-1, :3]:
        axes.set_xlabel("class")
    grid[-1, 3].set_xlabel(r"$(1 - P_y)/P_y$")
    return figure


def _against_ceiling(axes: Axes, group: pd.DataFrame) -> None:
    seen = group[group["released"] > 0]
    axes.scatter(
        seen["ceiling"], seen["released"], s=5, color=style.COLOURS["released"], label="released", linewidths=0
    )
    axes.scatter(group["ceiling"], group["exact"], s=2, color=style.COLOURS["exact"], label="exact", linewidths=0)
    low, high = group["ceiling"].min(), group["ceiling"].max()
    axes.plot([low, high], [low, high], color=style.COLOURS["ceiling"], linewidth=0.6, label="ceiling", zorder=3)
    zeros = group[group["released"] == 0]
    axes.plot(
        zeros["ceiling"],
        np.full(len(zeros), 0.02),
        "|",
        color=style.COLOURS["released"],
        transform=axes.get_xaxis_transform(),
        markersize=4,
        label=f"released = 0 ({len(zeros) / len(group):.0%})",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=6, loc="upper left", handlelength=1)


def draw_images(images: pd.DataFrame) -> Figure:
    """Setup 1: the images of largest FI, released and exact, with true and predicted label."""
    groups = list(images.groupby(["dataset", "model", "estimator"], sort=False))
    count = int(images["place"].max())
    figure = Figure(figsize=(style.WIDTH, 1.62 * len(groups)))
    grid = figure.subplots(len(groups), count, squeeze=False)
    for row, ((name, model, estimator), group) in zip(grid, groups, strict=True):
        for axes, (_, image) in zip(row, group.iterrows(), strict=True):
            axes.imshow(image["pixels"].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_title(
                f"true {image['label_name']}\npredicted {image['predicted_name']}\nFI {image['fi']:.3g}", fontsize=7
            )
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{style.name(name)}\n{style.name(model)}\n{style.name(estimator)}", fontsize=7)
    return figure
