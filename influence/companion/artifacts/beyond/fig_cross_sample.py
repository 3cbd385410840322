"""Cross-sample FI against exact leave-one-out, beside influence functions and TracIn, for the last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from influence.progress import progress_bar

from ... import style
from ...images.data import Dataset, Split
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import columns, spearman
from ...scores.evaluation import mean_interval
from ...scores.leave_one_out import Regression, cross_sample_influence
from ...zoo import last_layer, training
from ..common import classifier, dataset, groups, over_networks, scored

# Colour and name of what predicts the change; of these the first three have a sign.
PREDICTORS = {
    "influence": ("#0072B2", "influence function"),
    "newton": ("#56B4E9", "Newton step"),
    "tracin": ("#009E73", "TracIn"),
    "cross_fi": ("#D55E00", "cross-sample FI"),
    "loss": ("#000000", "loss of the training image"),
}
SIGNED = ("influence", "newton", "tracin")
WITHIN, TOTAL = "within a test image", "total of a training image"


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Exact leave-one-out of a logistic regression on a network's frozen features, and what predicts it.

    Float64. The features are those that the last layer takes, of images drawn at random for each network, and a 1. The
    penalty l2 / 2 |w|^2 stands beside the mean loss; the removal leaves n times it as it is.

    Returns:
        "fits", one row per seed and l2: images, classes, validation_loss (nats, all validation images), accuracy (of
        the test images), gradient (norm of the summed loss's, with all images), gradient_without (the largest without
        one of them), identity (largest relative error of FI(z, z) = (1 - P_y) / P_y over the removed images).
        "measures", one row per seed, l2, image and quantity ("change", the truth, or one of `PREDICTORS`), with `of`
        "test" (Spearman's correlation over the training images with the change: of the sizes, and signed) or
        "training" (means over the test images, of the size and signed); signed is NaN where there is no sign.
    """
    chosen, found = run.parameters, []
    images = dataset(run, chosen["dataset"])
    setting = {name: chosen[name] for name in ("images", "removed", "tested", "penalties")}
    for seed in progress_bar(chosen["seeds"], desc="leave-one-out", unit="network", leave=False):
        network = classifier(run, chosen["dataset"], chosen["model"], seed=seed)
        frame = scored(run, f"cross_sample/{images.name}", _measured, network, images, chosen=setting, seed=seed)
        found.append(frame.assign(seed=seed))
    rows = pd.concat(found, ignore_index=True)
    fits = rows[rows["of"] == "fit"].pivot(index=["seed", "l2"], columns="quantity", values="size").reset_index()
    return {"fits": fits.rename_axis(columns=None), "measures": rows[rows["of"] != "fit"].reset_index(drop=True)}


def _measured(
    model: nn.Module, images: Dataset, chosen: Mapping[str, Any], seed: int, device: torch.device
) -> pd.DataFrame:
    train = images.train.sample(chosen["images"], seed=seed)
    test = images.test.sample(chosen["tested"], seed=seed)
    generator = np.random.default_rng(training.mixed_seed(seed, 60_000))
    removed = torch.from_numpy(np.sort(generator.choice(len(train), chosen["removed"], replace=False)))
    fitted_on, validated_on, tested_on = (_features(model, part, device) for part in (train, images.valid, test))
    frames = []
    for l2 in chosen["penalties"]:
        classes, penalty = len(images.classes), l2 * len(train)
        fitted = Regression.fit(fitted_on, train.labels, classes=classes, penalty=penalty)
        without, gradient = fitted.leave_one_out(removed)
        logits = torch.einsum("td,mkd->mkt", tested_on, without)
        after = F.cross_entropy(logits, test.labels.expand(len(removed), -1), reduction="none")
        change = (after - fitted.loss(tested_on, test.labels)).numpy()
        predicted = fitted.predicted_changes(removed, tested_on, test.labels)
        loss = fitted.loss(fitted_on, train.labels)[removed]
        predicted["loss"] = loss[:, None].expand(-1, len(test))
        own = cross_sample_influence(fitted.weights, fitted_on, fitted_on, train.labels).diag()[removed]
        about = {
            "images": len(train),
            "classes": classes,
            "validation_loss": float(fitted.loss(validated_on, images.valid.labels).mean()),
            "accuracy": float((fitted.probabilities(tested_on).argmax(1) == test.labels).double().mean()),
            "gradient": float(fitted.gradient(fitted.weights[None]).norm()),
            "gradient_without": gradient,
            "identity": float((own / fitted.ceiling(fitted_on, train.labels)[removed] - 1).abs().max()),
        }
        fit = pd.DataFrame({"of": "fit", "image": -1, "quantity": list(about), "size": list(about.values())})
        values = {"change": change} | {name: value.numpy() for name, value in predicted.items()}
        found = measures(values, train.index[removed].numpy(), test.index.numpy())
        frames.append(pd.concat([fit.assign(signed=np.nan), found], ignore_index=True).assign(l2=l2))
    return pd.concat(frames, ignore_index=True)


def _features(model: nn.Module, part: Split, device: torch.device) -> Tensor:
    with torch.no_grad():
        found = last_layer.features(model, part.images, device=device).double()
    return torch.cat([found, torch.ones(len(found), 1, dtype=torch.float64)], dim=1)


def measures(values: Mapping[str, np.ndarray], train: np.ndarray, test: np.ndarray) -> pd.DataFrame:
    """Rank correlations with the change within each test image, and totals of each training image.

    Of "change" and what predicts it, each ``(m, t)``, and the positions of m training and t test images in their data
    set; the rows of "measures" of `compute`, without seed and l2.
    """
    frames, truth = [], values["change"]
    for name, value in values.items():
        signed = name in SIGNED or name == "change"
        about = {"quantity": name, "of": "training", "image": train, "size": np.abs(value).mean(axis=1)}
        frames.append(pd.DataFrame(about | {"signed": value.mean(axis=1) if signed else np.nan}))
        if name != "change":
            about = {"quantity": name, "of": "test", "image": test, "size": spearman(np.abs(value.T), np.abs(truth.T))}
            frames.append(pd.DataFrame(about | {"signed": spearman(value.T, truth.T) if signed else np.nan}))
    return pd.concat(frames, ignore_index=True)


def correlations(measures: pd.DataFrame) -> pd.DataFrame:
    """Of each network: Spearman's correlation with the change within a test image (mean over them), and of totals.

    One row per seed, l2, quantity and among (`WITHIN`, `TOTAL`): size, signed.
    """
    tests = measures[measures["of"] == "test"]
    rows = [tests.groupby(["seed", "l2", "quantity"])[["size", "signed"]].mean().reset_index().assign(among=WITHIN)]
    for (seed, l2), group in measures[measures["of"] == "training"].groupby(["seed", "l2"]):
        wide = group.pivot(index="image", columns="quantity", values=["size", "signed"])
        for name in PREDICTORS:
            found = {kind: float(spearman(wide[kind, name], wide[kind, "change"])) for kind in ("size", "signed")}
            rows.append(pd.DataFrame([{"seed": seed, "l2": l2, "quantity": name, "among": TOTAL, **found}]))
    return pd.concat(rows, ignore_index=True)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """The mean of `correlations` over networks with its 95% t interval, for each l2, among, kind and quantity."""
    long = found.melt(["seed", "l2", "quantity", "among"], ["size", "signed"], "kind", "spearman").dropna()
    rows = []
    for about, group in groups(long, "l2", "among", "kind", "quantity"):
        interval = mean_interval(group["spearman"], within=(-1, 1))
        rows.append({**about, "networks": len(group), **columns("spearman", interval, "")})
    return pd.DataFrame(rows)


def best_l2(fits: pd.DataFrame) -> float:
    """The penalty with the least validation loss, the mean over networks."""
    losses = fits.groupby("l2")["validation_loss"].mean()
    return float(losses.index.to_numpy()[losses.to_numpy().argmin()])


def claims(fits: pd.DataFrame, found: pd.DataFrame) -> dict[str, bool | Estimate]:
    """What the rules ask, of `correlations` with the size of the change at the penalty of least validation loss.

    * identity_of_the_image_itself: FI(z, z) is (1 - P_y) / P_y to 1e-8 for every removed image.
    * cross_sample_fi_orders_changes, cross_sample_fi_orders_totals: the correlation within a test image, and of totals.
    * cross_sample_fi_less_influence_functions, and with the suffix _in_totals: that of cross-sample FI less that of the
      influence function, paired by network.
    """
    chosen = found[found["l2"] == best_l2(fits)]
    wide = chosen.pivot(index="seed", columns=["among", "quantity"], values="size")
    less = {among: wide[among, "cross_fi"] - wide[among, "influence"] for among in (WITHIN, TOTAL)}
    return {
        "identity_of_the_image_itself": bool((fits["identity"] < 1e-8).all()),
        "cross_sample_fi_orders_changes": over_networks(wide[WITHIN, "cross_fi"], within=1),
        "cross_sample_fi_orders_totals": over_networks(wide[TOTAL, "cross_fi"], within=1),
        "cross_sample_fi_less_influence_functions": over_networks(less[WITHIN], within=2),
        "cross_sample_fi_less_influence_functions_in_totals": over_networks(less[TOTAL], within=2),
    }


def draw(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Correlation with the change at the chosen penalty (left: sizes; right: signed)."""
    figure, panels = style.subplots(1, 2, height=2.9, sharey=True)
    chosen = table[table["l2"] == best_l2(fits)]
    for axes, kind in zip(panels, ("size", "signed"), strict=True):
        for place, (among, marker) in enumerate(((WITHIN, "o"), (TOTAL, "s"))):
            part = chosen[(chosen["kind"] == kind) & (chosen["among"] == among)].set_index("quantity")
            for row, (name, (colour, _)) in enumerate(PREDICTORS.items()):
                if name in part.index:
                    line, y = part.loc[[name]], [row + 0.2 * (place - 0.5)]
                    look = {"fmt": marker, "color": colour, "capsize": 2, "markersize": 4}
                    axes.errorbar(line["spearman"], y, xerr=style.error_bars(line, "spearman", ""), **look)
        axes.axvline(0, color="0.6", linewidth=0.8)
        change = "|change|" if kind == "size" else "the change, signed"
        axes.set(xlim=(-1.05, 1.05), xlabel=f"Spearman with {change}")
    panels[0].set_yticks(range(len(PREDICTORS)), [name for _, name in PREDICTORS.values()])
    panels[0].invert_yaxis()
    for among, marker in ((WITHIN, "o"), (TOTAL, "s")):
        panels[1].plot([], [], marker, color="0.4", markersize=4, label=among)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    count, images = int(chosen["networks"].iloc[0]), int(fits["images"].iloc[0])
    figure.suptitle(f"{count} networks, {images:,} training images each, 95% t interval over networks", fontsize=8)
    return figure


def draw_totals(measures: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Each removed training image of the first network: |change| against two predictors, means over test images."""
    group = measures[(measures["of"] == "training") & (measures["seed"] == measures["seed"].min())]
    wide = group[group["l2"] == best_l2(fits)].pivot(index="image", columns="quantity", values="size")
    figure, panels = style.subplots(1, 2, height=2.8)
    for axes, name in zip(panels, ("influence", "cross_fi"), strict=True):
        colour, words = PREDICTORS[name]
        axes.scatter(wide["change"], wide[name], s=8, color=colour, alpha=0.6, linewidths=0)
        axes.set(xscale="log", yscale="log", xlabel="|change| (nats)")
        axes.set_ylabel(f"|{words}| (nats)" if name == "influence" else words)
        order = spearman(wide["change"], wide[name])
        axes.set_title(f"{len(wide)} training images, Spearman {order:+.2f}", fontsize=8)
    return figure


def draw_by_l2(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Correlation with |change| against the penalty; the vertical line is the one of least validation loss."""
    figure, panels = style.subplots(1, 2, height=2.9, sharey=True)
    for axes, among in zip(panels, (WITHIN, TOTAL), strict=True):
        part = table[(table["among"] == among) & (table["kind"] == "size")]
        for name, (colour, words) in PREDICTORS.items():
            line = part[part["quantity"] == name].sort_values("l2")
            bars = style.error_bars(line, "spearman", "")
            dashes = "o--" if name == "newton" else "o-"  # it lies on the influence function
            axes.errorbar(line["l2"], line["spearman"], bars, fmt=dashes, color=colour, markersize=3, label=words)
        axes.axvline(best_l2(fits), color="0.6", linestyle=":")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xscale="log", xlabel="penalty l2, beside the mean loss")
        axes.set_title(among, fontsize=8)
    panels[0].set(ylim=(-1.05, 1.05), ylabel="Spearman with |change|")
    figure.suptitle(f"{int(table['networks'].iloc[0])} networks, 95% t interval over networks", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    return figure
