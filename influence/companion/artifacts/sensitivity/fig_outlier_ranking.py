"""Setup 1 of Shu & Zhu (2019): do the training images of largest FI look like outliers?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import influence

from ... import style
from ...images import outliers
from ...images.data import Dataset, Split
from ...images.pictures import packed, unpacked
from ...ledger import paths
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import agreement, detection, spearman
from ...scores.imagewise import chunks, positions, table
from ..common import Subject, by_network, groups, networks, over_seeds, scored
from .common import ceiling_check, manhattan

_CHUNK = 64


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Setup 1: FI of the whole image, f = -log P(y_true), for the training images of each network.

    Returns:
        "scores", one row per data set, model, seed and image: image (position in the set's published order), label,
        predicted, p_label, loss (nats), position (the x of a Manhattan plot: images of class i spread over [i, i+1)),
        ceiling (1 - P_y) / P_y, exact and released (FI), rank (of the metric tensor), classes (K), answers (how many
        different labels people gave; 0 where nobody was asked); "check", of `ceiling_check` for 16 images of each
        network; "pictures", of `largest` for each network.
    """
    images, epsilon = run.parameters["images"] or None, run.parameters["epsilon"]
    found: dict[str, list[pd.DataFrame]] = {"scores": [], "check": [], "pictures": []}
    for network in networks(run):
        split = network.dataset.train.sample(images, seed=network.seed)
        scores = scored(run, f"setup1/{network.name}", score_images, network.trained, split, epsilon=epsilon)
        people = called(network.dataset, run.parameters["labels"])
        answers = people.loc[scores["image"]].nunique(axis=1).to_numpy()
        scores = scores.drop(columns="near_cut").assign(answers=answers, **network.columns)
        check = ceiling_check(network, device=run.device).assign(seed=network.seed)
        parts = {"scores": scores, "check": check, "pictures": largest(network, scores, people)}
        for name, frame in parts.items():
            found[name].append(frame)
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def called(dataset: Dataset, labels: Sequence[str]) -> pd.DataFrame:
    """What people call each training image, one column a label of CIFAR-10N; no columns for other data sets."""
    asked = labels if dataset.name == "cifar10" else []
    index, names = dataset.train.index.numpy(), np.array(dataset.classes)
    given = {kind: names[outliers.human_labels(kind, paths.data_dir())[0][index]] for kind in asked}
    return pd.DataFrame(given, index=index)


def score_images(
    model: torch.nn.Module, split: Split, *, epsilon: float, device: torch.device | str = "cpu"
) -> pd.DataFrame:
    """Exact and released FI of the whole image for every image of a split, f = -log P(y_true)."""
    parts = []
    for rows, x, y in chunks(split, _CHUNK, device, "FI of the image"):
        metric = influence.metric_tensor(model, x, wrt="input")
        exact = influence.first_order_influence(metric, y)
        released = influence.first_order_influence(metric, y, estimator=influence.Released(epsilon=epsilon))
        log_p = metric.log_probs.gather(1, y[:, None])[:, 0]
        values = {"image": split.index[rows], "label": y, "predicted": metric.log_probs.argmax(1)}
        values |= {"p_label": log_p.exp(), "loss": -log_p, "ceiling": exact.ceiling, "exact": exact.fi[:, 0]}
        values |= {"released": released.fi[:, 0], "rank": exact.rank[:, 0]}
        values["near_cut"] = (exact.near_cut | released.near_cut)[:, 0]
        parts.append(table(values).assign(classes=metric.log_probs.shape[1]))
    frame = pd.concat(parts, ignore_index=True)
    frame["position"] = positions(frame["label"].to_numpy())
    return frame


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the Manhattan plots of `draw` show, in numbers, for each data set, model and seed."""
    check = tables["check"]
    gap = (check["by_definition"] / check["ceiling"] - 1).abs()
    rows = []
    for network, group in groups(tables["scores"], "dataset", "model", "seed"):
        checked = check[list(network)].eq(pd.Series(network)).all(axis=1)
        top = {kind: set(group.nlargest(100, kind)["image"]) for kind in ("exact", "released", "loss")}
        rows.append(
            {
                **network,
                "images": len(group),
                "wrong": int((group["label"] != group["predicted"]).sum()),
                "full_rank_share": float((group["rank"] == group["classes"] - 1).mean()),
                "largest_gap_of_definition_to_ceiling": float(gap[checked].max()),
                "largest_exact": group["exact"].max(),
                "largest_released": group["released"].max(),
                "released_zero_share": float((group["released"] == 0).mean()),
                "spearman_exact_loss": float(spearman(group["exact"], group["loss"])),
                "spearman_released_loss": float(spearman(group["released"], group["loss"])),
                "top100_exact_in_loss": len(top["exact"] & top["loss"]),
                "top100_released_in_loss": len(top["released"] & top["loss"]),
            }
        )
    return pd.DataFrame(rows)


def rankings(scores: pd.DataFrame) -> pd.DataFrame:
    """How far rankings agree, by `agreement`: released FI with exact FI and with the loss, exact FI with the loss."""
    rows = []
    pairs = (("released", "exact"), ("released", "loss"), ("exact", "loss"))
    for network, group in groups(scores, "dataset", "model", "seed"):
        for first, second in pairs:
            found = agreement(group[first], group[second], repeats=100)
            rows.append({**network, "first": first, "second": second, "images": len(group), **found})
    return pd.DataFrame(rows)


def disputed(scores: pd.DataFrame) -> pd.DataFrame:
    """How well FI and the loss find the training images about which people do not agree, of those that they labelled.

    Returns:
        One row per data set, model, seed and score: images, disputed (how many), of_first_100 (how many among those of
        largest score), AUROC and average precision with 95% bootstrap intervals over the images.
    """
    rows = []
    asked = scores[scores["answers"] > 0]
    for network, group in groups(asked, "dataset", "model", "seed"):
        several = group["answers"] > 1
        about = {**network, "images": len(group), "disputed": int(several.sum())}
        for score in ("released", "loss"):
            first = int(several[group[score].nlargest(100).index].sum())
            rows.append({**about, "score": score, "of_first_100": first, **detection(group[score], several)})
    return pd.DataFrame(rows)


def claims(
    summary: pd.DataFrame, rankings: pd.DataFrame, disputed: pd.DataFrame
) -> dict[str, bool | float | Estimate | list[Estimate]]:
    """Setup 1, for which the paper states no rule.

    * fi_finds_disputed_images (the paper's claim, by a rule fixed before the run): the AUROC of released FI for the
      images about which people do not agree, the mean over seeds, beside 1/2, for every network.
    * the_loss_finds_disputed_images: the same of the loss.
    * DATASET_MODEL_largest_released: the largest released FI of any seed, beside the paper's printed axes.
    * DATASET_MODEL_kendall_released_exact, _loss: Kendall's tau of released FI with these, the mean over seeds.
    * exact_fi_is_the_ceiling: FI from its definition agrees with (1 - P_y) / P_y to 1e-6, for every network.
    """
    found: dict[str, bool | float | Estimate | list[Estimate]] = {
        f"{name}_{model}_largest_released": float(group["largest_released"].max())
        for (name, model), group in summary.groupby(["dataset", "model"], sort=False)
    }
    found["exact_fi_is_the_ceiling"] = bool((summary["largest_gap_of_definition_to_ceiling"] < 1e-6).all())
    released = rankings[rankings["first"] == "released"].groupby(["dataset", "model", "second"], sort=False)
    for (name, model, second), g in released:
        found[f"{name}_{model}_kendall_released_{second}"] = over_seeds(g, "kendall")
    for score, who in (("released", "fi"), ("loss", "the_loss")) if len(disputed) else ():
        found[f"{who}_finds_disputed_images"] = by_network(disputed[disputed["score"] == score], "auroc")
    return found


def largest(network: Subject, scores: pd.DataFrame, people: pd.DataFrame, *, count: int = 5) -> pd.DataFrame:
    """The `count` training images of largest FI of one network, released and exact.

    Returns:
        The rows of `scores` with estimator ("released" or "exact"), place (1 = largest), fi, class names, what people
        call the image, and the image as `pictures.packed` has it.
    """
    train, names = network.dataset.train, network.dataset.classes
    where = {int(image): row for row, image in enumerate(train.index)}
    frames = []
    for estimator in ("released", "exact"):
        top = scores.nlargest(count, estimator).reset_index(drop=True)
        top = top.assign(estimator=estimator, place=top.index + 1, fi=top[estimator])
        for column in ("label", "predicted"):
            top[f"{column}_name"] = [names[k] for k in top[column]]
        top["people"] = [", ".join(people.loc[image]) for image in top["image"]]
        images = train.images[[where[int(i)] for i in top["image"]]]
        frames.append(pd.concat([top, packed(images)], axis=1))
    return pd.concat(frames, ignore_index=True)


def draw(scores: pd.DataFrame) -> Figure:
    """Manhattan plots of released FI (full, zoomed) and exact FI, and both against their ceiling; first seed."""
    groups = style.first_seed(scores)
    figure, grid = style.subplots(len(groups), 4, height=1.45 * len(groups), width=1.05, squeeze=False)
    for (left, zoomed, middle, right), (name, model, group) in zip(grid, groups, strict=True):
        for axes in (left, zoomed):
            manhattan(axes, group["position"], group["released"], group["label"])
            axes.set_ylim(0)
        above = group["released"][group["released"] > 0]
        zoomed.set(ylim=(0, float(np.quantile(above, 0.95)) if len(above) else 1.0), title="lower 95% above 0")
        left.set(ylabel=f"{name}\n{model}\nFI (dimensionless)", title="as released")
        manhattan(middle, group["position"], group["exact"], group["label"])
        middle.set(yscale="log", title="exact (log scale)")
        _against_ceiling(right, group)
        right.set_title("against the ceiling")
    for axes in grid[-1, :3]:
        axes.set_xlabel("class")
    grid[-1, 3].set_xlabel(r"$(1 - P_y)/P_y$")
    figure.legend(*grid[0, 3].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=7)
    return figure


def _against_ceiling(axes: Axes, group: pd.DataFrame) -> None:
    tint, seen, zeros = style.COLOURS, group[group["released"] > 0], group[group["released"] == 0]
    axes.scatter(seen["ceiling"], seen["released"], s=5, color=tint["released"], label="released", linewidths=0)
    axes.scatter(group["ceiling"], group["exact"], s=2, color=tint["exact"], label="exact", linewidths=0)
    ends = [group["ceiling"].min(), group["ceiling"].max()]
    axes.plot(ends, ends, color=tint["ceiling"], linewidth=0.6, label="ceiling", zorder=3)
    at_foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "markersize": 4, "label": "released = 0"}
    axes.plot(zeros["ceiling"], np.full(len(zeros), 0.02), "|", color=tint["released"], **at_foot)
    axes.text(0.97, 0.1, f"{len(zeros) / len(group):.0%} are 0", transform=axes.transAxes, ha="right", fontsize=6)
    axes.set(xscale="log", yscale="log")


def draw_images(images: pd.DataFrame) -> Figure:
    """The images of largest FI, released and exact, true and predicted label, what people call them; first seed."""
    images = images[images["seed"] == images["seed"].min()]
    groups = list(images.groupby(["dataset", "model", "estimator"], sort=False))
    count = int(images["place"].max())
    figure, grid = style.subplots(len(groups), count, height=1.25 * len(groups), width=0.9, squeeze=False)
    for row, ((name, model, estimator), group) in zip(grid, groups, strict=True):
        for axes, (_, image) in zip(row, group.iterrows(), strict=True):
            lines = [f"true {image['label_name']}", f"predicted {image['predicted_name']}", f"FI {image['fi']:.3g}"]
            if image["people"]:  # as in "2 bird, 1 frog"
                lines.append(", ".join(f"{n} {name}" for name, n in Counter(image["people"].split(", ")).most_common()))
            style.picture(axes, unpacked(image), "\n".join(lines))
        row[0].set_ylabel(f"{style.name(name)}\n{style.name(model)}\n{style.name(estimator)}", fontsize=6)
    return figure
