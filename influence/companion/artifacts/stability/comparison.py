"""Networks continued by every arm of a comparison, measured on distorted images, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache as remember
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike
from torch import Tensor

from influence.progress import progress_bar

from ... import style
from ...images import distortions
from ...images.data import Split
from ...ledger import cache
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import columns
from ...scores.evaluation import mean_interval
from ...zoo import finetuning, recipes, training
from ...zoo.finetuning import Arm
from ..common import bound, dataset, groups, over_networks, over_seeds

ORIGINAL = distortions.ORIGINAL


CONTROL = "control"


def standard(parameters: Mapping[str, Any], kind: type[Arm] = Arm) -> dict[str, Arm]:
    """The arms of a kind by name: control, augmentation at the same sigma, stability (KL, both branches) at each alpha.

    Parameters of the run: alphas, sigma, steps, learning_rate; with `variants` also, at the last alpha, the
    cross-entropy in the place of the KL, and a stop-gradient on the clean branch; under that one the two have the same
    gradient, so that one network stands for both.
    """
    common: dict[str, Any] = {name: parameters[name] for name in ("steps", "learning_rate", "sigma")}
    chosen = {CONTROL: kind("control", **common), "augmentation": kind("augmentation", **common)}
    chosen |= {stability(alpha): kind("stability", alpha=alpha, **common) for alpha in parameters["alphas"]}
    if parameters.get("variants"):
        last = parameters["alphas"][-1]
        chosen[f"{stability(last)} CE"] = kind("stability", alpha=last, divergence="ce", **common)
        chosen[f"{stability(last)} stopped"] = kind("stability", alpha=last, stop_gradient=True, **common)
    return chosen


def stability(alpha: float) -> str:
    """Name of the arm with this weight of the stability loss."""
    return f"stability {alpha:g}"


def suffixes(alphas: Sequence[float]) -> dict[str, float]:
    """What an item ends in for each alpha: nothing for the first, _strong for the last, _at_ALPHA between them."""
    return {"": alphas[0], **{f"_at_{alpha:g}": alpha for alpha in alphas[1:-1]}, "_strong": alphas[-1]}


def own_noise(parameters: Mapping[str, Any]) -> str:
    """The distortion that the arms are trained on: Gaussian noise of the parameter sigma."""
    return f"noise-{parameters['sigma']:g}"


def networks(
    run: Run, dataset_name: str, chosen: Mapping[str, Arm], *, task: str, publish: bool = False
) -> Iterator[tuple[int, str, training.Trained]]:
    """The networks of a comparison, one after the other: seed, name of the arm, network; `task` names the bar.

    What is trained is kept with the published networks where `publish` says so.

    Parameters of the run: model (of `models.NAMES`) and seeds, one trained network each, continued by every arm.
    """
    pairs = [(seed, name) for seed in run.parameters["seeds"] for name in chosen]
    images = dataset(run, dataset_name)
    for seed, name in progress_bar(pairs, desc=task, unit="network", leave=False):
        recipe = recipes.recipe(run.profile, dataset_name, run.parameters["model"], seed=seed)
        yield seed, name, finetuning.finetune(recipe, chosen[name], images, device=run.device, publish=publish)


def again(
    run: Run,
    dataset_name: str,
    chosen: Mapping[str, Arm],
    examples: pd.DataFrame,
    rows: Callable[[training.Trained, int, pd.DataFrame], pd.DataFrame],
) -> pd.DataFrame:
    """What `rows` makes of each network that examples with the columns seed and arm name, of its seed and its examples.

    Raises:
        TrainingError: one of the networks is not published; none is trained.
    """
    images, found = dataset(run, dataset_name), []
    for of, group in groups(examples, "seed", "arm"):
        seed, arm = int(of["seed"]), chosen[of["arm"]]
        recipe = recipes.recipe(run.profile, dataset_name, run.parameters["model"], seed=seed)
        if not finetuning.is_published(recipe, arm, images):
            raise training.TrainingError(f"the network {recipe.name}, continued by {of['arm']}, is not published")
        trained = finetuning.finetune(recipe, arm, images, device=run.device)
        found.append(rows(trained, seed, group).assign(**of))
    return pd.concat(found)


def measure(
    run: Run, dataset_name: str, chosen: Mapping[str, Arm], versions: Sequence[str], *, part: str = "test"
) -> pd.DataFrame:
    """Precision@1 and @5 of every arm on every distortion of some images.

    For one seed every arm starts from the same trained network and takes the same number of steps on the same images.

    Args:
        run: the artifact, with the parameters model, seeds and images (how many, drawn at random; 0 for all).
        dataset_name: a name of `data.NAMES`.
        chosen: the arms by name.
        versions: names of `distortions.apply`, "original" among them where a change is asked for.
        part: "test" or "valid".

    Returns:
        One row per seed, arm and distortion: seed, arm, distortion, n (images), precision_at_1, precision_at_5.
    """
    model, images = run.parameters["model"], run.parameters["images"] or None
    split = getattr(dataset(run, dataset_name), part).sample(images)
    distorted = remember(partial(distortions.apply, images=split.images))
    frames = []
    for seed, name, trained in networks(run, dataset_name, chosen, task=f"arms on {dataset_name}"):
        for version in versions:
            key = {"model": trained.key, "version": version, "images": images, "part": part, "device": run.device.type}
            count = bound(_precision, trained, split, distorted, version, run.device)
            found = cache.table(f"arms/{dataset_name}-{model}", key, count)
            frames.append(found.assign(seed=seed, arm=name, distortion=version, n=len(split)))
    names = ["seed", "arm", "distortion", "n", "precision_at_1", "precision_at_5"]
    return pd.concat(frames, ignore_index=True)[names]


def measured_again(
    run: Run, dataset_name: str, chosen: Mapping[str, Arm], examples: pd.DataFrame, *, part: str = "test"
) -> pd.DataFrame:
    """The rows of `measure` that examples with the columns seed, arm and distortion name, by `again`."""
    split = getattr(dataset(run, dataset_name), part).sample(run.parameters["images"] or None)

    def rows(trained: training.Trained, seed: int, group: pd.DataFrame) -> pd.DataFrame:
        shown = partial(distortions.apply, images=split.images)
        versions = list(group["distortion"])
        parts = [_precision(trained, split, shown, version, run.device) for version in versions]
        return pd.concat(parts).assign(distortion=versions, n=len(split))

    return again(run, dataset_name, chosen, examples, rows)


def _precision(
    trained: training.Trained, split: Split, shown: Callable[[str], Tensor], version: str, device: torch.device
) -> pd.DataFrame:
    logits = training.predict(trained.model, shown(version), device=device)
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
    for where, group in groups(runs, *within):
        wide = group.pivot(index="seed", columns="arm", values=value)
        for arm in group["arm"].unique():
            row = {**where, "arm": arm, "seeds": len(wide)}
            row |= columns(value, mean_interval(wide[arm]), "")
            rows.append(row | columns("gain", mean_interval(wide[arm] - wide[CONTROL])))
    return pd.DataFrame(rows)


def gains(runs: pd.DataFrame, arm: str, *, value: str = "precision_at_1", control: str = CONTROL) -> pd.DataFrame:
    """Gain of an arm over the control: one row for each distortion, one column for each seed."""
    wide = runs.pivot(index=["distortion", "seed"], columns="arm", values=value)
    return (wide[arm] - wide[control]).unstack("seed").loc[list(runs["distortion"].unique())]


def paired(gains: ArrayLike, of: str = "") -> Estimate:
    """Mean of a gain, or a difference of two, of each seed with its 95% t interval; one seed leaves [-2, 2] open."""
    return over_networks(gains, of, within=2)


def over_images(gains: pd.Series, of: str = "") -> Estimate:
    """Mean of a gain of each seed and image, an index of the two, by `common.over_seeds`; NaN where there is none."""
    rows = [columns("gain", mean_interval(gain)) | {"images": len(gain)} for _, gain in gains.dropna().groupby("seed")]
    return over_seeds(pd.DataFrame(rows), "gain", of=of)


def label(arm: str) -> str:
    """How readers know an arm."""
    known = {
        "control": r"control ($\alpha$ = 0)",
        "augmentation": "Gaussian augmentation",
        "mixed": "clean + Gaussian augmentation",
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


def bars(axes: Axes, group: pd.DataFrame, *, across: str, value: str, ends: str = "", scale: float = 1) -> None:
    """Each arm's mean with its 95% interval over seeds, beside one another for each `across`."""
    groups, arms = list(group[across].unique()), list(group["arm"].unique())
    tint = colours(arms)
    for i, arm in enumerate(arms):
        ours = group[group["arm"] == arm].set_index(across).loc[groups]
        x = np.arange(len(groups)) + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
        look: Any = {"fmt": "o", "color": tint[arm], "markersize": 4, "capsize": 2, "label": label(arm)}
        axes.errorbar(x, scale * ours[value], scale * style.error_bars(ours, value, ends), **look)
    axes.set_xticks(range(len(groups)), groups)


def gain_cells(
    axes: Axes, gain: np.ndarray, *, largest: float, bold: np.ndarray | None = None, digits: int = 1, size: int = 7
) -> AxesImage:
    """A matrix of gains in percentage points as coloured cells with their numbers; white is 0."""
    largest = max(largest, 1e-6)
    image = axes.imshow(gain, cmap="PuOr", norm=TwoSlopeNorm(0, -largest, largest), aspect="auto")
    for (i, j), value in np.ndenumerate(gain):
        weight = "bold" if bold is not None and bold[i, j] else "normal"
        tint = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(j, i, f"{value:+.{digits}f}", ha="center", va="center", fontsize=size, weight=weight, color=tint)
    return image


def gain_matrix(axes: Axes, table: pd.DataFrame, *, across: str, names: Callable[[str], str], size: int = 7) -> None:
    """The gain of each arm but the control (rows) on each `across`; bold where the interval excludes 0.

    `table` is a `summary`, `names` what readers know an arm by.
    """
    part = table[table["arm"] != CONTROL]
    part = part.assign(sure=(part["gain_low"] > 0) | (part["gain_high"] < 0))
    rows, columns = list(part["arm"].unique()), list(part[across].unique())
    gain, sure = (part.pivot(index="arm", columns=across, values=v).loc[rows, columns] for v in ("gain", "sure"))
    cells = 100 * gain.to_numpy()
    image = gain_cells(axes, cells, largest=float(np.abs(cells).max()), bold=sure.to_numpy(), size=size)
    axes.set_xticks(range(len(columns)), [c.replace("_", " ") for c in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [names(row) for row in rows])
    axes.figure.colorbar(image, ax=axes, label="gain (pp)")


def gain_bars(axes: Axes, group: pd.DataFrame, *, across: str) -> None:
    """The same of the gain over the control, in percentage points."""
    arms = group[group["arm"] != CONTROL]
    bars(axes, arms, across=across, value="gain", ends="gain_", scale=100)
    axes.axhline(0, color=style.COLOURS[CONTROL], linewidth=1)
