"""Setup 0 of Shu & Zhu (2019): which score tells made outliers from training images, before and after learning them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from ... import style
from ...images import outliers
from ...ledger import cache
from ...ledger.results import Run
from ...scores import imagewise
from ...scores.detection import detection
from ...zoo import recipes, training
from ..common import bound, classifier, dataset

STATES = ("before", "middle", "after")


_PAPER = 54_000, 2_700  # training images and made outliers in the paper


def simulation(
    run: Run,
    dataset_name: str,
    models: Sequence[str],
    *,
    seed: int,
    per_class: int,
    shift: int,
    phases: Sequence[tuple[int, float]],
    images: int | None,
    made: int | None,
) -> pd.DataFrame:
    """Every score of training images and made outliers, for each network before, during and after learning the latter.

    Args:
        run: the artifact.
        dataset_name: images on a background of 0 ("digits" or "mnist").
        models: names of `models.NAMES`; all of them have to classify an image correctly for it to give a label.
        seed: of networks, outliers and choice of images.
        per_class: made outliers of each class, a tenth of them held out as in the released code.
        shift: largest shift in pixels.
        phases: (epochs, learning rate) of the two phases of learning training images and outliers together.
        images: training images to score, drawn at random; None for all.
        made: outliers to score, drawn at random from those to be learnt; None for all.

    Returns:
        One row per model, state (`STATES`) and image: outlier (bool), weight (of the example, so that outliers have the
        paper's share of 1 in 21) and the columns of `scores.all_scores`.
    """
    train = dataset(run, dataset_name).train
    simulated = made_outliers(run, dataset_name, models, seed=seed, per_class=per_class, shift=shift)
    chosen = {False: train.sample(images, seed=seed), True: simulated.train.sample(made, seed=seed)}
    notes = {"models": list(models), "seed": seed, "per_class": per_class, "shift": shift}
    schedule = tuple((int(epochs), float(rate)) for epochs, rate in phases)
    frames = []
    for model in models:
        before = classifier(run, dataset_name, model, seed=seed)
        recipe = recipes.recipe(run.profile, dataset_name, model, seed=seed)
        whole = dataset(run, dataset_name)
        later = training.learn(recipe, whole, simulated.train, phases=schedule, device=run.device)
        for state, trained in zip(STATES, [before, *later], strict=True):
            key = {"model": trained.key, "notes": notes, "images": images, "made": made, "device": run.device.type}
            for outlier, split in chosen.items():
                compute = bound(imagewise.all_scores, trained.model, split, device=run.device)
                name = f"setup0/{dataset_name}-{model}-{state}-{'made' if outlier else 'train'}"
                frame = cache.table(name, key, compute)
                weight = _PAPER[outlier] / len(split)
                frames.append(frame.assign(model=model, state=state, outlier=outlier, weight=weight))
    return pd.concat(frames, ignore_index=True)


def made_outliers(
    run: Run, dataset_name: str, models: Sequence[str], *, seed: int, per_class: int, shift: int
) -> outliers.Outliers:
    """Overlaid images from those training images that every network classifies correctly."""
    train = dataset(run, dataset_name).train
    right = torch.ones(len(train), dtype=torch.bool)
    for model in models:
        network = classifier(run, dataset_name, model, seed=seed).model
        right &= training.predict(network, train.images, device=run.device).argmax(1) == train.labels
    return outliers.overlay(train, right, per_class=per_class, shift=shift, seed=seed)


def detection_table(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """AUROC and average precision of each score in each state, with 95% bootstrap intervals over the images.

    Average precision is weighted to the paper's share of outliers, 2,700 among 56,700.
    """
    rows = []
    for (model, state), group in frame.groupby(["model", "state"], sort=False):
        for score in imagewise.NAMES:
            found = detection(group[score], group["outlier"], weight=group["weight"], seed=seed)
            counts = {"images": int((~group["outlier"]).sum()), "outliers": int(group["outlier"].sum())}
            rows.append({"model": model, "state": state, "score": score, **counts, **found})
    return pd.DataFrame(rows)


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """ROC and precision-recall curves of each score in each state, thinned to at most 400 points each.

    Returns:
        One row per model, state, score, curve ("roc" or "pr") and point: x, y.
    """
    frames = []
    for (model, state), group in frame.groupby(["model", "state"], sort=False):
        for score in imagewise.NAMES:
            ranks = group[score].rank(method="dense")
            false, true, _ = roc_curve(group["outlier"], ranks)
            precision, recall, _ = precision_recall_curve(group["outlier"], ranks, sample_weight=group["weight"])
            for curve, x, y in (("roc", false, true), ("pr", recall, precision)):
                rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), 400)).round().astype(int))
                points = pd.DataFrame({"x": x[rows], "y": y[rows]})
                frames.append(points.assign(model=str(model), state=str(state), score=score, curve=curve))
    return pd.concat(frames, ignore_index=True)


def examples(
    run: Run, dataset_name: str, models: Sequence[str], *, seed: int, per_class: int, shift: int, count: int
) -> pd.DataFrame:
    """Some made outliers as pictures: label and pixels (an (H, W) uint8 array), one of each class first."""
    made = made_outliers(run, dataset_name, models, seed=seed, per_class=per_class, shift=shift).train
    rows = np.linspace(0, len(made) - 1, count).round().astype(int)
    names = dataset(run, dataset_name).classes
    return pd.DataFrame(
        {"label": [names[int(made.labels[i])] for i in rows], "pixels": [made.images[i][0].numpy() for i in rows]}
    )


def claims(frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, bool | float]:
    """What Setup 0 is about, by rules fixed before the run.

    * fi_beats_jacobian_norm (the paper's claim): before fine-tuning, the lower end of the interval of released FI's
      AUROC (e = 1e-8, as there) lies above the upper end of that of the Jacobian norm, for every network.
    * auroc_of_exact_fi_is_that_of_the_loss: their AUROCs differ by at most 1e-12 in every state where all images have
      full rank.
    """
    found = table.set_index(["model", "state", "score"])
    full = frame["rank"] == frame["rank"].max()
    gaps = []
    for (model, state), group in frame[full].groupby(["model", "state"], sort=False):
        pair = [detection(group[name], group["outlier"], repeats=2)["auroc"] for name in ("exact", "loss")]
        gaps.append(abs(pair[0] - pair[1]))
        assert len(group) > 0.9 * len(frame[(frame["model"] == model) & (frame["state"] == state)])
    better = [
        found.loc[(model, "before", "released_1e-8"), "auroc_low"]
        > found.loc[(model, "before", "jacobian_norm"), "auroc_high"]
        for model in table["model"].unique()
    ]
    return {
        "fi_beats_jacobian_norm": bool(all(better)),
        "auroc_of_exact_fi_is_that_of_the_loss": bool(max(gaps) <= 1e-12),
    }


def draw_curves(points: pd.DataFrame, table: pd.DataFrame, state: str) -> Figure:
    """ROC and precision-recall curves of every score in one state, a row for each network."""
    models = list(points["model"].unique())
    figure = Figure(figsize=(style.WIDTH, 2.9 * len(models)))
    grid = figure.subplots(len(models), 2, squeeze=False)
    for row, model in zip(grid, models, strict=True):
        chosen = points[(points["model"] == model) & (points["state"] == state)]
        first = table[(table["model"] == model) & (table["state"] == state)].iloc[0]
        for axes, curve in zip(row, ("roc", "pr"), strict=True):
            for score, line in chosen[chosen["curve"] == curve].groupby("score", sort=False):
                colour, dashes = style.SCORES[str(score)]
                axes.plot(line["x"], line["y"], color=colour, linestyle=dashes, linewidth=1.2, label=style.name(score))
            axes.set_xlim(-0.01, 1.01)
            axes.set_ylim(-0.01, 1.02)
        row[0].set_ylabel(f"{style.name(model)}\ntrue positive rate")
        row[0].set_xlabel("false positive rate")
        row[1].set_ylabel("precision (1 outlier in 21)")
        row[1].set_xlabel("recall")
        counts = f"{first['outliers']} outliers, {first['images']} training images"
        row[0].set_title(f"ROC, {state} fine-tuning: {counts}", fontsize=8)
        row[1].set_title(f"precision-recall, {state} fine-tuning", fontsize=8)
    grid[0, 1].legend(fontsize=6, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_examples(images: pd.DataFrame) -> Figure:
    """Some made outliers with the label that they are given."""
    figure = Figure(figsize=(style.WIDTH, 1.0))
    for axes, (_, image) in zip(figure.subplots(1, len(images)), images.iterrows(), strict=True):
        axes.imshow(image["pixels"], cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"label {image['label']}", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
