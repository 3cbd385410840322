"""Networks continued by every arm of a comparison, measured on distorted images, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache as remember
from typing import Any

import pandas as pd
import torch

from influence.progress import progress_bar

from ... import style
from ...images import distortions
from ...images.data import Split
from ...ledger import cache
from ...ledger.results import Run
from ...scores.evaluation import mean_interval
from ...zoo import finetuning, recipes, training
from ...zoo.finetuning import Arm
from ..common import dataset

ORIGINAL = distortions.ORIGINAL


CONTROL = "control"


def standard(
    alphas: Sequence[float], *, sigma: float, steps: int, learning_rate: float, variants: bool = False
) -> dict[str, Arm]:
    """The arms by name: control, augmentation at the same sigma, stability (KL, both branches) at each alpha.

    With `variants` also, at the last alpha, the cross-entropy in the place of the KL, and a stop-gradient on the clean
    branch; under that one the two have the same gradient, so that one network stands for both.
    """
    common: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "sigma": sigma}
    chosen = {CONTROL: Arm("control", **common), "augmentation": Arm("augmentation", **common)}
    chosen |= {f"stability {alpha:g}": Arm("stability", alpha=alpha, **common) for alpha in alphas}
    if variants:
        last = alphas[-1]
        chosen[f"stability {last:g} CE"] = Arm("stability", alpha=last, divergence="ce", **common)
        chosen[f"stability {last:g} stopped"] = Arm("stability", alpha=last, stop_gradient=True, **common)
    return chosen


def network(run: Run, dataset_name: str, model: str, arm: Arm, *, seed: int) -> training.Trained:
    """The classifier of a seed, continued by an arm."""
    recipe = recipes.recipe(run.profile, dataset_name, model, seed=seed)
    return finetuning.finetune(recipe, arm, dataset(run, dataset_name), device=run.device)


def networks(
    run: Run, dataset_name: str, model: str, chosen: Mapping[str, Arm], *, seeds: Sequence[int], task: str
) -> Iterator[tuple[int, str, training.Trained]]:
    """The classifiers of a comparison, one after the other: seed, name of the arm, network; `task` names the bar."""
    pairs = [(seed, name) for seed in seeds for name in chosen]
    for seed, name in progress_bar(pairs, desc=task, unit="network", leave=False):
        yield seed, name, network(run, dataset_name, model, chosen[name], seed=seed)


def measure(
    run: Run,
    dataset_name: str,
    model: str,
    chosen: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    versions: Sequence[str],
    images: int | None,
    part: str = "test",
) -> pd.DataFrame:
    """Precision@1 and @5 of every arm on every distortion of some images.

    For one seed every arm starts from the same trained network and takes the same number of steps on the same images.

    Args:
        run: the artifact.
        dataset_name: a name of `data.NAMES`.
        model: a name of `models.NAMES`.
        chosen: the arms by name.
        seeds: one trained network each, continued by every arm.
        versions: names of `distortions.apply`, "original" among them where a change is asked for.
        images: how many images, drawn at random; None for all.
        part: "test" or "valid".

    Returns:
        One row per seed, arm and distortion: seed, arm, distortion, n (images), precision_at_1, precision_at_5.
    """
    everything = dataset(run, dataset_name)
    split = (everything.test if part == "test" else everything.valid).sample(images)

    @remember
    def distorted(version: str) -> torch.Tensor:
        return distortions.apply(version, split.images)

    rows = []
    compared = networks(run, dataset_name, model, chosen, seeds=seeds, task=f"arms on {dataset_name}")
    for seed, name, trained in compared:
        for version in versions:
            key = {"model": trained.key, "version": version, "images": images, "part": part, "device": run.device.type}

            def count(trained: training.Trained = trained, version: str = version) -> pd.DataFrame:
                return _precision(trained, distorted(version), split, run.device)

            found = cache.table(f"arms/{dataset_name}-{model}", key, count).iloc[0].to_dict()
            rows.append({"seed": seed, "arm": name, "distortion": version} | found | {"n": len(split)})
    return pd.DataFrame(rows)[["seed", "arm", "distortion", "n", "precision_at_1", "precision_at_5"]]


def _precision(trained: training.Trained, images: torch.Tensor, split: Split, device: torch.device) -> pd.DataFrame:
    logits = training.predict(trained.model, images, device=device)
    hits = logits.topk(5, dim=1).indices == split.labels[:, None]
    at = {f"precision_at_{k}": [float(hits[:, :k].any(dim=1).double().mean())] for k in (1, 5)}
    return pd.DataFrame(at)


def summary(
    runs: pd.DataFrame, *, value: str = "precision_at_1", within: Sequence[str] = ("distortion",)
) -> pd.DataFrame:
    """Mean of each arm and its gain over the control, paired by seed, with 95% t intervals over seeds.

    Args:
        runs: with columns seed, arm, `value` and those of `within`.
        value: what is averaged.
        within: what a row of the result is for, besides the arm.

    Returns:
        Columns of `within`, arm, seeds, `value`, low, high, gain, gain_low, gain_high.
    """
    rows = []
    for where, group in runs.groupby(list(within), sort=False):
        wide = group.pivot(index="seed", columns="arm", values=value)
        for arm in group["arm"].unique():
            mean, low, high = mean_interval(wide[arm])
            gain, gain_low, gain_high = mean_interval(wide[arm] - wide[CONTROL])
            rows.append(
                {
                    **dict(zip(within, where, strict=True)),
                    "arm": arm,
                    "seeds": len(wide),
                    value: mean,
                    "low": low,
                    "high": high,
                    "gain": gain,
                    "gain_low": gain_low,
                    "gain_high": gain_high,
                }
            )
    return pd.DataFrame(rows)


def gains(runs: pd.DataFrame, arm: str, *, value: str = "precision_at_1") -> pd.DataFrame:
    """Gain of an arm over the control: one row for each distortion, one column for each seed."""
    wide = runs.pivot(index=["distortion", "seed"], columns="arm", values=value)
    return (wide[arm] - wide[CONTROL]).unstack("seed").loc[list(runs["distortion"].unique())]


def label(arm: str) -> str:
    """How readers know an arm."""
    known = {
        "control": r"control ($\alpha$ = 0)",
        "augmentation": "Gaussian augmentation",
        "stability": "stability",
    }
    if arm in known:
        return known[arm]
    if arm.startswith("augmentation "):
        return "augmentation: " + arm.removeprefix("augmentation ")
    return arm.replace("stability ", r"stability, $\alpha$ = ")


def colours(arms: Sequence[str]) -> dict[str, str]:
    """One colour for each arm, the same in every figure of one set of arms."""
    stable = iter(style.STABILITY * 3)
    return {arm: style.COLOURS.get(arm) or next(stable) for arm in arms}
