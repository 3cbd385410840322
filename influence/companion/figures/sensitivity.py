"""Figures of Shu & Zhu (2019)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style


def accuracy(table: pd.DataFrame) -> Figure:
    """Accuracy and calibration error of each network on its images, one row of panels per data set, with intervals."""
    names = list(table["dataset"].unique())
    figure = Figure(figsize=(style.WIDTH, 2.9 * len(names)))
    for (left, right), name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
        group = table[table["dataset"] == name]
        _by_part(left, group, value="accuracy", low="low", high="high")
        _by_part(right, group, value="calibration_error", low="calibration_low", high="calibration_high")
        left.set_ylabel("accuracy")
        right.set_ylabel("expected calibration error")
        right.set_ylim(bottom=0)  # no error: the confidences can be taken at their word
        seeds = int(group["seeds"].min())
        shown = f"mean and 95% interval, {seeds} seeds" if seeds > 1 else "one seed, no interval"
        for axes in (left, right):
            axes.set_title(f"{style.name(name)}: {shown}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _by_part(axes: Axes, group: pd.DataFrame, *, value: str, low: str, high: str) -> None:
    """One point per network and part, those of one part beside each other; no bar where there is one seed."""
    parts = list(group["part"].unique())
    for row, (model, ours) in enumerate(group.groupby("model", sort=False)):
        bars = np.clip([ours[value] - ours[low], ours[high] - ours[value]], 0, 1)
        bars[:, ours["seeds"] == 1] = 0
        axes.errorbar(
            np.arange(len(parts)) + 0.18 * (row - 0.5),
            ours[value],
            bars,
            fmt="os"[row % 2],
            capsize=3,
            color=style.COLOURS.get(str(model)),
            label=style.name(str(model)),
        )
    axes.set_xticks(range(len(parts)), parts)
    axes.set_xlabel("images")
    axes.set_xlim(-0.5, len(parts) - 0.5)
    axes.margins(y=0.15)


def manhattan(axes: Axes, position: pd.Series, score: pd.Series, label: pd.Series) -> None:
    """The paper's own form: x = class, images of class i spread over [i, i+1), y = score, one colour per class."""
    n_classes = int(label.max()) + 1
    colours = np.asarray(style.class_colours(n_classes))
    axes.scatter(position, score, s=4, c=colours[label.to_numpy()], linewidths=0, rasterized=True)
    axes.set_xticks(np.arange(n_classes) + 0.5, [str(k) for k in range(n_classes)])
    axes.set_xlim(0, n_classes)
    axes.tick_params(axis="x", length=0)


def outlier_ranking(scores: pd.DataFrame) -> Figure:
    """Setup 1: Manhattan plots of released FI (full, zoomed) and exact FI, and both against their ceiling."""
    groups = list(scores.groupby(["dataset", "model"], sort=False))
    figure = Figure(figsize=(style.WIDTH * 1.4, 2.3 * len(groups)))
    grid = figure.subplots(len(groups), 4, squeeze=False)
    for (left, zoomed, middle, right), ((name, model), group) in zip(grid, groups, strict=True):
        for axes in (left, zoomed):
            manhattan(axes, group["position"], group["released"], group["label"])
            axes.set_ylim(0)
        top = float(np.quantile(group["released"], 0.95))
        zoomed.set_ylim(0, top if top > 0 else 1.0)
        zoomed.set_title("as released, lower 95%")
        left.set_ylabel(f"{style.name(name)}\n{style.name(model)}\nFI (dimensionless)")
        left.set_title("as released")
        manhattan(middle, group["position"], group["exact"], group["label"])
        middle.set_yscale("log")
        middle.set_title("exact (log scale)")
        _against_ceiling(right, group)
        right.set_title("against the ceiling")
    for axes in grid[-1, :3]:
        axes.set_xlabel("class")
    grid[-1, 3].set_xlabel(r"$(1 - P_y)/P_y$")
    return figure


def _against_ceiling(axes: Axes, group: pd.DataFrame) -> None:
    seen = group[group["released"] > 0]
    axes.scatter(
        seen["ceiling"], seen["released"], s=5, color=style.COLOURS["released"], label="released", linewidths=0
    )
    axes.scatter(group["ceiling"], group["exact"], s=2, color=style.COLOURS["exact"], label="exact", linewidths=0)
    low, high = group["ceiling"].min(), group["ceiling"].max()
    axes.plot([low, high], [low, high], color=style.COLOURS["ceiling"], linewidth=0.6, label="ceiling", zorder=3)
    zeros = group[group["released"] == 0]
    axes.plot(
        zeros["ceiling"],
        np.full(len(zeros), 0.02),
        "|",
        color=style.COLOURS["released"],
        transform=axes.get_xaxis_transform(),
        markersize=4,
        label=f"released = 0 ({len(zeros) / len(group):.0%})",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=6, loc="upper left", handlelength=1)


def outlier_images(images: pd.DataFrame) -> Figure:
    """Setup 1: the images of largest FI, released and exact, with true and predicted label."""
    groups = list(images.groupby(["dataset", "model", "estimator"], sort=False))
    count = int(images["place"].max())
    figure = Figure(figsize=(style.WIDTH, 1.62 * len(groups)))
    grid = figure.subplots(len(groups), count, squeeze=False)
    for row, ((name, model, estimator), group) in zip(grid, groups, strict=True):
        for axes, (_, image) in zip(row, group.iterrows(), strict=True):
            axes.imshow(image["pixels"].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_title(
                f"true {image['label_name']}\npredicted {image['predicted_name']}\nFI {image['fi']:.3g}", fontsize=7
            )
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{style.name(name)}\n{style.name(model)}\n{style.name(estimator)}", fontsize=7)
    return figure
