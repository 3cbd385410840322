"""Zheng et al. (2016): the tables behind each figure and table of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .. import cache, distortions, finetuning, recipes, training
from ..evaluation import mean_interval
from ..results import Run
from .common import dataset

ORIGINAL = "original"


# -- precision@1 against JPEG quality ---------------------------------------------------------------------------------


def arms(alphas: Sequence[float], *, sigma: float, steps: int, learning_rate: float) -> dict[str, finetuning.Arm]:
    """The arms of the comparison by name: control, augmentation at the same sigma, stability at each alpha."""

    def arm(objective: Literal["control", "augmentation", "stability"], alpha: float = 0.0) -> finetuning.Arm:
        return finetuning.Arm(objective, steps=steps, learning_rate=learning_rate, sigma=sigma, alpha=alpha)

    controls = {"control": arm("control"), "augmentation": arm("augmentation")}
    return controls | {f"stability {alpha:g}": arm("stability", alpha) for alpha in alphas}


def jpeg_quality(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: dict[str, finetuning.Arm],
    *,
    seeds: Sequence[int],
    qualities: Sequence[int],
    images: int | None,
) -> pd.DataFrame:
    """Precision@1 on test images compressed at each JPEG quality, for networks continued by each arm.

    For one seed every arm starts from the same trained network and takes the same number of steps on the same images.

    Args:
        run: the artifact.
        dataset_name: a name of `data.NAMES`.
        model: a name of `models.NAMES`.
        chosen: the arms by name.
        seeds: one trained network each, continued by every arm.
        qualities: of JPEG, 1..100.
        images: how many test images, drawn at random; None for all.

    Returns:
        One row per seed, arm and distortion ("original" or "jpeg-q"): n (images), precision_at_1.
    """
    everything = dataset(run, dataset_name)
    split = everything.test.sample(images)
    versions = {ORIGINAL: split.images}
    versions |= {f"jpeg-{quality}": distortions.jpeg(split.images, quality) for quality in qualities}
    frames = []
    pairs = [(seed, name) for seed in seeds for name in chosen]
    for seed, name in tqdm(pairs, desc="arms", unit="network", leave=False):
        trained = finetuning.finetune(
            recipes.recipe(run.profile, dataset_name, model, seed=seed), chosen[name], everything, device=run.device
        )

        def measure(network: training.Trained = trained) -> pd.DataFrame:
            right = {
                version: (training.predict(network.model, pictures, device=run.device).argmax(1) == split.labels)
                for version, pictures in versions.items()
            }
            return pd.DataFrame(
                {
                    "distortion": list(right),
                    "n": len(split),
                    "precision_at_1": [float(hits.double().mean()) for hits in right.values()],
                }
            )

        key = {"model": trained.key, "versions": list(versions), "images": images, "device": run.device.type}
        frames.append(cache.table(f"jpeg/{dataset_name}-{model}", key, measure).assign(seed=seed, arm=name))
    return pd.concat(frames, ignore_index=True)[["seed", "arm", "distortion", "n", "precision_at_1"]]


def jpeg_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean precision@1 of each arm and its paired gain over the control, with 95% t intervals over seeds."""
    wide = runs.pivot(index=["distortion", "seed"], columns="arm", values="precision_at_1")
    rows = []
    for distortion in runs["distortion"].unique():
        for arm in runs["arm"].unique():
            values = wide.loc[distortion, arm]
            mean, low, high = mean_interval(values)
            gain, gain_low, gain_high = mean_interval(values - wide.loc[distortion, "control"])
            rows.append(
                {
                    "distortion": distortion,
                    "arm": arm,
                    "seeds": len(values),
                    "precision_at_1": mean,
                    "low": low,
                    "high": high,
                    "gain": gain,
                    "gain_low": gain_low,
                    "gain_high": gain_high,
                }
            )
    return pd.DataFrame(rows)


def jpeg_claims(runs: pd.DataFrame, arm: str, *, lowest: int, margin: float = 0.01) -> dict[str, bool | float]:
    """Claims (i) and (ii) of the paper for one arm, by rules that do not depend on the outcome.

    (i) Clean accuracy does not fall: the 95% interval of its paired change lies above -`margin`.
    (ii) The gain grows as JPEG quality falls: the 95% interval of (gain at `lowest` - gain on originals) lies above 0.
    """
    wide = runs.pivot(index=["distortion", "seed"], columns="arm", values="precision_at_1")
    gain = (wide[arm] - wide["control"]).unstack("seed")
    clean, clean_low, _ = mean_interval(gain.loc[ORIGINAL])
    growth, growth_low, _ = mean_interval(np.asarray(gain.loc[f"jpeg-{lowest}"] - gain.loc[ORIGINAL]))
    return {
        "clean_accuracy_does_not_fall": bool(clean_low > -margin),
        "gain_grows_as_quality_falls": bool(growth_low > 0),
        "clean_change": clean,
        "growth_of_gain": growth,
    }
