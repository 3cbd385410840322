"""Figures of Zheng et al. (2016)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import style
from .classification import colours, label


def jpeg_quality(table: pd.DataFrame) -> Figure:
    """Precision@1 against JPEG quality for each arm, and its paired gain over the control with 95% intervals."""
    figure = Figure(figsize=(style.WIDTH, 3.2))
    left, right = figure.subplots(1, 2)
    distortions = list(table["distortion"].unique())
    x = np.arange(len(distortions))
    arms = list(table["arm"].unique())
    tint = colours(arms)
    for i, arm in enumerate(arms):
        ours = table[table["arm"] == arm].set_index("distortion").loc[distortions]
        left.plot(x, ours["precision_at_1"], "o-", color=tint[arm], markersize=3, label=label(arm))
        if arm != "control":
            gain = 100 * ours["gain"].to_numpy()
            errors = np.abs(100 * ours[["gain_low", "gain_high"]].to_numpy().T - gain)
            aside = x + 0.12 * (i - len(arms) / 2)
            right.errorbar(aside, gain, errors, fmt="o", color=tint[arm], markersize=3, elinewidth=1, label=label(arm))
    right.axhline(0, color=style.COLOURS["control"], linewidth=1)
    seeds = int(table["seeds"].iloc[0])
    left.set_ylabel("precision@1")
    right.set_ylabel("gain over control (pp)")
    left.set_title(f"mean over {seeds} seeds")
    right.set_title(f"gain paired by seed, 95% interval, {seeds} seeds")
    for axes in (left, right):
        axes.set_xticks(x, [name.removeprefix("jpeg-") for name in distortions], rotation=60)
        axes.set_xlabel("JPEG quality")
    left.legend(fontsize=7)
    return figure
