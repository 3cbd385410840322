"""Figures of Zheng et al. (2016), near-duplicate detection and ranking."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import style
from .classification import colours, label

_RECALL = np.linspace(0, 1, 101)


def near_duplicates(curves: pd.DataFrame) -> Figure:
    """Precision against recall, one panel per distortion: mean over seeds, band from the lowest to the highest seed."""
    names = list(curves["distortion"].unique())
    figure = Figure(figsize=(style.WIDTH, 2.9))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    tint = colours(list(curves["arm"].unique()))
    for axes, name in zip(panels, names, strict=True):
        here = curves[curves["distortion"] == name]
        for arm, group in here.groupby("arm", sort=False):
            lines = np.stack([_at_recalls(one) for _, one in group.groupby("seed")])
            axes.plot(_RECALL, lines.mean(axis=0), color=tint[str(arm)], label=label(str(arm)))
            low, high = lines.min(axis=0), lines.max(axis=0)
            axes.fill_between(_RECALL, low, high, color=tint[str(arm)], alpha=0.15, linewidth=0)
        axes.set_xlabel("recall")
        axes.set_title(name)
    panels[0].set_ylabel("precision")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"mean and range over {curves['seed'].nunique()} seeds", fontsize=9)
    return figure


def _at_recalls(curve: pd.DataFrame) -> np.ndarray:
    """The largest precision at each recall or beyond it."""
    recall, precision = curve["recall"].to_numpy(), curve["precision"].to_numpy()
    return np.array([precision[recall >= r].max() for r in _RECALL])


def distance_distribution(pairs: pd.DataFrame, *, threshold: float) -> Figure:
    """Cumulative distribution of D over near-duplicates (solid) and negatives (dashed), one panel per distortion."""
    names = list(pairs["distortion"].unique())
    figure = Figure(figsize=(style.WIDTH, 2.9))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    tint = colours(list(pairs["arm"].unique()))
    x = np.linspace(0, float(pairs["distance"].max()), 200)
    for axes, name in zip(panels, names, strict=True):
        here = pairs[pairs["distortion"] == name]
        for (arm, kind), group in here.groupby(["arm", "kind"], sort=False):
            share = np.searchsorted(np.sort(group["distance"]), x, side="right") / len(group)
            dashes = "-" if kind == "near-duplicate" else "--"
            axes.plot(x, share, dashes, color=tint[str(arm)], label=label(str(arm)) if dashes == "-" else None)
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("distance D of unit vectors")
        axes.set_title(name)
    panels[0].plot([], [], "k--", label="negatives")
    panels[0].set_ylabel("share of pairs below D")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    figure.suptitle(f"all pairs of {pairs['seed'].nunique()} seeds", fontsize=9)
    return figure


def examples(chosen: pd.DataFrame, *, arm: str) -> Figure:
    """Pairs of smallest and largest distance: original above its distorted copy, D of control and `arm` below."""
    places = list(chosen["place"].unique())
    count = int(chosen.groupby("place").size().max())
    figure = Figure(figsize=(style.WIDTH, 2 * len(places) * style.WIDTH / count * 0.8))
    grid = figure.subplots(2 * len(places), count, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for row, place in enumerate(places):
        for column, (_, pair) in enumerate(chosen[chosen["place"] == place].iterrows()):
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            above.imshow(pair["original"], cmap="gray")
            below.imshow(pair["distorted"], cmap="gray")
            above.set_title(pair["distortion"], fontsize=8)
            below.set_xlabel(f"{pair['control']:.3f} → {pair[arm]:.3f}", fontsize=8)
        grid[2 * row, 0].set_ylabel(f"{place} D", fontsize=8)
    figure.suptitle(f"near-duplicates: D of the control → {label(arm)}", fontsize=9)
    return figure


def ranking(table: pd.DataFrame) -> Figure:
    """Triplet accuracy and the share of the score at the top, on original and distorted photographs."""
    figure = Figure(figsize=(style.WIDTH, 3.0))
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("triplet_accuracy", "score_share"), strict=True):
        group = table[table["metric"] == metric]
        names, arms = list(group["distortion"].unique()), list(group["arm"].unique())
        tint = colours(arms)
        for i, arm in enumerate(arms):
            ours = group[group["arm"] == arm].set_index("distortion").loc[names]
            x = np.arange(len(names)) + 0.2 * (i - (len(arms) - 1) / 2)
            errors = np.abs(ours[["low", "high"]].to_numpy().T - ours["value"].to_numpy())
            axes.errorbar(x, ours["value"], errors, fmt="o", color=tint[arm], markersize=4, capsize=2, label=label(arm))
        axes.set_xticks(range(len(names)), names, rotation=20)
        low, high = float(group["low"].min()), float(group["high"].max())
        axes.set_ylim(max(low, -1.0) - 0.02, min(high, 1.0) + 0.02)
    panels[0].set_ylabel("triplet accuracy")
    panels[1].set_ylabel("score at the top / triplets there")
    seeds = int(table["seeds"].iloc[0])
    figure.suptitle(f"mean and 95% interval over {seeds} seeds", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
