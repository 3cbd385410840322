"""Accuracy and calibration of the networks, each with its gate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from influence.progress import progress_bar

from ... import style
from ...images.data import Split
from ...ledger.results import Run
from ...scores.detection import columns
from ...scores.evaluation import expected_calibration_error, mean_interval
from ...zoo import recipes, training
from ..common import groups, named, scored


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Accuracy, mean loss and calibration error of each network on its training, validation and test images.

    Networks that others trained saw all training images of their set and have no validation part; every test image is
    taken.

    Returns:
        "networks", one row per network and part: network, dataset, seed, part, n (images), accuracy, loss
        (mean -log P_y, nats), calibration_error, gate (the accuracy below which no verdict rests on the network; NaN
        for none).
    """
    names = recipes.with_seeds(run.parameters["networks"], run.parameters["seeds"])
    rows = []
    for name in progress_bar(names, desc="accuracies", unit="network", leave=False):
        chosen = named(run, name)
        for part, split in chosen.parts.items():
            sample = split if part == "test" else split.sample(run.parameters["images"] or None)
            found = scored(run, f"accuracy/{chosen.family}", quality, chosen, sample)
            about = {"network": chosen.family, "dataset": chosen.dataset, "seed": chosen.seed, "part": part}
            values = {str(column): found[column].iloc[0] for column in found}
            rows.append({**about, **values, "gate": chosen.gate.get(part, float("nan"))})
    return {"networks": pd.DataFrame(rows).astype({"n": int})}


def claims(table: pd.DataFrame) -> dict[str, bool | float]:
    """Whether every network meets its gate; beside it the test accuracy of each."""
    tests = table[table["part"] == "test"]
    columns = zip(tests["dataset"], tests["network"], tests["accuracy"], strict=True)
    found: dict[str, bool | float] = {f"{data}_{network}_test": float(value) for data, network, value in columns}
    return found | {"every_gate_is_met": bool(table["gate_met"].all())}


def quality(model: nn.Module, split: Split, device: torch.device) -> pd.DataFrame:
    """Images, accuracy, mean loss and calibration error of a network on a split: one row."""
    logits = training.predict(model, split.images, device=device).double()
    correct = logits.argmax(1) == split.labels
    row = {
        "n": len(split),
        "accuracy": float(correct.double().mean()),
        "loss": float(F.cross_entropy(logits, split.labels)),
        "calibration_error": expected_calibration_error(logits.softmax(1).amax(1).numpy(), correct.numpy()),
    }
    return pd.DataFrame([row])


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean over seeds of the networks' rows, with the 95% t intervals over seeds, in fractions."""
    rows, error = [], "calibration_error"
    for about, group in groups(tables["networks"], "dataset", "network", "part"):
        rows.append(
            {
                **about,
                "images": int(group["n"].iloc[0]),
                "seeds": len(group),
                **columns("accuracy", mean_interval(group["accuracy"], within=(0, 1)), ""),
                "loss": group["loss"].mean(),
                **columns(error, mean_interval(group[error], within=(0, 1)), "calibration_"),
                "gate": group["gate"].iloc[0],
                "gate_met": bool((group["accuracy"] >= group["gate"].fillna(0)).all()),
            }
        )
    return pd.DataFrame(rows)


_PARTS = {"train": ("#999999", "o"), "validation": ("#56B4E9", "s"), "test": ("#0072B2", "D")}


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy and calibration error of each network on its images with its gate, one row of panels per data set."""
    counts = table.groupby("dataset", sort=False)["network"].nunique()
    height, ratios = 1.0 * len(counts) + 0.42 * counts.sum() + 0.4, 1.5 + counts
    figure, panels = style.subplots(len(counts), 2, height=height, squeeze=False, sharey="row", height_ratios=ratios)
    for (left, right), name in zip(panels, counts.index, strict=True):
        group = table[table["dataset"] == name]
        _by_network(left, group, "accuracy", "")
        _by_network(right, group, "calibration_error", "calibration_")
        networks = list(group["network"].unique())
        gates = group[(group["part"] == "test") & group["gate"].notna()]
        rows = [networks.index(network) for network in gates["network"]]
        if rows:
            left.plot(gates["gate"], rows, "|", color="#D55E00", markersize=14, markeredgewidth=2, label="gate (test)")
        left.set_yticks(range(len(networks)), [style.network(network) for network in networks])
        left.set(ylim=(len(networks) - 0.5, -0.5), xlabel="accuracy")
        # No error: the confidences can be taken at their word.
        right.set(xlim=(0, None), xlabel="expected calibration error")
        left.set_title(style.name(name), loc="left")
        right.tick_params(labelleft=False)
    legends = [axes.get_legend_handles_labels() for axes in panels[:, 0]]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _by_network(axes: Axes, group: pd.DataFrame, value: str, ends: str) -> None:
    """A row for each network, a point for each part with its interval over seeds; no bar where there is one seed."""
    networks = list(group["network"].unique())
    for place, (part, (colour, marker)) in enumerate(_PARTS.items()):
        ours = group[group["part"] == part]
        bars = style.error_bars(ours, value, ends)
        bars[:, ours["seeds"] == 1] = 0
        rows = np.array([networks.index(network) for network in ours["network"]]) + 0.2 * (place - 1)
        axes.errorbar(ours[value], rows, xerr=bars, fmt=marker, markersize=4, capsize=2, color=colour, label=part)
    axes.grid(axis="x", alpha=0.3)
