"""Pairs of images with the distances of their embeddings (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ... import style
from ...images import distortions
from ...images.data import Split
from ...images.pictures import packed, unpacked
from ...ledger.results import Run
from ..common import dataset
from . import embeddings
from .comparison import CONTROL, label
from .embeddings import Vectors

SMALLEST, LARGEST, DISSIMILAR = "smallest D", "largest D", "dissimilar"
SIDES = ("original", "distorted")


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Near-duplicates of the smallest and the largest distance, and a dissimilar pair, for each distortion.

    Chosen by the control of each seed. The dissimilar pair, an image and the distorted copy of another one of its
    class, is the one whose distance is the median of such pairs.

    Returns:
        "pairs", one row per seed, distortion, place ("smallest D", "largest D", "dissimilar") and rank: first, second
        (positions of the images in the set's published order), class, and one column for each arm: distance over the
        median of the negatives; "pictures", for each of these rows, by its number in `pair`, two images ("original",
        "distorted") as `pictures.packed` has them.
    """
    part, classes = embeddings.images(run), dataset(run, run.parameters["dataset"]).classes
    others = embeddings.negatives(part.labels.numpy(), run.parameters["negatives"])
    by_seed: dict[int, dict[str, Vectors]] = {}
    for seed, arm, z in embeddings.vectors(run):
        by_seed.setdefault(seed, {})[arm] = z
    frames = [
        _chosen(arms, version, others, run.parameters["count"]).assign(seed=seed, distortion=version)
        for seed, arms in by_seed.items()
        for version in run.parameters["versions"]
    ]
    pairs = pd.concat(frames, ignore_index=True)
    pairs["class"] = [classes[k] for k in part.labels.numpy()[pairs["first"]]]
    pictures = pd.concat([_pictures(part, pairs, side) for side in SIDES], ignore_index=True)
    for column in ("first", "second"):
        pairs[column] = part.index.numpy()[pairs[column]]
    return {"pairs": pairs, "pictures": pictures}


def _chosen(
    arms: Mapping[str, Vectors], version: str, others: tuple[np.ndarray, np.ndarray], count: int
) -> pd.DataFrame:
    everyone = np.arange(len(arms[CONTROL][version]))
    near = {arm: embeddings.between(z, version, everyone, everyone) for arm, z in arms.items()}
    far = {arm: embeddings.between(z, version, *others) for arm, z in arms.items()}
    order, middle = np.argsort(near[CONTROL], kind="stable"), len(others[0]) // 2
    frames = []
    for place, rows, (first, second), gaps in (
        (SMALLEST, order[:count], (everyone, everyone), near),
        (LARGEST, order[::-1][:count], (everyone, everyone), near),
        (DISSIMILAR, np.argpartition(far[CONTROL], middle)[[middle]], others, far),
    ):
        columns = {"place": place, "rank": range(1, len(rows) + 1), "first": first[rows], "second": second[rows]}
        ours = {arm: gaps[arm][rows] / np.median(far[arm]) for arm in arms}
        frames.append(pd.DataFrame(columns | ours))
    return pd.concat(frames, ignore_index=True)


def _pictures(part: Split, pairs: pd.DataFrame, side: str) -> pd.DataFrame:
    if side == SIDES[0]:
        shown = part.images[pairs["first"].tolist()]
    else:
        copies = zip(pairs["distortion"], pairs["second"], strict=True)
        shown = torch.cat([distortions.apply(version, part.images[[image]]) for version, image in copies])
    return packed(shown).assign(pair=range(len(pairs)), side=side)


def claims(pairs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, float]:
    """For each arm the share of the pairs of smallest and of largest distance that come nearer than in the control."""
    groups = pairs[pairs["place"] != DISSIMILAR].groupby("place", sort=False)
    return {
        f"{arm}: share of the {place} that shrink": float((group[arm] < group[CONTROL]).mean())
        for arm in embeddings.suffixes(parameters)
        for place, group in groups
    }


def draw(tables: Mapping[str, pd.DataFrame], *, arm: str) -> Figure:
    """Pairs of the first seed: the image above, its distorted copy below, with D of the control and of `arm`."""
    pairs, pictures = tables["pairs"], tables["pictures"].set_index(["pair", "side"])
    pairs = pairs[pairs["seed"] == pairs["seed"].min()]
    names = list(pairs["distortion"].unique())
    width = int((pairs["distortion"] == names[0]).sum())
    figure, grid = style.subplots(
        2 * len(names), width, height=2 * len(names) * style.WIDTH / width * 0.82, squeeze=False
    )
    for row, name in enumerate(names):
        for column, (number, pair) in enumerate(pairs[pairs["distortion"] == name].iterrows()):
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            for axes, side in zip((above, below), SIDES, strict=True):
                style.picture(axes, unpacked(pictures.loc[(number, side)]))
            above.set_title(f"{pair['place']}\n{pair['class']}", fontsize=7)
            below.set_xlabel(f"{pair[CONTROL]:.2f} → {pair[arm]:.2f}", fontsize=8)
        grid[2 * row, 0].set_ylabel("original", fontsize=7)
        grid[2 * row + 1, 0].set_ylabel(name, fontsize=7)
    figure.suptitle(f"D / median D of negatives: control → {label(arm)}", fontsize=9)
    return figure
