"""Embeddings of test images and of their distorted copies, and the distances of near-duplicates and negatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache as remember
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ...images import distortions
from ...images.data import Split
from ...ledger import cache
from ...ledger.results import Run
from ...zoo import training
from ...zoo.embedding import EmbeddingArm
from ..common import dataset
from .comparison import ORIGINAL, networks, own_noise, stability, standard

POSITIVE, NEGATIVE = "near-duplicate", "negative"
_AT_ONCE = 2**17  # pairs
Vectors = dict[str, np.ndarray]  # by distortion, (N, D) float32 of unit length


def measured(parameters: Mapping[str, Any]) -> list[str]:
    """The distortions of the paper, and the noise that the arms are trained on."""
    return [*parameters["versions"], own_noise(parameters)]


def suffixes(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The suffix of the items of each arm: none for the paper's alpha, the first one."""
    first, *_, last = parameters["alphas"]
    return {stability(first): "", stability(last): "_strong", "augmentation": "_augmentation"}


def images(run: Run) -> Split:
    """The test images of an artifact; parameters: dataset, images (drawn at random; 0 for all)."""
    return dataset(run, run.parameters["dataset"]).test.sample(run.parameters["images"] or None)


def vectors(run: Run) -> Iterator[tuple[int, str, Vectors]]:
    """Embeddings of the test images and of their distorted copies, by seed and arm.

    Parameters of the run: dataset, model and seeds (of the trained networks whose features they are), images, versions
    (names of `distortions.apply`), and those of `comparison.standard`.
    """
    chosen, part = run.parameters, images(run)

    distorted = remember(partial(distortions.apply, images=part.images))
    for seed, arm, trained in networks(run, chosen["dataset"], standard(chosen, EmbeddingArm), task="embeddings"):
        found = {}
        for version in [ORIGINAL, *measured(chosen)]:
            key = {"model": trained.key, "version": version, "images": part.digest, "device": run.device.type}

            def embed(trained: training.Trained = trained, version: str = version) -> pd.DataFrame:
                z = training.predict(trained.model, distorted(version), device=run.device)
                return pd.DataFrame(z.numpy(), columns=[str(i) for i in range(z.shape[1])])

            found[version] = cache.table(f"embeddings/{chosen['dataset']}-{chosen['model']}", key, embed).to_numpy()
        yield seed, arm, found


@dataclass(frozen=True)
class Distances:
    """Of all near-duplicates and of the negatives, under one embedding."""

    columns: dict[str, Any]  # seed, arm, distortion
    near: np.ndarray  # (P,) |f(x) - f(x')|, x' the distorted copy of x, over `unit`
    far: np.ndarray  # (Q,) the same for x' of another image of the class
    unit: float  # the median distance of the negatives, so that an embedding that shrinks gains nothing


def distances(run: Run) -> Iterator[Distances]:
    """Of every seed, arm and distortion; the same negatives for all.

    Parameters of the run: those of `vectors`, and negatives (how many at most).
    """
    first, second = negatives(images(run).labels.numpy(), run.parameters["negatives"])
    for seed, arm, z in vectors(run):
        for version in measured(run.parameters):
            everyone = np.arange(len(z[version]))
            near = between(z, version, everyone, everyone)
            far = between(z, version, first, second)
            unit = float(np.median(far))
            yield Distances({"seed": seed, "arm": arm, "distortion": version}, near / unit, far / unit, unit)


def negatives(labels: np.ndarray, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of at most `count` pairs of two images of a class, drawn at random from all ordered ones."""
    pairs = np.flatnonzero((labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool))
    chosen = np.sort(np.random.default_rng(seed).choice(len(pairs), min(count, len(pairs)), replace=False))
    return np.divmod(pairs[chosen], len(labels))


def between(z: Vectors, version: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distances (M,) float64 of the embeddings of images to those of distorted ones."""
    clean, copies, starts = z[ORIGINAL], z[version], range(0, len(first), _AT_ONCE)
    pieces = [clean[first[i : i + _AT_ONCE]] - copies[second[i : i + _AT_ONCE]] for i in starts]
    return np.concatenate([np.linalg.norm(piece, axis=1) for piece in pieces]).astype(np.float64)
