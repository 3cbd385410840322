"""Which alpha and sigma, which layers: the grid, on validation images only."""

from __future__ import annotations

from collections.abc import Mapping
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


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Clean and distorted validation accuracy of stability training over a grid, all layers and the last one.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the validation part, drawn at random; 0
    for all), alphas and sigmas (of the grid), steps, learning_rate, versions (distortions over which the distorted
    accuracy is averaged).

    Returns:
        "grid", one row per layers, alpha, sigma and seed: clean and distorted accuracy, and their gains over the
        control of the same layers and seed (clean_gain, distorted_gain).
    """
    chosen = run.parameters
    versions, frames = [ORIGINAL, *chosen["versions"]], []
    for layers in get_args(Layers):
        runs = comparison.measure(run, chosen["dataset"], _arms(chosen, layers), versions, part="valid")
        frames.append(_grid(runs).assign(layers=layers))
    return {"grid": pd.concat(frames, ignore_index=True)}


def _arms(parameters: Mapping[str, Any], layers: Layers) -> dict[str, Arm]:
    """The control and each cell of the grid, by name."""
    common: dict[str, Any] = {name: parameters[name] for name in ("steps", "learning_rate")} | {"layers": layers}
    grid = {
        f"{alpha:g} {sigma:g}": Arm("stability", alpha=alpha, sigma=sigma, **common)
        for alpha in parameters["alphas"]
        for sigma in parameters["sigmas"]
    }
    return {comparison.CONTROL: Arm("control", **common), **grid}


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


def claims(best: pd.DataFrame) -> dict[str, bool | float]:
    """The chosen cell of each choice of layers with its gains, and whether tuning all layers gains more."""
    found: dict[str, bool | float] = {}
    for cell in best.to_dict("records"):
        columns = ("alpha", "sigma", "clean_gain", "distorted_gain")
        found |= {f"{cell['layers']}_{name}": float(cell[name]) for name in columns}
    more = found["all_distorted_gain"] - found["last_distorted_gain"]
    return found | {"all_layers_gain_more_than_last": more > 1e-9}  # equal counts may differ by a rounding error


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
