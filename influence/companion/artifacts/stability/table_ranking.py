"""Similar-image ranking: are images of the query's class nearer than others, also when the images are distorted?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ... import style
from ...images import data, distortions
from ...ledger import cache
from ...ledger.results import Run
from ...scores.evaluation import mean_interval
from ...zoo import training
from ...zoo.embedding import EmbeddingArm
from . import comparison
from .comparison import colours, label
from .embeddings import embed, embeddings, photographs


def scores(
    run: Run,
    name: str,
    size: int,
    chosen: Mapping[str, EmbeddingArm],
    *,
    seeds: Sequence[int],
    versions: Sequence[str],
    train_steps: int,
    top: int,
) -> pd.DataFrame:
    """Triplet accuracy and the score at the top of the ranking, on test photographs and on distorted copies of them.

    Args:
        run: the artifact.
        name: "photos" or "imagefolder".
        size: height and width of the photographs, pixels.
        chosen: the arms by name.
        seeds: one trained embedding each, continued by every arm.
        versions: names of `distortions.apply`; query and candidates are both distorted.
        train_steps: of the triplet training before the arms.
        top: K of the score.

    Returns:
        One row per seed, arm and distortion: triplets, triplet_accuracy, triplets_at_top, score_at_top (correctly minus
        wrongly ordered ones among them), score_share (the score over that count).
    """
    photos = photographs(run, name, size)
    frames = []
    for seed, arm, trained in embeddings(run, photos, chosen, seeds=seeds, train_steps=train_steps):
        key = {"model": trained.key, "versions": list(versions), "top": top, "device": run.device.type}

        def measure(trained: training.Trained = trained) -> pd.DataFrame:
            return _scores(trained, photos.test, versions, top, run.device)

        frames.append(cache.table(f"ranking/{name}", key, measure).assign(seed=seed, arm=arm))
    return pd.concat(frames, ignore_index=True)


def _scores(
    trained: training.Trained, part: data.Split, versions: Sequence[str], top: int, device: torch.device
) -> pd.DataFrame:
    rows = []
    for version in versions:
        z = embed(trained, distortions.apply(version, part.images), device)
        rows.append({"distortion": version, **ordered(torch.cdist(z, z).numpy(), part.labels.numpy(), top=top)})
    return pd.DataFrame(rows)


def ordered(gaps: np.ndarray, labels: np.ndarray, *, top: int) -> dict[str, float]:
    """How many triplets (query, same class, other class) are in order; equal distances are wrong.

    A triplet is at the top when one of its two candidates is among the `top` nearest of the query.

    Args:
        gaps: (N, N) distances.
        labels: (N,) classes.
        top: K of the score.
    """
    triplets = correct = triplets_at_top = score = 0
    for query, row in enumerate(gaps):
        candidates = np.delete(np.arange(len(row)), query)
        nearest = np.zeros(len(row), dtype=bool)
        nearest[candidates[np.argsort(row[candidates], kind="stable")[:top]]] = True
        positive = candidates[labels[candidates] == labels[query]]
        negative = candidates[labels[candidates] != labels[query]]
        right = row[positive][:, None] < row[negative][None]
        high = nearest[positive][:, None] | nearest[negative][None]
        triplets += right.size
        correct += int(right.sum())
        triplets_at_top += int(high.sum())
        score += int((high & right).sum()) - int((high & ~right).sum())
    return {
        "triplets": triplets,
        "triplet_accuracy": correct / triplets,
        "triplets_at_top": triplets_at_top,
        "score_at_top": score,
        "score_share": score / triplets_at_top,
    }


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Triplet accuracy and score of each arm, long form (metric, value), with paired gains over the control."""
    frames = []
    for metric in ("triplet_accuracy", "score_at_top", "score_share"):
        frames.append(comparison.summary(runs, value=metric).rename(columns={metric: "value"}).assign(metric=metric))
    columns = ["distortion", "metric", "arm", "seeds", "value", "low", "high", "gain", "gain_low", "gain_high"]
    return pd.concat(frames, ignore_index=True)[columns]


def claims(runs: pd.DataFrame, arm: str, *, margin: float = 0.01) -> dict[str, bool | float]:
    """Claim (v), by triplet accuracy.

    Not hurt on clean images: the 95% interval of the paired change lies above -`margin`. Better on distorted ones: the
    interval of the gain, averaged over the distortions, lies above 0.
    """
    gain = comparison.gains(runs, arm, value="triplet_accuracy")
    clean, clean_low, _ = mean_interval(gain.loc[distortions.ORIGINAL])
    distorted, distorted_low, _ = mean_interval(gain.drop(index=distortions.ORIGINAL).mean(axis=0))
    return {
        "ranking_not_hurt_on_clean": bool(clean_low > -margin),
        "ranking_better_on_distorted": bool(distorted_low > 0),
        "clean_change": clean,
        "distorted_gain": distorted,
    }


def draw(table: pd.DataFrame) -> Figure:
    """Triplet accuracy and the share of the score at the top, on original and distorted photographs."""
    figure = Figure(figsize=(style.WIDTH, 3.0))
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("triplet_accuracy", "score_share"), strict=True):
        group = table[table["metric"] == metric]
        names, arms = list(group["distortion"].unique()), list(group["arm"].unique())
        tint = colours(arms)
        for i, arm in enumerate(arms):
            ours = group[group["arm"] == arm].set_index("distortion").loc[names]
            x = np.arange(len(names)) + 0.2 * (i - (len(arms) - 1) / 2)
            errors = np.abs(ours[["low", "high"]].to_numpy().T - ours["value"].to_numpy())
            axes.errorbar(x, ours["value"], errors, fmt="o", color=tint[arm], markersize=4, capsize=2, label=label(arm))
        axes.set_xticks(range(len(names)), names, rotation=20)
        low, high = float(group["low"].min()), float(group["high"].max())
        axes.set_ylim(max(low, -1.0) - 0.02, min(high, 1.0) + 0.02)
    panels[0].set_ylabel("triplet accuracy")
    panels[1].set_ylabel("score at the top / triplets there")
    seeds = int(table["seeds"].iloc[0])
    figure.suptitle(f"mean and 95% interval over {seeds} seeds", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
