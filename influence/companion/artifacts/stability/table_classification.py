"""Precision@1 under JPEG, thumbnail and crop distortion (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from . import comparison, fig_jpeg_quality
from .comparison import ORIGINAL, own_noise, standard


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Precision@1 and @5 on original and compressed test images of several data sets, for each arm.

    Parameters of the run: datasets, model, seeds (of the networks), images (of each test part, drawn at random; 0 for
    all), qualities (of JPEG, 1..100), and those of `comparison.standard`.

    Returns:
        "runs", one row per data set, seed, arm and distortion ("original", "jpeg-q", and the noise that the arms are
        trained on): n (images), precision_at_1, precision_at_5.
    """
    chosen = run.parameters
    versions = [ORIGINAL, *(f"jpeg-{quality}" for quality in chosen["qualities"]), own_noise(chosen)]
    arms = standard(chosen)
    frames = [comparison.measure(run, name, arms, versions).assign(dataset=name) for name in chosen["datasets"]]
    return {"runs": pd.concat(frames, ignore_index=True)}


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Both precisions of each arm, long form, with paired gains over the control."""
    runs = tables["runs"].rename(columns={"precision_at_1": 1, "precision_at_5": 5})
    long = runs.melt(["dataset", "seed", "arm", "distortion"], [1, 5], "at", "precision")
    return comparison.summary(long, value="precision", within=("dataset", "distortion", "at"))


def claims(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, list[Estimate]]:
    """The claims of `fig_jpeg_quality`, for each data set."""
    groups = runs.groupby("dataset", sort=False)
    found = [fig_jpeg_quality.claims(group, parameters, of=str(name)) for name, group in groups]
    return {item: [of_one[item] for of_one in found] for item in found[0]}


def gains_at_5(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, list[Estimate]]:
    """Gain of each alpha in precision@5 on originals and compressed images, for each data set; none is scored."""
    versions = [ORIGINAL, *(f"jpeg-{quality}" for quality in parameters["qualities"])]
    groups = [(str(name), group) for name, group in runs.groupby("dataset", sort=False)]
    found: dict[str, list[Estimate]] = {}
    for arm in map(comparison.stability, parameters["alphas"]):
        gains = [(name, comparison.gains(group, arm, value="precision_at_5")) for name, group in groups]
        found |= {f"at_5_{v}, {arm}": [comparison.paired(gain.loc[v], name) for name, gain in gains] for v in versions}
    return found


def draw(table: pd.DataFrame) -> Figure:
    """Precision@1 of each arm on each distortion, one panel per data set, with 95% intervals over seeds."""
    names = list(table["dataset"].unique())
    figure, panels = style.subplots(1, len(names), height=3.0, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        group = table[(table["dataset"] == name) & (table["at"] == 1)]
        comparison.bars(axes, group, across="distortion", value="precision")
        axes.set_title(f"{style.name(name)}: mean and 95% interval, {int(group['seeds'].iloc[0])} seeds")
        low, high = max(0.0, float(group["low"].min()) - 0.02), min(1.0, float(group["high"].max()) + 0.02)
        axes.set(ylim=(low, high), ylabel="precision@1")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
