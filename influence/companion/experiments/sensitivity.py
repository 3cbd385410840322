"""Shu & Zhu (2019): the tables behind each figure and table of the paper."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import influence
from influence.progress import progress_bar

from .. import cache
from ..data import Split
from ..detection import agreement
from ..evaluation import expected_calibration_error, mean_interval, rank_agreement
from ..results import Run
from ..scores import positions
from ..zoo import recipes, training
from .common import classifier, dataset, named
from .definition import influence_by_definition
from .keyed import bound

_CHUNK = 64


# -- table of accuracies ----------------------------------------------------------------------------------------------


def accuracy(run: Run, networks: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """Accuracy, mean loss and calibration error of each network on its training, validation and test images.

    Args:
        run: the artifact.
        networks: names of `recipes.yaml`, with a seed or without, such as "paper-resnet50-mnist-0", and of
            `pretrained.NAMES`. The latter were trained on all training images of their set and have no validation part.
        seeds: of networks that are named without one.

    Returns:
        One row per network and part: network, dataset, seed, part, n (images), accuracy, loss (mean -log P_y, nats),
        calibration_error, gate (the accuracy below which no verdict rests on the network; NaN for none).
    """
    rows = []
    for name in progress_bar(recipes.with_seeds(networks, seeds), desc="accuracies", unit="network", leave=False):
        chosen = named(run, name)
        for part, split in chosen.parts.items():
            logits = training.predict(chosen.model, split.images, device=run.device).double()
            about = {"network": chosen.family, "dataset": chosen.dataset, "seed": chosen.seed, "part": part}
            rows.append({**about, **_quality(logits, split), "gate": chosen.gate.get(part, float("nan"))})
    return pd.DataFrame(rows)


def _quality(logits: Tensor, split: Split) -> dict[str, float]:
    correct = logits.argmax(1) == split.labels
    return {
        "n": len(split),
        "accuracy": float(correct.double().mean()),
        "loss": float(F.cross_entropy(logits, split.labels)),
        "calibration_error": expected_calibration_error(logits.softmax(1).amax(1).numpy(), correct.numpy()),
    }


def accuracy_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of `accuracy`'s rows, with the 95% t intervals over seeds, in fractions."""
    rows = []
    for (name, network, part), group in runs.groupby(["dataset", "network", "part"], sort=False):
        mean, low, high = mean_interval(group["accuracy"])
        error, error_low, error_high = mean_interval(group["calibration_error"])
        rows.append(
            {
                "dataset": name,
                "network": network,
                "part": part,
                "images": int(group["n"].iloc[0]),
                "seeds": len(group),
                "accuracy": mean,
                "low": max(low, 0.0),
                "high": min(high, 1.0),
                "loss": group["loss"].mean(),
                "calibration_error": error,
                "calibration_low": max(error_low, 0.0),
                "calibration_high": min(error_high, 1.0),
                "gate": group["gate"].iloc[0],
                "gate_met": bool((group["accuracy"] >= group["gate"].fillna(0)).all()),
            }
        )
    return pd.DataFrame(rows)


# -- Setup 1: detecting outliers --------------------------------------------------------------------------------------


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


def ceiling_check(run: Run, datasets: Sequence[str], models: Sequence[str], *, seed: int, images: int) -> pd.DataFrame:
    """FI from its definition (float64, thin SVD, no closed form) over (1 - P_y) / P_y, for some training images.

    Returns:
        One row per data set, model and image: image, p_label, by_definition (FI), ceiling.
    """
    frames = []
    for name in datasets:
        for model in models:
            network = copy.deepcopy(classifier(run, name, model, seed=seed).model).double()
            split = dataset(run, name).train.sample(images, seed=seed)
            x, labels = training.pixels(split.images, run.device).double(), split.labels.to(run.device)
            with torch.no_grad():
                log_p = F.log_softmax(network(x), dim=1)
            others = log_p.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
            log_label = log_p.gather(1, labels[:, None])[:, 0]
            values = {
                "image": split.index.numpy(),
                "p_label": log_label.exp().cpu().numpy(),
                "by_definition": influence_by_definition(network, x, labels).cpu().numpy(),
                "ceiling": (others - log_label).exp().cpu().numpy(),
            }
            frames.append(pd.DataFrame(values).assign(dataset=name, model=model))
    return pd.concat(frames, ignore_index=True)


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
