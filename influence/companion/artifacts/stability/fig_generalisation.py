"""Do the gains carry over to distortions that no arm was trained on (Zheng et al. 2016)?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ... import style
from ...scores.evaluation import mean_interval
from ...zoo.finetuning import Arm
from . import comparison
from .comparison import ORIGINAL, label, standard
from .fig_alpha_sigma import _DIVERGING


def arms(
    perturbations: Sequence[str], *, alpha: float, sigma: float, steps: int, learning_rate: float
) -> dict[str, Arm]:
    """Control, Gaussian augmentation, stability at one alpha, and augmentation with each of some distortions."""
    chosen = standard([alpha], sigma=sigma, steps=steps, learning_rate=learning_rate)
    for name in perturbations:
        arm = Arm("augmentation", steps=steps, learning_rate=learning_rate, sigma=sigma, perturbation=name)
        chosen[f"augmentation {name}"] = arm
    return chosen


def claims(runs: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Claim (vi) for one arm trained with Gaussian noise.

    It holds when the 95% interval over seeds of the gain over the control lies above 0, the gain being the mean over
    all distortions other than Gaussian noise. Beside it: on how many of them the mean gain is above 0.
    """
    gain = comparison.gains(runs, arm)
    other = gain.loc[[name for name in gain.index if name != ORIGINAL and not str(name).startswith("noise")]]
    mean, low, _ = mean_interval(other.mean(axis=0))
    return {
        "gaussian_training_generalises": bool(low > 0),
        "mean_gain": mean,
        "mean_gain_low": low,
        "distortions_gained": float((other.mean(axis=1) > 0).mean()),
    }


def draw(table: pd.DataFrame) -> Figure:
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
