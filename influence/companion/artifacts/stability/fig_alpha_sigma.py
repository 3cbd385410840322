"""Which alpha and sigma, which layers: the grid, on validation images only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ... import style
from ...ledger.results import Run
from ...zoo.finetuning import Arm
from . import comparison
from .comparison import ORIGINAL

Layers = Literal["all", "last"]


def alpha_sigma(
    run: Run,
    dataset_name: str,
    model: str,
    *,
    seeds: Sequence[int],
    alphas: Sequence[float],
    sigmas: Sequence[float],
    steps: int,
    learning_rate: float,
    versions: Sequence[str],
    images: int | None,
) -> pd.DataFrame:
    """Clean and distorted validation accuracy of stability training over a grid, all layers and the last one.

    Args:
        run: the artifact.
        dataset_name: a name of `data.NAMES`.
        model: a name of `models.NAMES`.
        seeds: one trained network each.
        alphas: weights of the stability loss.
        sigmas: of the noise, pixels in [0, 1].
        steps: of SGD, for every arm.
        learning_rate: its peak.
        versions: distortions over which the distorted accuracy is averaged.
        images: validation images, drawn at random; None for all.

    Returns:
        One row per layers, alpha, sigma and seed: clean and distorted accuracy, and their gains over the control of
        the same layers and seed (clean_gain, distorted_gain).
    """
    common: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate}
    frames = []
    for layers in get_args(Layers):
        grid = {
            f"{alpha:g} {sigma:g}": Arm("stability", alpha=alpha, sigma=sigma, layers=layers, **common)
            for alpha in alphas
            for sigma in sigmas
        }
        chosen = {comparison.CONTROL: Arm("control", layers=layers, **common), **grid}
        runs = comparison.measure(
            run,
            dataset_name,
            model,
            chosen,
            seeds=seeds,
            versions=[ORIGINAL, *versions],
            images=images,
            part="valid",
        )
        frames.append(_grid(runs).assign(layers=layers))
    return pd.concat(frames, ignore_index=True)


def _grid(runs: pd.DataFrame) -> pd.DataFrame:
    parts = runs.assign(part=(runs["distortion"] == ORIGINAL).map({True: "clean", False: "distorted"}))
    wide = parts.groupby(["seed", "arm", "part"])["precision_at_1"].mean().unstack("part").reset_index()
    control = wide[wide["arm"] == comparison.CONTROL].set_index("seed")
    table = wide[wide["arm"] != comparison.CONTROL].copy()
    for part in ("clean", "distorted"):
        table[f"{part}_gain"] = table[part] - table["seed"].map(control[part])
    table[["alpha", "sigma"]] = [[float(number) for number in str(arm).split()] for arm in table["arm"]]
    return (
        table.drop(columns="arm").sort_values(["seed", "alpha", "sigma"], ignore_index=True).rename_axis(columns=None)
    )


def best(table: pd.DataFrame, *, margin: float = 0.01) -> pd.DataFrame:
    """For each choice of layers the cell chosen on validation images.

    The largest distorted accuracy among the cells whose clean accuracy is at most `margin` below the control's, means
    over seeds; among all cells where there is none.
    """
    rows = []
    columns = ["clean", "distorted", "clean_gain", "distorted_gain"]
    for layers, group in table.groupby("layers", sort=False):
        cells = group.groupby(["alpha", "sigma"])[columns].mean().reset_index()
        kept = cells[cells["clean_gain"] >= -margin]
        chosen = (kept if len(kept) else cells).sort_values("distorted", ascending=False).iloc[0]
        rows.append({"layers": layers, **chosen.to_dict(), "seeds": group["seed"].nunique()})
    return pd.DataFrame(rows)


_DIVERGING = "PuOr"


def draw(table: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """Heat maps over the grid: gain in clean and in distorted validation accuracy, all layers and the last one.

    A square marks the cell chosen on these validation images.
    """
    figure = Figure(figsize=(style.WIDTH, 5.6))
    grid = figure.subplots(2, 2)
    largest = 100 * float(np.abs(table[["clean_gain", "distorted_gain"]].to_numpy()).max())
    norm = TwoSlopeNorm(0, -max(largest, 1e-6), max(largest, 1e-6))
    for row, layers in zip(grid, table["layers"].unique(), strict=True):
        group = table[table["layers"] == layers]
        for axes, part in zip(row, ("clean", "distorted"), strict=True):
            cells = 100 * group.pivot_table(index="alpha", columns="sigma", values=f"{part}_gain")
            image = axes.imshow(cells, cmap=_DIVERGING, norm=norm, origin="lower", aspect="auto")
            for (i, j), value in np.ndenumerate(cells.to_numpy()):
                tint = "white" if abs(value) > 0.6 * largest else "black"
                axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=tint)
            chosen = best[best["layers"] == layers].iloc[0]
            where = list(cells.columns).index(chosen["sigma"]), list(cells.index).index(chosen["alpha"])
            axes.plot(*where, "s", markersize=26, markerfacecolor="none", markeredgecolor="black")
            axes.set_xticks(range(len(cells.columns)), [f"{v:g}" for v in cells.columns])
            axes.set_yticks(range(len(cells.index)), [f"{v:g}" for v in cells.index])
            axes.set_xlabel(r"$\sigma$ (pixels in [0, 1])")
            axes.set_ylabel(r"$\alpha$")
            axes.set_title(f"{part} accuracy, {'all layers' if layers == 'all' else 'last layer'}")
    figure.colorbar(image, ax=list(grid.flat), label="gain over control (pp, validation)")
    seeds = table["seed"].nunique()
    figure.suptitle("no interval: one network (n = 1 seed)" if seeds == 1 else f"mean of {seeds} seeds", fontsize=9)
    return figure
