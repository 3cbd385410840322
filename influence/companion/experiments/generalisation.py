"""Setup 3 of Shu & Zhu (2019): FI of the predicted class on the training set against the test set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .. import cache
from ..detection import two_sample
from ..results import Run
from ..scores import predicted_class_scores
from .common import classifier, dataset
from .keyed import bound

QUANTILES = (0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 1.0)
# What the gap is read through: FI needs no label, the loss does.
MEASURES = {
    "exact": "FI of the predicted class, exact",
    "released": "FI of the predicted class, as released",
    "loss": "-log P of the true class",
    "margin": "-log P of the predicted class",
}


def predicted_influence(
    run: Run, datasets: Sequence[str], models: Sequence[str], *, seed: int, images: int | None, epsilon: float
) -> pd.DataFrame:
    """Setup 3: FI of the whole image, f = -log P(y_pred), for training and test images of each network.

    Args:
        run: the artifact.
        datasets: names of `data.NAMES`.
        models: names of `models.NAMES`.
        seed: of the networks and of the choice of images.
        images: images of each part to score, drawn at random; None for all.
        epsilon: e of the released code.

    Returns:
        One row per data set, model, part ("train", "test") and image: image, label, predicted, p_predicted, loss (nats,
        true class), margin (nats, predicted class), ceiling, exact, released, rank, position (of a Manhattan plot by
        true class).
    """
    frames = []
    for name in datasets:
        for model in models:
            trained = classifier(run, name, model, seed=seed)
            for part in ("train", "test"):
                split = dataset(run, name).train if part == "train" else dataset(run, name).test
                key: dict[str, object] = {
                    "model": trained.key,
                    "data": dataset(run, name).digest,
                    "part": part,
                    "images": images,
                }
                compute = bound(
                    predicted_class_scores, trained.model, split.sample(images, seed=seed), epsilon, run.device
                )
                key |= {"seed": seed, "epsilon": epsilon, "device": run.device.type}
                frame = cache.table(f"setup3/{name}-{model}-{part}", key, compute)
                frames.append(frame.assign(dataset=name, model=model, part=part))
    return pd.concat(frames, ignore_index=True)


def quantiles(frame: pd.DataFrame, *, seed: int = 0, repeats: int = 200) -> pd.DataFrame:
    """The paper's table: upper quantiles of FI in both parts, with 95% percentile bootstrap intervals over the images.

    The interval of the largest value (quantile 1) is left out: no bootstrap says how far it could be.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for (name, model, part), group in frame.groupby(["dataset", "model", "part"], sort=False):
        for estimator in ("exact", "released"):
            values = group[estimator].to_numpy()
            found = np.quantile(values, QUANTILES)
            samples = [
                np.quantile(values[generator.integers(0, len(values), len(values))], QUANTILES) for _ in range(repeats)
            ]
            lows, highs = np.quantile(samples, [0.025, 0.975], axis=0)
            for q, value, low, high in zip(QUANTILES, found, lows, highs, strict=True):
                limits = {"low": np.nan, "high": np.nan} if q == 1 else {"low": low, "high": high}
                key = {"dataset": name, "model": model, "estimator": estimator, "part": part, "images": len(values)}
                rows.append({**key, "quantile": q, "value": value, **limits})
    return pd.DataFrame(rows)


def gap(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Training against test images through each measure: tests, and the size of the effect with its interval.

    Returns:
        One row per data set, model and measure: accuracies and mean values of both parts, ks, ks_p, mw_p, effect
        (probability that a test image's value exceeds a training image's, ties half) with its 95% interval.
    """
    rows = []
    for (name, model), group in frame.groupby(["dataset", "model"], sort=False):
        parts = {str(part): rest for part, rest in group.groupby("part")}
        hits = {f"accuracy_{part}": float((rest["label"] == rest["predicted"]).mean()) for part, rest in parts.items()}
        for measure in MEASURES:
            values = {part: rest[measure].to_numpy() for part, rest in parts.items()}
            means = {f"mean_{part}": float(x.mean()) for part, x in values.items()}
            tests = two_sample(values["train"], values["test"], seed=seed)
            row = {"dataset": name, "model": model, "measure": measure, "images": len(values["train"])}
            rows.append({**row, **hits, **means, **tests})
    return pd.DataFrame(rows)


def claims(gaps: pd.DataFrame) -> dict[str, bool]:
    """Setup 3 by rules fixed before the run, each for every data set and network.

    * fi_separates_training_from_test (the paper reads overfitting off FI): the 95% interval of the effect of released
      FI lies above 1/2, and the Kolmogorov-Smirnov test rejects equality at 1%.
    * fi_orders_as_the_margin: exact FI and -log P of the predicted class have the same effect to 1e-12.
    """
    table = gaps.set_index(["dataset", "model", "measure"])
    released = table.xs("released", level="measure")
    same = table["effect"].xs("exact", level="measure") - table["effect"].xs("margin", level="measure")
    return {
        "fi_separates_training_from_test": bool(
            (released["effect_low"] > 0.5).all() and (released["ks_p"] < 0.01).all()
        ),
        "fi_orders_as_the_margin": bool((same.abs() <= 1e-12).all()),
    }


def quantile_claims(table: pd.DataFrame) -> dict[str, bool]:
    """By a rule fixed before the run: whether upper quantiles grow towards the test set, for every network.

    * upper_quantiles_are_larger_on_the_test_set: the 95% interval of the .95 quantile of released FI on test images
      lies above that on training images.
    """
    chosen = table[(table["estimator"] == "released") & (table["quantile"] == 0.95)]
    ends = chosen.pivot(index=["dataset", "model"], columns="part", values=["low", "high"])
    larger = ends[("low", "test")] > ends[("high", "train")]
    return {"upper_quantiles_are_larger_on_the_test_set": bool(larger.all())}
