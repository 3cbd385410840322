"""Figures of Shu & Zhu (2019)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style

_PARTS = {"train": ("#999999", "o"), "validation": ("#56B4E9", "s"), "test": ("#0072B2", "D")}


def accuracy(table: pd.DataFrame) -> Figure:
    """Accuracy and calibration error of each network on its images with its gate, one row of panels per data set."""
    counts = table.groupby("dataset", sort=False)["network"].nunique()
    height = 1.0 * len(counts) + 0.42 * counts.sum() + 0.4
    figure = Figure(figsize=(style.WIDTH, height))
    panels = figure.subplots(
        len(counts), 2, squeeze=False, sharey="row", height_ratios=[1.5 + int(count) for count in counts]
    )
    for (left, right), name in zip(panels, counts.index, strict=True):
        group = table[table["dataset"] == name]
        _by_network(left, group, value="accuracy", low="low", high="high")
        _by_network(right, group, value="calibration_error", low="calibration_low", high="calibration_high")
        networks = list(group["network"].unique())
        gates = group[(group["part"] == "test") & group["gate"].notna()]
        rows = [networks.index(network) for network in gates["network"]]
        if rows:
            left.plot(gates["gate"], rows, "|", color="#D55E00", markersize=14, markeredgewidth=2, label="gate (test)")
        left.set_yticks(range(len(networks)), [style.network(network) for network in networks])
        left.set_ylim(len(networks) - 0.5, -0.5)
        left.set_xlabel("accuracy")
        right.set_xlabel("expected calibration error")
        right.set_xlim(left=0)  # no error: the confidences can be taken at their word
        left.set_title(style.name(name), loc="left")
        right.tick_params(labelleft=False)
    handles: dict[str, Artist] = {}
    for axes in panels[:, 0]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _by_network(axes: Axes, group: pd.DataFrame, *, value: str, low: str, high: str) -> None:
    """A row for each network, a point for each part with its interval over seeds; no bar where there is one seed."""
    networks = list(group["network"].unique())
    for place, (part, (colour, marker)) in enumerate(_PARTS.items()):
        ours = group[group["part"] == part]
        bars = np.clip([ours[value] - ours[low], ours[high] - ours[value]], 0, 1)
        bars[:, ours["seeds"] == 1] = 0
        rows = np.array([networks.index(network) for network in ours["network"]]) + 0.2 * (place - 1)
        axes.errorbar(ours[value], rows, xerr=bars, fmt=marker, markersize=4, capsize=2, color=colour, label=part)
    axes.grid(axis="x", alpha=0.3)


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
