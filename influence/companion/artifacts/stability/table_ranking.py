"""Similar-image ranking: are images of the query's class nearer than others, also when the images are distorted?"""

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
from .comparison import ORIGINAL, own_noise, paired

METRICS = ("triplet_accuracy", "score_at_top", "score_share")


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Triplet accuracy and the score at the top of the ranking, on test images and on distorted copies of them.

    Query and candidates are both distorted; the candidates are all other test images.

    Returns:
        "runs", one row per seed, arm and distortion: queries (how many), and what `ordered` returns.
    """
    labels, count = embeddings.images(run).labels.numpy(), run.parameters["queries"]
    queries = np.arange(len(labels))
    if 0 < count < len(queries):
        queries = np.sort(np.random.default_rng(0).choice(queries, count, replace=False))
    rows = []
    for seed, arm, z in embeddings.vectors(run):
        for version in [ORIGINAL, *embeddings.measured(run.parameters)]:
            columns = {"seed": seed, "arm": arm, "distortion": version, "queries": len(queries)}
            rows.append(columns | ordered(z[version], labels, queries, top=run.parameters["top"]))
    return {"runs": pd.DataFrame(rows)}


def ordered(z: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, top: int) -> dict[str, float]:
    """How many triplets (query, an image of its class, one of another class) are in order: the first is nearer.

    Of unit vectors (N, D), their classes (N,) and the positions of the queries; every other image is a candidate. A
    triplet is at the top when one of its two candidates is among the `top` nearest of the query.

    Returns:
        triplets, triplet_accuracy, triplets_at_top, score_at_top (triplets in order less those out of order among
        them), score_share (the score over their number).
    """
    triplets = correct = triplets_at_top = score = 0
    for query in queries:
        likeness = z @ z[query]  # falls with the distance of unit vectors
        order = np.argsort(-likeness, kind="stable")
        order = order[order != query]
        same = labels[order] == labels[query]
        nearer = np.cumsum(~same)[same]  # of another class, before each image of the query's
        positives, negatives, high = len(nearer), len(order) - len(nearer), int(same[:top].sum())
        triplets += positives * negatives
        correct += positives * negatives - int(nearer.sum())
        at_top = high * negatives + (min(top, len(order)) - high) * (positives - high)
        triplets_at_top += at_top
        # In order at the top are those whose image of the class is there, unless the other one is nearer still.
        score += 2 * (high * negatives - int(nearer[:high].sum())) - at_top
    return {
        "triplets": triplets,
        "triplet_accuracy": correct / triplets,
        "triplets_at_top": triplets_at_top,
        "score_at_top": score,
        "score_share": score / triplets_at_top,
    }


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Triplet accuracy and score of each arm, long form (metric, value), with paired gains over the control."""
    long = tables["runs"].melt(["seed", "arm", "distortion"], METRICS, "metric")
    return comparison.summary(long, value="value", within=("distortion", "metric"))


def claims(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, Estimate]:
    """Claim (v) for the first alpha; beside it with the suffix _strong for the last one, _augmentation for that arm.

    Paired changes of triplet accuracy against the control, means over seeds.

    * ranking_not_hurt_on_clean: on original images.
    * ranking_better_on_distorted: averaged over the distortions of the paper.
    * score_gain_on_distorted: the same of score_share.
    * improves_under_its_own_noise: on images with the noise of the training.
    """
    found: dict[str, Estimate] = {}
    for arm, suffix in embeddings.suffixes(parameters).items():
        gain, score = (comparison.gains(runs, arm, value=value) for value in ("triplet_accuracy", "score_share"))
        distorted = list(parameters["versions"])
        found |= {
            f"ranking_not_hurt_on_clean{suffix}": paired(gain.loc[ORIGINAL]),
            f"ranking_better_on_distorted{suffix}": paired(gain.loc[distorted].mean(axis=0)),
            f"score_gain_on_distorted{suffix}": paired(score.loc[distorted].mean(axis=0)),
            f"improves_under_its_own_noise{suffix}": paired(gain.loc[own_noise(parameters)]),
        }
    return found


def draw(table: pd.DataFrame) -> Figure:
    """Triplet accuracy, its paired gain over the control, and the share of the score at the top, by distortion."""
    figure, (left, middle, right) = style.subplots(1, 3, height=3.2)
    groups = {metric: group for metric, group in table.groupby("metric", sort=False)}
    for axes, metric in ((left, "triplet_accuracy"), (right, "score_share")):
        comparison.bars(axes, groups[metric], across="distortion", value="value")
    comparison.gain_bars(middle, groups["triplet_accuracy"], across="distortion")
    words = ("triplet accuracy", "its gain over control (pp)", "score at the top, as a share")
    for axes, label in zip((left, middle, right), words, strict=True):
        axes.set_ylabel(label)
        axes.tick_params(axis="x", rotation=60)
    figure.suptitle(f"mean and 95% interval over {int(table['seeds'].iloc[0])} seeds, gain paired by seed", fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
