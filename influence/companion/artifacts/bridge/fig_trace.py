"""The bridge between the papers: the stability loss against (sigma^2 / 2) tr G, before and after stability training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ... import style
from ...images.data import Split
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import columns
from ...scores.evaluation import mean_interval
from ...zoo import training
from ..common import dataset, estimates, groups, named, over_networks, scored
from ..overview import divergence
from ..stability import comparison
from ..stability.comparison import colours, label

MEASURES = ("trace", "lambda_max", "ceiling", "fi")
CONFIDENCE = ("least sure third", "middle third", "surest third")

_RESAMPLES = 500
_OPEN = 99.0  # the logarithm of a ratio of one network
_SIGMA = r"$\sigma$ (pixels in [0, 1])"


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """The metric tensor of each test image, and the stability loss on noisy copies of it, for networks and arms.

    Arithmetic is float64; the noise is not clipped, since the limit is about the function, not about pictures.

    Returns:
        "measures", one row per seed, arm, image and sigma: trace and lambda_max (of G, per squared unit of the pixel
        range), p_top (the largest probability), ceiling and fi (of the true label), loss (mean KL over draws),
        loss_variance (of that mean), quadratic (mean of 1/2 eps^T G eps over the same draws), limit (sigma^2 / 2 tr G,
        the mean of that over all draws). "networks", the same for each of `networks`, in the place of seed and arm.
    """
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"])
    measured, others = [], []
    arms = comparison.standard(chosen)
    table, options = f"trace/{chosen['dataset']}", {"sigmas": chosen["sigmas"], "draws": chosen["draws"]}
    for seed, arm, trained in comparison.networks(run, chosen["dataset"], arms, task="metric tensors"):
        frame = scored(run, table, measures_of, trained, split, seed=seed, **options)
        measured.append(frame.assign(seed=seed, arm=arm))
    for name in chosen["networks"]:
        network = named(run, name)
        frame = scored(run, table, measures_of, network, split, seed=network.seed, **options)
        others.append(frame.assign(network=name))
    found = {"measures": pd.concat(measured, ignore_index=True)}
    return found | ({"networks": pd.concat(others, ignore_index=True)} if others else {})


def measures_of(
    model: nn.Module,
    split: Split,
    sigmas: Sequence[float],
    draws: int,
    device: torch.device,
    seed: int,
    only: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The rows of one network, with `only` for the images at these places of the split alone, with the same noise."""
    network, shape = copy.deepcopy(model).double(), split.images.shape
    places = list(range(len(split)) if only is None else only)
    split = split.take(places)
    x, labels = training.pixels(split.images, device).double(), split.labels.to(device)
    metric = influence.metric_tensor(network, x, wrt="input")
    result = influence.first_order_influence(metric, labels)
    of_image = {
        "image": split.index.numpy(),
        "trace": 255.0**2 * metric.trace()[:, 0].cpu().numpy(),
        "lambda_max": 255.0**2 * metric.lambda_max()[:, 0].cpu().numpy(),
        "p_top": metric.log_probs.amax(1).exp().cpu().numpy(),
        "ceiling": result.ceiling.cpu().numpy(),
        "fi": result.fi[:, 0].cpu().numpy(),
    }
    # The same noise for every arm and, up to its scale, for every sigma.
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 50_000))
    losses, forms = [], []
    for _ in range(draws):
        noise = 255 * torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)[places]
        forms.append(_quadratic(network, x, noise))
        with torch.no_grad():
            noisy = (F.log_softmax(network(x + sigma * noise), dim=1) for sigma in sigmas)
            losses.append(torch.stack([divergence(metric.log_probs, log_q) for log_q in noisy]))
    loss, form = torch.stack(losses).cpu(), torch.stack(forms).mean(dim=0).cpu().numpy()
    frames = []
    for place, sigma in enumerate(sigmas):
        columns = {
            "sigma": sigma,
            "loss": loss[:, place].mean(dim=0).numpy(),
            "loss_variance": (loss[:, place].var(dim=0) / draws).numpy(),
            "quadratic": sigma**2 * form,
            "limit": sigma**2 / 2 * of_image["trace"],
        }
        frames.append(pd.DataFrame({**of_image, **columns}))
    return pd.concat(frames, ignore_index=True)


def _quadratic(network: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """1/2 eps^T G eps = 1/2 sum_k P_k (d log P_k(x + t eps) / dt)^2 of each image at t = 0, by a JVP."""
    with torch.no_grad():
        log_p, slope = torch.func.jvp(lambda z: F.log_softmax(network(z), dim=1), (x,), (noise,))[:2]
    return (log_p.exp() * slope.square()).sum(dim=1) / 2


def reach(frame: pd.DataFrame) -> pd.DataFrame:
    """How far the law carries, for one network or those of several seeds: loss over quadratic form of the same draws.

    Returns:
        One row per sigma and third of the images by p_top, and for all of them ("all"): images and seeds (how many
        there are), the median of the ratio with its 95% interval (low, high; percentile bootstrap over images and over
        seeds), and its quantiles .1 and .9 (q10, q90).
    """
    rows = []
    for sigma, group in frame.groupby("sigma"):
        ratio = group["loss"] / group["quadratic"]
        thirds = pd.qcut(group["p_top"].rank(method="first"), 3, labels=list(CONFIDENCE))
        parts = {"all": ratio} | {name: ratio[thirds == name] for name in CONFIDENCE}
        seeds = group.get("seed", pd.Series(0, index=group.index))
        for name, part in parts.items():
            # The same images under several networks are not so many more images: both are drawn anew.
            wide = part.groupby([group["image"], seeds]).first().unstack().to_numpy()
            generator = np.random.default_rng(0)
            images, networks = (generator.integers(0, count, (_RESAMPLES, count)) for count in wide.shape)
            drawn = np.nanmedian(wide[images[:, :, None], networks[:, None, :]], axis=(1, 2))
            low, high = np.nanquantile(drawn, [0.025, 0.975])
            q10, median, q90 = np.quantile(part, [0.1, 0.5, 0.9])
            rows.append((name, sigma, *wide.shape, median, low, high, q10, q90))
    return pd.DataFrame(rows, columns=["third", "sigma", "images", "seeds", "median", "low", "high", "q10", "q90"])


def law(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`reach` of the networks that were measured as they are, and of control and last alpha over all seeds."""
    measures = tables["measures"]
    arms = list(measures["arm"].unique())
    parts = [reach(measures[measures["arm"] == arm]).assign(network=arm) for arm in (arms[0], arms[-1])]
    if "networks" in tables:
        groups = tables["networks"].groupby("network", sort=False)
        parts += [reach(group).assign(network=name) for name, group in groups]
    return pd.concat(parts, ignore_index=True)


def losses(measures: pd.DataFrame) -> pd.DataFrame:
    """Stability loss and its limit against sigma: means over images, with two kinds of uncertainty.

    Returns:
        One row per arm and sigma: seeds, images, loss, low, high (95% t interval over seeds, networks and noise),
        limit, ratio (mean over seeds of loss over limit) and ratio_error (its Monte-Carlo standard error, from the
        noise alone).
    """
    rows = []
    for about, group in groups(measures, "arm", "sigma"):
        by_seed = group.groupby("seed").agg(
            loss=("loss", "mean"), limit=("limit", "mean"), variance=("loss_variance", "sum"), images=("image", "size")
        )
        error = np.sqrt(by_seed["variance"]) / by_seed["images"] / by_seed["limit"]
        row = {**about, "seeds": len(by_seed), "images": int(by_seed["images"].iloc[0])}
        row |= columns("loss", mean_interval(by_seed["loss"]), "") | {"limit": float(by_seed["limit"].mean())}
        row |= {"ratio": float((by_seed["loss"] / by_seed["limit"]).mean())}
        rows.append(row | {"ratio_error": float(np.sqrt((error**2).sum()) / len(by_seed))})
    return pd.DataFrame(rows)


def effect(measures: pd.DataFrame) -> pd.DataFrame:
    """What training does to each measure: geometric mean over images of (arm / control), 95% t interval over seeds."""
    once = measures[measures["sigma"] == measures["sigma"].min()]
    rows = []
    for measure in MEASURES:
        for arm in [name for name in once["arm"].unique() if name != comparison.CONTROL]:
            logs = _logs(once, arm, measure).groupby(level="seed").mean()
            mean, low, high = (float(np.exp(end)) for end in mean_interval(logs))
            rows.append({"measure": measure, "arm": arm, "seeds": len(logs), "ratio": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def claims(
    measures: pd.DataFrame, changes: pd.DataFrame, reached: pd.DataFrame, *, sigma: float
) -> dict[str, bool | Estimate | list[Estimate]]:
    """The limit, how far it reaches, and the effect of the training at the last alpha.

    * loss_is_the_quadratic_form: at the smallest sigma the median of loss over 1/2 eps^T G eps of the same draws is
      within .01 of 1 for every network.
    * departure_at_the_training_noise: that median at `sigma` for each network; the law holds where it is 1.
      departure_of_the_surest_third: the same for the third of the images that a network is surest of.
    * ratio_of_traces: trace after the training over that under the control, the geometric mean over images.
    * ratio_of_mean_traces: the mean trace over images after the training over that under the control.
    * ratio_of_traces_by_confidence: the first ratio for each third of the images of each network by confidence.
    """
    whole = reached[reached["third"] == "all"]
    there = reached[reached["sigma"] == sigma]
    departures = {
        f"departure_{name}": estimates(there[there["third"] == third], "median", "", of="{network}")
        for name, third in (("at_the_training_noise", "all"), ("of_the_surest_third", CONFIDENCE[-1]))
    }
    least = whole.loc[whole["sigma"] == whole["sigma"].min(), "median"]
    arm = str(changes["arm"].iloc[-1])
    once = measures[measures["sigma"] == measures["sigma"].min()]
    means = once.groupby(["seed", "arm"])["trace"].mean().unstack("arm")
    logs = _logs(once, arm, "trace")
    return {
        "loss_is_the_quadratic_form": bool(((least - 1).abs() <= 0.01).all()),
        **departures,
        "ratio_of_traces": _ratio(logs.groupby(level="seed").mean()),
        "ratio_of_mean_traces": _ratio(np.log(means[arm] / means[comparison.CONTROL])),
        "ratio_of_traces_by_confidence": _by_confidence(once, arm),
    }


def _ratio(logs: pd.Series, of: str = "") -> Estimate:
    """Geometric mean over networks of what these are the logarithms of, with its 95% t interval."""
    found = over_networks(logs, of, within=_OPEN)
    value, low, high = (float(np.exp(end)) for end in (found.value, found.low, found.high))
    return replace(found, value=value, low=low, high=high, ratio=True)


def _logs(once: pd.DataFrame, arm: str, measure: str) -> pd.Series:
    """Logarithm of a measure after an arm over that under the control, by seed and image."""
    wide = once.pivot(index=["seed", "image"], columns="arm", values=measure)
    return np.log(wide[arm]) - np.log(wide[comparison.CONTROL])


def _by_confidence(once: pd.DataFrame, arm: str) -> list[Estimate]:
    """Trace after an arm over that under the control, its geometric mean, for thirds of the images by confidence.

    Thirds are of the mean of two ranks of p_top, under the control and after the arm: of those that one network is
    surest of, the other would be less sure by chance alone.
    """
    p_top = once.pivot(index=["seed", "image"], columns="arm", values="p_top")
    sure = p_top[[comparison.CONTROL, arm]].rank().mean(axis=1).rank(method="first")
    found = []
    for third, group in _logs(once, arm, "trace").groupby(pd.qcut(sure, 3, labels=list(CONFIDENCE)), observed=True):
        found.append(_ratio(group.groupby(level="seed").mean(), str(third)))
    return found


def draw_law(reached: pd.DataFrame) -> Figure:
    """Loss over the quadratic form of the same draws against sigma: medians by confidence, band .1 to .9 of all."""
    names = list(reached["network"].unique())
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = style.subplots(rows, columns, height=0.6 + 2.1 * rows, squeeze=False, sharex=True, sharey=True)
    colours = ("#D55E00", "#E69F00", "#0072B2")
    for axes, name in zip(grid.flat, names, strict=False):
        group = reached[reached["network"] == name]
        whole = group[group["third"] == "all"]
        axes.fill_between(whole["sigma"], whole["q10"], whole["q90"], color="0.88", linewidth=0, label="80% of images")
        for third, colour in zip(CONFIDENCE, colours, strict=True):
            part = group[group["third"] == third]
            errors = style.error_bars(part, "median", "")
            axes.errorbar(part["sigma"], part["median"], errors, fmt="o-", color=colour, markersize=3, label=third)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log")
        arm = name in ("control", "augmentation") or name.startswith("stability")
        title = label(name) if arm else style.network(name)
        images, seeds = (int(whole[count].iloc[0]) for count in ("images", "seeds"))
        size = f"n = {images}" + (f" x {seeds} networks" if seeds > 1 else "")
        axes.set_title(f"{title}, {size}", fontsize=7.5)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(r"KL / $\frac{1}{2}\varepsilon^\top G\,\varepsilon$")
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < len(names))
        grid[last, column].set_xlabel(_SIGMA)
        grid[last, column].tick_params(labelbottom=True)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def draw(table: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Stability loss and (sigma^2 / 2) tr G against sigma; and what training does to the measures."""
    figure, (left, right) = style.subplots(1, 2, height=3.2, width_ratios=[3, 2])
    tint = colours(list(table["arm"].unique()))
    for arm, group in table.groupby("arm", sort=False):
        colour = tint[str(arm)]
        left.plot(group["sigma"], group["limit"], "--", color=colour, linewidth=1)
        errors = style.error_bars(group, "loss", "")
        errors[0] = np.minimum(errors[0], 0.95 * group["loss"].to_numpy())  # the axis is logarithmic
        left.errorbar(group["sigma"], group["loss"], errors, fmt="o", color=colour, capsize=2, label=label(str(arm)))
    left.plot([], [], "k--", linewidth=1, label=r"$(\sigma^2/2)\,\mathrm{tr}\,G$")
    left.set(xscale="log", yscale="log", xlabel=_SIGMA, ylabel="mean KL (nats)")
    left.set_title(f"{int(table['images'].iloc[0])} images, {int(table['seeds'].iloc[0])} seeds, 95% interval")
    left.legend(fontsize=7)
    measures = list(changes["measure"].unique())
    arms = list(changes["arm"].unique())
    names = {"trace": r"tr $G$", "lambda_max": r"$\lambda_{max}$", "ceiling": "ceiling", "fi": "FI"}
    for i, arm in enumerate(arms):
        ours = changes[changes["arm"] == arm].set_index("measure").loc[measures]
        x = np.arange(len(measures)) + 0.15 * (i - (len(arms) - 1) / 2)
        errors = style.error_bars(ours, "ratio", "")
        right.errorbar(x, ours["ratio"], errors, fmt="o", color=tint[arm], capsize=2, label=label(arm))
    right.axhline(1, color=style.COLOURS["control"], linewidth=1)
    right.set(yscale="log", ylabel="ratio to control (geometric mean)")
    right.set_xticks(range(len(measures)), [names[m] for m in measures])
    return figure
