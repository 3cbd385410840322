"""Do the gains carry over to distortions that no arm was trained on (Zheng et al. 2016)?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...zoo.finetuning import Arm
from . import comparison
from .comparison import ORIGINAL, label, own_noise, paired, stability, standard


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Precision@1 on distorted test images, for control, augmentation and stability with Gaussian noise, and rivals.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random; 0 for
    all), sigma, alpha, steps, learning_rate, trained (distortions that an arm of augmentation each is trained on),
    tested and corruptions (those that all are tested on).

    Returns:
        "runs", one row per seed, arm and distortion ("original", those tested, and the noise that the arms are trained
        on): n (images), precision_at_1, precision_at_5.
    """
    chosen = run.parameters
    versions = dict.fromkeys([ORIGINAL, *chosen["tested"], *chosen["corruptions"], own_noise(chosen)])
    return {"runs": comparison.measure(run, chosen["dataset"], arms(chosen), list(versions))}


def arms(parameters: Mapping[str, Any]) -> dict[str, Arm]:
    """Control, Gaussian augmentation, stability at one alpha, and augmentation with each of some distortions."""
    chosen = standard({**parameters, "alphas": [parameters["alpha"]]})
    for name in parameters["trained"]:
        chosen[f"augmentation {name}"] = replace(chosen["augmentation"], perturbation=name)
    return chosen


def claims(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, Estimate | float]:
    """Claim (vi) for stability training, and with the suffix _augmentation for the same noise as plain augmentation.

    * gaussian_training_generalises: gain over the control, the mean over all distortions other than Gaussian noise.
    * improves_under_its_own_noise: gain under the noise of the training, without which the loss did not take effect.
    * distortions_gained: on how many of those distortions the mean gain is above 0, as a share.
    """
    found: dict[str, Estimate | float] = {}
    for arm, suffix in ((stability(parameters["alpha"]), ""), ("augmentation", "_augmentation")):
        gain = comparison.gains(runs, arm)
        other = gain.loc[[name for name in gain.index if name != ORIGINAL and not str(name).startswith("noise-")]]
        found |= {
            f"gaussian_training_generalises{suffix}": paired(other.mean(axis=0)),
            f"improves_under_its_own_noise{suffix}": paired(gain.loc[own_noise(parameters)]),
            f"distortions_gained{suffix}": float((other.mean(axis=1) > 0).mean()),
        }
    return found


def draw(table: pd.DataFrame) -> Figure:
    """Gain over the control of each training (rows) on each distortion; bold where the interval excludes 0."""
    figure = Figure(figsize=(style.WIDTH, 1.5 + 0.42 * (table["arm"].nunique() - 1)))
    axes = figure.subplots()
    comparison.gain_matrix(axes, table, across="distortion", names=label)
    axes.set_xlabel("tested on")
    axes.set_title(f"gain over control, paired, {int(table['seeds'].iloc[0])} seeds (bold: 95% interval excludes 0)")
    return figure
