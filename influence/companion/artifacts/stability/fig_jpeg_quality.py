"""Precision@1 against JPEG quality (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.results import Run
from ...scores.evaluation import mean_interval
from ...zoo.finetuning import Arm
from . import comparison
from .comparison import ORIGINAL, colours, label


def jpeg_quality(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    qualities: Sequence[int],
    images: int | None,
) -> pd.DataFrame:
    """Precision@1 on test images compressed at each JPEG quality, for networks continued by each arm.

    For one seed every arm starts from the same trained network and takes the same number of steps on the same images.

    Args:
        run: the artifact.
        dataset_name: a name of `data.NAMES`.
        model: a name of `models.NAMES`.
        chosen: the arms by name.
        seeds: one trained network each, continued by every arm.
        qualities: of JPEG, 1..100.
        images: how many test images, drawn at random; None for all.

    Returns:
        One row per seed, arm and distortion ("original" or "jpeg-q"): n (images), precision_at_1, precision_at_5.
    """
    versions = [ORIGINAL, *(f"jpeg-{quality}" for quality in qualities)]
    return comparison.measure(run, dataset_name, model, chosen, seeds=seeds, versions=versions, images=images)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean precision@1 of each arm and its paired gain over the control, with 95% t intervals over seeds."""
    return comparison.summary(runs)


def claims(runs: pd.DataFrame, arm: str, *, lowest: int, margin: float = 0.01) -> dict[str, bool | float]:
    """Claims (i) and (ii) of the paper for one arm, by rules that do not depend on the outcome.

    (i) Clean accuracy does not fall: the 95% interval of its paired change lies above -`margin`.
    (ii) The gain grows as JPEG quality falls: the 95% interval of (gain at `lowest` - gain on originals) lies above 0.
    """
    gain = comparison.gains(runs, arm)
    clean, clean_low, _ = mean_interval(gain.loc[ORIGINAL])
    growth, growth_low, _ = mean_interval(np.asarray(gain.loc[f"jpeg-{lowest}"] - gain.loc[ORIGINAL]))
    return {
        "clean_accuracy_does_not_fall": bool(clean_low > -margin),
        "gain_grows_as_quality_falls": bool(growth_low > 0),
        "clean_change": clean,
        "growth_of_gain": growth,
    }


def draw(table: pd.DataFrame) -> Figure:
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
