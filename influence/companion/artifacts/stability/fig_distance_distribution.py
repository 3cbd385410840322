"""How far near-duplicates lie apart (Zheng et al. 2016)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...scores.evaluation import mean_interval
from .comparison import CONTROL, colours, label
from .embeddings import NEGATIVE, POSITIVE


def concentration(pairs: pd.DataFrame, *, threshold: float) -> pd.DataFrame:
    """Share of distances below a threshold, and the median, for near-duplicates and for negatives.

    Returns:
        One row per seed, arm, distortion and kind: below (share), median.
    """
    grouped = pairs.groupby(["seed", "arm", "distortion", "kind"], sort=False)["distance"]
    table = grouped.agg(below=lambda d: float((d < threshold).mean()), median="median")
    return table.reset_index()


def claims(shares: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Claim (iv): distances of near-duplicates concentrate at 0.

    It holds when the 95% interval over seeds of the gain in the share of near-duplicates below the threshold, averaged
    over distortions, lies above 0. The change for the negatives stands beside it: an embedding that collapses gains
    both.
    """
    wide = shares.pivot(index=["kind", "distortion", "seed"], columns="arm", values="below")
    by_seed = wide.groupby(level=["kind", "seed"]).mean()
    near, other = by_seed.loc[POSITIVE], by_seed.loc[NEGATIVE]
    mean, low, _ = mean_interval(near[arm] - near[CONTROL])
    return {
        "distances_concentrate_at_zero": bool(low > 0),
        "share_below_control": float(near[CONTROL].mean()),
        "share_below_stability": float(near[arm].mean()),
        "gain_of_near_duplicates": mean,
        "gain_of_negatives": float((other[arm] - other[CONTROL]).mean()),
    }


def draw(pairs: pd.DataFrame, *, threshold: float) -> Figure:
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
