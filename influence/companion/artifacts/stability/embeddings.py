"""Embeddings of photographs, continued by every arm, and the distances of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache as remember

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from influence.progress import progress_bar

from ...images import data, distortions
from ...ledger import cache, paths
from ...ledger.results import Run
from ...zoo import embedding, training
from ...zoo.embedding import EmbeddingArm, EmbeddingRecipe
from .comparison import CONTROL

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
