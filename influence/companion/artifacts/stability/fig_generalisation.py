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
    """Precision@1 on distorted test images, for networks continued by each of `arms`.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random; 0 for
    all), trained (distortions that an arm of augmentation each is trained on), tested and corruptions (those that all
    are tested on), and those of `comparison.standard`.

    Returns:
        "runs", one row per seed, arm and distortion ("original", those tested, and the noise that the arms are trained
        on): n (images), precision_at_1, precision_at_5.
    """
    chosen = run.parameters
    versions = dict.fromkeys([ORIGINAL, *chosen["tested"], *chosen["corruptions"], own_noise(chosen)])
    return {"runs": comparison.measure(run, chosen["dataset"], arms(chosen), list(versions))}


def arms(parameters: Mapping[str, Any]) -> dict[str, Arm]:
    """The standard arms, augmentation beside clean images ("mixed"), and augmentation with each of some distortions.

    "mixed" isolates the loss: it sees the images that stability training sees, and has the cross-entropy on both.
    """
    chosen = standard(parameters)
    chosen["mixed"] = replace(chosen["augmentation"], objective="mixed")
    for name in parameters["trained"]:
        chosen[f"augmentation {name}"] = replace(chosen["augmentation"], perturbation=name)
    return chosen


def claims(runs: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, Estimate | float]:
    """Claim (vi) for the first alpha; suffix _strong for the last, _at_ALPHA between, and the same noise in other arms.

    * gaussian_training_generalises: gain over the control, the mean over all distortions other than Gaussian noise.
    * improves_under_its_own_noise: gain under the noise of the training, without which the loss did not take effect.
    * distortions_gained: on how many of those distortions the mean gain is above 0, as a share.
    * strong_less_mixed: the same mean, stability at the last alpha less the cross-entropy on clean and noisy images.
    """
    found: dict[str, Estimate | float] = {}
    chosen = {suffix: stability(alpha) for suffix, alpha in comparison.suffixes(parameters["alphas"]).items()}
    means = {}
    for suffix, arm in {**chosen, "_augmentation": "augmentation", "_mixed": "mixed"}.items():
        gain = comparison.gains(runs, arm)
        other = gain.loc[[name for name in gain.index if name != ORIGINAL and not str(name).startswith("noise-")]]
        means[suffix] = other.mean(axis=0)
        found |= {
            f"gaussian_training_generalises{suffix}": paired(means[suffix]),
            f"improves_under_its_own_noise{suffix}": paired(gain.loc[own_noise(parameters)]),
            f"distortions_gained{suffix}": float((other.mean(axis=1) > 0).mean()),
        }
    return found | {"strong_less_mixed": paired(means["_strong"] - means["_mixed"])}


def draw(table: pd.DataFrame) -> Figure:
    """Gain over the control of each training (rows) on each distortion; bold where the interval excludes 0."""
    figure, axes = style.subplots(height=1.5 + 0.42 * (table["arm"].nunique() - 1))
    comparison.gain_matrix(axes, table, across="distortion", names=label)
    axes.set_xlabel("tested on")
    axes.set_title(f"gain over control, paired, {int(table['seeds'].iloc[0])} seeds (bold: 95% interval excludes 0)")
    return figure
