"""Figures of Setup 3 of Shu & Zhu (2019): the training set against the test set."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from . import style
from .sensitivity import manhattan

_MARKS = {"exact": "o", "released": "s", "loss": "D", "margin": "^"}
_LABELS = {
    "exact": "exact FI of the predicted class",
    "released": "released FI of the predicted class",
    "loss": "loss (true class)",
    "margin": "-log P of the predicted class",
}


def train_vs_test(scores: pd.DataFrame) -> Figure:
    """The paper's figure: paired Manhattan plots of released FI on one range, training left and test right."""
    groups = list(scores.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH, 2.1 * len(groups)))
    grid = figure.subplots(len(groups), 2, squeeze=False, sharey="row")
    for row, ((name, model), group) in zip(grid, groups, strict=True):
        for axes, part in zip(row, ("train", "test"), strict=True):
            chosen = group[group["part"] == part]
            manhattan(axes, chosen["position"], chosen["released"], chosen["label"])
            axes.set_title(f"{part}, {len(chosen)} images", fontsize=9)
            axes.set_xlabel("class")
        row[0].set_ylim(0, 1.05 * group["released"].max())
        row[0].set_ylabel(f"{style.name(name)}\n{style.name(model)}\nreleased FI, $y_{{pred}}$")
    return figure


def effects(gaps: pd.DataFrame) -> Figure:
    """Probability that a test image's value exceeds a training image's, through FI and through the loss."""
    networks = gaps[["dataset", "model"]].drop_duplicates().to_numpy().tolist()
    figure = Figure(figsize=(style.WIDTH, 0.9 + 0.6 * len(networks)))
    axes = figure.subplots()
    for place, measure in enumerate(_MARKS):
        part = gaps[gaps["measure"] == measure]
        bars = [part["effect"] - part["effect_low"], part["effect_high"] - part["effect"]]
        y = [i + 0.16 * (place - 1.5) for i in range(len(part))]
        colour = style.SCORES[measure][0]
        axes.errorbar(
            part["effect"], y, xerr=bars, fmt=_MARKS[measure], color=colour, label=_LABELS[measure], markersize=4
        )
    axes.axvline(0.5, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(networks)), [f"{style.name(d)} {style.name(m)}" for d, m in networks])
    axes.invert_yaxis()
    axes.set_xlabel("P(test image > training image), 95% bootstrap interval over images; one network each")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def quantiles(table: pd.DataFrame) -> Figure:
    """Upper quantiles of released FI in both parts with 95% bootstrap intervals; the largest has none."""
    chosen = table[table["estimator"] == "released"]
    groups = list(chosen.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH, 2.3 * ((len(groups) + 1) // 2)))
    grid = figure.subplots((len(groups) + 1) // 2, 2, squeeze=False).ravel()
    for axes, ((name, model), group) in zip(grid, groups, strict=False):
        for part, colour, shift in (("train", style.COLOURS["exact"], -0.1), ("test", style.COLOURS["released"], 0.1)):
            rows = group[group["part"] == part].reset_index(drop=True)
            bars = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
            axes.errorbar(rows.index + shift, rows["value"], yerr=bars, fmt="o", color=colour, markersize=4, label=part)
        axes.set_xticks(range(len(rows)), [f"{q:g}" for q in rows["quantile"]])
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(0, 2 * group["value"].max())
        axes.set_xlabel("quantile")
        axes.set_ylabel("released FI")
        axes.set_title(f"{style.name(name)}, {style.name(model)}, {rows['images'].iloc[0]} images each", fontsize=8)
        axes.legend(fontsize=7)
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    return figure
