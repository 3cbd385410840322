"""Setup 3 of Shu & Zhu (2019): FI of the predicted class on the training set against the test set."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from .common import manhattan


def claims(gaps: pd.DataFrame) -> dict[str, bool]:
    """Setup 3 by rules fixed before the run, each for every data set and network.

    * fi_separates_training_from_test (the paper reads overfitting off FI): the 95% interval of the effect of released
      FI lies above 1/2, and the Kolmogorov-Smirnov test rejects equality at 1%.
    * fi_orders_as_the_margin: exact FI and -log P of the predicted class have the same effect to 1e-12.
    """
    table = gaps.set_index(["dataset", "model", "measure"])
    released = table.xs("released", level="measure")
    same = table["effect"].xs("exact", level="measure") - table["effect"].xs("margin", level="measure")
    return {
        "fi_separates_training_from_test": bool(
            (released["effect_low"] > 0.5).all() and (released["ks_p"] < 0.01).all()
        ),
        "fi_orders_as_the_margin": bool((same.abs() <= 1e-12).all()),
    }


_MARKS = {"exact": "o", "released": "s", "loss": "D", "margin": "^"}


_LABELS = {
    "exact": "exact FI of the predicted class",
    "released": "released FI of the predicted class",
    "loss": "loss (true class)",
    "margin": "-log P of the predicted class",
}


def draw(scores: pd.DataFrame) -> Figure:
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


def draw_effects(gaps: pd.DataFrame) -> Figure:
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
