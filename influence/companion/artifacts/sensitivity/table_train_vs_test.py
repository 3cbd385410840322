"""Setup 3 of Shu & Zhu (2019) in numbers: the quantiles of FI on training and test images."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ... import style

QUANTILES = (0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 1.0)


def quantiles(frame: pd.DataFrame, *, seed: int = 0, repeats: int = 200) -> pd.DataFrame:
    """The paper's table: upper quantiles of FI in both parts, with 95% percentile bootstrap intervals over the images.

    The interval of the largest value (quantile 1) is left out: no bootstrap says how far it could be.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for (name, model, part), group in frame.groupby(["dataset", "model", "part"], sort=False):
        for estimator in ("exact", "released"):
            values = group[estimator].to_numpy()
            found = np.quantile(values, QUANTILES)
            samples = [
                np.quantile(values[generator.integers(0, len(values), len(values))], QUANTILES) for _ in range(repeats)
            ]
            lows, highs = np.quantile(samples, [0.025, 0.975], axis=0)
            for q, value, low, high in zip(QUANTILES, found, lows, highs, strict=True):
                limits = {"low": np.nan, "high": np.nan} if q == 1 else {"low": low, "high": high}
                key = {"dataset": name, "model": model, "estimator": estimator, "part": part, "images": len(values)}
                rows.append({**key, "quantile": q, "value": value, **limits})
    return pd.DataFrame(rows)


def claims(table: pd.DataFrame) -> dict[str, bool]:
    """By a rule fixed before the run: whether upper quantiles grow towards the test set, for every network.

    * upper_quantiles_are_larger_on_the_test_set: the 95% interval of the .95 quantile of released FI on test images
      lies above that on training images.
    """
    chosen = table[(table["estimator"] == "released") & (table["quantile"] == 0.95)]
    ends = chosen.pivot(index=["dataset", "model"], columns="part", values=["low", "high"])
    larger = ends[("low", "test")] > ends[("high", "train")]
    return {"upper_quantiles_are_larger_on_the_test_set": bool(larger.all())}


def draw(table: pd.DataFrame) -> Figure:
    """Upper quantiles of released FI in both parts with 95% bootstrap intervals; the largest has none."""
    chosen = table[table["estimator"] == "released"]
    groups = list(chosen.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH, 2.3 * ((len(groups) + 1) // 2)))
    grid = figure.subplots((len(groups) + 1) // 2, 2, squeeze=False).ravel()
    for axes, ((name, model), group) in zip(grid, groups, strict=False):
        for part, colour, shift in (("train", style.COLOURS["exact"], -0.1), ("test", style.COLOURS["released"], 0.1)):
            rows = group[group["part"] == part].reset_index(drop=True)
            bars = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
            axes.errorbar(rows.index + shift, rows["value"], yerr=bars, fmt="o", color=colour, markersize=4, label=part)
        axes.set_xticks(range(len(rows)), [f"{q:g}" for q in rows["quantile"]])
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(0, 2 * group["value"].max())
        axes.set_xlabel("quantile")
        axes.set_ylabel("released FI")
        axes.set_title(f"{style.name(name)}, {style.name(model)}, {rows['images'].iloc[0]} images each", fontsize=8)
        axes.legend(fontsize=7)
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    return figure
