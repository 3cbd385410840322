"""Curves and intervals of scores that look for outliers and wrong labels."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style


def curves(points: pd.DataFrame, table: pd.DataFrame, state: str) -> Figure:
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


def auroc(table: pd.DataFrame, by: str) -> Figure:
    """AUROC and average precision of each score with 95% bootstrap intervals; a column for each value of `by`.

    Args:
        table: model, score, auroc, ap, each with _low and _high, and the column `by`.
        by: "state" or "kind".
    """
    columns = list(table[by].unique())
    models = list(table["model"].unique())
    scores = list(table["score"].unique())
    figure = Figure(figsize=(style.WIDTH * 1.15, 0.5 + 0.24 * len(scores) * 2))
    grid = figure.subplots(2, len(columns), squeeze=False, sharey=True)
    for measure, row in zip(("auroc", "ap"), grid, strict=True):
        for axes, value in zip(row, columns, strict=True):
            _intervals(axes, table[table[by] == value], measure, models, scores)
            axes.set_xlabel({"auroc": "AUROC", "ap": "average precision"}[measure])
        row[0].set_yticks(range(len(scores)), [style.name(score) for score in scores], fontsize=7)
    for axes, value in zip(grid[0], columns, strict=True):
        axes.set_title(style.name(value) if by == "kind" else f"{_WHEN[str(value)]} fine-tuning", fontsize=9)
    grid[0, 0].invert_yaxis()
    grid[0, -1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("one network each, 95% bootstrap intervals over the images", fontsize=8)
    return figure


_WHEN = {"before": "before", "middle": "during", "after": "after"}
_MODELS = {"resnet50": "o", "densenet121": "s", "resnet20": "^", "resnet56": "D"}
_MODEL_COLOURS = {"resnet50": "#0072B2", "densenet121": "#E69F00", "resnet20": "#009E73", "resnet56": "#CC79A7"}


def _intervals(axes: Axes, table: pd.DataFrame, measure: str, models: list[str], scores: list[str]) -> None:
    step = 0.7 / len(models)
    for place, model in enumerate(models):
        part = table[table["model"] == model].set_index("score").loc[scores]
        y = [i + step * (place - (len(models) - 1) / 2) for i in range(len(scores))]
        bars = [part[measure] - part[f"{measure}_low"], part[f"{measure}_high"] - part[measure]]
        axes.errorbar(
            part[measure],
            y,
            xerr=[bar.clip(lower=0) for bar in bars],
            fmt=_MODELS.get(model, "o"),
            color=_MODEL_COLOURS.get(model),
            markersize=3,
            elinewidth=0.8,
            label=style.name(model),
        )
    axes.grid(axis="y", linewidth=0.3)


def made_outliers(images: pd.DataFrame) -> Figure:
    """Some made outliers with the label that they are given."""
    figure = Figure(figsize=(style.WIDTH, 1.0))
    for axes, (_, image) in zip(figure.subplots(1, len(images)), images.iterrows(), strict=True):
        axes.imshow(image["pixels"], cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"label {image['label']}", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
