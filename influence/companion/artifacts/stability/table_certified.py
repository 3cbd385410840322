"""What stability training is not: certified accuracy by randomised smoothing, and accuracy under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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

# One noisy copy that changes sides moves a radius by less.
_NEAR_RADIUS = 0.01


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Certified accuracy of every arm under smoothing at one sigma, and its accuracy under FGSM and PGD.

    Parameters of the run: dataset, model, seeds (of the networks), images (of the test part, drawn at random) and those
    of `comparison.standard`; smoothing_sigma, select (noisy copies that choose the class), estimate (those that bound
    its probability), level (probability of a wrong certificate), radii (l2, pixels in [0, 1]); epsilons (l_inf, pixels
    in [0, 1]; 0 is no attack).

    Returns:
        "certificates", one row per seed, arm and image: radius (0 where the class is wrong or none is certified),
        abstained.
        "attacks", one row per seed, arm, attack ("fgsm" or "pgd": 10 steps of epsilon / 4, random start), epsilon and
        image: right, 1 or 0.
    """
    name = run.parameters["dataset"]
    split, arms = dataset(run, name).test.sample(run.parameters["images"]), comparison.standard(run.parameters)
    publish, named = run.profile == COMMITTED, f"{name}-{run.parameters['model']}"
    found: dict[str, list[pd.DataFrame]] = {"certificates": [], "attacks": []}
    for seed, arm, trained in comparison.networks(run, name, arms, task="certificates and attacks", publish=publish):
        for table, make in _TABLES.items():
            rows = scored(run, f"{table}/{named}", make, trained, split, seed=seed, **_setting(run.parameters, table))
            found[table].append(rows.assign(seed=seed, arm=arm).drop(columns="near_cut"))
    return {table: pd.concat(parts, ignore_index=True) for table, parts in found.items()}


def again(run: Run, examples: pd.DataFrame, *, table: str) -> pd.DataFrame:
    """The rows of "certificates" or "attacks" of some seeds and arms, by `comparison.again`."""
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"])

    def rows(trained: training.Trained, seed: int, group: pd.DataFrame) -> pd.DataFrame:
        return _TABLES[table](trained.model, split, device=run.device, seed=seed, **_setting(chosen, table))

    return comparison.again(run, chosen["dataset"], comparison.standard(chosen), examples, rows)


def _setting(parameters: Mapping[str, Any], table: str) -> dict[str, Any]:
    if table == "attacks":
        return {"epsilons": parameters["epsilons"]}
    named = {name: parameters[name] for name in ("select", "estimate", "level")}
    return {"sigma": parameters["smoothing_sigma"], **named}


def _certified(model: nn.Module, split: Split, *, device: torch.device, seed: int, **setting: Any) -> pd.DataFrame:
    """One row per image: image, radius, abstained, near_cut (rounding may turn an answer into none, or back)."""
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 30_000))
    found = pd.DataFrame([smoothing.certify(model, image, generator=generator, **setting) for image in split.images])
    right = found["predicted"].to_numpy() == split.labels.numpy()
    columns = {"image": split.index.numpy(), "radius": found["radius"].where(right, 0.0)}
    abstained = found["predicted"] == smoothing.ABSTAIN
    return pd.DataFrame(columns).assign(abstained=abstained, near_cut=found["radius"] < _NEAR_RADIUS)


def _attacked(
    model: nn.Module, split: Split, *, epsilons: Sequence[float], device: torch.device, seed: int
) -> pd.DataFrame:
    """One row per attack, epsilon and image: attack, epsilon, image, right, near_cut (`attacks.near_tie`)."""
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 40_000))
    rows = []
    for epsilon in epsilons:
        pgd = partial(attacks.pgd, epsilon=epsilon, generator=generator)
        for name, attack in (("fgsm", partial(attacks.fgsm, epsilon=epsilon)), ("pgd", pgd)):
            margins = attacks.margins(model, split, attack, device)
            columns = {"image": split.index.numpy(), "right": 1.0 * (margins > 0)}
            near = attacks.near_tie(margins, attacked=epsilon > 0)
            rows.append(pd.DataFrame(columns).assign(attack=name, epsilon=epsilon, near_cut=near))
    return pd.concat(rows, ignore_index=True)


_TABLES: dict[str, Callable[..., pd.DataFrame]] = {"certificates": _certified, "attacks": _attacked}


def summary(tables: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """Both, long form: quantity, strength, arm, mean over seeds with its 95% interval, paired gain over the control.

    "certified" is the share of images with the right class and at least that radius.
    """
    certificates, attacked = tables["certificates"], tables["attacks"]
    radius = certificates["radius"]
    certified = [certificates.assign(strength=r, value=1.0 * ((radius > 0) & (radius >= r))) for r in radii]
    parts = [
        pd.concat(certified).assign(quantity="certified"),
        attacked.assign(quantity=attacked["attack"], strength=attacked["epsilon"], value=attacked["right"]),
    ]
    keys = ["quantity", "strength", "seed", "arm"]
    runs = pd.concat(parts, ignore_index=True).groupby(keys, sort=False)["value"].mean().reset_index()
    return comparison.summary(runs, value="value", within=("quantity", "strength"))


def claims(tables: Mapping[str, pd.DataFrame], parameters: Mapping[str, Any]) -> dict[str, Estimate | float]:
    """What the rules ask of the last alpha, paired by network and image, `comparison.over_images`, and means behind it.

    * certified_radius_grows: its average certified radius less that of the control.
    * no_adversarial_robustness: half of its accuracy without an attack less that under PGD at the largest epsilon.
    """
    arm = comparison.stability(parameters["alphas"][-1])
    certificates, attacked = tables["certificates"], tables["attacks"]
    radius = certificates.pivot(index=["seed", "image"], columns="arm", values="radius")
    of_arm = attacked[(attacked["arm"] == arm) & (attacked["attack"] == "pgd")]
    right = of_arm.pivot(index=["seed", "image"], columns="epsilon", values="right")
    strongest = right.columns.max()
    return {
        "certified_radius_grows": comparison.over_images(radius[arm] - radius[comparison.CONTROL]),
        "no_adversarial_robustness": comparison.over_images(right[0.0] / 2 - right[strongest]),
        "mean_certified_radius_control": float(radius[comparison.CONTROL].mean()),
        "mean_certified_radius_stability": float(radius[arm].mean()),
        "pgd_accuracy": float(right[strongest].mean()),
    }


def under_the_strongest(attacked: pd.DataFrame) -> dict[str, float]:
    """Accuracy of each arm under PGD at the largest epsilon, the mean over seeds."""
    rows = attacked[(attacked["attack"] == "pgd") & (attacked["epsilon"] == attacked["epsilon"].max())]
    return {str(arm): float(group["right"].mean()) for arm, group in rows.groupby("arm", sort=False)}


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
