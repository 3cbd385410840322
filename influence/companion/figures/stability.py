"""Figures of Zheng et al. (2016)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import style
from .classification import colours, label


def jpeg_quality(table: pd.DataFrame) -> Figure:
    """Precision@1 against JPEG quality for each arm, and its paired gain over the control, with 95% intervals."""
    figure = Figure(figsize=(style.WIDTH, 3.2))
    left, right = figure.subplots(1, 2)
    distortions = list(table["distortion"].unique())
    x = np.arange(len(distortions))
    tint = colours(list(table["arm"].unique()))
    for arm, group in table.groupby("arm", sort=False):
        colour = tint[str(arm)]
        ours = group.set_index("distortion").loc[distortions]
        left.plot(x, ours["precision_at_1"], "o-", color=colour, markersize=3, label=label(str(arm)))
        left.fill_between(x, ours["low"], ours["high"], color=colour, alpha=0.15, linewidth=0)
        if arm != "control":
            right.plot(x, 100 * ours["gain"], "o-", color=colour, markersize=3, label=label(str(arm)))
            right.fill_between(
                x, 100 * ours["gain_low"], 100 * ours["gain_high"], color=colour, alpha=0.15, linewidth=0
            )
    right.axhline(0, color=style.COLOURS["control"], linewidth=1)
    seeds = int(table["seeds"].iloc[0])
    left.set_ylabel("precision@1")
    right.set_ylabel("gain over control (pp)")
    left.set_title(f"mean and 95% interval, {seeds} seeds")
    right.set_title("difference to the control, paired by seed")
    for axes in (left, right):
        axes.set_xticks(x, [name.removeprefix("jpeg-") for name in distortions], rotation=60)
        axes.set_xlabel("JPEG quality")
    left.legend(fontsize=7)
    return figure
