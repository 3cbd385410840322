"""Precision@1 under JPEG, thumbnail and crop distortion (Zheng et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ... import style
from ...ledger.results import Run
from . import comparison, fig_jpeg_quality
from .comparison import colours, label, standard


def classification(
    run: Run,
    model: str,
    *,
    seeds: Mapping[str, Sequence[int]],
    steps: Mapping[str, int],
    alphas: Sequence[float],
    sigma: float,
    learning_rate: float,
    versions: Sequence[str],
    images: int | None,
) -> pd.DataFrame:
    """The rows of `arms.measure` for several data sets, each with seeds and steps of its own.

    Args:
        run: the artifact.
        model: a name of `models.NAMES`.
        seeds: data set -> seeds.
        steps: data set -> steps of every arm.
        alphas: of the stability arms.
        sigma: of the noise, pixels in [0, 1].
        learning_rate: its peak.
        versions: names of `distortions.apply`.
        images: test images of each data set, drawn at random; None for all.
    """
    frames = []
    for name, chosen_seeds in seeds.items():
        chosen = standard(alphas, sigma=sigma, steps=steps[name], learning_rate=learning_rate)
        frame = comparison.measure(run, name, model, chosen, seeds=chosen_seeds, versions=versions, images=images)
        frames.append(frame.assign(dataset=name))
    return pd.concat(frames, ignore_index=True)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Both precisions of each arm, long form, with paired gains over the control."""
    frames = []
    for k in (1, 5):
        value = f"precision_at_{k}"
        table = comparison.summary(runs, value=value, within=("dataset", "distortion"))
        frames.append(table.rename(columns={value: "precision"}).assign(at=k))
    columns = ["dataset", "distortion", "at", "arm", "seeds", "precision"]
    columns += ["low", "high", "gain", "gain_low", "gain_high"]
    return pd.concat(frames, ignore_index=True)[columns]


def claims(runs: pd.DataFrame, arm: str, *, lowest: int) -> dict[str, bool | float]:
    """Claims (i) and (ii) for one arm on every data set: each holds when it holds on all of them."""
    found = {
        str(name): fig_jpeg_quality.claims(group, arm, lowest=lowest)
        for name, group in runs.groupby("dataset", sort=False)
    }
    claims: dict[str, bool | float] = {
        item: all(bool(values[item]) for values in found.values())
        for item in ("clean_accuracy_does_not_fall", "gain_grows_as_quality_falls")
    }
    for name, values in found.items():
        claims |= {f"{name}_{item}": values[item] for item in ("clean_change", "growth_of_gain")}
    return claims


def draw(table: pd.DataFrame) -> Figure:
    """Precision@1 of each arm on each distortion, one panel per data set, with 95% intervals over seeds."""
    names = list(table["dataset"].unique())
    figure = Figure(figsize=(style.WIDTH, 3.0))
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        group = table[(table["dataset"] == name) & (table["at"] == 1)]
        _bars(axes, group, across="distortion", value="precision")
        axes.set_title(f"{style.name(name)}: mean and 95% interval, {int(group['seeds'].iloc[0])} seeds")
        axes.set_ylabel("precision@1")
        low = max(0.0, float(group["low"].min()) - 0.02)
        axes.set_ylim(low, min(1.0, float(group["high"].max()) + 0.02))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _bars(axes: Axes, group: pd.DataFrame, *, across: str, value: str) -> None:
    groups, arms = list(group[across].unique()), list(group["arm"].unique())
    tint = colours(arms)
    for i, arm in enumerate(arms):
        ours = group[group["arm"] == arm].set_index(across).loc[groups]
        x = np.arange(len(groups)) + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
        errors = np.abs(ours[["low", "high"]].to_numpy().T - ours[value].to_numpy())
        axes.errorbar(x, ours[value], errors, fmt="o", color=tint[arm], markersize=4, capsize=2, label=label(arm))
    axes.set_xticks(range(len(groups)), groups)
