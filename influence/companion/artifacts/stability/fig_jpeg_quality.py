"""Precision@1 against JPEG quality (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from . import comparison
from .comparison import ORIGINAL, colours, label, own_noise, paired, stability, standard


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Precision@1 on test images compressed at each JPEG quality, for networks continued by each arm.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random; 0 for
    all), qualities (of JPEG, 1..100), and those of `comparison.standard`.

    Returns:
        "runs", one row per seed, arm and distortion ("original", "jpeg-q", and the noise that the arms are trained on):
        n (images), precision_at_1, precision_at_5.
    """
    chosen = run.parameters
    versions = [ORIGINAL, *(f"jpeg-{quality}" for quality in chosen["qualities"]), own_noise(chosen)]
    return {"runs": comparison.measure(run, chosen["dataset"], standard(chosen), versions)}


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean precision@1 of each arm and its paired gain over the control, with 95% t intervals over seeds."""
    return comparison.summary(tables["runs"])


def claims(runs: pd.DataFrame, parameters: Mapping[str, Any], *, of: str = "") -> dict[str, Estimate]:
    """Claims (i) and (ii) of the paper for the first alpha; suffix _strong for the last, _at_ALPHA between them.

    * clean_accuracy_does_not_fall: the paired change of precision@1 on originals, the mean over seeds.
    * gain_grows_as_quality_falls: gain over the control at the lowest quality less gain on originals.
    * improves_under_its_own_noise: gain under the noise of the training, without which the loss did not take effect.
    """
    found: dict[str, Estimate] = {}
    for suffix, alpha in comparison.suffixes(parameters["alphas"]).items():
        gain = comparison.gains(runs, stability(alpha))
        lowest, clean = gain.loc[f"jpeg-{min(parameters['qualities'])}"], gain.loc[ORIGINAL]
        found |= {
            f"clean_accuracy_does_not_fall{suffix}": paired(clean, of),
            f"gain_grows_as_quality_falls{suffix}": paired(lowest - clean, of),
            f"improves_under_its_own_noise{suffix}": paired(gain.loc[own_noise(parameters)], of),
        }
    return found


def by_quality(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, Estimate]:
    """Gain of the first alpha at each quality, and how much larger it is at the lowest quality than at each other.

    Claim (ii) compares the ends alone; these say where between them the gain grows.
    """
    gain = comparison.gains(runs, stability(parameters["alphas"][0]))
    lowest, *others = sorted(parameters["qualities"])
    found = {f"gain_at_{quality}": paired(gain.loc[f"jpeg-{quality}"]) for quality in (*reversed(others), lowest)}
    least = gain.loc[f"jpeg-{lowest}"]
    return found | {
        f"gain_at_{lowest}_less_{quality}": paired(least - gain.loc[f"jpeg-{quality}"]) for quality in others
    }


def draw(table: pd.DataFrame) -> Figure:
    """Precision@1 against JPEG quality for each arm, and its paired gain over the control with 95% intervals.

    Below, the gain of the first alpha by itself, which is what is scored: beside a stronger one it cannot be seen.
    """
    figure = Figure(figsize=(style.WIDTH, 4.4))
    grid = figure.add_gridspec(2, 2)
    left, right, near = (figure.add_subplot(where) for where in (grid[:, 0], grid[0, 1], grid[1, 1]))
    distortions = [name for name in table["distortion"].unique() if name == ORIGINAL or name.startswith("jpeg-")]
    x = np.arange(len(distortions))
    arms = list(table["arm"].unique())
    tint = colours(arms)
    first = next(arm for arm in arms if arm.startswith("stability"))
    for i, arm in enumerate(arms):
        ours = table[table["arm"] == arm].set_index("distortion").loc[distortions]
        left.plot(x, ours["precision_at_1"], "o-", color=tint[arm], markersize=3, label=label(arm))
        if arm != "control":
            aside = x + 0.12 * (i - len(arms) / 2)
            look: Any = {"color": tint[arm], "markersize": 3, "elinewidth": 1}
            for axes in (right, near) if arm == first else (right,):
                axes.errorbar(aside, 100 * ours["gain"], 100 * style.error_bars(ours, "gain"), fmt="o", **look)
    for axes in (right, near):
        axes.axhline(0, color=style.COLOURS["control"], linewidth=1)
    seeds = int(table["seeds"].iloc[0])
    left.set(title=f"mean over {seeds} seeds", xlabel="JPEG quality", ylabel="precision@1")
    right.set(title=f"gain paired by seed, 95% interval, {seeds} seeds", ylabel="gain (pp)")
    near.set(title=f"{label(first)} alone", xlabel="JPEG quality", ylabel="gain (pp)")
    for axes in (left, right, near):
        axes.set_xticks(x, [name.removeprefix("jpeg-") for name in distortions], rotation=60)
    right.tick_params(labelbottom=False)
    left.legend(fontsize=7)
    return figure
