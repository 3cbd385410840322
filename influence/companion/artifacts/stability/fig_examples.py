"""Pairs of photographs with their distances (Zheng et al. 2016)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...images import distortions
from ...ledger.results import Run
from .comparison import CONTROL, label
from .embeddings import POSITIVE, photographs


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


def draw(chosen: pd.DataFrame, *, arm: str) -> Figure:
    """Pairs of smallest and largest distance: original above its distorted copy, D of control and `arm` below."""
    places = list(chosen["place"].unique())
    count = int(chosen.groupby("place").size().max())
    figure = Figure(figsize=(style.WIDTH, 2 * len(places) * style.WIDTH / count * 0.8))
    grid = figure.subplots(2 * len(places), count, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for row, place in enumerate(places):
        for column, (_, pair) in enumerate(chosen[chosen["place"] == place].iterrows()):
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            above.imshow(pair["original"], cmap="gray")
            below.imshow(pair["distorted"], cmap="gray")
            above.set_title(pair["distortion"], fontsize=8)
            below.set_xlabel(f"{pair['control']:.3f} → {pair[arm]:.3f}", fontsize=8)
        grid[2 * row, 0].set_ylabel(f"{place} D", fontsize=8)
    figure.suptitle(f"near-duplicates: D of the control → {label(arm)}", fontsize=9)
    return figure
