"""Figures of what FI measures: the released estimator against the loss, and what constants and units do to it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import style

_UNITS = {"0-255": "o", "0-1": "s", "standardised": "^"}


def released_against_loss(curve: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """Left, released FI against the loss: closed form for each e and the measured images. Right, exact FI likewise."""
    figure = Figure(figsize=(style.WIDTH * 1.1, 3.2))
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    epsilons = sorted(curve["epsilon"].unique())
    colours = dict(zip(epsilons, ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#E69F00"), strict=False))
    for epsilon, group in curve.groupby("epsilon"):
        left.fill_between(group["loss"], group["low"], group["high"], color=colours[float(str(epsilon))], alpha=0.5)
        left.plot(
            group["loss"], group["high"], color=colours[float(str(epsilon))], label=f"$e$ = {epsilon:g}", linewidth=1
        )
    shown = scores[(scores["unit"] == "0-255") & (scores["score"] == "released") & (scores["epsilon"] == 1e-3)]
    seen = shown[shown["value"] > 0]
    zeros = len(shown) - len(seen)
    label = f"images, $e$ = 0.001\n({zeros / len(shown):.1%} of {len(shown)} are 0)"
    left.scatter(seen["loss"], seen["value"], s=6, color="black", linewidths=0, label=label, zorder=3)
    exact = scores[(scores["unit"] == "0-255") & (scores["score"] == "exact")]
    right.scatter(
        exact["loss"], exact["value"], s=6, color=style.COLOURS["exact"], linewidths=0, label="images, exact FI"
    )
    one = curve[curve["epsilon"] == epsilons[0]]
    for axes in (left, right):
        axes.plot(
            one["loss"], one["ceiling"], color="black", linewidth=0.8, linestyle="--", label=r"ceiling $e^{loss} - 1$"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-7, 1e6)
        axes.set_xlim(1e-6, 50)
        axes.set_xlabel("loss (nats)")
        axes.legend(fontsize=6, loc="upper left")
    left.set_ylabel("FI (dimensionless)")
    left.set_title("as released: rises, peaks near $P_y = e$, falls", fontsize=9)
    right.set_title("exact", fontsize=9)
    return figure


def sensitivity(table: pd.DataFrame) -> Figure:
    """Share of exact zeros and rank correlation with the loss, for each e and unit of the pixels."""
    figure = Figure(figsize=(style.WIDTH, 2.6))
    left, right = figure.subplots(1, 2)
    released = table[table["score"] == "released"]
    for place, (unit, marker) in enumerate(_UNITS.items()):
        part = released[released["unit"] == unit]
        x = np.arange(len(part)) + 0.12 * (place - 1)
        colour = style.STABILITY[place]
        left.plot(x, part["zeros"], marker, color=colour, label=f"pixels {unit}")
        bars = [part["spearman"] - part["spearman_low"], part["spearman_high"] - part["spearman"]]
        bars = [bar.clip(lower=0) for bar in bars]
        right.errorbar(x, part["spearman"], yerr=bars, fmt=marker, color=colour, label=f"pixels {unit}")
    for axes in (left, right):
        axes.set_xticks(range(len(part)), [f"{epsilon:g}" for epsilon in part["epsilon"]])
        axes.set_xlabel("constant and cut $e$ of the released code")
    left.set_ylabel("share of released FI = 0")
    right.set_ylabel("Spearman with the loss")
    right.ticklabel_format(axis="y", useOffset=False)
    right.set_title("exact FI: 1 in every unit", fontsize=8)
    left.set_title(f"{int(released['images'].iloc[0])} training images, one network", fontsize=8)
    left.legend(fontsize=7)
    return figure


def layers(table: pd.DataFrame) -> Figure:
    """Does the score of a layer say how far noise on its parameters moves the output: trace, and exact FI."""
    figure = Figure(figsize=(style.WIDTH, 2.6))
    for axes, (column, name) in zip(
        figure.subplots(1, 2), (("trace", "mean trace of G"), ("exact", "mean exact FI")), strict=True
    ):
        axes.errorbar(
            table[column],
            table["divergence"],
            yerr=2 * table["standard_error"],
            fmt="o",
            markersize=3,
            elinewidth=0.6,
            color=style.SCORES[column][0],
        )
        axes.set_xlabel(f"{name}, one point a layer")
        axes.set_yscale("log")
    axes_left, axes_right = figure.axes
    axes_left.set_xscale("log")
    low, high = table["exact"].min(), table["exact"].max()
    axes_right.set_xlim(0.5 * low, 1.5 * high)
    axes_left.set_ylabel("mean KL under noise\non the layer (nats), 2 s.e.")
    return figure
