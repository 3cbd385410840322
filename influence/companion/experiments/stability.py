"""Zheng et al. (2016), classification on noisy data: the tables behind its figure and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..evaluation import mean_interval
from ..results import Run
from ..zoo.finetuning import Arm
from . import arms as comparison
from .arms import ORIGINAL, standard

arms = standard


# -- precision@1 against JPEG quality ---------------------------------------------------------------------------------


def jpeg_quality(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: Mapping[str, Arm],
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
        One row per seed, arm and distortion ("original" or "jpeg-q"): n (images), precision_at_1, precision_at_5.
    """
    versions = [ORIGINAL, *(f"jpeg-{quality}" for quality in qualities)]
    return comparison.measure(run, dataset_name, model, chosen, seeds=seeds, versions=versions, images=images)


def jpeg_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean precision@1 of each arm and its paired gain over the control, with 95% t intervals over seeds."""
    return comparison.summary(runs)


def jpeg_claims(runs: pd.DataFrame, arm: str, *, lowest: int, margin: float = 0.01) -> dict[str, bool | float]:
    """Claims (i) and (ii) of the paper for one arm, by rules that do not depend on the outcome.

    (i) Clean accuracy does not fall: the 95% interval of its paired change lies above -`margin`.
    (ii) The gain grows as JPEG quality falls: the 95% interval of (gain at `lowest` - gain on originals) lies above 0.
    """
    gain = comparison.gains(runs, arm)
    clean, clean_low, _ = mean_interval(gain.loc[ORIGINAL])
    growth, growth_low, _ = mean_interval(np.asarray(gain.loc[f"jpeg-{lowest}"] - gain.loc[ORIGINAL]))
    return {
        "clean_accuracy_does_not_fall": bool(clean_low > -margin),
        "gain_grows_as_quality_falls": bool(growth_low > 0),
        "clean_change": clean,
        "growth_of_gain": growth,
    }


# -- the table: precision@1 and @5 ------------------------------------------------------------------------------------


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
        learning_rate: of Adam.
        versions: names of `distortions.apply`.
        images: test images of each data set, drawn at random; None for all.
    """
    frames = []
    for name, chosen_seeds in seeds.items():
        chosen = standard(alphas, sigma=sigma, steps=steps[name], learning_rate=learning_rate)
        frame = comparison.measure(run, name, model, chosen, seeds=chosen_seeds, versions=versions, images=images)
        frames.append(frame.assign(dataset=name))
    return pd.concat(frames, ignore_index=True)


def classification_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Both precisions of each arm, long form, with paired gains over the control."""
    frames = []
    for k in (1, 5):
        value = f"precision_at_{k}"
        table = comparison.summary(runs, value=value, within=("dataset", "distortion"))
        frames.append(table.rename(columns={value: "precision"}).assign(at=k))
    columns = ["dataset", "distortion", "at", "arm", "seeds", "precision"]
    columns += ["low", "high", "gain", "gain_low", "gain_high"]
    return pd.concat(frames, ignore_index=True)[columns]


def classification_claims(runs: pd.DataFrame, arm: str, *, lowest: int) -> dict[str, bool | float]:
    """Claims (i) and (ii) for one arm on every data set: each holds when it holds on all of them."""
    found = {str(name): jpeg_claims(group, arm, lowest=lowest) for name, group in runs.groupby("dataset", sort=False)}
    claims: dict[str, bool | float] = {
        item: all(bool(values[item]) for values in found.values())
        for item in ("clean_accuracy_does_not_fall", "gain_grows_as_quality_falls")
    }
    for name, values in found.items():
        claims |= {f"{name}_{item}": values[item] for item in ("clean_change", "growth_of_gain")}
    return claims


# -- claim (vi): other distortions than the one trained with ----------------------------------------------------------


def generalisation_arms(
    perturbations: Sequence[str], *, alpha: float, sigma: float, steps: int, learning_rate: float
) -> dict[str, Arm]:
    """Control, Gaussian augmentation, stability at one alpha, and augmentation with each of some distortions."""
    chosen = standard([alpha], sigma=sigma, steps=steps, learning_rate=learning_rate)
    for name in perturbations:
        arm = Arm("augmentation", steps=steps, learning_rate=learning_rate, sigma=sigma, perturbation=name)
        chosen[f"augmentation {name}"] = arm
    return chosen


def generalisation_claim(runs: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Claim (vi) for one arm trained with Gaussian noise.

    It holds when the 95% interval over seeds of the gain over the control lies above 0, the gain being the mean over
    all distortions other than Gaussian noise. Beside it: on how many of them the mean gain is above 0.
    """
    gain = comparison.gains(runs, arm)
    other = gain.loc[[name for name in gain.index if name != ORIGINAL and not str(name).startswith("noise")]]
    mean, low, _ = mean_interval(other.mean(axis=0))
    return {
        "gaussian_training_generalises": bool(low > 0),
        "mean_gain": mean,
        "mean_gain_low": low,
        "distortions_gained": float((other.mean(axis=1) > 0).mean()),
    }
