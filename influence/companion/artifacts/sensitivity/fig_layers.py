"""Setup 2 of Shu & Zhu (2019): FI of all parameters, and of each trainable layer alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

import influence

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.definition import of_logits
from ...scores.detection import spearman
from ...scores.layerwise import rounding_scores, score_layers
from ...zoo import training
from ..common import Subject, networks, scored
from .common import manhattan

_KINDS = {nn.Conv2d: "convolution", nn.BatchNorm2d: "batch normalisation", nn.Linear: "dense"}
_BITS = 4
_MARKERS = {"convolution": ("#0072B2", "o"), "batch normalisation": ("#D55E00", "^"), "dense": ("#000000", "s")}


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Setup 2: FI of all parameters and of each layer, f = -log P(y_true), for training images of each network.

    Returns:
        "whole", one row per data set, model, seed and image, for all parameters: image, label, position (of a Manhattan
        plot), loss, ceiling, exact, released, rank, kept (singular values above the released cut), trace,
        effective_rank (tr(G)^2 / tr(G^2)), departs; "layers", of `summary`, with type; "released", one row per image
        and layer: number, layer, image, released; "rounded", of `rounding_scores` for as many test images;
        "definition", of `by_definition` for 2 images and 6 layers of the first network.
    """
    images, epsilon = run.parameters["images"] or None, run.parameters["epsilon"]
    found: dict[str, list[pd.DataFrame]] = {"whole": [], "layers": [], "released": [], "rounded": [], "definition": []}
    for network in networks(run):
        trained, name, whole = network.trained, network.name, network.dataset
        train, tested = (part.sample(images, seed=network.seed) for part in (whole.train, whole.test))
        scores = scored(run, f"setup2/{name}", score_layers, trained, train, epsilon=epsilon)
        layers = summary(scores)
        kinds = {name: _KINDS.get(type(module), "other") for name, module in trained.model.named_modules()}
        parts = {
            "whole": scores[scores["number"] == 0].drop(columns=["number", "layer", "near_cut"]),
            "layers": layers.assign(type=layers["layer"].map(kinds).fillna("all")),
            "released": scores.loc[scores["number"] > 0, ["number", "layer", "image", "released"]],
            "rounded": scored(run, f"setup2/rounded-{name}", rounding_scores, trained, tested, bits=_BITS),
        }
        if not found["definition"]:
            parts["definition"] = by_definition(network, images=2, layers=6, device=run.device)
        for name, frame in parts.items():
            found[name].append(frame.assign(**network.columns))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per layer of one network: means over the images, some with 95% bootstrap intervals (_low, _high).

    `alignment` is the mean of exact FI over its ceiling, `released_share` mean released FI over that of all parameters.
    `gap_at_full_rank` is the largest relative difference of exact FI and ceiling over the images where the layer has
    rank K - 1 (by definition of the estimator no more than rounding), `gap_to_all` that of a layer's exact FI and that
    of all parameters over the same images; `kept` the mean number of singular values above the released cut,
    `cut` the share of images that lost a direction to it, `zero` of those whose released FI is 0, and `constant` of
    those that lost none and yet differ from exact FI by more than 1%, through the constant e.
    """
    whole = scores[scores["number"] == 0].set_index("image")
    full_rank = scores["rank"].max()
    # The same images for every layer and quantity, so that a layer of full rank has a share of exactly 1.
    draws = np.random.default_rng(0).integers(0, len(whole), (200, len(whole)))
    rows = []
    for (number, layer), group in scores.groupby(["number", "layer"], sort=True):
        full = group[group["rank"] == full_rank]
        trace, alignment = group["trace"].to_numpy(), (group["exact"] / group["ceiling"]).to_numpy()
        released, of_all = group["released"].to_numpy(), whole["released"].loc[group["image"]].to_numpy()
        intervals = {
            "trace": trace[draws].mean(axis=1),
            "alignment": alignment[draws].mean(axis=1),
            "released_share": released[draws].mean(axis=1) / of_all[draws].mean(axis=1),
        }
        ends = {
            f"{name}_{end}": float(np.quantile(drawn, q))
            for name, drawn in intervals.items()
            for end, q in (("low", 0.025), ("high", 0.975))
        }
        rows.append(
            {
                "number": number,
                "layer": layer,
                "size": int(group["size"].iloc[0]),
                "images": len(group),
                "rank": group["rank"].mean(),
                "full_rank_share": len(full) / len(group),
                "gap_at_full_rank": float((full["exact"] / full["ceiling"] - 1).abs().max()),
                "gap_to_all": float((full["exact"] / full["image"].map(whole["exact"]) - 1).abs().max()),
                "alignment": alignment.mean(),
                "released_share": released.mean() / of_all.mean(),
                "trace": trace.mean(),
                **ends,
                "effective_rank": group["effective_rank"].mean(),
                "kept": group["kept"].mean(),
                "cut": float((group["kept"] < group["rank"]).mean()),
                "zero": float((group["released"] == 0).mean()),
                "constant": float((group["departs"] & (group["kept"] >= group["rank"])).mean()),
                "largest_released": group["released"].max(),
                "largest_exact": group["exact"].max(),
            }
        )
    return pd.DataFrame(rows)


def by_definition(subject: Subject, *, images: int, layers: int, device: torch.device) -> pd.DataFrame:
    """FI of single layers straight from the definition (float64, thin SVD of L0), for some images and layers."""
    network = copy.deepcopy(subject.trained.model).double()
    split = subject.dataset.train.sample(images, seed=subject.seed)
    x = training.pixels(split.images, device).double()
    metric = influence.metric_tensor(network, x, wrt="layers")
    result = influence.first_order_influence(metric, split.labels.to(device))
    modules, rows = dict(network.named_modules()), []
    for number in np.linspace(0, len(metric.blocks) - 1, layers).round().astype(int):
        weights = list(modules[metric.blocks[number]].parameters(recurse=False))
        for i in range(len(split)):
            with torch.enable_grad():
                value = float(of_logits(network(x[i : i + 1])[0], int(split.labels[i]), weights))
            rows.append(
                {
                    "layer": metric.blocks[number],
                    "image": int(split.index[i]),
                    "by_definition": value,
                    "ceiling": float(result.ceiling[i]),
                    "exact": float(result.fi[i, number]),
                    "rank": int(result.rank[i, number]),
                }
            )
    return pd.DataFrame(rows)


def by_rounding(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The rounded layers beside their scores on training images.

    `predicted` is half the mean squared error of a weight times the trace of G, the divergence of the second order.
    """
    keys = ["dataset", "model", "seed", "layer"]
    scores = tables["layers"][[*keys, "number", "type", "size", "trace", "released_share"]]
    found = tables["rounded"].merge(scores, on=keys, validate="one_to_one")
    return found.assign(predicted=found["error"] * found["trace"] / 2)


_RIVALS = {"released_share": "released FI", "size": "number of weights"}


def _order_gained(frame: pd.DataFrame, rival: str, of: str) -> Estimate:
    """Spearman of `predicted` with the divergence less that of a rival, bootstrap interval paired over layers."""

    def gain(ours: np.ndarray, other: np.ndarray, target: np.ndarray, *, axis: int = -1) -> np.ndarray:
        # Scores that are the same for every layer order nothing: 0.
        found, rivals = (np.nan_to_num(spearman(score, target)) for score in (ours, other))
        return found - rivals

    columns = tuple(frame[column].to_numpy() for column in ("predicted", rival, "divergence"))
    options: dict[str, Any] = {"paired": True, "n_resamples": 999, "method": "percentile"}
    found = stats.bootstrap(columns, gain, rng=np.random.default_rng(0), **options).confidence_interval
    return Estimate(float(gain(*columns)), float(found.low), float(found.high), len(frame), of)


def claims(tables: Mapping[str, pd.DataFrame]) -> dict[str, bool | float | Estimate | list[Estimate]]:
    """Setup 2 by rules fixed before the run.

    * DATASET_MODEL_largest_released_all, _layers: the largest released FI of any seed for all parameters, and for one
      layer, beside the paper's printed axes.
    * layers_differ_in_exact_fi (what the paper reads off the columns): the share of layers with a mean alignment below
      .99, in the network where it is largest. The interval counts the layers whose own interval lies below .99, and
      those whose interval reaches below it.
    * layers_differ_in_released_fi: the same for mean released FI over that of all parameters.
    * full_rank_layers_agree: at rank K - 1 every layer agrees per image with all parameters and the ceiling to 1e-6,
      and so does FI from its definition.
    * traces_differ: the largest trace of a layer is over ten times the smallest, for every network.
    * trace_orders_rounded_layers: rounding the weights of one layer to 4 bits, Spearman over layers of `predicted` with
      the mean divergence on test images, less that of released FI and less that of the layer's size.
    """
    table, definition = tables["layers"], tables["definition"]
    layers = table[table["number"] > 0]
    networks = layers.groupby(["dataset", "model", "seed"])
    full = definition[definition["rank"] == definition["rank"].max()]
    gaps = max(table["gap_at_full_rank"].max(), layers["gap_to_all"].max())
    by_definition_gap = float((full["by_definition"] / full["ceiling"] - 1).abs().max())
    rounded = [
        _order_gained(frame, rival, f"{name} {model} against {label}")
        for (name, model, _), frame in by_rounding(tables).groupby(["dataset", "model", "seed"], sort=False)
        for rival, label in _RIVALS.items()
    ]
    return {
        **_largest(table[table["number"] == 0], "all"),
        **_largest(layers, "layers"),
        "layers_differ_in_exact_fi": _differing(networks, "alignment"),
        "layers_differ_in_released_fi": _differing(networks, "released_share"),
        "full_rank_layers_agree": bool(max(gaps, by_definition_gap) <= 1e-6),
        "traces_differ": bool((networks["trace"].max() / networks["trace"].min() > 10).all()),
        "trace_orders_rounded_layers": rounded,
    }


def _differing(networks: Iterable[tuple[Any, pd.DataFrame]], column: str) -> Estimate:
    """Share of layers below .99 in the network where it is largest."""
    shares = []
    for (name, model, seed), layers in networks:
        value, low, high = (float((layers[f"{column}{end}"] < 0.99).mean()) for end in ("", "_high", "_low"))
        shares.append(Estimate(value, low, high, int(layers["images"].iloc[0]), f"{name} {model} {seed}"))
    return max(shares, key=lambda share: share.value)


def _largest(table: pd.DataFrame, of: str) -> dict[str, float]:
    return {
        f"{name}_{model}_largest_released_{of}": float(group["largest_released"].max())
        for (name, model), group in table.groupby(["dataset", "model"], sort=False)
    }


def draw_by_class(whole: pd.DataFrame) -> Figure:
    """Manhattan plots by class for all parameters: released FI in full, zoomed, and exact FI; first seed."""
    groups = style.first_seed(whole)
    figure, grid = style.subplots(len(groups), 3, height=1.8 * len(groups), squeeze=False)
    for row, (name, model, group) in zip(grid, groups, strict=True):
        for axes, column in zip(row, ("released", "released", "exact"), strict=True):
            manhattan(axes, group["position"], group[column], group["label"])
        zoom = float(np.quantile(group["released"], 0.9)) or float(group["released"].max())
        row[0].set(ylim=(0, None), ylabel=f"{name}\n{model}\nFI of all parameters")
        row[1].set_ylim(0, zoom if zoom > 0 else 1)
        row[2].set_yscale("log")
        for axes, title in zip(row, ("as released", "as released, lower 90%", "exact (log scale)"), strict=True):
            axes.set_title(f"{title}, {len(group)} images", fontsize=8)
            axes.set_xlabel("class")
    return figure


def draw_by_layer(released: pd.DataFrame) -> Figure:
    """The paper's figure: every image in each layer's column, in full and zoomed, blocks on the axis; first seed."""
    groups = style.first_seed(released)
    figure, grid = style.subplots(2 * len(groups), 1, height=2.6 * len(groups))
    for row, (name, model, group) in enumerate(groups):
        zoom = float(np.quantile(group["released"], 0.9)) or float(group["released"].max())
        for axes, top in zip(grid[2 * row : 2 * row + 2], (None, zoom), strict=True):
            shade(axes, group)
            colours = style.class_colours(10)
            blocks = pd.factorize(_block(group["layer"]))[0]
            style.dots(axes, group["number"], group["released"], blocks % 10, colours, size=1.7)
            axes.set(ylim=(0, top), ylabel="released FI" if top is None else "lower 90%")
        counts = f"{group['number'].nunique()} trainable layers, {group['image'].nunique()} images"
        grid[2 * row].set_title(f"{name}, {model}: {counts}", fontsize=9)
        grid[2 * row + 1].set_xlabel("trainable layer number")
    return figure


def draw_per_layer(table: pd.DataFrame) -> Figure:
    """What does differ between layers: trace, effective rank; where released FI departs from exact FI; first seed."""
    groups = style.first_seed(table[table["number"] > 0])
    figure, grid = style.subplots(3 * len(groups), 1, height=3.6 * len(groups), width=1.1)
    for row, (name, model, group) in enumerate(groups):
        trace, rank, departs = grid[3 * row : 3 * row + 3]
        x = group["number"]
        for kind, part in group.groupby("type", sort=False):
            colour, marker = _MARKERS.get(str(kind), ("#999999", "v"))
            look = {"color": colour, "fmt": marker, "markersize": 2.5, "elinewidth": 0.8, "linewidth": 0}
            trace.errorbar(part["number"], part["trace"], style.error_bars(part, "trace"), label=str(kind), **look)
        trace.set(yscale="log", ylabel="trace of G")
        trace.set_title(f"{name}, {model}: means over {group['images'].iloc[0]} images, 95% intervals", fontsize=9)
        dots = {"linewidth": 0, "marker": ".", "markersize": 3}
        rank.plot(x, group["rank"], color=style.COLOURS["exact"], label="rank", **dots)
        rank.plot(x, group["kept"], color=style.COLOURS["released"], label="above the released cut", **dots)
        rank.plot(x, group["effective_rank"], color=style.COLOURS["ceiling"], label="effective rank", **dots)
        rank.set(ylabel="directions", ylim=(0, group["rank"].max() + 0.5))
        departs.plot(x, group["alignment"], color=style.COLOURS["exact"], label="exact FI / ceiling", linewidth=0.7)
        departs.plot(x, group["cut"], color=style.COLOURS["released"], label="images: a direction cut", **dots)
        departs.plot(x, group["zero"], color=style.COLOURS["ceiling"], label="images: released FI = 0", **dots)
        departs.plot(x, group["constant"], color=style.STABILITY[0], label="images: moved > 1% by e", **dots)
        departs.set(ylabel="share", ylim=(-0.03, 1.03), xlabel="trainable layer number")
        for axes in (trace, rank, departs):
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
            shade(axes, group)
    return figure


def draw_rounded(rounded: pd.DataFrame) -> Figure:
    """The divergence after a layer's weights were rounded to 4 bits, against three scores of the layer; first seed."""
    groups = style.first_seed(rounded)
    columns = {"predicted": r"error$^2$ tr $G$ / 2 (nats)", **_RIVALS, "released_share": "released FI / that of all"}
    figure, grid = style.subplots(
        len(groups), len(columns), height=1.9 * len(groups), squeeze=False, sharex="col", sharey="row"
    )
    for row, (name, model, group) in zip(grid, groups, strict=True):
        for axes, column in zip(row, columns, strict=True):
            for kind, part in group.groupby("type", sort=False):
                colour, marker = _MARKERS.get(str(kind), ("#999999", "v"))
                look = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 0}
                axes.plot(part[column], part["divergence"], label=str(kind), **look)
            order = spearman(group[column], group["divergence"])
            axes.set_title(f"Spearman {order:.2f}, {len(group)} layers", fontsize=8)
            axes.set(xscale="linear" if column == "released_share" else "log", yscale="log")
            if column == "predicted":
                ends = [min(group[column]), max(group[column])]
                axes.plot(ends, ends, color="0.5", linewidth=0.8, linestyle="--")
        row[0].set_ylabel(f"{name}\n{model}\nKL after rounding (nats)")
    for axes, label in zip(grid[-1], columns.values(), strict=True):
        axes.set_xlabel(label, fontsize=8)
    grid[0, -1].legend(fontsize=7)
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
    return layer.map({name: name.removeprefix("network.").partition(".")[0] for name in layer.unique()})
