"""How far near-duplicates lie apart (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.evaluation import mean_interval
from . import comparison, embeddings
from .comparison import CONTROL, colours, label, own_noise, paired
from .embeddings import NEGATIVE, POSITIVE

_DISTANCE = np.linspace(0, 2, 101)  # in median distances of the negatives


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """The distribution of distances of near-duplicates and of negatives, in units of the negatives' median.

    Returns:
        "cumulative", one row per seed, arm, distortion, kind ("near-duplicate", "negative") and distance: share (of
        pairs at this distance or below it); "shares", one row per seed, arm, distortion and kind: pairs (how many),
        below (share nearer than the threshold), median, unit (median distance of the negatives, of unit vectors).
    """
    cumulative, shares = [], []
    for pairs in embeddings.distances(run):
        for kind, gaps in ((POSITIVE, np.sort(pairs.near)), (NEGATIVE, np.sort(pairs.far))):
            columns = {**pairs.columns, "kind": kind}
            share = np.searchsorted(gaps, _DISTANCE, side="right") / len(gaps)
            cumulative.append(pd.DataFrame({**columns, "distance": _DISTANCE, "share": share}))
            below, median = float((gaps < run.parameters["threshold"]).mean()), float(np.median(gaps))
            shares.append({**columns, "pairs": len(gaps), "below": below, "median": median, "unit": pairs.unit})
    return {"cumulative": pd.concat(cumulative, ignore_index=True), "shares": pd.DataFrame(shares)}


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share below the threshold, median and unit of each arm, long form, with paired gains over the control."""
    long = tables["shares"].melt(["seed", "arm", "distortion", "kind"], ["below", "median", "unit"], "metric")
    return comparison.summary(long, value="value", within=("distortion", "kind", "metric"))


def claims(shares: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, Estimate]:
    """Claim (iv) for the first alpha; beside it with the suffix _strong for the last one, _augmentation for that arm.

    All are averaged over the distortions of the paper; gains are paired by seed.

    * distances_concentrate_at_zero: gain in the share of near-duplicates below the threshold.
    * median_distance_change: of near-duplicates, in medians of the negatives; unit_ratio: that median itself over the
      control's, which says how far the whole embedding has shrunk.
    * share_below_control, share_below: the share itself.
    * improves_under_its_own_noise: gain in the share below the threshold under the noise of the training.
    """
    near = shares[shares["kind"] == POSITIVE]
    own = near["distortion"] == own_noise(parameters)

    def by_seed(rows: pd.DataFrame, value: str) -> pd.DataFrame:
        return rows.pivot_table(index="seed", columns="arm", values=value)  # the mean over distortions

    below, median, unit = (by_seed(near[~own], value) for value in ("below", "median", "unit"))
    noisy = by_seed(near[own], "below")
    found = {"share_below_control": paired(below[CONTROL])}
    for arm, suffix in embeddings.suffixes(parameters).items():
        found |= {
            f"distances_concentrate_at_zero{suffix}": paired(below[arm] - below[CONTROL]),
            f"share_below{suffix}": paired(below[arm]),
            f"median_distance_change{suffix}": paired(median[arm] - median[CONTROL]),
            f"unit_ratio{suffix}": paired(unit[arm] / unit[CONTROL]),
            f"improves_under_its_own_noise{suffix}": paired(noisy[arm] - noisy[CONTROL]),
        }
    return found


def draw(cumulative: pd.DataFrame, *, threshold: float) -> Figure:
    """Cumulative distribution of D over near-duplicates (solid) and negatives (dashed), one panel per distortion.

    Below, for the first alpha by itself, the share of near-duplicates within D less that of the control: beside a
    larger alpha it cannot be seen.
    """
    names = [name for name in cumulative["distortion"].unique() if not name.startswith("noise-")]
    figure, grid = style.subplots(
        2, len(names), height=4.8, sharex=True, sharey="row", squeeze=False, height_ratios=[3, 2]
    )
    panels = grid[0]
    arms = list(cumulative["arm"].unique())
    tint = colours(arms)
    first = next(arm for arm in arms if arm.startswith("stability"))
    for axes, below, name in zip(panels, grid[1], names, strict=True):
        here = cumulative[cumulative["distortion"] == name]
        near = here[here["kind"] == POSITIVE].pivot(index=["distance", "seed"], columns="arm", values="share")
        gain = 100 * (near[first] - near[CONTROL]).unstack("seed")
        mean, low, high = np.array([mean_interval(row) for row in gain.to_numpy()]).T
        below.plot(gain.index, mean, color=tint[first], lw=1.2)
        if gain.shape[1] > 1:
            below.fill_between(gain.index, low, high, color=tint[first], alpha=0.25, lw=0)
        below.axhline(0, color=tint[CONTROL], lw=1)
        below.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
        below.set_xlabel("D / median D of negatives")
        for (arm, kind), group in here.groupby(["arm", "kind"], sort=False):
            wide = group.pivot(index="distance", columns="seed", values="share")
            solid = kind == POSITIVE
            colour, known = tint[str(arm)], label(str(arm)) if solid else None
            axes.plot(wide.index, wide.mean(axis=1), "-" if solid else "--", color=colour, lw=1.2, label=known)
            axes.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.15, lw=0)
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=name, xlim=(0, 1.6))
    panels[0].plot([], [], "k--", label="negatives")
    panels[0].set_ylabel("share of pairs within D")
    grid[1, 0].set_ylabel(f"{label(first)}\nless control (pp)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    seeds = cumulative["seed"].nunique()
    words = f"above, mean and range over {seeds} seeds; below, paired by seed, with the 95% interval at each D"
    figure.suptitle(f"{words}\ndotted: the threshold of the claim", fontsize=8)
    return figure
