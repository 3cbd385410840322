"""What FI measures: its ceiling, the released estimator's departures, units and constants, and which score to use."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import influence

from ... import style
from ...images.data import Split
from ...ledger import reference
from ...ledger.results import Run
from ...scores import imagewise
from ...scores.detection import Interval, columns, spearman_interval
from ...scores.layerwise import layer_noise_scores
from ...zoo import training
from ..common import Subject, classifier, dataset, scored
from . import fig_label_noise, fig_vulnerable_areas
from .common import CHECKED, both_parts, ceiling_check, detection_table, gap

EPSILON, _SHARE = 1e-3, 0.2  # e of the four tasks; flipped labels
_LAYER_IMAGES, _CLASSES = 64, 10
_UNIT = 255.0  # of pixels in [0, 1], in which the check of the unit is made


def released_curve(epsilons: Sequence[float], *, classes: int) -> pd.DataFrame:
    """Released FI at full rank against the loss, from its closed form, and the ceiling.

    The rest of the probability lies on one other class (`low`) or evenly on all others (`high`): where it lies hardly
    matters. One row per e and loss (nats, from 1e-4 to 40).
    """
    loss = np.geomspace(1e-4, 40, 400)
    p = np.exp(-loss)
    rest = -np.expm1(-loss)
    one = np.column_stack([p, rest, np.zeros((len(p), classes - 2))])
    even = np.column_stack([p, *([rest / (classes - 1)] * (classes - 1))])
    frames = []
    for epsilon in epsilons:
        low, high = (imagewise.released_at_full_rank(probs, 0, epsilon=epsilon) for probs in (one, even))
        columns = {"loss": loss, "p_label": p, "ceiling": np.expm1(loss), "low": low, "high": high}
        frames.append(pd.DataFrame(columns).assign(epsilon=epsilon))
    return pd.concat(frames, ignore_index=True)


def peak(epsilon: float, *, classes: int) -> tuple[float, float]:
    """The largest value of the closed form and the P_y where it is taken, the rest on one other class."""
    p = np.geomspace(1e-8, 0.5, 200_001)
    values = imagewise.released_at_full_rank(
        np.column_stack([p, 1 - p, np.zeros((len(p), classes - 2))]), 0, epsilon=epsilon
    )
    return float(values.max()), float(p[values.argmax()])


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """What the constants, the cut and the unit do, and every score on each of the paper's four tasks.

    Returns:
        "scores" (of `sensitivity`), "definition" (of `ceiling_check`), "units" (`change`: one number, of `unit_check`),
        "layers" (of `layer_noise`), "labels" (of `fig_label_noise.of_kind`), "parts" (of
        `both_parts`), "pixels" (of `fig_vulnerable_areas.intervention_table`).
    """
    p, seed = run.parameters, run.parameters["seeds"][0]
    name, model = p["dataset"], p["model"]
    network = Subject(classifier(run, name, model, seed=seed), dataset(run, name), model, seed)
    labels: dict[str, Any] = {"images": p["label_images"] or None, "share": _SHARE, "without": p["without"]}
    pixels = fig_vulnerable_areas.intervention(run, network, images=p["changed"], counts=p["counts"], epsilon=EPSILON)
    return {
        "scores": sensitivity(run, network, images=p["images"] or None, epsilons=p["epsilons"]),
        "definition": ceiling_check(network, device=run.device),
        "units": pd.DataFrame({"change": [unit_check(network, device=run.device)]}),
        "layers": layer_noise(run, network, sigma=p["sigma"], draws=p["draws"]),
        "labels": fig_label_noise.of_kind(run, p["labels"][0], name, p["detectors"][:1], seed=seed, **labels),
        "parts": both_parts(run, network, images=p["part_images"] or None, epsilon=EPSILON),
        "pixels": fig_vulnerable_areas.intervention_table(pixels),
    }


def sensitivity(run: Run, network: Subject, *, images: int | None, epsilons: Sequence[float]) -> pd.DataFrame:
    """Scores of the same images and network in each unit of the pixels, and released FI for each e.

    A unit is a factor u with x = u * (pixels in that unit): 1 for raw 0..255, 255 for 0..1, the standard deviation of
    the training pixels for standardised ones (their mean does not matter to a derivative). The network computes the
    same function; the metric tensor takes the factor u^2. `unit_check` does it with a rescaled network instead.

    Returns:
        One row per image, unit ("0-255", "0-1", "standardised") and score: image, loss, ceiling, epsilon (NaN but for
        released FI), value, rank.
    """
    train = network.dataset.train
    split = train.sample(images, seed=network.seed)
    options: dict[str, Any] = {"factors": unit_factors(train), "epsilons": epsilons}
    found = scored(run, f"meaning/{network.name}", imagewise.unit_scores, network.trained, split, **options)
    return found.drop(columns="near_cut")


def unit_factors(train: Split) -> dict[str, float]:
    """The factor of each unit."""
    return {"0-255": 1.0, "0-1": 255.0, "standardised": float(train.images.double().std())}


def sensitivity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per unit, score and e: what the choice does to the values and to the order of the images.

    `change` is the largest relative difference from the value in raw pixels over the images; `spearman` with the loss
    comes with its 95% bootstrap interval; `zeros` is the share of images whose value is exactly 0.
    """
    raw = frame[frame["unit"] == "0-255"]
    rows = []
    for (score, epsilon, unit), group in frame.groupby(["score", "epsilon", "unit"], sort=False, dropna=False):
        same = raw[(raw["score"] == score) & ((raw["epsilon"] == epsilon) | raw["epsilon"].isna())].set_index("image")
        reference = same["value"].loc[group["image"]].to_numpy()
        gap = np.abs(group["value"].to_numpy() - reference)
        change = float(np.max(np.divide(gap, reference, out=np.where(gap > 0, np.inf, 0.0), where=reference > 0)))
        order = spearman_interval(group["value"], group["loss"], repeats=100)
        rows.append(
            {
                "score": score,
                "epsilon": epsilon,
                "unit": unit,
                "images": len(group),
                "zeros": float((group["value"] == 0).mean()),
                "median": group["value"].median(),
                "largest": group["value"].max(),
                "change": change,
                **columns("spearman", order),
            }
        )
    return pd.DataFrame(rows)


def unit_check(subject: Subject, *, device: torch.device) -> float:
    """Largest relative difference of exact FI between raw pixels and a network that takes them in another unit."""
    network = copy.deepcopy(subject.trained.model).double()
    split = subject.dataset.train.sample(CHECKED, seed=subject.seed)
    x, y = training.pixels(split.images, device).double(), split.labels.to(device)
    before = influence.first_order_influence(influence.metric_tensor(network, x), y).fi
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0] * _UNIT,))
    after = influence.first_order_influence(influence.metric_tensor(network, x / _UNIT), y).fi
    return float((before / after - 1).abs().max())


def layer_noise(run: Run, network: Subject, *, sigma: float, draws: int) -> pd.DataFrame:
    """The mean divergence of the output when one layer's parameters get noise, beside each score of that layer.

    Noise N(0, sigma^2) on every parameter of the layer, KL(p || p') averaged over images and draws.

    Returns:
        One row per layer: number, layer, size, divergence (nats) and its standard error over draws, and the means over
        the same images of exact, released, alignment, trace.
    """
    split = network.dataset.train.sample(_LAYER_IMAGES, seed=network.seed)
    options: dict[str, Any] = {"sigma": sigma, "draws": draws, "seed": network.seed, "epsilon": EPSILON}
    return scored(run, f"meaning/layers-{network.name}", layer_noise_scores, network.trained, split, **options)


def cost(score: str) -> tuple[str, int]:
    """What one score of one image costs: passes through the network, in words, and weighed against one another."""
    k = _CLASSES
    passes = dict.fromkeys(("loss", "margin", "max_softmax", "el2n"), (1, 0, "", 0))
    passes |= dict.fromkeys(("jacobian_norm", "saliency"), (1, 1, "", 0)) | {"random": (0, 0, "", 0)}
    passes |= {"grand": (1, 1, " with weight gradients per image", 1)}
    passes |= {"cook": (1, 1, f" + {k} Hessian-vector products", 4 * k)}
    forward, backward, more, further = passes.get(score, (1, k - 1, ", K x K algebra", 0))
    return f"{forward} forward, {backward} backward{more}", forward + 2 * backward + further


def tasks(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Which score for which of the four tasks, from what was measured (the tables of `compute`), best first.

    Returns:
        One row per task and score: measured (what the number is), value, low, high (95% interval), cost, use (True for
        the cheapest score whose interval reaches the best value).
    """
    found = [
        ("1 find outliers", row.score, "AUROC", row.auroc, row.auroc_low, row.auroc_high)
        for row in detection_table(tables["labels"]).itertuples()
    ]
    layer, measured = tables["layers"], "Spearman with the divergence under noise, over layers"
    for score in ("trace", "released", "exact", "alignment"):
        found.append(("2 compare layers", score, measured, *_spearman(layer[score], layer["divergence"])))
    for row in gap(tables["parts"]).itertuples():
        ends = row.effect_low, row.effect_high
        found.append(("3 train against test", row.measure, "P(test image > training image)", row.effect, *ends))
    single = tables["pixels"][(tables["pixels"]["target"] == "entries") & (tables["pixels"]["change"] == "farther")]
    for row in single[single["count"] == single["count"].max()].itertuples():
        found.append(("4 find vulnerable pixels", row.ranking, "fall of P", row.drop, row.drop_low, row.drop_high))
    table = pd.DataFrame(found, columns=["task", "score", "measured", "value", "low", "high"])
    table["cost"], passes = zip(*map(cost, table["score"]), strict=True)
    table["use"] = False
    for _, group in table.assign(passes=passes).groupby("task"):
        close = group[group["high"] >= group["value"].max()]
        best = close.sort_values(["passes", "value"], ascending=[True, False]).index[0]
        table.loc[best, "use"] = True
    return table.sort_values(["task", "value"], ascending=[True, False], ignore_index=True)


def _spearman(score: pd.Series, target: pd.Series) -> Interval:
    """Spearman's rho with its bootstrap interval over layers; 0 where a score is the same for all of them."""
    if float(score.max() - score.min()) <= 1e-9 * float(score.abs().max()):
        return 0.0, 0.0, 0.0
    return spearman_interval(score, target)


def claims(table: pd.DataFrame, check: float, definition_gap: float) -> dict[str, bool | float]:
    """By rules fixed before the run: the identity, the invariance, and what the released constants do."""
    exact, released = table[table["score"] == "exact"], table[table["score"] == "released"]
    return {
        "exact_fi_is_the_ceiling": bool(definition_gap <= 1e-6),
        "exact_fi_is_invariant_to_the_unit": bool(max(exact["change"].max(), check) <= 1e-6),
        "released_fi_is_invariant_to_the_unit": bool(released["change"].max() <= 1e-6),
        "released_peak": peak(1e-3, classes=10)[0],
        **logged_pairs(),
    }


def logged_pairs() -> dict[str, float]:
    """(1 - P) / P at each P that the released code logged, whose item names the FI logged beside it."""
    logged = {row.item: row.value for row in reference.load("sensitivity/fig_vulnerable_areas")}
    known = {item.removesuffix("_p"): value for item, value in logged.items() if item.endswith("_p")}
    return {f"{name}_fi": 1 / value - 1 for name, value in known.items() if value is not None}


_UNITS = {"0-255": "o", "0-1": "s", "standardised": "^"}


def draw_released_against_loss(curve: pd.DataFrame, images: pd.DataFrame) -> Figure:
    """Left, released FI against the loss: closed form for each e and the measured images. Right, exact FI likewise.

    `images` are those of the task of wrong labels, whose losses reach both sides of the peak.
    """
    figure, (left, right) = style.subplots(1, 2, height=3.2, width=1.1, sharey=True, sharex=True)
    colours = ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#E69F00")
    for (epsilon, group), colour in zip(curve.groupby("epsilon"), colours, strict=False):
        left.fill_between(group["loss"], group["low"], group["high"], color=colour, alpha=0.5)
        left.plot(group["loss"], group["high"], color=colour, label=f"$e$ = {epsilon:g}", linewidth=1)
    seen = images[images["released_1e-3"] > 0]
    zeros = len(images) - len(seen)
    label = f"images, $e$ = 0.001\n({zeros / len(images):.1%} of {len(images):,} are 0)"
    left.scatter(seen["loss"], seen["released_1e-3"], s=6, color="black", linewidths=0, label=label, zorder=3)
    blue = style.COLOURS["exact"]
    right.scatter(images["loss"], images["exact"], s=6, color=blue, linewidths=0, label="images, exact FI")
    one = curve[curve["epsilon"] == curve["epsilon"].min()]
    for axes in (left, right):
        axes.plot(one["loss"], one["ceiling"], "--", color="black", linewidth=0.8, label=r"ceiling $e^{loss} - 1$")
        axes.set(xscale="log", yscale="log", ylim=(1e-7, 1e6), xlim=(1e-6, 50), xlabel="loss (nats)")
        axes.legend(fontsize=6, loc="upper left")
    left.set_ylabel("FI (dimensionless)")
    left.set_title("as released: rises, peaks near $P_y = e$, falls", fontsize=9)
    right.set_title("exact", fontsize=9)
    return figure


def draw_sensitivity(table: pd.DataFrame) -> Figure:
    """Share of exact zeros and rank correlation with the loss, for each e and unit of the pixels."""
    figure, (left, right) = style.subplots(1, 2, height=2.6)
    released = table[table["score"] == "released"]
    for place, (unit, marker) in enumerate(_UNITS.items()):
        part = released[released["unit"] == unit]
        x = np.arange(len(part)) + 0.12 * (place - 1)
        colour = style.STABILITY[place]
        left.plot(x, part["zeros"], marker, color=colour, label=f"pixels {unit}")
        bars = style.error_bars(part, "spearman")
        right.errorbar(x, part["spearman"], yerr=bars, fmt=marker, color=colour, label=f"pixels {unit}")
    for axes in (left, right):
        axes.set_xticks(range(len(part)), [f"{epsilon:g}" for epsilon in part["epsilon"]])
        axes.set_xlabel("constant and cut $e$ of the released code")
    left.set_ylabel("share of released FI = 0")
    right.set_ylabel("Spearman with the loss")
    right.ticklabel_format(axis="y", useOffset=False)
    right.set_title("exact FI: 1 in every unit", fontsize=8)
    left.set_title(f"{int(released['images'].iloc[0])} training images, one network", fontsize=8)
    left.legend(fontsize=7)
    return figure


def draw_layers(table: pd.DataFrame) -> Figure:
    """Does the score of a layer say how far noise on its parameters moves the output: trace, and exact FI."""
    figure, (left, right) = style.subplots(1, 2, height=2.6)
    for axes, column, name in ((left, "trace", "mean trace of G"), (right, "exact", "mean exact FI")):
        look = {"fmt": "o", "markersize": 3, "elinewidth": 0.6, "color": style.SCORES[column][0]}
        axes.errorbar(table[column], table["divergence"], yerr=2 * table["standard_error"], **look)
        axes.set(xlabel=f"{name}, one point a layer", yscale="log")
    left.set(xscale="log", ylabel="mean KL under noise\non the layer (nats), 2 s.e.")
    right.set_xlim(0.5 * table["exact"].min(), 1.5 * table["exact"].max())
    return figure
