"""What stability training is not: certified accuracy by randomised smoothing, and accuracy under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ... import style
from ...images.data import Split
from ...ledger import cache
from ...ledger.results import Run
from ...scores import attacks, smoothing
from ...scores.evaluation import mean_interval
from ...zoo import training
from ...zoo.finetuning import Arm
from ..common import dataset
from . import comparison
from .comparison import colours, label

_ATTACKED_AT_ONCE = 250


PGD_STEPS = 10


def certified(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    images: int,
    sigma: float,
    select: int,
    estimate: int,
    level: float,
    radii: Sequence[float],
) -> pd.DataFrame:
    """Certified accuracy of every arm under smoothing at one sigma.

    Args:
        run: the artifact.
        dataset_name: a name of `data.NAMES`.
        model: a name of `models.NAMES`.
        chosen: the arms by name.
        seeds: one trained network each.
        images: test images, drawn at random.
        sigma: of the smoothing noise, pixels in [0, 1].
        select: noisy copies that choose the class.
        estimate: noisy copies that bound its probability.
        level: probability of a wrong certificate.
        radii: l2, pixels in [0, 1].

    Returns:
        One row per seed, arm and radius: certified (share of images with the right class and at least that radius),
        abstained (share), mean_radius (average certified radius, 0 where the class is wrong), n (images).
    """
    split = dataset(run, dataset_name).test.sample(images)
    setting = {"sigma": sigma, "select": select, "estimate": estimate, "level": level, "images": images}
    rows = []
    for seed, name, trained in comparison.networks(run, dataset_name, model, chosen, seeds=seeds, task="certificates"):

        def measure(trained: training.Trained = trained, seed: int = seed) -> pd.DataFrame:
            generator = torch.Generator(run.device).manual_seed(training.mixed_seed(seed, 30_000))
            found = [
                smoothing.certify(
                    trained.model,
                    image,
                    sigma=sigma,
                    select=select,
                    estimate=estimate,
                    level=level,
                    generator=generator,
                )
                for image in split.images
            ]
            return pd.DataFrame({"predicted": [c.predicted for c in found], "radius": [c.radius for c in found]})

        key = {"model": trained.key, "seed": seed, "device": run.device.type, **setting}
        found = cache.table(f"certified/{dataset_name}-{model}", key, measure)
        right = found["predicted"].to_numpy() == split.labels.numpy()
        radius = found["radius"].to_numpy()
        common = {
            "seed": seed,
            "arm": name,
            "abstained": float((found["predicted"] == smoothing.ABSTAIN).mean()),
            "mean_radius": float(np.where(right, radius, 0.0).mean()),
            "n": len(split),
        }
        rows += [{**common, "radius": r, "certified": float((right & (radius >= r)).mean())} for r in radii]
    return pd.DataFrame(rows)


def attacked(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    images: int,
    epsilons: Sequence[float],
) -> pd.DataFrame:
    """Accuracy of every arm under FGSM and PGD (10 steps of epsilon / 4, random start), l_inf radius epsilon.

    Returns:
        One row per seed, arm, attack ("fgsm" or "pgd") and epsilon: accuracy, n (images). Epsilon 0 is no attack.
    """
    split = dataset(run, dataset_name).test.sample(images)
    frames = []
    for seed, name, trained in comparison.networks(run, dataset_name, model, chosen, seeds=seeds, task="attacks"):

        def measure(trained: training.Trained = trained, seed: int = seed) -> pd.DataFrame:
            return _attacked(trained, split, epsilons, run.device, seed)

        key = {"model": trained.key, "seed": seed, "images": images, "epsilons": list(epsilons)}
        found = cache.table(f"attacked/{dataset_name}-{model}", key | {"device": run.device.type}, measure)
        frames.append(found.assign(seed=seed, arm=name, n=len(split)))
    return pd.concat(frames, ignore_index=True)


def _attacked(
    trained: training.Trained, split: Split, epsilons: Sequence[float], device: torch.device, seed: int
) -> pd.DataFrame:
    generator = torch.Generator(device).manual_seed(training.mixed_seed(seed, 40_000))
    rows = []
    for epsilon in epsilons:
        right = {"fgsm": 0, "pgd": 0}
        for pictures, classes in zip(
            split.images.split(_ATTACKED_AT_ONCE), split.labels.split(_ATTACKED_AT_ONCE), strict=True
        ):
            x, y = training.pixels(pictures, device), classes.to(device)
            moved = {
                "fgsm": attacks.fgsm(trained.model, x, y, epsilon=epsilon),
                "pgd": attacks.pgd(
                    trained.model, x, y, epsilon=epsilon, steps=PGD_STEPS, step_size=epsilon / 4, generator=generator
                ),
            }
            with torch.no_grad():
                for attack, images in moved.items():
                    right[attack] += int((trained.model(images).argmax(1) == y).sum())
        rows += [{"attack": attack, "epsilon": epsilon, "accuracy": n / len(split)} for attack, n in right.items()]
    return pd.DataFrame(rows)


def summary(certificates: pd.DataFrame, attacks_found: pd.DataFrame) -> pd.DataFrame:
    """Both, long form: quantity, strength, arm, mean over seeds with its 95% interval, paired gain over the control."""
    parts = [
        certificates.assign(quantity="certified", strength=certificates["radius"], value=certificates["certified"]),
        attacks_found.assign(
            quantity=attacks_found["attack"], strength=attacks_found["epsilon"], value=attacks_found["accuracy"]
        ),
    ]
    runs = pd.concat([part[["quantity", "strength", "seed", "arm", "value"]] for part in parts], ignore_index=True)
    return comparison.summary(runs, value="value", within=("quantity", "strength"))


def claims(certificates: pd.DataFrame, attacks_found: pd.DataFrame, arm: str) -> dict[str, bool | float]:
    """Average certified radius of the control and of an arm, and whether any accuracy is left under the strongest PGD.

    `no_adversarial_robustness` holds when the arm's mean accuracy under PGD at the largest epsilon is below half of its
    clean accuracy.
    """
    radius = certificates.groupby(["seed", "arm"])["mean_radius"].first().unstack("arm")
    gain, gain_low, _ = mean_interval(radius[arm] - radius[comparison.CONTROL])
    of_arm = attacks_found[attacks_found["arm"] == arm]
    pgd = of_arm[of_arm["attack"] == "pgd"].groupby("epsilon")["accuracy"].mean()
    clean = float(pgd.loc[0.0])
    return {
        "mean_certified_radius_control": float(radius[comparison.CONTROL].mean()),
        "mean_certified_radius_stability": float(radius[arm].mean()),
        "certified_radius_grows": bool(gain_low > 0),
        "gain_of_radius": gain,
        "pgd_accuracy": float(pgd.iloc[-1]),
        "no_adversarial_robustness": bool(pgd.iloc[-1] < clean / 2),
    }


def draw(table: pd.DataFrame) -> Figure:
    """Certified accuracy against the l2 radius, and accuracy against the strength of each attack."""
    quantities = {
        "certified": (r"certified $\ell_2$ radius", "certified accuracy"),
        "fgsm": (r"$\ell_\infty$ radius of FGSM", "accuracy"),
        "pgd": (r"$\ell_\infty$ radius of PGD", "accuracy"),
    }
    figure = Figure(figsize=(style.WIDTH, 3.0))
    panels = figure.subplots(1, 3, sharey=True)
    tint = colours(list(table["arm"].unique()))
    for axes, (quantity, (x, y)) in zip(panels, quantities.items(), strict=True):
        for arm, group in table[table["quantity"] == quantity].groupby("arm", sort=False):
            colour = tint[str(arm)]
            axes.plot(group["strength"], group["value"], "o-", color=colour, markersize=3, label=label(str(arm)))
            axes.fill_between(group["strength"], group["low"], group["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    panels[0].set_ylim(-0.02, 1.05)
    seeds = int(table["seeds"].iloc[0])
    figure.suptitle(f"mean and 95% interval over {seeds} seeds; radii for pixels in [0, 1]", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
