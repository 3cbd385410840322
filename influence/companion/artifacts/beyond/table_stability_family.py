"""The stability loss beside its relatives: equal steps from the same networks, and what each buys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import influence

from ... import style
from ...images import corruptions, distortions
from ...images.data import Split
from ...ledger import cache
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores import attacks
from ...scores.evaluation import mean_interval
from ...zoo import training
from ...zoo.family import PENALTIES, FamilyArm
from ...zoo.finetuning import Arm
from ..common import bound, dataset
from ..stability import comparison
from ..stability.comparison import CONTROL, ORIGINAL, over_seeds, own_noise, standard, summary
from ..stability.fig_alpha_sigma import _DIVERGING

STABILITY = "stability"
NAMES = {
    CONTROL: "control",
    "augmentation": "Gaussian augmentation",
    STABILITY: "stability loss (KL)",
    "symmetric": "symmetric KL",
    "consistency": "consistency of copies",
    "jsd": "Jensen-Shannon (AugMix)",
    "trades": "TRADES",
    "trace": "trace penalty",
}
ATTACK, KL, TRACE = "PGD", "KL", "trace"
PGD_RADIUS = 2 / 255
_PGD_STEPS, _AT_ONCE = 10, 250
_OPEN = 99.0  # one network leaves a logarithm open: no infinity in a ledger


def arms(parameters: Mapping[str, Any]) -> dict[str, Arm]:
    """Control, augmentation and stability of `comparison.standard`, and each of `family.PENALTIES`, at one alpha."""
    control, augmentation, stable = standard({**parameters, "alphas": [parameters["alpha"]]}).values()
    found = {CONTROL: control, "augmentation": augmentation, STABILITY: stable}
    common: dict[str, Any] = {name: parameters[name] for name in ("steps", "learning_rate", "sigma", "alpha")}
    return found | {name: FamilyArm("stability", penalty=name, **common) for name in PENALTIES}


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Every arm on distorted and corrupted images, under attack, under noise, and the trace of its metric tensor.

    Parameters of the run: dataset, model, seeds (of the networks), sigma, alpha, steps, learning_rate, tested (names of
    `distortions.apply`), corruptions (names of `corruptions.NAMES`), severities (1 to 5), images (of the test part,
    drawn at random), attacked (of these, under PGD) and traced (of these, for KL and trace), draws (noisy copies).

    Returns:
        "runs", one row per seed, arm and measure: kind ("distortion", "corruption", "attack" or "output"), measure,
        n (images), value. The value is precision@1; a corruption's is the mean over severities; "PGD" is of l_inf
        2 / 255, 10 steps from a random start; "KL" the mean of KL(p(x) || p(x + eps)) in nats, noise of sigma, not
        clipped; "trace" the mean of tr G, per squared unit of pixels in [0, 1].
    """
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"] or None)
    names = ("sigma", "tested", "corruptions", "severities", "images", "attacked", "traced", "draws")
    about = {name: chosen[name] for name in names}
    rows = []
    for seed, name, trained in comparison.networks(run, chosen["dataset"], arms(chosen), task="stability family"):
        key = {"model": trained.key, "device": run.device.type, **about}
        make = bound(_measured, trained.model, split, about, run.device)
        rows.append(cache.table(f"family/{chosen['dataset']}-{chosen['model']}", key, make).assign(seed=seed, arm=name))
    return {"runs": pd.concat(rows, ignore_index=True)[["seed", "arm", "kind", "measure", "n", "value"]]}


def _measured(model: nn.Module, split: Split, chosen: Mapping[str, Any], device: torch.device) -> pd.DataFrame:
    rows: list[tuple[str, str, int, float]] = []

    def precision(images: torch.Tensor) -> float:
        return float((training.predict(model, images, device=device).argmax(1) == split.labels).double().mean())

    for name in dict.fromkeys([ORIGINAL, *chosen["tested"], own_noise(chosen)]):
        rows.append(("distortion", name, len(split), precision(distortions.apply(name, split.images))))
    for name in chosen["corruptions"]:
        versions = (corruptions.corrupt(name, split.images, severity=s) for s in chosen["severities"])
        rows.append(("corruption", name, len(split), float(np.mean([precision(images) for images in versions]))))
    few = split.take(np.arange(min(chosen["attacked"], len(split))))
    rows.append(("attack", ATTACK, len(few), _under_attack(model, few, device)))
    few = split.take(np.arange(min(chosen["traced"], len(split))))
    values = _outputs(model, few, chosen["sigma"], chosen["draws"], device)
    rows += [("output", name, len(few), value) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["kind", "measure", "n", "value"])


def _under_attack(model: nn.Module, split: Split, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(training.mixed_seed(70_000))  # one start for every network
    right = 0
    for images, labels in zip(split.images.split(_AT_ONCE), split.labels.split(_AT_ONCE), strict=True):
        x, y = training.pixels(images, device), labels.to(device)
        how: dict[str, Any] = {"steps": _PGD_STEPS, "step_size": PGD_RADIUS / 4, "generator": generator}
        moved = attacks.pgd(model, x, y, epsilon=PGD_RADIUS, **how)
        with torch.no_grad():
            right += int((model(moved).argmax(1) == y).sum())
    return right / len(split)


def _outputs(model: nn.Module, split: Split, sigma: float, draws: int, device: torch.device) -> dict[str, float]:
    """Mean KL under noise and mean trace, in float64."""
    network = copy.deepcopy(model).double()
    x = training.pixels(split.images, device).double()
    generator = torch.Generator(device).manual_seed(training.mixed_seed(70_001))
    with torch.no_grad():
        clean, losses = F.log_softmax(network(x), dim=1), []
        for _ in range(draws):
            noise = 255 * sigma * torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            losses.append(float((clean.exp() * (clean - F.log_softmax(network(x + noise), dim=1))).sum(1).mean()))
    trace = 255.0**2 * influence.trace(network, x, wrt="input")
    return {KL: float(np.mean(losses)), TRACE: float(trace.mean())}


def robustness(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean precision of each seed and arm over all distortions and corruptions but Gaussian noise: seed, arm, value."""
    noise = runs["measure"].str.startswith("noise-") | runs["measure"].isin(["gaussian_noise", ORIGINAL])
    other = runs[runs["kind"].isin(["distortion", "corruption"]) & ~noise]
    return other.groupby(["seed", "arm"], sort=False)["value"].mean().reset_index()


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every measure and its change from the control, paired: `comparison.summary`.

    Of KL and trace the natural logarithm, so that a change is that of a ratio.
    """
    logged = runs["kind"] == "output"
    value = runs["value"].where(~logged, np.log(runs["value"].where(logged, 1.0)))
    return summary(runs.assign(value=value), value="value", within=("kind", "measure", "n"))


def claims(runs: pd.DataFrame) -> dict[str, Estimate | list[Estimate]]:
    """What the rules ask, paired by network.

    * family_gains_on_distorted: gain over the control of the stability loss and of each relative, `robustness`.
    * trace_penalty_lowers_the_trace: log of the mean trace after the trace penalty over that after the control.
    * trades_resists_the_attack: precision under PGD of TRADES less that of the stability loss.
    * relatives_less_stability: `robustness` of each relative less that of the stability loss.
    * clean_change: change of precision on clean images by each member.
    """

    def wide(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.pivot(index="seed", columns="arm", values="value")

    robust, of = wide(robustness(runs)), {name: wide(group) for name, group in runs.groupby("measure")}
    members, log_trace = [STABILITY, *PENALTIES], np.log(of[TRACE])
    mean, low, high = mean_interval(log_trace["trace"] - log_trace[CONTROL])
    return {
        "family_gains_on_distorted": [over_seeds(robust[a] - robust[CONTROL], a) for a in members],
        "trace_penalty_lowers_the_trace": Estimate(mean, max(low, -_OPEN), min(high, _OPEN), len(log_trace)),
        "trades_resists_the_attack": over_seeds(of[ATTACK]["trades"] - of[ATTACK][STABILITY]),
        "relatives_less_stability": [over_seeds(robust[a] - robust[STABILITY], a) for a in PENALTIES],
        "clean_change": [over_seeds(of[ORIGINAL][a] - of[ORIGINAL][CONTROL], a) for a in members],
    }


def draw(found: pd.DataFrame) -> Figure:
    """Gain over the control in points of each member (rows) on each measure; bold where the interval excludes 0."""
    part = found[(found["kind"] != "output") & (found["arm"] != CONTROL)]
    rows, columns = list(part["arm"].unique()), list(part["measure"].unique())
    gain = 100 * part.pivot(index="arm", columns="measure", values="gain").loc[rows, columns].to_numpy()
    sure = part.assign(sure=(part["gain_low"] > 0) | (part["gain_high"] < 0))
    bold = sure.pivot(index="arm", columns="measure", values="sure").loc[rows, columns].to_numpy()
    figure = Figure(figsize=(style.WIDTH * 1.35, 1.6 + 0.36 * len(rows)))
    axes = figure.subplots()
    largest = max(float(np.abs(gain).max()), 1e-6)
    image = axes.imshow(gain, cmap=_DIVERGING, norm=TwoSlopeNorm(0, -largest, largest), aspect="auto")
    for (i, j), value in np.ndenumerate(gain):
        weight = "bold" if bold[i, j] else "normal"
        tint = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=6, weight=weight, color=tint)
    axes.set_xticks(range(len(columns)), [c.replace("_", " ") for c in columns], rotation=50, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [NAMES[row] for row in rows], fontsize=8)
    seeds, images = int(found["seeds"].iloc[0]), part.groupby("measure")["n"].first()
    counts = f"{images[ORIGINAL]:,} images ({ATTACK}: {images[ATTACK]:,})"
    axes.set_title(f"gain over control, paired, {seeds} seeds, {counts}; bold: 95% interval excludes 0", fontsize=8)
    figure.colorbar(image, ax=axes, label="gain (pp)")
    return figure


def draw_outputs(found: pd.DataFrame) -> Figure:
    """KL under the noise and trace of G of each member over those of the control: geometric means over seeds."""
    figure = Figure(figsize=(style.WIDTH, 2.9))
    part = found[(found["kind"] == "output") & (found["arm"] != CONTROL)]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure, words in zip(panels, (KL, TRACE), ("KL under the noise", r"tr $G$"), strict=True):
        group = part[part["measure"] == measure]
        mean, low, high = (np.exp(group[name].clip(-_OPEN, _OPEN)) for name in ("gain", "gain_low", "gain_high"))
        bars = np.stack([mean - low, high - mean])
        if int(group["seeds"].iloc[0]) == 1:
            bars[:] = 0
        axes.errorbar(mean, range(len(group)), xerr=bars, fmt="o", color="#0072B2", markersize=4, capsize=2)
        axes.axvline(1, color=style.COLOURS[CONTROL], linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel(f"{words}, over the control's")
    panels[0].set_yticks(range(part["arm"].nunique()), [NAMES[arm] for arm in part["arm"].unique()], fontsize=8)
    panels[0].invert_yaxis()
    seeds, images = int(part["seeds"].iloc[0]), int(part["n"].iloc[0])
    figure.suptitle(f"{seeds} seeds, {images:,} images, 95% t interval over seeds of the logarithm", fontsize=8)
    return figure
