"""Near-duplicate detection: distances between embeddings of photographs and of their distorted copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache as remember

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor

from influence.progress import progress_bar

from .. import cache, data, distortions, paths
from ..evaluation import mean_interval
from ..results import Run
from ..zoo import embedding, training
from ..zoo.embedding import EmbeddingArm, EmbeddingRecipe
from .arms import CONTROL

POSITIVE, NEGATIVE = "near-duplicate", "negative"


def photographs(run: Run, name: str, size: int) -> data.Dataset:
    """Photographs of size x size pixels, their digest noted among the inputs of the run."""
    loaded = _load(name, size)
    run.add_input(f"{name}-{size}", loaded.digest)
    return loaded


@remember
def _load(name: str, size: int) -> data.Dataset:
    return data.load(name, paths.data_dir(), size=size)


def arms(alphas: Sequence[float], *, sigma: float, steps: int, learning_rate: float) -> dict[str, EmbeddingArm]:
    """Control, augmentation at the same sigma, stability at each alpha."""
    chosen = {
        CONTROL: EmbeddingArm("control", steps, learning_rate, sigma),
        "augmentation": EmbeddingArm("augmentation", steps, learning_rate, sigma),
    }
    return chosen | {f"stability {a:g}": EmbeddingArm("stability", steps, learning_rate, sigma, a) for a in alphas}


def embeddings(
    run: Run, photos: data.Dataset, chosen: Mapping[str, EmbeddingArm], *, seeds: Sequence[int], train_steps: int
) -> Iterator[tuple[int, str, training.Trained]]:
    """The embeddings of a comparison, one after the other: seed, name of the arm, network."""
    pairs = [(seed, name) for seed in seeds for name in chosen]
    for seed, name in progress_bar(pairs, desc="embeddings", unit="network", leave=False):
        recipe = EmbeddingRecipe(seed=seed, steps=train_steps)
        yield seed, name, embedding.finetune(recipe, chosen[name], photos, device=run.device)


def distances(
    run: Run,
    name: str,
    size: int,
    chosen: Mapping[str, EmbeddingArm],
    *,
    seeds: Sequence[int],
    versions: Sequence[str],
    train_steps: int,
) -> pd.DataFrame:
    """D = |f(x) - f(x')| for near-duplicates and negatives among the test photographs.

    A near-duplicate is a photograph and its own distorted copy; a negative is a photograph and the distorted copy of
    another one of the same class, the hard case. Every unordered pair of a class is taken once.

    Args:
        run: the artifact.
        name: "photos" or "imagefolder".
        size: height and width of the photographs, pixels.
        chosen: the arms by name.
        seeds: one trained embedding each, continued by every arm.
        versions: names of `distortions.apply`.
        train_steps: of the triplet training before the arms.

    Returns:
        One row per seed, arm, distortion and pair: kind ("near-duplicate" or "negative"), first, second (positions in
        the test part), distance.
    """
    photos = photographs(run, name, size)
    frames = []
    for seed, arm, trained in embeddings(run, photos, chosen, seeds=seeds, train_steps=train_steps):
        key = {"model": trained.key, "versions": list(versions), "device": run.device.type}

        def measure(trained: training.Trained = trained) -> pd.DataFrame:
            return _distances(trained, photos.test, versions, run.device)

        frames.append(cache.table(f"near-duplicates/{name}", key, measure).assign(seed=seed, arm=arm))
    return pd.concat(frames, ignore_index=True)


def _distances(
    trained: training.Trained, part: data.Split, versions: Sequence[str], device: torch.device
) -> pd.DataFrame:
    clean = embed(trained, part.images, device)
    labels = part.labels.numpy()
    first, second = np.triu_indices(len(labels), k=1)
    same = labels[first] == labels[second]
    first, second = first[same], second[same]
    everyone = np.arange(len(labels))
    frames = []
    for version in versions:
        gaps = torch.cdist(clean, embed(trained, distortions.apply(version, part.images), device)).numpy()
        for kind, a, b in ((POSITIVE, everyone, everyone), (NEGATIVE, first, second)):
            columns = {"distortion": version, "kind": kind, "first": a, "second": b, "distance": gaps[a, b]}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def embed(trained: training.Trained, images: Tensor, device: torch.device) -> Tensor:
    """Unit vectors (N, D) float64 of raw uint8 images."""
    return training.predict(trained.model, images, device=device).double()


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


def detection_claim(found: pd.DataFrame, arm: str) -> dict[str, bool | float]:
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


def concentration(pairs: pd.DataFrame, *, threshold: float) -> pd.DataFrame:
    """Share of distances below a threshold, and the median, for near-duplicates and for negatives.

    Returns:
        One row per seed, arm, distortion and kind: below (share), median.
    """
    grouped = pairs.groupby(["seed", "arm", "distortion", "kind"], sort=False)["distance"]
    table = grouped.agg(below=lambda d: float((d < threshold).mean()), median="median")
    return table.reset_index()


def concentration_claim(shares: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Claim (iv): distances of near-duplicates concentrate at 0.

    It holds when the 95% interval over seeds of the gain in the share of near-duplicates below the threshold, averaged
    over distortions, lies above 0. The change for the negatives stands beside it: an embedding that collapses gains
    both.
    """
    wide = shares.pivot(index=["kind", "distortion", "seed"], columns="arm", values="below")
    by_seed = wide.groupby(level=["kind", "seed"]).mean()
    near, other = by_seed.loc[POSITIVE], by_seed.loc[NEGATIVE]
    mean, low, _ = mean_interval(near[arm] - near[CONTROL])
    return {
        "distances_concentrate_at_zero": bool(low > 0),
        "share_below_control": float(near[CONTROL].mean()),
        "share_below_stability": float(near[arm].mean()),
        "gain_of_near_duplicates": mean,
        "gain_of_negatives": float((other[arm] - other[CONTROL]).mean()),
    }


def examples(run: Run, name: str, size: int, pairs: pd.DataFrame, *, seed: int, count: int) -> pd.DataFrame:
    """Near-duplicate pairs of the smallest and the largest D under the control, with D under every arm.

    Returns:
        2 `count` rows: distortion, first, place ("smallest" or "largest"), one column of distances for each arm, and
        the two pictures, original and distorted, as (H, W, C) uint8 arrays.
    """
    part = photographs(run, name, size).test
    kept = pairs[(pairs["seed"] == seed) & (pairs["kind"] == POSITIVE)]
    wide = kept.pivot(index=["distortion", "first"], columns="arm", values="distance").reset_index()
    ordered = wide.sort_values(CONTROL)
    chosen = pd.concat(
        [ordered.head(count).assign(place="smallest"), ordered.tail(count)[::-1].assign(place="largest")]
    )
    chosen = chosen[["distortion", "first", "place", *kept["arm"].unique()]]
    chosen = chosen.reset_index(drop=True).rename_axis(columns=None)
    originals = [part.images[[i]] for i in chosen["first"]]
    copies = [distortions.apply(str(v), image) for v, image in zip(chosen["distortion"], originals, strict=True)]
    for column, pictures in (("original", originals), ("distorted", copies)):
        chosen[column] = pd.Series([p[0].permute(1, 2, 0).numpy() for p in pictures], dtype=object)
    return chosen
