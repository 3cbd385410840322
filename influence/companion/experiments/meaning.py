"""What FI measures: its ceiling, the released estimator's departures, units and constants, and which score to use."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

import influence

from .. import cache, scores
from ..detection import agreement
from ..layerwise import layer_noise_scores
from ..results import Run
from ..zoo import training
from . import vulnerability
from .common import classifier, dataset
from .keyed import bound


def released_curve(epsilons: Sequence[float], *, classes: int) -> pd.DataFrame:
    """Released FI at full rank against the loss, from its closed form, and the ceiling.

    The rest of the probability lies on one other class (`low`) or evenly on all others (`high`): where it lies hardly
    matters.

    Returns:
        One row per e and loss (nats, from 1e-4 to 40): loss, p_label, ceiling, low, high.
    """
    loss = np.geomspace(1e-4, 40, 400)
    p = np.exp(-loss)
    rest = -np.expm1(-loss)
    one = np.column_stack([p, rest, np.zeros((len(p), classes - 2))])
    even = np.column_stack([p, *([rest / (classes - 1)] * (classes - 1))])
    frames = []
    for epsilon in epsilons:
        low, high = (scores.released_at_full_rank(probs, 0, epsilon=epsilon) for probs in (one, even))
        columns = {"loss": loss, "p_label": p, "ceiling": np.expm1(loss), "low": low, "high": high}
        frames.append(pd.DataFrame(columns).assign(epsilon=epsilon))
    return pd.concat(frames, ignore_index=True)


def peak(epsilon: float, *, classes: int) -> tuple[float, float]:
    """The largest value of the closed form and the P_y where it is taken, the rest on one other class."""
    p = np.geomspace(1e-8, 0.5, 200_001)
    values = scores.released_at_full_rank(
        np.column_stack([p, 1 - p, np.zeros((len(p), classes - 2))]), 0, epsilon=epsilon
    )
    return float(values.max()), float(p[values.argmax()])


def sensitivity(
    run: Run,
    dataset_name: str,
    model: str,
    *,
    seed: int,
    images: int | None,
    epsilons: Sequence[float],
) -> pd.DataFrame:
    """Scores of the same images and network in each unit of the pixels, and released FI for each e.

    A unit is a factor u with x = u * (pixels in that unit): 1 for raw 0..255, 255 for 0..1, the standard deviation of
    the training pixels for standardised ones (their mean does not matter to a derivative). The network computes the
    same function; the metric tensor takes the factor u^2. `unit_check` does it with a rescaled network instead.

    Returns:
        One row per image, unit ("0-255", "0-1", "standardised") and score: image, loss, p_label, epsilon (NaN but for
        released FI), value, rank.
    """
    trained = classifier(run, dataset_name, model, seed=seed)
    train = dataset(run, dataset_name).train
    split = train.sample(images, seed=seed)
    factors = {"0-255": 1.0, "0-1": 255.0, "standardised": float(train.images.double().std())}
    key = {"model": trained.key, "data": dataset(run, dataset_name).digest, "seed": seed, "images": images}
    key |= {"epsilons": list(epsilons), "device": run.device.type}
    compute = bound(scores.unit_scores, trained.model, split, factors, tuple(epsilons), run.device)
    return cache.table(f"meaning/{dataset_name}-{model}", key, compute)


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
        order = agreement(group["value"], group["loss"], repeats=100)
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
                **{name: order[name] for name in ("spearman", "spearman_low", "spearman_high")},
            }
        )
    return pd.DataFrame(rows)


class Rescaled(nn.Module):
    """The same classifier for inputs in another unit: x = factor * input."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) in the unit to logits (N, K)."""
        return self.model(x * self.factor)


def unit_check(run: Run, dataset_name: str, model: str, *, seed: int, images: int, factor: float = 255.0) -> float:
    """Largest relative difference of exact FI between raw pixels and a network that takes them in another unit."""
    network = copy.deepcopy(classifier(run, dataset_name, model, seed=seed).model).double()
    split = dataset(run, dataset_name).train.sample(images, seed=seed)
    x, y = training.pixels(split.images, run.device).double(), split.labels.to(run.device)
    values = [
        influence.first_order_influence(influence.metric_tensor(net, pixels, wrt="input"), y).fi
        for net, pixels in ((network, x), (Rescaled(network, factor), x / factor))
    ]
    return float((values[0] / values[1] - 1).abs().max())


# -- does a score of a layer say what moves the output? ---------------------------------------------------------------


def layer_noise(
    run: Run, dataset_name: str, model: str, *, seed: int, images: int, sigma: float, draws: int, epsilon: float
) -> pd.DataFrame:
    """The mean divergence of the output when one layer's parameters get noise, beside each score of that layer.

    Noise N(0, sigma^2) on every parameter of the layer, KL(p || p') averaged over images and draws.

    Returns:
        One row per layer: number, layer, size, divergence (nats) and its standard error over draws, and the means over
        the same images of exact, released, alignment, trace.
    """
    trained = classifier(run, dataset_name, model, seed=seed)
    split = dataset(run, dataset_name).train.sample(images, seed=seed)
    key = {"model": trained.key, "data": dataset(run, dataset_name).digest, "seed": seed, "images": images}
    key |= {"sigma": sigma, "draws": draws, "epsilon": epsilon, "device": run.device.type}
    compute = bound(layer_noise_scores, trained.model, split, sigma, draws, seed, epsilon, run.device)
    return cache.table(f"meaning/layers-{dataset_name}-{model}", key, compute)


# -- the practitioner's table -----------------------------------------------------------------------------------------


def cost(score: str, *, classes: int) -> str:
    """What one score of one image costs, in passes through the network."""
    k = classes
    passes = {
        "loss": (1, 0, ""),
        "margin": (1, 0, ""),
        "max_softmax": (1, 0, ""),
        "el2n": (1, 0, ""),
        "jacobian_norm": (1, 1, ""),
        "saliency": (1, 1, ""),
        "grand": (1, 1, " with weight gradients per image"),
        "cook": (1, 1, f" + {k} Hessian-vector products"),
        "random": (0, 0, ""),
    }
    forward, backward, more = passes.get(score, (1, k - 1, ", K x K algebra"))
    return f"{forward} forward, {backward} backward{more}"


def practice(
    *,
    outlier: pd.DataFrame,
    layer: pd.DataFrame,
    generalisation: pd.DataFrame,
    pixels: pd.DataFrame,
    classes: int,
) -> pd.DataFrame:
    """Which score for which of the four tasks, from what was measured: the value of each score, best first.

    Args:
        outlier: `outlier_simulation.detection_table` or `label_noise.detection_table` of one network and state.
        layer: of `layer_noise`.
        generalisation: of `generalisation.gap`, one network.
        pixels: of `vulnerability.intervention_table`.
        classes: K.

    Returns:
        One row per task and score: measured (what the number is), value, low, high (95% interval), cost, use (True for
        the cheapest score whose interval reaches the best value).
    """
    rows: list[dict[str, object]] = []
    for row in outlier.itertuples():
        rows.append(_row("1 find outliers", row.score, "AUROC", row.auroc, row.auroc_low, row.auroc_high))
    for score in ("trace", "released", "exact", "alignment"):
        value, low, high = _spearman(layer[score], layer["divergence"])
        measured = "Spearman with the divergence under noise, over layers"
        rows.append(_row("2 compare layers", score, measured, value, low, high))
    for row in generalisation.itertuples():
        measured = "P(test image > training image)"
        rows.append(_row("3 train against test", row.measure, measured, row.effect, row.effect_low, row.effect_high))
    single = pixels[(pixels["target"] == "entries") & (pixels["change"] == "farther")]
    single = single[single["count"] == single["count"].max()]
    for row in single.itertuples():
        rows.append(_row("4 find vulnerable pixels", row.ranking, "fall of P", row.drop, row.drop_low, row.drop_high))
    table = pd.DataFrame(rows)
    table["cost"] = [cost(str(score), classes=classes) for score in table["score"]]
    table["use"] = False
    for _, group in table.groupby("task"):
        close = group[group["high"] >= group["value"].max()].copy()
        close["passes"] = [_passes(text, classes) for text in close["cost"]]
        best = close.sort_values(["passes", "value"], ascending=[True, False]).index[0]
        table.loc[best, "use"] = True
    return table.sort_values(["task", "value"], ascending=[True, False], ignore_index=True)


def pixel_table(
    run: Run, dataset_name: str, model: str, *, seed: int, images: int, counts: Sequence[int], epsilon: float
) -> pd.DataFrame:
    """`vulnerability.intervention_table` of one network, with 3x3 patches as in `fig_vulnerable_areas`."""
    frame = vulnerability.intervention(
        run, dataset_name, model, seed=seed, images=images, counts=counts, patch=3, epsilon=epsilon
    )
    return vulnerability.intervention_table(frame)


def _row(task: str, score: object, measured: str, value: object, low: object, high: object) -> dict[str, object]:
    return {"task": task, "score": score, "measured": measured, "value": value, "low": low, "high": high}


def _passes(text: str, classes: int) -> float:
    forward, backward = (int(part.split()[0]) for part in text.split(", ")[:2])
    return forward + 2 * backward + 4 * classes * ("Hessian" in text) + ("weight" in text)


def _spearman(score: pd.Series, target: pd.Series) -> tuple[float, float, float]:
    """Spearman's rho with its bootstrap interval over layers; 0 where a score is the same for all of them."""
    if float(score.max() - score.min()) <= 1e-9 * float(score.abs().max()):
        return 0.0, 0.0, 0.0
    found = agreement(score, target)
    return found["spearman"], found["spearman_low"], found["spearman_high"]


def claims(table: pd.DataFrame, check: float, definition_gap: float) -> dict[str, bool | float]:
    """By rules fixed before the run: the identity, the invariance, and what the released constants do."""
    exact, released = table[table["score"] == "exact"], table[table["score"] == "released"]
    return {
        "exact_fi_is_the_ceiling": bool(definition_gap <= 1e-6),
        "exact_fi_is_invariant_to_the_unit": bool(max(exact["change"].max(), check) <= 1e-6),
        "released_fi_is_invariant_to_the_unit": bool(released["change"].max() <= 1e-6),
        "released_peak": peak(1e-3, classes=10)[0],
    }
