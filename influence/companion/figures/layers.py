"""Figures of Setup 2 of Shu & Zhu (2019): all parameters by class, and each trainable layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style
from .sensitivity import manhattan


def by_class(scores: pd.DataFrame) -> Figure:
    """Manhattan plots by class for all parameters: released FI in full, zoomed, and exact FI."""
    whole = scores[scores["number"] == 0]
    groups = list(whole.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH * 1.2, 2.1 * len(groups)))
    for row, ((name, model), group) in zip(figure.subplots(len(groups), 3, squeeze=False), groups, strict=True):
        for axes, column in zip(row, ("released", "released", "exact"), strict=True):
            manhattan(axes, group["position"], group[column], group["label"])
        row[0].set_ylim(0)
        zoom = float(np.quantile(group["released"], 0.9)) or float(group["released"].max())
        row[1].set_ylim(0, zoom if zoom > 0 else 1)
        row[2].set_yscale("log")
        row[0].set_ylabel(f"{style.name(name)}\n{style.name(model)}\nFI of all parameters")
        for axes, title in zip(row, ("as released", "as released, lower 90%", "exact (log scale)"), strict=True):
            axes.set_title(f"{title}, {len(group)} images", fontsize=8)
            axes.set_xlabel("class")
    return figure


def by_layer(scores: pd.DataFrame) -> Figure:
    """The paper's figure: every image in each layer's column, released FI in full and zoomed, blocks on the axis."""
    groups = list(scores[scores["number"] > 0].groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH * 1.2, 3.4 * len(groups)))
    grid = figure.subplots(2 * len(groups), 1, squeeze=False)[:, 0]
    for row, ((name, model), group) in enumerate(groups):
        zoom = float(np.quantile(group["released"], 0.9)) or float(group["released"].max())
        for axes, top in zip(grid[2 * row : 2 * row + 2], (None, zoom), strict=True):
            shade(axes, group)
            axes.scatter(
                group["number"],
                group["released"],
                s=3,
                c=np.asarray(style.class_colours(10))[_block_numbers(group) % 10],
                linewidths=0,
                rasterized=True,
            )
            axes.set_ylim(0, top)
            axes.set_ylabel("released FI" if top is None else "lower 90%")
        count = group["number"].nunique()
        title = f"{style.name(name)}, {style.name(model)}: {count} trainable layers, {group['image'].nunique()} images"
        grid[2 * row].set_title(title, fontsize=9)
    return figure


def per_layer(table: pd.DataFrame) -> Figure:
    """What does differ between layers: trace, effective rank; and where released FI departs from exact FI."""
    groups = list(table[table["number"] > 0].groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH * 1.2, 4.6 * len(groups)))
    grid = figure.subplots(3 * len(groups), 1, squeeze=False)[:, 0]
    for row, ((name, model), group) in enumerate(groups):
        trace, rank, departs = grid[3 * row : 3 * row + 3]
        x = group["number"]
        trace.fill_between(x, group["trace_low"], group["trace_high"], color=style.SCORES["trace"][0], alpha=0.4)
        trace.plot(x, group["trace"], color=style.SCORES["trace"][0], linewidth=1)
        trace.set_yscale("log")
        trace.set_ylabel("trace of G")
        trace.set_title(
            f"{style.name(name)}, {style.name(model)}: means over {group['images'].iloc[0]} images, band: 95% interval",
            fontsize=9,
        )
        rank.plot(x, group["rank"], color=style.COLOURS["exact"], label="rank")
        rank.plot(x, group["kept"], color=style.COLOURS["released"], label="above the released cut")
        rank.plot(x, group["effective_rank"], color=style.COLOURS["ceiling"], label="effective rank", linewidth=1)
        rank.set_ylabel("directions")
        rank.set_ylim(0, 9.5)
        departs.plot(x, group["cut"], color=style.COLOURS["released"], label="lost a direction to the cut")
        departs.plot(x, group["zero"], color=style.COLOURS["ceiling"], label="released FI = 0")
        departs.plot(x, group["constant"], color=style.STABILITY[0], label="moved over 1% by e alone")
        departs.plot(x, group["alignment"], color=style.COLOURS["exact"], label="exact FI / ceiling", linestyle="--")
        departs.set_ylabel("share of images")
        departs.set_ylim(-0.03, 1.03)
        for axes in (rank, departs):
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for axes in (trace, rank, departs):
            shade(axes, group)
    return figure


def shade(axes: Axes, group: pd.DataFrame) -> None:
    """Bands for the blocks of a network, with their names and the layer numbers where they begin."""
    layers = group.drop_duplicates("number").sort_values("number")
    first = layers.groupby(_block(layers["layer"]), sort=False)["number"].min()
    last = layers.groupby(_block(layers["layer"]), sort=False)["number"].max()
    ticks = []
    for place, (name, start, end) in enumerate(zip(first.index, first, last, strict=True)):
        if place % 2:
            axes.axvspan(start - 0.5, end + 0.5, color="0.93", linewidth=0, zorder=-1)
        if end - start > 4:
            ticks.append(((start + end) / 2, f"{name}\n{start}-{end}"))
    axes.set_xlim(0.5, float(layers["number"].max()) + 0.5)
    axes.set_xticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.tick_params(axis="x", length=0)


def _block(layer: pd.Series) -> pd.Series:
    return layer.str.split(".").str[0]


def _block_numbers(group: pd.DataFrame) -> np.ndarray:
    return pd.factorize(_block(group["layer"]))[0]
