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
from ...images.data import Split
from ...images.pictures import packed, unpacked
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores import imagewise
from ...scores.detection import auroc_difference, columns, detection
from ...zoo import recipes, training
from ..common import by_network, classifier, dataset, groups, scored
from .common import draw_auroc

STATES = ("before", "middle", "after")


_PAPER = 54_000, 2_700  # training images and made outliers in the paper


_REPEATS = 1000
_DRAWN = ("exact", "jacobian_norm", "loss", "released_1e-3")  # curves of the figure
_FALSE = 0.2  # the largest false positive rate there


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Setup 0: "scores", of `simulation`, and "pictures", of `examples`, for each seed.

    Only the networks of the first seed learn the outliers: the state before is the one that is judged.
    """
    scores, shown = [], []
    for seed in run.parameters["seeds"]:
        made = made_outliers(run, seed=seed)
        states = STATES if seed == run.parameters["seeds"][0] else STATES[:1]
        scores.append(simulation(run, made, seed=seed, states=states).assign(seed=seed))
        shown.append(examples(made, dataset(run, run.parameters["dataset"]).classes, count=10).assign(seed=seed))
    return {"scores": pd.concat(scores, ignore_index=True), "pictures": pd.concat(shown, ignore_index=True)}


def made_outliers(run: Run, *, seed: int) -> Split:
    """Overlaid images to be learnt, from those training images that every network classifies correctly."""
    chosen = run.parameters
    train = dataset(run, chosen["dataset"]).train
    right = torch.ones(len(train), dtype=torch.bool)
    for model in chosen["models"]:
        network = classifier(run, chosen["dataset"], model, seed=seed).model
        right &= training.predict(network, train.images, device=run.device).argmax(1) == train.labels
    return outliers.overlay(train, right, per_class=chosen["per_class"], shift=chosen["shift"], seed=seed)


def simulation(run: Run, learnt: Split, *, seed: int, states: Sequence[str] = STATES) -> pd.DataFrame:
    """Scores of training images and made outliers, for each network before, during and after learning the latter.

    Nothing is learnt where `states` is "before" alone.

    Returns:
        One row per model, state and image: outlier (bool), weight (of the example, so that outliers have the paper's
        share of 1 in 21) and the columns of `imagewise.all_scores`.
    """
    chosen = run.parameters
    whole, images, made = dataset(run, chosen["dataset"]), chosen["images"] or None, chosen["made"] or None
    splits = {False: whole.train.sample(images, seed=seed), True: learnt.sample(made, seed=seed)}
    phases = tuple((int(epochs), float(rate)) for epochs, rate in zip(chosen["epochs"], chosen["rates"], strict=True))
    frames = []
    for model in chosen["models"]:
        networks = [classifier(run, whole.name, model, seed=seed)]
        if states[1:]:
            recipe = recipes.recipe(run.profile, whole.name, model, seed=seed)
            networks += training.learn(recipe, whole, learnt, phases=phases, device=run.device)
        for state, trained in zip(states, networks, strict=True):
            for outlier, split in splits.items():
                name = f"setup0/{whole.name}-{model}-{state}-{'made' if outlier else 'train'}"
                frame = scored(run, name, imagewise.all_scores, trained, split, without=chosen["without"])
                weight = _PAPER[outlier] / len(split)
                frames.append(frame.assign(model=model, state=state, outlier=outlier, weight=weight))
    return pd.concat(frames, ignore_index=True).drop(columns="near_cut")


def examples(made: Split, classes: Sequence[str], *, count: int) -> pd.DataFrame:
    """Some made outliers spread over the classes: label, and the image as `pictures.packed` has it."""
    rows = np.linspace(0, len(made) - 1, count).round().astype(int)
    labels = pd.DataFrame({"label": [classes[int(made.labels[i])] for i in rows]})
    return pd.concat([labels, packed(made.images[rows])], axis=1)


def detection_table(frame: pd.DataFrame) -> pd.DataFrame:
    """AUROC and average precision of each score in each state, with 95% bootstrap intervals over the images.

    Average precision is weighted to the paper's share of outliers, 2,700 among 56,700.
    """
    rows = []
    for about, group in groups(frame, "seed", "model", "state"):
        counts = {"images": int((~group["outlier"]).sum()), "outliers": int(group["outlier"].sum())}
        for score in (name for name in imagewise.NAMES if name in group):
            found = detection(group[score], group["outlier"], weight=group["weight"])
            rows.append({**about, "score": score, **counts, **found})
    return pd.DataFrame(rows)


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """At most 400 points (x, y) of the ROC ("roc") and precision-recall ("pr") of each score and state; first seed."""
    frames = []
    for (model, state), group in _first_seed(frame).groupby(["model", "state"], sort=False):
        for score in _DRAWN:
            ranks = group[score].rank(method="dense")
            false, true, _ = roc_curve(group["outlier"], ranks)
            precision, recall, _ = precision_recall_curve(group["outlier"], ranks, sample_weight=group["weight"])
            for curve, x, y in (("roc", false, true), ("pr", recall, precision)):
                rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), 400)).round().astype(int))
                points = pd.DataFrame({"x": x[rows], "y": y[rows]})
                frames.append(points.assign(model=str(model), state=str(state), score=score, curve=curve))
    return pd.concat(frames, ignore_index=True)


def claims(frame: pd.DataFrame) -> dict[str, bool | list[Estimate]]:
    """What Setup 0 is about, by rules fixed before the run.

    * fi_beats_jacobian_norm (the paper's claim): the AUROC of released FI (e = 1e-8, as there) less that of the
      Jacobian norm before fine-tuning, over the same images, the mean over seeds, for every network.
    * fi_beats_jacobian_norm_middle, fi_beats_jacobian_norm_after: the same in the other states, not judged.
    * auroc_of_exact_fi_is_that_of_the_loss: their AUROCs over the images of full rank differ by at most 1e-12 in every
      state.
    """
    full = frame[frame["rank"] == frame["rank"].max()]
    gaps = [
        auroc_difference(group["exact"], group["loss"], group["outlier"], repeats=1)[0]
        for _, group in full.groupby(["seed", "model", "state"], sort=False)
    ]
    item = "fi_beats_jacobian_norm"
    states = {str(state): _ahead(group) for state, group in frame.groupby("state", sort=False)}
    ahead = {item if state == "before" else f"{item}_{state}": found for state, found in states.items()}
    return {**ahead, "auroc_of_exact_fi_is_that_of_the_loss": bool(max(map(abs, gaps)) <= 1e-12)}


def _ahead(frame: pd.DataFrame) -> list[Estimate]:
    """AUROC of released FI less that of the Jacobian norm, paired by image, for each network."""
    rows = []
    for network, group in groups(frame, "model", "seed"):
        less = auroc_difference(group["released_1e-8"], group["jacobian_norm"], group["outlier"], repeats=_REPEATS)
        rows.append({**network, "images": len(group), **columns("less", less)})
    return by_network(pd.DataFrame(rows), "less", "model")


def _first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["seed"] == frame["seed"].min()]


def draw_curves(points: pd.DataFrame, table: pd.DataFrame, state: str) -> Figure:
    """ROC and precision-recall curves of FI and what it is compared with, in one state, a row a network; first seed."""
    table = _first_seed(table)
    models = list(points["model"].unique())
    figure, grid = style.subplots(len(models), 2, height=2.6 * len(models), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        chosen = points[(points["model"] == model) & (points["state"] == state)]
        first = table[(table["model"] == model) & (table["state"] == state)].iloc[0]
        for axes, curve in zip(row, ("roc", "pr"), strict=True):
            lines = chosen[chosen["curve"] == curve].set_index("score")
            for score in _DRAWN:
                colour, dashes = style.SCORES[score]
                x, y = lines.loc[score, "x"], lines.loc[score, "y"]
                front = 3 if score == "loss" else 2  # dots on the line of exact FI
                axes.plot(x, y, color=colour, linestyle=dashes, label=style.name(score), zorder=front)
        row[0].set(xlim=(-0.005, _FALSE), ylim=(0.5, 1.01), xlabel="false positive rate")
        row[0].set_ylabel(f"{style.name(model)}\ntrue positive rate")
        row[1].set(xlim=(0.5, 1.01), ylim=(-0.01, 1.02), xlabel="recall", ylabel="precision (1 outlier in 21)")
        counts = f"{first['outliers']} outliers, {first['images']} training images"
        row[0].set_title(f"ROC, {state} fine-tuning, one network:\n{counts}", fontsize=8)
        row[1].set_title(f"precision-recall,\n{state} fine-tuning, one network", fontsize=8)
    grid[0, 1].legend(fontsize=7, loc="lower left")
    return figure


def draw_intervals(table: pd.DataFrame) -> Figure:
    """AUROC and average precision of each score in the three states, with their intervals; first seed."""
    return draw_auroc(_first_seed(table), by="state", share=_PAPER[True] / sum(_PAPER))


def draw_examples(images: pd.DataFrame) -> Figure:
    """Some made outliers with the label that they are given; first seed."""
    images = _first_seed(images)
    figure, panels = style.subplots(1, len(images), height=1.0)
    for axes, (_, image) in zip(panels, images.iterrows(), strict=True):
        style.picture(axes, unpacked(image), f"label {image['label']}")
    return figure
