"""The bridge between the papers: the stability loss against (sigma^2 / 2) tr G, before and after stability training."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ... import style
from ...images.data import Split
from ...ledger import cache
from ...ledger.results import Run
from ...scores.evaluation import mean_interval
from ...zoo import training
from ..common import bound, dataset
from ..overview import divergence
from ..stability import comparison
from ..stability.comparison import colours, label

MEASURES = ("trace", "lambda_max", "ceiling", "fi")


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """The metric tensor of each test image, and the stability loss on noisy copies of it, for every arm.

    Arithmetic is float64; the noise is not clipped, since the limit is about the function, not about pictures.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random), sigmas
    (of the noise, pixels in [0, 1]), draws (noisy copies of each image and sigma), and those of `comparison.standard`.

    Returns:
        "measures", one row per seed, arm, image and sigma: trace and lambda_max (of G, per squared unit of the pixel
        range), ceiling and fi (of the true label), loss (mean KL over draws), loss_variance (of that mean), limit
        (sigma^2 / 2 tr G).
    """
    chosen = run.parameters
    name, images, sigmas, draws = (chosen[key] for key in ("dataset", "images", "sigmas", "draws"))
    split = dataset(run, name).test.sample(images)
    frames = []
    for seed, arm, trained in comparison.networks(run, name, comparison.standard(chosen), task="metric tensors"):
        key = {"model": trained.key, "images": images, "sigmas": list(sigmas), "draws": draws, "seed": seed}
        measure = bound(_measures, trained, split, sigmas, draws, run.device, seed)
        found = cache.table(f"trace/{name}-{chosen['model']}", key | {"device": run.device.type}, measure)
        frames.append(found.assign(seed=seed, arm=arm))
    return {"measures": pd.concat(frames, ignore_index=True)}


def _measures(
    trained: training.Trained, split: Split, sigmas: Sequence[float], draws: int, device: torch.device, seed: int
) -> pd.DataFrame:
    network = copy.deepcopy(trained.model).double()
    x, labels = training.pixels(split.images, device).double(), split.labels.to(device)
    metric = influence.metric_tensor(network, x, wrt="input")
    result = influence.first_order_influence(metric, labels)
    of_image = {
        "image": split.index.numpy(),
        "trace": 255.0**2 * metric.trace()[:, 0].cpu().numpy(),
        "lambda_max": 255.0**2 * metric.lambda_max()[:, 0].cpu().numpy(),
        "ceiling": result.ceiling.cpu().numpy(),
        "fi": result.fi[:, 0].cpu().numpy(),
    }
    frames = []
    for sigma in sigmas:
        # The same noise for every arm and, up to its scale, for every sigma.
        generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 50_000))
        drawn = torch.stack([_drawn(network, metric.log_probs, x, 255 * sigma, generator) for _ in range(draws)])
        columns = {
            "sigma": sigma,
            "loss": drawn.mean(dim=0).cpu().numpy(),
            "loss_variance": (drawn.var(dim=0) / draws).cpu().numpy(),
            "limit": sigma**2 / 2 * of_image["trace"],
        }
        frames.append(pd.DataFrame({**of_image, **columns}))
    return pd.concat(frames, ignore_index=True)


def _drawn(network: nn.Module, log_p: Tensor, x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """KL between the outputs on each image and on one noisy copy of it."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        return divergence(log_p, F.log_softmax(network(x + scale * noise), dim=1))


def losses(measures: pd.DataFrame) -> pd.DataFrame:
    """Stability loss and its limit against sigma: means over images, with two kinds of uncertainty.

    Returns:
        One row per arm and sigma: seeds, images, loss, low, high (95% t interval over seeds, networks and noise),
        limit, ratio (mean over seeds of loss over limit) and ratio_error (its Monte-Carlo standard error, from the
        noise alone).
    """
    rows = []
    for (arm, sigma), group in measures.groupby(["arm", "sigma"], sort=False):
        by_seed = group.groupby("seed").agg(
            loss=("loss", "mean"), limit=("limit", "mean"), variance=("loss_variance", "sum"), images=("image", "size")
        )
        loss, low, high = mean_interval(by_seed["loss"])
        error = np.sqrt(by_seed["variance"]) / by_seed["images"] / by_seed["limit"]
        rows.append(
            {
                "arm": arm,
                "sigma": sigma,
                "seeds": len(by_seed),
                "images": int(by_seed["images"].iloc[0]),
                "loss": loss,
                "low": low,
                "high": high,
                "limit": float(by_seed["limit"].mean()),
                "ratio": float((by_seed["loss"] / by_seed["limit"]).mean()),
                "ratio_error": float(np.sqrt((error**2).sum()) / len(by_seed)),
            }
        )
    return pd.DataFrame(rows)


def effect(measures: pd.DataFrame) -> pd.DataFrame:
    """What training does to each measure: geometric mean over images of (arm / control), 95% t interval over seeds.

    Returns:
        One row per arm but the control and measure: seeds, ratio, low, high.
    """
    once = measures[measures["sigma"] == measures["sigma"].min()]
    rows = []
    for measure in MEASURES:
        wide = once.pivot(index=["seed", "image"], columns="arm", values=measure)
        for arm in [name for name in once["arm"].unique() if name != comparison.CONTROL]:
            logs = (np.log(wide[arm]) - np.log(wide[comparison.CONTROL])).groupby(level="seed").mean()
            mean, low, high = (float(np.exp(value)) for value in mean_interval(logs))
            rows.append({"measure": measure, "arm": arm, "seeds": len(logs), "ratio": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def claims(table: pd.DataFrame, changes: pd.DataFrame) -> dict[str, bool | float]:
    """The limit, and the effect on it of the training at the last alpha.

    `loss_is_half_sigma_squared_trace` holds when at the smallest sigma the ratio of loss and limit is within 3
    Monte-Carlo standard errors of 1 for every arm, and these errors are below 10%; `training_shrinks_the_trace` when
    the interval of the ratio of traces lies below 1.
    """
    smallest = table[table["sigma"] == table["sigma"].min()]
    trace = changes[changes["measure"] == "trace"].iloc[-1]
    gap, error = (smallest["ratio"] - 1).abs(), smallest["ratio_error"]
    return {
        "loss_is_half_sigma_squared_trace": bool((gap <= 3 * error).all() and error.max() < 0.1),
        "largest_gap_at_smallest_sigma": float(gap.max()),
        "largest_error_at_smallest_sigma": float(error.max()),
        "training_shrinks_the_trace": bool(trace["high"] < 1),
        "ratio_of_traces": float(trace["ratio"]),
    }


def draw(table: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Stability loss and (sigma^2 / 2) tr G against sigma; and what training does to the measures."""
    figure = Figure(figsize=(style.WIDTH, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    tint = colours(list(table["arm"].unique()))
    for arm, group in table.groupby("arm", sort=False):
        colour = tint[str(arm)]
        left.plot(group["sigma"], group["limit"], "--", color=colour, linewidth=1)
        errors = np.abs(group[["low", "high"]].to_numpy().T - group["loss"].to_numpy())
        errors[0] = np.minimum(errors[0], 0.95 * group["loss"].to_numpy())  # the axis is logarithmic
        left.errorbar(group["sigma"], group["loss"], errors, fmt="o", color=colour, capsize=2, label=label(str(arm)))
    left.plot([], [], "k--", linewidth=1, label=r"$(\sigma^2/2)\,\mathrm{tr}\,G$")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(r"$\sigma$ (pixels in [0, 1])")
    left.set_ylabel("mean KL (nats)")
    left.set_title(f"{int(table['images'].iloc[0])} images, {int(table['seeds'].iloc[0])} seeds, 95% interval")
    left.legend(fontsize=7)
    measures = list(changes["measure"].unique())
    arms = list(changes["arm"].unique())
    names = {"trace": r"tr $G$", "lambda_max": r"$\lambda_{max}$", "ceiling": "ceiling", "fi": "FI"}
    for i, arm in enumerate(arms):
        ours = changes[changes["arm"] == arm].set_index("measure").loc[measures]
        x = np.arange(len(measures)) + 0.15 * (i - (len(arms) - 1) / 2)
        errors = np.abs(ours[["low", "high"]].to_numpy().T - ours["ratio"].to_numpy())
        right.errorbar(x, ours["ratio"], errors, fmt="o", color=tint[arm], capsize=2, label=label(arm))
    right.axhline(1, color=style.COLOURS["control"], linewidth=1)
    right.set_yscale("log")
    right.set_xticks(range(len(measures)), [names[m] for m in measures])
    right.set_ylabel("ratio to control (geometric mean)")
    return figure
