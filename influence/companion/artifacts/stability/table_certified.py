"""What stability training is not: certified accuracy by randomised smoothing, and accuracy under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from ... import style
from ...images.data import Split
from ...ledger.reference import Estimate
from ...ledger.results import COMMITTED, Run
from ...scores import attacks, smoothing
from ...zoo import training
from ..common import dataset, scored
from . import comparison
from .comparison import colours, label


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Certified accuracy of every arm under smoothing at one sigma, and its accuracy under FGSM and PGD.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random) and those
    of `comparison.standard`; smoothing_sigma, select (noisy copies that choose the class), estimate (those that bound
    its probability), level (probability of a wrong certificate), radii (l2, pixels in [0, 1]); epsilons (l_inf, pixels
    in [0, 1]; 0 is no attack).

    Returns:
        "certificates", one row per seed, arm and radius: certified (share of images with the right class and at least
        that radius), abstained (share), mean_radius (average certified radius, 0 where the class is wrong), n (images).
        "attacks", one row per seed, arm, attack ("fgsm" or "pgd": 10 steps of epsilon / 4, random start) and epsilon:
        accuracy, n (images).
    """
    chosen = run.parameters
    name, model, epsilons = (chosen[key] for key in ("dataset", "model", "epsilons"))
    split = dataset(run, name).test.sample(chosen["images"])
    certificates, attacked = [], []
    arms = comparison.standard(chosen)
    publish = run.profile == COMMITTED
    for seed, arm, trained in comparison.networks(run, name, arms, task="certificates and attacks", publish=publish):
        of: dict[str, Any] = {"seed": seed, "arm": arm, "n": len(split)}
        found = scored(run, f"certified/{name}-{model}", _certified, trained, split, seed=seed, **_setting(chosen))
        certificates.append(_shares(found, split, chosen["radii"]).assign(**of))
        tried = scored(run, f"attacked/{name}-{model}", _attacked, trained, split, seed=seed, epsilons=epsilons)
        attacked.append(tried.assign(**of))
    return {
        "certificates": pd.concat(certificates, ignore_index=True),
        "attacks": pd.concat(attacked, ignore_index=True),
    }


def again(run: Run, examples: pd.DataFrame, *, table: str) -> pd.DataFrame:
    """The rows of "certificates" or "attacks" of some seeds and arms, by `comparison.again`."""
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"])

    def rows(trained: training.Trained, seed: int, group: pd.DataFrame) -> pd.DataFrame:
        if table == "attacks":
            found = _attacked(trained.model, split, epsilons=chosen["epsilons"], device=run.device, seed=seed)
        else:
            of_image = _certified(trained.model, split, device=run.device, seed=seed, **_setting(chosen))
            found = _shares(of_image, split, chosen["radii"])
        return found.assign(n=len(split))

    return comparison.again(run, chosen["dataset"], comparison.standard(chosen), examples, rows)


def _setting(parameters: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: parameters[name] for name in ("select", "estimate", "level")}
    return {"sigma": parameters["smoothing_sigma"], **named}


def _shares(found: pd.DataFrame, split: Split, radii: Sequence[float]) -> pd.DataFrame:
    """One row per radius: radius, certified, abstained, mean_radius."""
    right, radius = found["predicted"].to_numpy() == split.labels.numpy(), found["radius"].to_numpy()
    shares = [float((right & (radius >= r)).mean()) for r in radii]
    return pd.DataFrame({"radius": radii, "certified": shares}).assign(
        abstained=float((found["predicted"] == smoothing.ABSTAIN).mean()),
        mean_radius=float(np.where(right, radius, 0.0).mean()),
    )


def _certified(model: nn.Module, split: Split, *, device: torch.device, seed: int, **setting: Any) -> pd.DataFrame:
    """One row per image: predicted, radius."""
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 30_000))
    return pd.DataFrame([smoothing.certify(model, image, generator=generator, **setting) for image in split.images])


def _attacked(
    model: nn.Module, split: Split, *, epsilons: Sequence[float], device: torch.device, seed: int
) -> pd.DataFrame:
    """One row per attack and epsilon: attack, epsilon, accuracy."""
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 40_000))
    rows = []
    for epsilon in epsilons:
        pgd = partial(attacks.pgd, epsilon=epsilon, generator=generator)
        for name, attack in (("fgsm", partial(attacks.fgsm, epsilon=epsilon)), ("pgd", pgd)):
            accuracy = attacks.accuracy(model, split, attack, device)
            rows.append({"attack": name, "epsilon": epsilon, "accuracy": accuracy})
    return pd.DataFrame(rows)


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Both, long form: quantity, strength, arm, mean over seeds with its 95% interval, paired gain over the control."""
    certificates, attacked = tables["certificates"], tables["attacks"]
    parts = [
        certificates.assign(quantity="certified", strength=certificates["radius"], value=certificates["certified"]),
        attacked.assign(quantity=attacked["attack"], strength=attacked["epsilon"], value=attacked["accuracy"]),
    ]
    runs = pd.concat([part[["quantity", "strength", "seed", "arm", "value"]] for part in parts], ignore_index=True)
    return comparison.summary(runs, value="value", within=("quantity", "strength"))


def claims(tables: Mapping[str, pd.DataFrame], parameters: Mapping[str, Any]) -> dict[str, Estimate | float]:
    """What the rules ask of the last alpha, paired by network, and the means behind it.

    * certified_radius_grows: its average certified radius less that of the control.
    * no_adversarial_robustness: half of its accuracy without an attack less that under PGD at the largest epsilon.
    """
    arm, attacked = comparison.stability(parameters["alphas"][-1]), tables["attacks"]
    radius = tables["certificates"].groupby(["seed", "arm"])["mean_radius"].first().unstack("arm")
    of_arm = attacked[(attacked["arm"] == arm) & (attacked["attack"] == "pgd")]
    accuracy = of_arm.pivot(index="seed", columns="epsilon", values="accuracy")
    return {
        "certified_radius_grows": comparison.paired(radius[arm] - radius[comparison.CONTROL]),
        "no_adversarial_robustness": comparison.paired(accuracy[0.0] / 2 - accuracy[accuracy.columns.max()]),
        "mean_certified_radius_control": float(radius[comparison.CONTROL].mean()),
        "mean_certified_radius_stability": float(radius[arm].mean()),
        "pgd_accuracy": float(accuracy[accuracy.columns.max()].mean()),
    }


def under_the_strongest(attacked: pd.DataFrame) -> dict[str, float]:
    """Accuracy of each arm under PGD at the largest epsilon, the mean over seeds."""
    rows = attacked[(attacked["attack"] == "pgd") & (attacked["epsilon"] == attacked["epsilon"].max())]
    return {str(arm): float(group["accuracy"].mean()) for arm, group in rows.groupby("arm", sort=False)}


def draw(table: pd.DataFrame, *, images: int) -> Figure:
    """Certified accuracy against the l2 radius, and accuracy against the strength of each attack, of so many images."""
    quantities = {
        "certified": (r"certified $\ell_2$ radius", "certified accuracy"),
        "fgsm": (r"$\ell_\infty$ radius of FGSM", "accuracy"),
        "pgd": (r"$\ell_\infty$ radius of PGD", "accuracy"),
    }
    figure, panels = style.subplots(1, 3, height=3.0, sharey=True)
    tint = colours(list(table["arm"].unique()))
    for axes, (quantity, (x, y)) in zip(panels, quantities.items(), strict=True):
        for arm, group in table[table["quantity"] == quantity].groupby("arm", sort=False):
            colour = tint[str(arm)]
            axes.plot(group["strength"], group["value"], "o-", color=colour, markersize=3, label=label(str(arm)))
            axes.fill_between(group["strength"], group["low"], group["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
    panels[0].set_ylim(-0.02, 1.05)
    seeds = int(table["seeds"].iloc[0])
    over = f"over {seeds} seeds, {images:,} images"
    figure.suptitle(f"mean and 95% interval {over}; radii for pixels in [0, 1]", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
