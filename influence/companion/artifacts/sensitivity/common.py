"""What the artifacts of Shu & Zhu (2019) share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn import functional as F

from influence.measures import log_ceiling

from ... import style
from ...ledger.results import Run
from ...scores import imagewise
from ...scores.definition import influence_by_definition
from ...scores.detection import detection, two_sample
from ...scores.imagewise import predicted_class_scores
from ...zoo import training
from ..common import Subject, groups, networks, scored

CHECKED = 16  # images of a check


def ceiling_check(subject: Subject, *, device: torch.device) -> pd.DataFrame:
    """FI from its definition (float64, thin SVD, no closed form) beside (1 - P_y) / P_y of some training images."""
    network = copy.deepcopy(subject.trained.model).double()
    split = subject.dataset.train.sample(CHECKED, seed=subject.seed)
    x, labels = training.pixels(split.images, device).double(), split.labels.to(device)
    with torch.no_grad():
        log_p = F.log_softmax(network(x), dim=1)
    values = {
        "image": split.index,
        "p_label": log_p.gather(1, labels[:, None])[:, 0].exp(),
        "by_definition": influence_by_definition(network, x, labels),
        "ceiling": log_ceiling(log_p, labels).exp(),
    }
    return imagewise.table(values).assign(dataset=subject.dataset.name, model=subject.model)


# What the gap is read through: FI needs no label, the loss does.
MEASURES = {
    "exact": "exact FI of the predicted class",
    "released": "released FI of the predicted class",
    "loss": "loss (true class)",
    "margin": "-log P of the predicted class",
}


# Of the scores of an image: what the rest follows from.
_PUBLISHED = ["image", "label", "predicted", "loss", "ceiling", "exact", "released", "rank"]


def predicted_influence(run: Run) -> dict[str, pd.DataFrame]:
    """Setup 3: FI of the whole image, f = -log P(y_pred), for training and test images of each network.

    Returns:
        "scores", one row per data set, model, seed, part ("train", "test") and image: image, label, predicted, loss
        (nats, true class), ceiling (of the predicted class), exact, released, rank.
    """
    images, epsilon = run.parameters["images"], run.parameters["epsilon"]
    frames = [both_parts(run, network, images=images or None, epsilon=epsilon) for network in networks(run)]
    return {"scores": pd.concat(frames, ignore_index=True)}


def both_parts(run: Run, network: Subject, *, images: int | None, epsilon: float) -> pd.DataFrame:
    """The scores of `predicted_influence` of one network."""
    frames = []
    for part, split in (("train", network.dataset.train), ("test", network.dataset.test)):
        sample, name = split.sample(images, seed=network.seed), f"setup3/{network.name}-{part}"
        frame = scored(run, name, predicted_class_scores, network.trained, sample, epsilon=epsilon)
        frames.append(frame[_PUBLISHED].assign(part=part, **network.columns))
    return pd.concat(frames, ignore_index=True)


def gap(frame: pd.DataFrame) -> pd.DataFrame:
    """Training against test images through each measure: tests, and the size of the effect with its interval.

    Returns:
        One row per data set, model, seed and measure: accuracies and mean values of both parts, ks, ks_p, mw_p, effect
        (probability that a test image's value exceeds a training image's, ties half) with its 95% interval.
    """
    rows = []
    frame = frame.assign(margin=np.log1p(frame["ceiling"]))
    for network, group in groups(frame, "dataset", "model", "seed"):
        parts = {str(part): rest for part, rest in group.groupby("part")}
        hits = {f"accuracy_{part}": float((rest["label"] == rest["predicted"]).mean()) for part, rest in parts.items()}
        for measure in MEASURES:
            values = {part: rest[measure].to_numpy() for part, rest in parts.items()}
            means = {f"mean_{part}": float(x.mean()) for part, x in values.items()}
            tests = two_sample(values["train"], values["test"])
            rows.append({**network, "measure": measure, "images": len(values["train"]), **hits, **means, **tests})
    return pd.DataFrame(rows)


def detection_table(frame: pd.DataFrame, *, also: Sequence[str] = ()) -> pd.DataFrame:
    """AUROC and average precision of each score for finding wrong labels, with 95% bootstrap intervals over images.

    The scores are those of `imagewise.NAMES` and the columns in `also`, where they were computed.
    """
    rows = []
    for about, group in groups(frame, "model", "kind"):
        hits = {"accuracy": float((group["predicted"] == group["label"])[~group["wrong"]].mean())}
        counts = {"images": len(group), "wrong": int(group["wrong"].sum())}
        for score in (name for name in (*imagewise.NAMES, *also) if name in group and group[name].notna().all()):
            found = detection(group[score], group["wrong"])
            rows.append({**about, "score": score, **counts, **hits, **found})
    return pd.DataFrame(rows)


def manhattan(axes: Axes, position: pd.Series, score: pd.Series, label: pd.Series) -> None:
    """The paper's own form: x = class, images of class i spread over [i, i+1), y = score, one colour per class."""
    n_classes = int(label.max()) + 1
    style.dots(axes, position, score, label, style.class_colours(n_classes), size=2)
    axes.set_xticks(np.arange(n_classes) + 0.5, [str(k) for k in range(n_classes)])
    axes.set_xlim(0, n_classes)
    axes.tick_params(axis="x", length=0)


def draw_auroc(table: pd.DataFrame, by: str, *, share: float | None = None) -> Figure:
    """AUROC and average precision of each score with 95% bootstrap intervals; a panel for each "state" or "kind".

    Dashed lines are chance: one half, and the share of what is to be found, that of `wrong` in `images` where None.
    """
    columns = list(table[by].unique())
    models = list(table["model"].unique())
    scores = list(table["score"].unique())
    figure, grid = style.subplots(
        2, len(columns), height=0.5 + 0.24 * len(scores) * 2, width=1.15, squeeze=False, sharey=True, sharex="row"
    )
    for measure, row in zip(("auroc", "ap"), grid, strict=True):
        for axes, value in zip(row, columns, strict=True):
            part = table[table[by] == value]
            _intervals(axes, part, measure, models, scores)
            found = float((part["wrong"] / part["images"]).mean()) if share is None else share
            chance = 0.5 if measure == "auroc" else found
            axes.axvline(chance, color="0.4", linestyle="--", linewidth=0.8, zorder=0, label="chance")
            axes.set_xlabel({"auroc": "AUROC", "ap": "average precision"}[measure])
        row[0].set_yticks(range(len(scores)), [style.name(score) for score in scores], fontsize=7)
    for axes, value in zip(grid[0], columns, strict=True):
        axes.set_title(style.name(value) if by == "kind" else f"{_WHEN.get(str(value), value)} fine-tuning", fontsize=9)
    grid[0, 0].invert_yaxis()
    grid[0, -1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    images = " to ".join(f"{count:,}" for count in sorted({int(table["images"].min()), int(table["images"].max())}))
    figure.suptitle(f"95% bootstrap intervals over {images} images", fontsize=8)
    return figure


_WHEN = {"middle": "during"}
_MODELS = {
    "resnet50": ("o", "#0072B2"),
    "densenet121": ("s", "#E69F00"),
    "resnet20": ("^", "#009E73"),
    "resnet56": ("D", "#CC79A7"),
}


def _intervals(axes: Axes, table: pd.DataFrame, measure: str, models: list[str], scores: list[str]) -> None:
    step = 0.7 / len(models)
    for place, model in enumerate(models):
        marker, colour = _MODELS.get(model, ("o", None))
        part = table[table["model"] == model].set_index("score").loc[scores]
        y = [i + step * (place - (len(models) - 1) / 2) for i in range(len(scores))]
        look: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 3, "elinewidth": 0.8}
        axes.errorbar(part[measure], y, xerr=style.error_bars(part, measure), label=style.name(model), **look)
    axes.grid(axis="y", linewidth=0.3)
