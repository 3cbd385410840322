"""Setup 3 of Shu & Zhu (2019) in numbers: the quantiles of FI on training and test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import columns
from ..common import by_network, groups
from .common import predicted_influence

QUANTILES = (0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 1.0)
TAIL = 0.95  # the quantile of the claim
_REPEATS = 200
_LINEAR = 1e-3  # below it the axis of the figure is linear


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Of `predicted_influence` the rows of "scores" with exact and released FI alone."""
    scores = predicted_influence(run)["scores"]
    return {"scores": scores[["dataset", "model", "seed", "part", "image", "exact", "released"]]}


def quantiles(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The paper's table: upper quantiles of FI in both parts, with 95% percentile bootstrap intervals over the images.

    The interval of the largest value (quantile 1) is left out: no bootstrap says how far it could be.
    """
    generator = np.random.default_rng(0)
    rows = []
    for about, group in groups(tables["scores"], "dataset", "model", "seed", "part"):
        part = about.pop("part")
        for estimator in ("exact", "released"):
            values = group[estimator].to_numpy()
            found = np.quantile(values, QUANTILES)
            lows, highs = _interval(lambda drawn, axis: np.quantile(drawn, QUANTILES, axis=axis), generator, values)
            for q, value, low, high in zip(QUANTILES, found, lows, highs, strict=True):
                limits = {"low": np.nan, "high": np.nan} if q == 1 else {"low": low, "high": high}
                key = {**about, "estimator": estimator, "part": part, "images": len(values)}
                rows.append({**key, "quantile": q, "value": value, **limits})
    return pd.DataFrame(rows)


def claims(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Estimate]]:
    """By a rule fixed before the run: whether upper quantiles grow towards the test set, for every network.

    * upper_quantiles_are_larger_on_the_test_set: the difference of the .95 quantiles of released FI, test images less
      training images, the mean over seeds.
    """
    generator = np.random.default_rng(0)
    rows = []
    for network, group in groups(tables["scores"], "dataset", "model", "seed"):
        test, train = (group["released"][group["part"] == part].to_numpy() for part in ("test", "train"))
        apart = (_tails_apart(test, train), *_interval(_tails_apart, generator, test, train))
        rows.append({**network, "images": len(test), **columns("apart", apart)})
    return {"upper_quantiles_are_larger_on_the_test_set": by_network(pd.DataFrame(rows), "apart")}


def _tails_apart(test: np.ndarray, train: np.ndarray, axis: int = -1) -> Any:
    return np.quantile(test, TAIL, axis=axis) - np.quantile(train, TAIL, axis=axis)


def _interval(statistic: Callable[..., Any], generator: np.random.Generator, *samples: np.ndarray) -> Any:
    """95% percentile bootstrap interval of a statistic of independent samples: (low, high)."""
    options: dict[str, Any] = {"n_resamples": _REPEATS, "method": "percentile", "rng": generator}
    return stats.bootstrap(samples, statistic, vectorized=True, **options).confidence_interval


def draw(table: pd.DataFrame) -> Figure:
    """Upper quantiles of released FI in both parts with 95% bootstrap intervals (the largest has none); first seed."""
    groups = style.first_seed(table[table["estimator"] == "released"])
    pairs = (len(groups) + 1) // 2
    figure, grid = style.subplots(pairs, 2, height=2.3 * pairs, squeeze=False)
    for axes, (name, model, group) in zip(grid.flat, groups, strict=False):
        for part, colour, shift in (("train", style.COLOURS["exact"], -0.1), ("test", style.COLOURS["released"], 0.1)):
            rows = group[group["part"] == part].reset_index(drop=True)
            bars = np.nan_to_num(style.error_bars(rows, "value", ""))
            axes.errorbar(rows.index + shift, rows["value"], yerr=bars, fmt="o", color=colour, markersize=4, label=part)
        axes.set_xticks(range(len(rows)), [f"{q:g}" for q in rows["quantile"]])
        axes.set_yscale("symlog", linthresh=_LINEAR)
        axes.set(ylim=(0, 2 * group["value"].max()), xlabel="quantile")
        axes.set_ylabel(f"released FI\n(linear below {_LINEAR:g})")
        about = f"seed {rows['seed'].iloc[0]}, {rows['images'].iloc[0]} images each"
        axes.set_title(f"{name}, {model}, {about}", fontsize=7)
        axes.legend(fontsize=7)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    return figure
