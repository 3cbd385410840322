"""Figures of Zheng et al. (2016), classification: the table, the grid, other distortions, robustness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from . import style

_DIVERGING = "PuOr"


def label(arm: str) -> str:
    """How readers know an arm."""
    known = {
        "control": r"control ($\alpha$ = 0)",
        "augmentation": "Gaussian augmentation",
        "stability": "stability",
    }
    if arm in known:
        return known[arm]
    if arm.startswith("augmentation "):
        return "augmentation: " + arm.removeprefix("augmentation ")
    return arm.replace("stability ", r"stability, $\alpha$ = ")


def colours(arms: Sequence[str]) -> dict[str, str]:
    """One colour for each arm, the same in every figure of one set of arms."""
    stable = iter(style.STABILITY * 3)
    return {arm: style.COLOURS.get(arm) or next(stable) for arm in arms}


def classification(table: pd.DataFrame) -> Figure:
    """Precision@1 of each arm on each distortion, one panel per data set, with 95% intervals over seeds."""
    names = list(table["dataset"].unique())
    figure = Figure(figsize=(style.WIDTH, 3.0))
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        group = table[(table["dataset"] == name) & (table["at"] == 1)]
        _bars(axes, group, across="distortion", value="precision")
        axes.set_title(f"{style.name(name)}: mean and 95% interval, {int(group['seeds'].iloc[0])} seeds")
        axes.set_ylabel("precision@1")
        low = max(0.0, float(group["low"].min()) - 0.02)
        axes.set_ylim(low, min(1.0, float(group["high"].max()) + 0.02))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _bars(axes: Axes, group: pd.DataFrame, *, across: str, value: str) -> None:
    groups, arms = list(group[across].unique()), list(group["arm"].unique())
    tint = colours(arms)
    for i, arm in enumerate(arms):
        ours = group[group["arm"] == arm].set_index(across).loc[groups]
        x = np.arange(len(groups)) + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
        errors = np.abs(ours[["low", "high"]].to_numpy().T - ours[value].to_numpy())
        axes.errorbar(x, ours[value], errors, fmt="o", color=tint[arm], markersize=4, capsize=2, label=label(arm))
    axes.set_xticks(range(len(groups)), groups)


def alpha_sigma(table: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """Heat maps over the grid: gain in clean and in distorted validation accuracy, all layers and the last one.

    A square marks the cell chosen on these validation images.
    """
    figure = Figure(figsize=(style.WIDTH, 5.6))
    grid = figure.subplots(2, 2)
    largest = 100 * float(np.abs(table[["clean_gain", "distorted_gain"]].to_numpy()).max())
    norm = TwoSlopeNorm(0, -max(largest, 1e-6), max(largest, 1e-6))
    for row, layers in zip(grid, table["layers"].unique(), strict=True):
        group = table[table["layers"] == layers]
        for axes, part in zip(row, ("clean", "distorted"), strict=True):
            cells = 100 * group.pivot_table(index="alpha", columns="sigma", values=f"{part}_gain")
            image = axes.imshow(cells, cmap=_DIVERGING, norm=norm, origin="lower", aspect="auto")
            for (i, j), value in np.ndenumerate(cells.to_numpy()):
                tint = "white" if abs(value) > 0.6 * largest else "black"
                axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=tint)
            chosen = best[best["layers"] == layers].iloc[0]
            where = list(cells.columns).index(chosen["sigma"]), list(cells.index).index(chosen["alpha"])
            axes.plot(*where, "s", markersize=26, markerfacecolor="none", markeredgecolor="black")
            axes.set_xticks(range(len(cells.columns)), [f"{v:g}" for v in cells.columns])
            axes.set_yticks(range(len(cells.index)), [f"{v:g}" for v in cells.index])
            axes.set_xlabel(r"$\sigma$ (pixels in [0, 1])")
            axes.set_ylabel(r"$\alpha$")
            axes.set_title(f"{part} accuracy, {'all layers' if layers == 'all' else 'last layer'}")
    figure.colorbar(image, ax=list(grid.flat), label="gain over control (pp, validation)")
    seeds = table["seed"].nunique()
    figure.suptitle("no interval: one network (n = 1 seed)" if seeds == 1 else f"mean of {seeds} seeds", fontsize=9)
    return figure


def generalisation(table: pd.DataFrame) -> Figure:
    """Gain over the control of each training (rows) on each distortion; bold where the interval excludes 0."""
    arms = [arm for arm in table["arm"].unique() if arm != "control"]
    distortions = list(table["distortion"].unique())
    gain = 100 * table.pivot(index="arm", columns="distortion", values="gain").loc[arms, distortions]
    known = table.assign(sure=(table["gain_low"] > 0) | (table["gain_high"] < 0))
    sure = known.pivot(index="arm", columns="distortion", values="sure").loc[arms, distortions]
    figure = Figure(figsize=(style.WIDTH, 0.9 + 0.42 * len(arms) + 0.6))
    axes = figure.subplots()
    largest = max(float(np.abs(gain.to_numpy()).max()), 1e-6)
    image = axes.imshow(gain, cmap=_DIVERGING, norm=TwoSlopeNorm(0, -largest, largest), aspect="auto")
    for (i, j), value in np.ndenumerate(gain.to_numpy()):
        weight = "bold" if sure.iloc[i, j] else "normal"
        tint = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7, weight=weight, color=tint)
    axes.set_xticks(range(len(distortions)), distortions, rotation=45, ha="right")
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
    axes.set_xlabel("tested on")
    axes.set_title(f"gain over control, paired, {int(table['seeds'].iloc[0])} seeds (bold: 95% interval excludes 0)")
    figure.colorbar(image, ax=axes, label="gain (pp)")
    return figure


def robustness(table: pd.DataFrame) -> Figure:
    """Certified accuracy against the l2 radius, and accuracy against the strength of each attack."""
    quantities = {
        "certified": (r"certified $\ell_2$ radius", "certified accuracy"),
        "fgsm": (r"$\ell_\infty$ radius of FGSM", "accuracy"),
        "pgd": (r"$\ell_\infty$ radius of PGD", "accuracy"),
    }
    figure = Figure(figsize=(style.WIDTH, 3.0))
    panels = figure.subplots(1, 3, sharey=True)
    tint = colours(list(table["arm"].unique()))
    for axes, (quantity, (x, y)) in zip(panels, quantities.items(), strict=True):
        for arm, group in table[table["quantity"] == quantity].groupby("arm", sort=False):
            colour = tint[str(arm)]
            axes.plot(group["strength"], group["value"], "o-", color=colour, markersize=3, label=label(str(arm)))
            axes.fill_between(group["strength"], group["low"], group["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    panels[0].set_ylim(-0.02, 1.05)
    seeds = int(table["seeds"].iloc[0])
    figure.suptitle(f"mean and 95% interval over {seeds} seeds; radii for pixels in [0, 1]", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def trace(table: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Stability loss and (sigma^2 / 2) tr G against sigma; and what training does to the measures."""
    figure = Figure(figsize=(style.WIDTH, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    tint = colours(list(table["arm"].unique()))
    for arm, group in table.groupby("arm", sort=False):
        colour = tint[str(arm)]
        left.plot(group["sigma"], group["limit"], "--", color=colour, linewidth=1)
        errors = np.abs(group[["low", "high"]].to_numpy().T - group["loss"].to_numpy())
        errors[0] = np.minimum(errors[0], 0.95 * group["loss"].to_numpy())  # the axis is logarithmic
        left.errorbar(group["sigma"], group["loss"], errors, fmt="o", color=colour, capsize=2, label=label(str(arm)))
    left.plot([], [], "k--", linewidth=1, label=r"$(\sigma^2/2)\,\mathrm{tr}\,G$")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(r"$\sigma$ (pixels in [0, 1])")
    left.set_ylabel("mean KL (nats)")
    left.set_title(f"{int(table['images'].iloc[0])} images, {int(table['seeds'].iloc[0])} seeds, 95% interval")
    left.legend(fontsize=7)
    measures = list(changes["measure"].unique())
    arms = list(changes["arm"].unique())
    names = {"trace": r"tr $G$", "lambda_max": r"$\lambda_{max}$", "ceiling": "ceiling", "fi": "FI"}
    for i, arm in enumerate(arms):
        ours = changes[changes["arm"] == arm].set_index("measure").loc[measures]
        x = np.arange(len(measures)) + 0.15 * (i - (len(arms) - 1) / 2)
        errors = np.abs(ours[["low", "high"]].to_numpy().T - ours["ratio"].to_numpy())
        right.errorbar(x, ours["ratio"], errors, fmt="o", color=tint[arm], capsize=2, label=label(arm))
    right.axhline(1, color=style.COLOURS["control"], linewidth=1)
    right.set_yscale("log")
    right.set_xticks(range(len(measures)), [names[m] for m in measures])
    right.set_ylabel("ratio to control (geometric mean)")
    return figure
