"""Every score of one metric tensor on the same images: wrong labels, flips by noise and by PGD, ranks of networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

import influence
from influence.measures import log_ceiling
from influence.progress import progress_bar

from ... import style
from ...images import outliers
from ...images.data import Split
from ...ledger import paths
from ...ledger.reference import Estimate
from ...ledger.results import COMMITTED, Run
from ...scores import attacks, imagewise
from ...scores.detection import Interval, columns, detection, spearman, spearman_interval
from ...scores.evaluation import mean_interval
from ...zoo import finetuning, pretrained, recipes, training
from ...zoo.recipes import RecipeError
from ..common import Network, estimates, groups, named, scored
from .table_stability_family import arms

WORST = "worst_direction"
SCORES = {
    "exact": "FI",
    "loss": "loss",
    "margin": "margin",
    "el2n": "EL2N, one converged network",
    "trace": "trace of G",
    "lambda_max": r"$\lambda_{max}$(G)",
    WORST: "loss after the worst step",
}
LABELS, NOISE = "wrong labels", "noise"
_CONTINUED = "+"  # between the name of a network and that of the arm that continued it
_SHARE = 0.2  # of the labels that are flipped where people gave none
_LEAST = 5  # examples of either sort without which a network says nothing about a task
_TO_RESAMPLE = 8  # kinds of network without which there is no bootstrap over them
_RESAMPLES = 2000
_WITHOUT = [name for name in imagewise.NAMES if name in ("cook", "grand")]
MEASURES = ("lambda_max", "mean_lambda_max", "trace", "loss", "error")  # medians where no mean is named


def attack(radius: float) -> str:
    """Name of the task to predict the flips by PGD in a ball of this radius, in grey levels of 255."""
    return f"PGD {radius:g}/255"


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Every score of test images beside what noise and PGD do to them, and of labelled images beside what is wrong.

    Images are drawn at random. Detectors look at images held out of their training, with the labels that people gave
    (CIFAR-10N) where they were trained on such, else with a fifth of the labels flipped. What a smaller ball of PGD
    flips counts for a larger. The noise of an arm that continues a network is of the same sigma.

    Returns:
        "flips", one row per network and test image: network, kind (its name without the seed), image, label,
        predicted, the scores of `SCORES` for the true label, noise (share of the noisy copies whose prediction
        differs), and for each radius the name of its `attack` (bool: the prediction differs). "labels", one row per
        detector and image: network, kind, image, label (the given one), predicted, wrong (bool), the same scores.
    """
    chosen, flipped, labelled = run.parameters, [], []
    seed = chosen["seeds"][0]
    options: dict[str, Any] = {name: chosen[name] for name in ("sigma", "copies", "radii")}
    for name in progress_bar(chosen["networks"], desc="flips", unit="network", leave=False):
        subject = network(run, name)
        split = subject.parts["test"].sample(chosen["images"], seed=seed)
        found = scored(run, f"one-metric/flips-{name}", flips, subject, split, **options)
        flipped.append(found.assign(network=name, kind=subject.family))
    for name in progress_bar(chosen["detectors"], desc="wrong labels", unit="network", leave=False):
        recipe = recipes.named(name)
        held_out = recipe.dataset()
        run.add_input(f"{recipe.data} for {name}", held_out.digest)
        trained = training.fit(recipe, held_out, device=run.device)
        split = held_out.valid.sample(chosen["label_images"], seed=seed)
        given, verified = split.labels, split.labels
        if recipe.labels is None:
            given = outliers.flip_labels(verified, share=_SHARE, classes=len(held_out.classes), seed=seed)
        else:
            verified = outliers.human_labels(recipe.labels, paths.data_dir())[1][split.index]
        judged = Split(split.images, given, split.index)
        found = scored(run, f"one-metric/labels-{name}", scores, trained, judged, radius=chosen["radii"][0])
        about = {"wrong": (given != verified).numpy(), "network": name, "kind": name.rpartition("-")[0]}
        labelled.append(found.assign(**about))
    parts = {"flips": flipped, "labels": labelled}
    return {name: pd.concat(frames, ignore_index=True).drop(columns="near_cut") for name, frames in parts.items()}


def network(run: Run, name: str) -> Network:
    """The network of `common.named`, or, named "NETWORK+ARM", that network continued by an arm of the stability family.

    ARM is one of `table_stability_family.arms`, as in "base-resnet20-cifar10-0+stability", a network that is of a kind
    of its own, "base-resnet20-cifar10+stability"; a RecipeError where there is none, or of a network of others.
    """
    name, _, arm = name.partition(_CONTINUED)
    found = named(run, name)
    if not arm:
        return found
    known = arms(run.parameters)
    if arm not in known or name in pretrained.NAMES:
        where = f"{name}{_CONTINUED}{arm}"
        raise RecipeError(f"{where}: only networks of recipes.yaml are continued, by one of {', '.join(known)}")
    recipe = recipes.named(name)
    publish = run.profile == COMMITTED
    trained = finetuning.finetune(recipe, known[arm], recipe.dataset(), device=run.device, publish=publish)
    return replace(found, model=trained.model, key=trained.key, family=f"{found.family}{_CONTINUED}{arm}")


def scores(model: nn.Module, split: Split, *, radius: float, device: torch.device) -> pd.DataFrame:
    """Image, label, predicted, near_cut and the scores of `SCORES` of each image, y its label in the split.

    The worst step is along the first eigenvector of G (`influence.worst_direction`), on the side where the loss of the
    predicted class rises, as long as the diagonal of a cube of half side `radius` (grey levels), so that it is as long
    as what PGD adds at most; the image is clipped to 0..255, and the score is -log P_y there.
    """
    frame = imagewise.all_scores(model, split, device=device, without=_WITHOUT)
    after = []
    for _, x, y in imagewise.chunks(split, 64, device, "worst steps"):
        direction, _ = influence.worst_direction(model, x)
        length = radius * x[0].numel() ** 0.5
        with torch.no_grad():
            after.append(loss(model((x + length * direction).clamp(0, 255)), y).cpu())
    columns = ["image", "label", "predicted", "near_cut", *(name for name in SCORES if name != WORST)]
    return frame[columns].assign(**{WORST: torch.cat(after).numpy()})


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log P_y from the other classes, with all digits where P_y is near 1; (N, K) and (N,) to (N,) float64."""
    return F.softplus(log_ceiling(logits.double(), labels), threshold=100)


def flips(
    model: nn.Module, split: Split, *, sigma: float, copies: int, radii: Sequence[float], device: torch.device
) -> pd.DataFrame:
    """The scores of each image, and whether its prediction changes under noise and under PGD; `compute` says how."""
    # The same noise for every network; the starts of PGD are drawn for the images that are left, whose number differs.
    noise, starts = (torch.Generator(device).manual_seed(seed) for seed in (0, 1))
    parts = []
    for rows, x, _ in imagewise.chunks(split, 64, device, "flips"):
        with torch.no_grad():
            predicted = model(x).argmax(1)
            changed = torch.zeros(len(x), device=x.device)
            for _copy in range(copies):
                noisy = 255 * influence.gaussian_perturbation(x / 255, sigma=sigma, generator=noise)
                changed += model(noisy).argmax(1) != predicted
        found = {"image": split.index[rows], NOISE: changed.double() / copies}
        broken = torch.zeros_like(predicted, dtype=torch.bool)
        for radius in radii:
            # A smaller ball lies within the larger: what was flipped there stays flipped.
            left = (~broken).nonzero()[:, 0]
            if len(left):
                moved = attacks.pgd(model, x[left], predicted[left], epsilon=radius / 255, generator=starts)
                with torch.no_grad():
                    broken = broken.index_put((left,), model(moved).argmax(1) != predicted[left])
            found[attack(radius)] = broken
        parts.append(imagewise.table(found))
    return scores(model, split, radius=radii[0], device=device).merge(pd.concat(parts), on="image")


def aurocs(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """AUROC of each score for each task and network, and less that of the score that it is measured against.

    Flips are predicted on images that are classified rightly, where the true label is the predicted one; a noise flip
    is one in any copy. Against the margin for flips, against the loss for wrong labels. A network with fewer than five
    examples on either side is left out.

    Returns:
        One row per task, network and score: kind, images, positives, auroc, difference.
    """
    flipped = tables["flips"]
    right = flipped[flipped["label"] == flipped["predicted"]]
    tasks = [(LABELS, tables["labels"], "wrong", "loss"), (NOISE, right, NOISE, "margin")]
    tasks += [(name, right, name, "margin") for name in _attacks(right)]
    rows = []
    for task, frame, column, against in tasks:
        for network, group in groups(frame, "kind", "network"):
            positive = group[column].to_numpy() > 0
            if min(positive.sum(), (~positive).sum()) < _LEAST:
                continue
            values = {score: detection(group[score], positive, repeats=0)["auroc"] for score in SCORES}
            about = {"task": task, **network, "images": len(group), "positives": positive.sum()}
            rows += [
                {**about, "score": score, "auroc": value, "difference": value - values[against]}
                for score, value in values.items()
            ]
    columns = ["task", "kind", "network", "images", "positives", "score", "auroc", "difference"]
    return pd.DataFrame(rows, columns=columns)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean over kinds of network of `aurocs` (of each kind the mean over seeds) with its 95% t interval over kinds.

    Returns:
        One row per task and score: kinds, networks, images and positives (means over networks), auroc, low, high,
        difference, difference_low, difference_high.
    """
    rows = []
    for about, group in groups(found, "task", "score"):
        kinds = group.groupby("kind", sort=False)[["auroc", "difference"]].mean()
        row = {**about, "kinds": len(kinds), "networks": len(group)}
        row |= {name: float(group[name].mean()) for name in ("images", "positives")}
        for name, ends, least in (("auroc", "", 0), ("difference", "difference_", -1)):
            row |= columns(name, mean_interval(kinds[name], within=(least, 1)), ends)
        rows.append(row)
    return pd.DataFrame(rows)


def networks(flipped: pd.DataFrame) -> pd.DataFrame:
    """One row per network: kind, images, accuracy, error, the measures of `MEASURES`, and the accuracy lost to PGD.

    lambda_max and trace are per squared unit of the pixel range; the accuracy lost is the share of all images that are
    classified rightly and flipped, in a column for each attack.
    """
    rows = []
    for about, group in groups(flipped, "kind", "network"):
        right = group["label"] == group["predicted"]
        row = {**about, "images": len(group)}
        row |= {"accuracy": right.mean(), "error": 1 - right.mean()}
        row |= {name: 255.0**2 * group[name].median() for name in ("lambda_max", "trace")}
        row |= {"mean_lambda_max": 255.0**2 * group["lambda_max"].mean(), "loss": group["loss"].mean()}
        row |= {name: (right & group[name]).mean() for name in _attacks(group)}
        rows.append(row)
    return pd.DataFrame(rows)


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each measure with the accuracy lost, over kinds (means over seeds) and over networks.

    Returns:
        One row per attack, measure and unit ("kinds", "networks"): n, spearman, low, high: 95% percentile bootstrap
        over what is ranked, [-1, 1] where there are fewer than eight; 0 where all are alike.
    """
    means = table.drop(columns="network").groupby("kind", sort=False).mean()
    rows = []
    for name in _attacks(table):
        for measure in MEASURES:
            for unit, frame in (("kinds", means), ("networks", table)):
                row = {"attack": name, "measure": measure, "unit": unit, "n": len(frame)}
                found = correlation(frame[measure].to_numpy(), frame[name].to_numpy())
                rows.append(row | columns("spearman", found, ""))
    return pd.DataFrame(rows)


def correlation(first: np.ndarray, second: np.ndarray) -> Interval:
    """Spearman's rank correlation of (n,) values with its percentile bootstrap interval; `ranks` says for how many."""
    value = float(spearman(first, second))
    if np.isnan(value) or len(first) < _TO_RESAMPLE:
        return 0.0 if np.isnan(value) else value, -1.0, 1.0
    return spearman_interval(first, second, repeats=_RESAMPLES)


_RANKED = (("lambda_max", "kinds"), ("lambda_max", "networks"), ("mean_lambda_max", "kinds"), ("error", "kinds"))


def _attacks(table: pd.DataFrame) -> list[str]:
    return [str(column) for column in table if str(column).startswith("PGD")]


def claims(found: pd.DataFrame, table: pd.DataFrame, ranked: pd.DataFrame) -> dict[str, bool | list[Estimate]]:
    """What `results/reference/beyond.csv` has rules for; a task that no network can say anything about is left out.

    * wrong_labels_need_the_label: trace and lambda_max, which see no label, less the loss.
    * noise_flips_metric, pgd_flips_metric: trace and lambda_max less the margin; PGD at every radius.
    * *_worst_direction: the loss after the worst step less the loss (wrong labels) or the margin (flips).
    * lambda_max_ranks_kinds: Spearman's correlation of the median lambda_max with the accuracy lost at every radius;
      lambda_max_ranks_networks, mean_lambda_max_ranks_kinds and error_ranks_kinds stand beside it.
    * fi_orders_as_the_loss: no AUROC of FI is further than 1e-9 from that of the loss.
    """
    metric = ("trace", "lambda_max")
    pgd = [task for task in table["task"].unique() if task.startswith("PGD")]
    asked = {
        "wrong_labels_need_the_label": ([LABELS], metric),
        "wrong_labels_worst_direction": ([LABELS], [WORST]),
        "noise_flips_metric": ([NOISE], metric),
        "noise_flips_worst_direction": ([NOISE], [WORST]),
        "pgd_flips_metric": (pgd, metric),
        "pgd_flips_worst_direction": (pgd, [WORST]),
    }
    claimed: dict[str, bool | list[Estimate]] = {}
    for item, (tasks, measures) in asked.items():
        rows = table[table["task"].isin(tasks) & table["score"].isin(measures)]
        if len(rows):
            less = estimates(rows, "difference", of="{task}, {score}", n="kinds")
            claimed[item] = [replace(e, df=e.n - 1 or None) for e in less]
    for measure, unit in _RANKED:
        rows = ranked[(ranked["measure"] == measure) & (ranked["unit"] == unit)]
        claimed[f"{measure}_ranks_{unit}"] = estimates(rows, "spearman", "", of="{attack}", n="n")
    values = found.pivot(index=["task", "network"], columns="score", values="auroc")
    claimed["fi_orders_as_the_loss"] = bool(((values["exact"] - values["loss"]).abs() <= 1e-9).all())
    return claimed


def with_and_without(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The estimates of `claims` with all networks, and without those that an arm continued: "without_value" on."""
    few = {name: frame[~frame["kind"].str.contains(_CONTINUED, regex=False)] for name, frame in tables.items()}
    sides = []
    for chosen in (tables, few):
        found, table = aurocs(chosen), networks(chosen["flips"])
        claimed = claims(found, summary(found), ranks(table)).items()
        estimates = [pd.DataFrame(found).assign(claim=item) for item, found in claimed if not isinstance(found, bool)]
        sides.append(pd.concat(estimates).set_index(["claim", "of"])[["value", "low", "high", "n"]])
    return sides[0].join(sides[1].add_prefix("without_")).reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """AUROC of each score for each task: means over kinds of network with 95% t intervals; dotted: what is to beat."""
    tasks = list(table["task"].unique())
    figure, panels = style.subplots(1, len(tasks), height=3.3, width=1.25, sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        part = table[table["task"] == task].set_index("score").loc[list(SCORES)]
        for place, score in enumerate(SCORES):
            row, colour = part.loc[[score]], style.SCORES.get(score, ("#D55E00", ""))[0]
            look = {"fmt": "o", "color": colour, "markersize": 4, "capsize": 2}
            axes.errorbar(row["auroc"], [place], xerr=style.error_bars(row, "auroc", ""), **look)
        axes.axvline(part.loc["loss" if task == LABELS else "margin", "auroc"], color="0.5", linestyle=":", linewidth=1)
        title = task if task == LABELS else f"flips by {task}"
        several, kinds = int(part["networks"].iloc[0]), int(part["kinds"].iloc[0])
        count = f"{several} networks" + (f" of {kinds} kinds" if several > kinds else "")
        axes.set_title(f"{title}\n{count},\n{part['images'].iloc[0]:.0f} images each")
        axes.set_yticks(range(len(SCORES)), list(SCORES.values()))
        axes.set(ylim=(len(SCORES) - 0.5, -0.5), xlabel="AUROC")
        axes.grid(axis="x", alpha=0.3)
    words = "means over kinds of network with 95% t intervals, each score by itself; dotted: what a score has to beat"
    paired = "claims are of differences from it, paired by kind, with intervals of their own"
    figure.suptitle(f"{words}\n({paired}); images: mean over networks, for flips those classified rightly", fontsize=8)
    return figure


def draw_ranks(table: pd.DataFrame, ranked: pd.DataFrame) -> Figure:
    """Accuracy lost to PGD against the median lambda_max: a point for each network, a colour for each kind.

    Networks that an arm continued are hollow, in the colour of those that they were.
    """
    names = _attacks(table)
    before = list(dict.fromkeys(kind.partition(_CONTINUED)[0] for kind in table["kind"]))
    colours = style.class_colours(len(before))
    figure, panels = style.subplots(1, len(names), height=4.1, width=1.15, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for kind, part in table.groupby("kind", sort=False):
            base, _, arm = str(kind).partition(_CONTINUED)
            place = before.index(base)
            look = {"marker": "osD^vP*X<>"[place % 10], "edgecolors": [colours[place]], "s": 28}
            label = style.network(base) + (f" + {arm}" if arm else "")
            fill = "none" if arm else [colours[place]]
            axes.scatter(part["lambda_max"], 100 * part[name], facecolors=fill, label=label, **look)
        chosen = ranked[(ranked["attack"] == name) & (ranked["measure"] == "lambda_max") & (ranked["unit"] == "kinds")]
        value, low, high, n = chosen[["spearman", "low", "high", "n"]].iloc[0]
        axes.set_title(f"{name}: Spearman {value:.2f} [{low:.2f}, {high:.2f}], n = {int(n)} kinds", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=r"median $\lambda_{max}$(G), per squared pixel range", ylabel="accuracy lost (points)")
    images = int(table["images"].iloc[0])
    figure.suptitle(f"{images} test images of each network; 95% bootstrap intervals over kinds", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
