"""Near-duplicate detection by the distance of embeddings (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve

from ... import style
from ...scores.evaluation import mean_interval
from .comparison import CONTROL, colours, label
from .embeddings import POSITIVE


def curves(pairs: pd.DataFrame) -> pd.DataFrame:
    """Precision and recall as the threshold on D sweeps over all distances, for each seed, arm and distortion."""
    frames = []
    for (seed, arm, distortion), group in pairs.groupby(["seed", "arm", "distortion"], sort=False):
        precision, recall, _ = precision_recall_curve(group["kind"] == POSITIVE, -group["distance"])
        columns = {"seed": seed, "arm": arm, "distortion": distortion, "precision": precision, "recall": recall}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def detection(pairs: pd.DataFrame, *, levels: Sequence[float]) -> pd.DataFrame:
    """Recall at fixed precisions, precision at fixed recalls and average precision.

    Recall at precision v is the largest recall among the thresholds with precision >= v (0 without one), and the other
    way round.

    Returns:
        One row per seed, arm, distortion and metric ("recall@p0.95", "precision@r0.95", ..., "average precision").
    """
    rows = []
    for (seed, arm, distortion), group in pairs.groupby(["seed", "arm", "distortion"], sort=False):
        truth, score = group["kind"] == POSITIVE, -group["distance"]
        precision, recall, _ = precision_recall_curve(truth, score)
        values = {"average precision": float(average_precision_score(truth, score))}
        for level in levels:
            values[f"recall@p{level:g}"] = float(recall[precision >= level].max(initial=0.0))
            values[f"precision@r{level:g}"] = float(precision[recall >= level].max(initial=0.0))
        where = {"seed": seed, "arm": arm, "distortion": distortion}
        rows += [{**where, "metric": metric, "value": value} for metric, value in values.items()]
    return pd.DataFrame(rows)


def claims(found: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Claim (iii): better for every distortion, at every fixed precision and recall.

    It holds when for every distortion the 95% interval over seeds of the paired gain, averaged over all levels, lies
    above 0, and at no level is the mean gain below 0.
    """
    wide = found.pivot(index=["distortion", "metric", "seed"], columns="arm", values="value")
    gain: pd.DataFrame = (wide[arm] - wide[CONTROL]).unstack("seed")
    levels = gain[[metric != "average precision" for metric in gain.index.get_level_values("metric")]]
    lows = {str(name): mean_interval(group.mean(axis=0))[1] for name, group in levels.groupby(level="distortion")}
    least = float(levels.mean(axis=1).min())
    average = gain.loc[[metric == "average precision" for metric in gain.index.get_level_values("metric")]]
    return {
        "better_for_all_distortions_and_levels": bool(min(lows.values()) > 0 and least >= 0),
        "smallest_mean_gain_at_a_level": least,
        "mean_gain_over_levels": float(levels.to_numpy().mean()),
        "mean_gain_of_average_precision": float(average.to_numpy().mean()),
    }


_RECALL = np.linspace(0, 1, 101)


def draw(curves: pd.DataFrame) -> Figure:
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
