"""Setup 3 of Shu & Zhu (2019): FI of the predicted class on the training set against the test set."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...scores.imagewise import positions
from ..common import by_network
from .common import MEASURES, gap, manhattan, predicted_influence

compute = predicted_influence


def gaps(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Training against test images through each measure, for each network."""
    return gap(tables["scores"])


def claims(gaps: pd.DataFrame) -> dict[str, bool | list[Estimate]]:
    """Setup 3 by rules fixed before the run, each for every data set and network.

    * fi_separates_training_from_test (the paper reads overfitting off FI): the effect of released FI, the mean over
      seeds, beside 1/2.
    * fi_orders_as_the_margin: exact FI and -log P of the predicted class have the same effect to 1e-12.
    """
    estimates = by_network(gaps[gaps["measure"] == "released"], "effect")
    effects = gaps.pivot(index=["dataset", "model", "seed"], columns="measure", values="effect")
    same = bool(((effects["exact"] - effects["margin"]).abs() <= 1e-12).all())
    return {"fi_separates_training_from_test": estimates, "fi_orders_as_the_margin": same}


_MARKS = {"exact": "o", "released": "s", "loss": "D", "margin": "^"}


def draw(scores: pd.DataFrame) -> Figure:
    """The paper's figure: paired Manhattan plots of released FI on one range, training left, test right; first seed."""
    groups = style.first_seed(scores)
    figure, grid = style.subplots(len(groups), 2, height=1.8 * len(groups), squeeze=False, sharey="row")
    for row, (name, model, group) in zip(grid, groups, strict=True):
        for axes, part in zip(row, ("train", "test"), strict=True):
            chosen = group[group["part"] == part]
            position = pd.Series(positions(chosen["label"].to_numpy()), chosen.index)
            manhattan(axes, position, chosen["released"], chosen["label"])
            axes.set_title(f"{part}, {len(chosen)} images, seed {scores['seed'].min()}", fontsize=9)
            axes.set_xlabel("class")
        row[0].set(ylim=(0, 1.05 * group["released"].max()), ylabel=f"{name}\n{model}\nreleased FI, $y_{{pred}}$")
    return figure


def draw_effects(gaps: pd.DataFrame) -> Figure:
    """Probability that a test image's value exceeds a training image's, through FI and through the loss."""
    networks = gaps[["dataset", "model"]].drop_duplicates().to_numpy().tolist()
    seeds, images = gaps["seed"].nunique(), int(gaps["images"].max())
    figure, axes = style.subplots(height=0.9 + 0.6 * len(networks))
    for place, measure in enumerate(_MARKS):
        found = pd.DataFrame(by_network(gaps[gaps["measure"] == measure], "effect"))
        y = found.index + 0.16 * (place - 1.5)
        look = {"fmt": _MARKS[measure], "color": style.SCORES[measure][0], "markersize": 4}
        bars = style.error_bars(found, "value", "")
        axes.errorbar(found["value"], y, xerr=bars, label=MEASURES[measure], **look)
    axes.axvline(0.5, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(networks)), [f"{style.name(d)} {style.name(m)}" for d, m in networks])
    axes.invert_yaxis()
    over_networks = f"{seeds} networks, or over images where that is wider"
    of = over_networks if seeds > 1 else f"{images} images of each part; one network"
    axes.set_xlabel(f"P(test image > training image), 95% interval over {of}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
