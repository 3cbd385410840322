"""Near-duplicate detection by the distance of embeddings (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from . import comparison, embeddings
from .comparison import CONTROL, colours, label, own_noise, paired

AVERAGE = "average precision"
_RECALL = np.linspace(0.01, 1, 100)
# The gains in recall that the paper prints, in percentage points: name, distortion, precision.
_PRINTED = (("98_jpeg", "jpeg", 0.98), ("99.5_thumbnail", "thumb", 0.995))


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """How well a threshold on the distance of two embeddings tells near-duplicates from negatives.

    Returns:
        "curves", one row per seed, arm, distortion and recall: precision; "levels", one row per seed, arm, distortion
        and metric ("recall@p0.98", "precision@r0.5", ..., "average precision"): value, positives and negatives (how
        many), unit (median distance of the negatives).
    """
    curves, levels = [], []
    for pairs in embeddings.distances(run):
        precision, recall = curve(pairs.near, pairs.far)
        reached = np.searchsorted(recall, _RECALL - 1e-12)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or beyond it
        curves.append(pd.DataFrame({**pairs.columns, "recall": _RECALL, "precision": best[reached]}))
        values = at_levels(precision, recall, run.parameters["precisions"], run.parameters["recalls"])
        sizes = {"positives": len(pairs.near), "negatives": len(pairs.far), "unit": pairs.unit}
        levels.append(pd.DataFrame({**pairs.columns, "metric": list(values), "value": list(values.values()), **sizes}))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in (("curves", curves), ("levels", levels))}


def curve(near: np.ndarray, far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall with the threshold at each distance of a near-duplicate, from the smallest.

    Precision is that among equally many near-duplicates and negatives: share found / (share found + share of negatives
    below the threshold). With more negatives for each near-duplicate every curve falls; the order at one recall stays.
    """
    thresholds = np.sort(near)
    found = np.searchsorted(thresholds, thresholds, side="right") / len(near)
    false = np.searchsorted(np.sort(far), thresholds, side="right") / len(far)
    return found / (found + false), found


def at_levels(
    precision: np.ndarray, recall: np.ndarray, precisions: Sequence[float], recalls: Sequence[float]
) -> dict[str, float]:
    """The largest recall at each precision or beyond it (0 without one), and the other way round."""
    values = {f"recall@p{level:g}": float(recall[precision >= level].max(initial=0.0)) for level in precisions}
    values |= {f"precision@r{level:g}": float(precision[recall >= level - 1e-12].max()) for level in recalls}
    return values | {AVERAGE: float(precision.mean())}


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean of each metric and its paired gain over the control, with 95% t intervals over seeds."""
    return comparison.summary(tables["levels"], value="value", within=("distortion", "metric"))


def claims(levels: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, list[Estimate] | Estimate | float]:
    """Claim (iii) for the first alpha; beside it with the suffix _strong for the last one, _augmentation for that arm.

    * better_for_all_distortions_and_levels: the paired gain over the control of recall at each fixed precision and of
      precision at each fixed recall, for every distortion of the paper, each a mean over seeds.
    * levels_better: the share of these whose interval lies above 0; levels_worse: below 0; mean_gain: over all of them.
    * recall_gain_at_precision_...: those that the paper prints, in percentage points.
    * improves_under_its_own_noise: the gain of average precision under the noise of the training.
    """
    found: dict[str, list[Estimate] | Estimate | float] = {}
    for arm, suffix in embeddings.suffixes(parameters).items():
        gain = _gains(levels, arm)
        scored = gain.drop(index=AVERAGE, level="metric").drop(index=own_noise(parameters), level="distortion")
        each = [paired(row, " ".join(where)) for where, row in zip(scored.index, scored.to_numpy(), strict=True)]
        if not suffix:
            found["better_for_all_distortions_and_levels"] = each
        found |= {
            f"levels_better{suffix}": float(np.mean([one.low > 0 for one in each])),
            f"levels_worse{suffix}": float(np.mean([one.high < 0 for one in each])),
            f"mean_gain{suffix}": paired(scored.mean(axis=0)),
        }
        for name, kind, level in _PRINTED:
            for version in (v for v in parameters["versions"] if v.startswith(kind)):
                if (version, f"recall@p{level:g}") in scored.index:
                    one = paired(scored.loc[(version, f"recall@p{level:g}")].to_numpy())
                    points = Estimate(100 * one.value, 100 * one.low, 100 * one.high, one.n, df=one.df)
                    found[f"recall_gain_at_precision_{name}{suffix}"] = points
        own = np.asarray(gain.loc[(own_noise(parameters), AVERAGE)])
        found[f"improves_under_its_own_noise{suffix}"] = paired(own)
    return found


def _gains(levels: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Gain of an arm over the control: one row for each distortion and metric, one column for each seed."""
    wide = levels.pivot(index=["distortion", "metric", "seed"], columns="arm", values="value")
    order = pd.MultiIndex.from_frame(levels[["distortion", "metric"]].drop_duplicates())
    return (wide[arm] - wide[CONTROL]).unstack("seed").loc[order]


def draw(curves: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Precision against recall, one panel per distortion, and below it the paired gain at each fixed level."""
    names = [name for name in curves["distortion"].unique() if not name.startswith("noise-")]
    figure, grid = style.subplots(2, len(names), height=5.0, sharey="row", squeeze=False)
    tint = colours(list(curves["arm"].unique()))
    for (above, below), name in zip(grid.T, names, strict=True):
        for arm, group in curves[curves["distortion"] == name].groupby("arm", sort=False):
            wide = group.pivot(index="recall", columns="seed", values="precision")
            above.plot(wide.index, wide.mean(axis=1), color=tint[str(arm)], label=label(str(arm)))
            above.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=tint[str(arm)], alpha=0.15, lw=0)
        above.set(title=name, xlabel="recall")
        ours = table[(table["distortion"] == name) & (table["metric"] != AVERAGE)]
        words = ours["metric"].str.replace("@p", "\nat precision ").str.replace("@r", "\nat recall ")
        comparison.gain_bars(below, ours.assign(metric=words), across="metric")
        below.tick_params(axis="x", rotation=90, labelsize=7)
    grid[0, 0].set_ylabel("precision")
    grid[1, 0].set_ylabel("gain over control (pp)")
    # Gains of the paper's alpha and of a stronger one differ by an order of magnitude.
    grid[1, 0].set_yscale("symlog", linthresh=3)
    grid[1, 0].set_yticks([-30, -10, -3, 0, 3, 10, 30, 100], ["-30", "-10", "-3", "0", "3", "10", "30", "100"])
    grid[1, 0].minorticks_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    seeds = curves["seed"].nunique()
    figure.suptitle(f"above, mean and range over {seeds} seeds; below, gain paired by seed, 95% interval", fontsize=9)
    return figure
