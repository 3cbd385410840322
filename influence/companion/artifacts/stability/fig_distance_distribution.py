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
from . import comparison, embeddings
from .comparison import CONTROL, colours, label, own_noise, paired
from .embeddings import NEGATIVE, POSITIVE

_DISTANCE = np.linspace(0, 2, 101)  # in median distances of the negatives


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """The distribution of distances of near-duplicates and of negatives, in units of the negatives' median.

    Parameters of the run: those of `embeddings.distances`, threshold (a distance in that unit).

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
    """Cumulative distribution of D over near-duplicates (solid) and negatives (dashed), one panel per distortion."""
    names = [name for name in cumulative["distortion"].unique() if not name.startswith("noise-")]
    figure = Figure(figsize=(style.WIDTH, 3.0))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    tint = colours(list(cumulative["arm"].unique()))
    for axes, name in zip(panels, names, strict=True):
        here = cumulative[cumulative["distortion"] == name]
        for (arm, kind), group in here.groupby(["arm", "kind"], sort=False):
            wide = group.pivot(index="distance", columns="seed", values="share")
            near = kind == POSITIVE
            colour, known = tint[str(arm)], label(str(arm)) if near else None
            axes.plot(wide.index, wide.mean(axis=1), "-" if near else "--", color=colour, lw=1.2, label=known)
            axes.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.15, lw=0)
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("D / median D of negatives")
        axes.set_title(name)
        axes.set_xlim(0, 1.6)
    panels[0].plot([], [], "k--", label="negatives")
    panels[0].set_ylabel("share of pairs within D")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    seeds = cumulative["seed"].nunique()
    figure.suptitle(f"mean and range over {seeds} seeds; dotted: the threshold of the claim", fontsize=9)
    return figure
