"""Figures of the notebook for a model and data of the reader's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import style
from .by_weight import JUDGED, PLACED

_FAINT = 0.25  # share of the ceiling below which a map of its own scale shows more


def suspicious(top: pd.DataFrame) -> Figure:
    """The examples of largest FI as a grid of pictures; as bars for what is no image."""
    if "pixels" not in top:
        figure = Figure(figsize=(style.WIDTH, 3))
        axes = figure.subplots()
        axes.bar(range(len(top)), top["fi"], color=style.COLOURS["exact"])
        axes.set_xticks(range(len(top)), top["example"].astype(str), rotation=90)
        axes.set(xlabel="example", ylabel="FI (dimensionless)")
        return figure
    columns = 5
    rows = -(-len(top) // columns)
    figure = Figure(figsize=(style.WIDTH, 1.75 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, (_, row) in zip(grid, top.iterrows(), strict=False):
        axes.imshow(row["pixels"].squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{_named(row, ' ')}\nFI {row['fi']:.3g}", fontsize=6.5)
    return figure


def layers(table: pd.DataFrame, *, count: int = 12) -> Figure:
    """Divergence under relative noise along the network, and its largest layers by name."""
    figure = Figure(figsize=(style.WIDTH, 3.8))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    left.plot(np.arange(1, len(table) + 1), table["divergence"], ".-", linewidth=0.6, color=style.COLOURS["exact"])
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(yscale="log", xlabel="layer, from the input", ylabel="divergence at 1% noise (nats)")
    left.set_title(f"mean of {int(table['examples'].iloc[0])} examples")
    top = table.nlargest(count, "divergence")[::-1]
    look: dict[str, Any] = {"color": style.COLOURS["exact"], "error_kw": {"elinewidth": 0.8}}
    right.barh(range(len(top)), top["share"], xerr=top["error"], **look)  # NaN, of one example, draws no bar
    right.set_yticks(range(len(top)), top["layer"] + "\n" + top["kind"], fontsize=6)
    right.set_xlim(left=0)
    right.set_xlabel("share of the sum over layers\n(± standard error)")
    return figure


def weights(table: pd.DataFrame, places: pd.DataFrame, *, count: int = 12) -> Figure:
    """Accuracy against the share of the weights set to 0, a line for each ranking, and the layers of the first ones."""
    if not len(table):
        return Figure(figsize=(style.WIDTH, 0.5))
    figure = Figure(figsize=(style.WIDTH, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    style.by_share(left, table[table["ranking"] != "none"], "accuracy", "", apart=1.06, middle=2)
    left.axhline(100 * table["accuracy"].iloc[0], color="black", linewidth=0.5, label="as it is")
    left.set(xlabel="share of the weights set to 0 (%)", ylabel="accuracy (%)")
    left.set_ylim(bottom=-2)  # so that lines at 0 are seen
    how = f"{table['samples'].iloc[0]} random sums each" if table["samples"].iloc[0] else "exact"
    left.set_title(f"ranked from {table['examples'].iloc[0]} examples ({how}),\ntested on {table['n'].iloc[0]}")
    top = places.nlargest(count, "first")[::-1]
    right.barh(range(len(top)), 100 * top["first"] / places["first"].sum(), color=style.RANKINGS[PLACED][1])
    right.plot(100 * top["weights"] / places["weights"].sum(), range(len(top)), "k|", label="share of all weights")
    right.set_yticks(range(len(top)), top["layer"] + "\n" + top["kind"], fontsize=6)
    right.set_xlabel("share in the layer (%)")
    right.set_title(f"the first {JUDGED:.0%} by {style.RANKINGS[PLACED][0]}")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize=7)
    names = left.get_legend_handles_labels()
    figure.legend(*names, fontsize=7, ncols=3, loc="outside lower center", title="first by", title_fontsize=7)
    return figure


def train_against_test(table: pd.DataFrame, parts: pd.DataFrame) -> Figure:
    """Distribution of FI of the predicted class and of the trace on either part; empty where there are no parts."""
    if not len(parts):
        return Figure(figsize=(style.WIDTH, 0.5))
    figure = Figure(figsize=(style.WIDTH, 2.6))
    labels = {
        "fi_predicted": "FI of the predicted class (dimensionless)",
        "trace": "trace (per squared unit of the data)",
    }
    for axes, row in zip(figure.subplots(1, 2), parts.to_dict("records"), strict=True):
        for part, colour in (("train", style.COLOURS["control"]), ("test", style.COLOURS["exact"])):
            values = np.sort(table.loc[table["part"] == part, row["score"]].to_numpy())
            n = len(values)
            axes.step(values, np.arange(1, n + 1) / n, label=f"{part} (n = {n})", color=colour)
        positive = table.loc[table[row["score"]] > 0, row["score"]]
        if positive.max() > 10 * positive.min():
            axes.set_xscale("log")
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        axes.set(xlabel=labels[row["score"]], title=f"AUROC {row['auroc']:.3f} (95%: {interval})")
        axes.legend(loc="upper left")
    figure.axes[0].set_ylabel("share of the examples below")
    return figure


def maps(areas: pd.DataFrame) -> Figure:
    """Each image beside its trace, its FI of single values, and its FI of patches, both as shares of the ceiling."""
    if not len(areas):
        return Figure(figsize=(style.WIDTH, 0.5))
    figure = Figure(figsize=(style.WIDTH, 1.9 * len(areas)))
    grid = figure.subplots(len(areas), 4, squeeze=False)
    for line, (_, row) in zip(grid, areas.iterrows(), strict=True):
        style.picture(line[0], row["pixels"], largest=1)
        line[0].set_ylabel(_named(row, ": "), fontsize=7)
        shown = [(row["trace"] / max(row["trace"].max(), 1e-300), "trace / its largest")]
        for kind, name in (("single", "one value"), ("patch", f"{row['size']} x {row['size']}")):
            shown.append(_share(row[kind] / row["ceiling"], f"FI of {name}"))
        for axes, (values, title) in zip(line[1:], shown, strict=True):
            image = axes.imshow(values, cmap="nipy_spectral", vmin=0, vmax=1)
            axes.set_title(title, fontsize=7)
            axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=line[-1], fraction=0.046)
    return figure


def _share(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Shares of the ceiling as they are, or of their largest where that is too faint to see."""
    largest = float(values.max())
    if largest >= _FAINT:
        return values, f"{name} / ceiling"
    return values / max(largest, 1e-300), f"{name} / its largest\n({largest:.1%} of the ceiling)"


def robustness(curves: pd.DataFrame) -> Figure:
    """Accuracy against the strength of each distortion, one line for each arm."""
    if not len(curves):
        return Figure(figsize=(style.WIDTH, 0.5))
    palette = (style.COLOURS["ceiling"], style.COLOURS["control"], *style.STABILITY[1:])
    colours = dict(zip(curves["arm"].unique(), palette, strict=False))
    figure = Figure(figsize=(style.WIDTH, 4.4))
    panels = figure.subplots(2, 2, sharey=True).ravel()
    for axes, (family, group) in zip(panels, curves.groupby("family", sort=False), strict=True):
        for shift, (arm, line) in enumerate(group.groupby("arm", sort=False)):
            x = line["strength"] + shift * 0.01 * (group["strength"].max() or 1)
            look = {"fmt": ".-", "capsize": 2, "linewidth": 1, "color": colours[arm]}
            axes.errorbar(x, line["accuracy"], style.error_bars(line, "accuracy", ""), label=arm, **look)
        axes.set_xlabel(str(family))
    figure.axes[0].set_ylabel("accuracy")
    figure.axes[2].set_ylabel("accuracy")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=7, ncols=len(names), loc="outside lower center")
    figure.suptitle(f"accuracy with 95% Wilson intervals, {int(curves['n'].iloc[0])} images, one run", fontsize=9)
    return figure


def _named(row: pd.Series, between: str) -> str:
    names = str(row["label_name"]), str(row["predicted_name"])
    label, seen = (name if len(name) <= 14 else f"{name[:12]}.." for name in names)
    return f"#{row['example']}{between}{label}\nseen as {seen}"
