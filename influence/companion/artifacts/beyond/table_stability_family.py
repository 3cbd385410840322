"""The stability loss beside its relatives: equal steps from the same networks, and what each buys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache as remember
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import influence

from ... import style
from ...images import corruptions, distortions
from ...images.data import Split
from ...ledger import cache, paths
from ...ledger.reference import Estimate
from ...ledger.results import COMMITTED, Run
from ...scores import attacks
from ...zoo import training
from ...zoo.family import PENALTIES, FamilyArm, kl
from ...zoo.finetuning import Arm
from ..common import bound, dataset, over_networks
from ..stability import comparison
from ..stability.comparison import CONTROL, ORIGINAL, own_noise, paired, standard, summary

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
OUTPUT = "output"
PGD_RADIUS = 2 / 255
_OPEN = 99.0  # one network leaves a logarithm open: no infinity in a ledger


def arms(parameters: Mapping[str, Any]) -> dict[str, Arm]:
    """Control, augmentation and stability of `comparison.standard`, and each of `family.PENALTIES`, at one alpha."""
    control, augmentation, stable = standard({**parameters, "alphas": [parameters["alpha"]]}).values()
    found = {CONTROL: control, "augmentation": augmentation, STABILITY: stable}
    common: dict[str, Any] = {name: parameters[name] for name in ("steps", "learning_rate", "sigma", "alpha")}
    return found | {name: FamilyArm("stability", penalty=name, **common) for name in PENALTIES}


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Every arm on distorted and corrupted images, under attack, under noise, and the trace of its metric tensor.

    Returns:
        One row per seed, arm and measure, with n images, each:
        "precision": precision@1 by kind (distortion, corruption, attack) and measure; a corruption's is the mean over
        severities; "PGD" is of l_inf 2 / 255, 10 steps from a random start.
        "outputs": "KL", the mean of KL(p(x) || p(x + eps)) in nats, noise of sigma, not clipped; "trace", the mean of
        tr G, per squared unit of pixels in [0, 1].
    """
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"] or None)
    names = ("sigma", "tested", "corruptions", "severities", "images", "attacked", "traced", "draws")
    about = {name: chosen[name] for name in names}
    shown = remember(partial(_versions, split, tuple(chosen["severities"])))
    if corruptions.FROST in chosen["corruptions"]:
        run.add_input(corruptions.FROST, cache.fingerprint(corruptions.FROST_SHA256))
    found = []
    publish = run.profile == COMMITTED
    for seed, name, trained in comparison.networks(
        run, chosen["dataset"], arms(chosen), task="stability family", publish=publish
    ):
        key = {"model": trained.key, "device": run.device.type, **about}
        make = bound(measured, trained.model, split, about, run.device, shown)
        one = cache.table(f"family/{chosen['dataset']}-{chosen['model']}", key, make)
        found.append(one.assign(seed=seed, arm=name)[["seed", "arm", "kind", "measure", "n", "value"]])
    rows = pd.concat(found, ignore_index=True)
    output = rows["kind"] == OUTPUT
    parts = {"precision": rows[~output], "outputs": rows[output].drop(columns="kind")}
    return {name: part.reset_index(drop=True) for name, part in parts.items()}


def measures(chosen: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and name of everything that is measured."""
    distorted = dict.fromkeys([ORIGINAL, *chosen["tested"], own_noise(chosen)])
    pairs = [("distortion", name) for name in distorted] + [("corruption", name) for name in chosen["corruptions"]]
    return [*pairs, ("attack", ATTACK), (OUTPUT, KL), (OUTPUT, TRACE)]


def measured(
    model: nn.Module,
    split: Split,
    chosen: Mapping[str, Any],
    device: torch.device,
    shown: Callable[[str, str], list[torch.Tensor]],
    *,
    only: Collection[str] | None = None,
) -> pd.DataFrame:
    """Kind, measure, n (images) and value of each of `measures`, or of those in `only`, for pixels 0..255.

    `shown` gives the images of a kind and measure, one tensor for each severity; `chosen` are parameters of the run.
    """
    rows: list[tuple[str, str, int, float]] = []
    for kind, name in measures(chosen):
        if only is not None and name not in only:
            continue
        few = split
        if kind in ("distortion", "corruption"):
            predicted = [training.predict(model, images, device=device).argmax(1) for images in shown(kind, name)]
            value = float(np.mean([float((labels == split.labels).double().mean()) for labels in predicted]))
        elif kind == "attack":
            few = split.take(np.arange(min(chosen["attacked"], len(split))))
            value = _under_attack(model, few, device)
        else:
            few = split.take(np.arange(min(chosen["traced"], len(split))))
            network, x = copy.deepcopy(model).double(), training.pixels(few.images, device).double()
            if name == KL:
                value = _kl(network, x, chosen["sigma"], chosen["draws"])
            else:
                value = float(255.0**2 * influence.trace(network, x, wrt="input").mean())
        rows.append((kind, name, len(few), value))
    return pd.DataFrame(rows, columns=["kind", "measure", "n", "value"])


def _versions(split: Split, severities: Sequence[int], kind: str, name: str) -> list[torch.Tensor]:
    if kind == "distortion":
        return [distortions.apply(name, split.images)]
    data_dir = paths.data_dir()
    return [corruptions.corrupt(name, split.images, severity=severity, data_dir=data_dir) for severity in severities]


def again(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    """The rows of some seeds, arms and measures, by `comparison.again`."""
    chosen = run.parameters
    split = dataset(run, chosen["dataset"]).test.sample(chosen["images"] or None)
    shown = partial(_versions, split, chosen["severities"])

    def rows(trained: training.Trained, seed: int, group: pd.DataFrame) -> pd.DataFrame:
        return measured(trained.model, split, chosen, run.device, shown, only=set(group["measure"]))

    return comparison.again(run, chosen["dataset"], arms(chosen), examples, rows)


def _under_attack(model: nn.Module, split: Split, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(training.mixed_seed(70_000))  # one start for every network
    return attacks.accuracy(model, split, partial(attacks.pgd, epsilon=PGD_RADIUS, generator=generator), device)


@torch.no_grad()
def _kl(network: nn.Module, x: torch.Tensor, sigma: float, draws: int) -> float:
    generator = torch.Generator(x.device).manual_seed(training.mixed_seed(70_001))
    clean, losses = F.log_softmax(network(x), dim=1), []
    for _ in range(draws):
        noise = 255 * sigma * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        losses.append(float(kl(clean, F.log_softmax(network(x + noise), dim=1)).mean()))
    return float(np.mean(losses))


def together(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All rows of `compute` in one table, kind "output" for what is no precision."""
    return pd.concat([tables["precision"], tables["outputs"].assign(kind=OUTPUT)], ignore_index=True)


def robustness(runs: pd.DataFrame, *, but: Collection[str] | None = None) -> pd.DataFrame:
    """Mean precision of each seed and arm over all distortions and corruptions but noise: seed, arm, value.

    `runs` is what `together` makes, here and below; `but`, names of measures, stands for every kind of noise.
    """
    measure = runs["measure"]
    noise = measure.str.endswith("_noise") if but is None else measure.isin(but)
    left_out = noise | measure.str.startswith("noise-") | (measure == ORIGINAL)
    other = runs[runs["kind"].isin(["distortion", "corruption"]) & ~left_out]
    return other.groupby(["seed", "arm"], sort=False)["value"].mean().reset_index()


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every measure and its change from the control, paired: `comparison.summary`.

    Of KL and trace the natural logarithm, so that a change is that of a ratio.
    """
    logged = runs["kind"] == OUTPUT
    value = runs["value"].where(~logged, np.log(runs["value"].where(logged, 1.0)))
    return summary(runs.assign(value=value), value="value", within=("kind", "measure", "n"))


def claims(runs: pd.DataFrame) -> dict[str, Estimate | list[Estimate]]:
    """What the rules ask, paired by network.

    * family_gains_on_distorted: gain over the control of the stability loss and of each relative, `robustness`.
    * trace_penalty_lowers_the_trace: log of the mean trace after the trace penalty over that after the control.
    * trades_resists_the_attack: precision under PGD of TRADES less that of the stability loss.
    * relatives_less_stability: `robustness` of each relative less that of the stability loss.
    * clean_change: change of precision on clean images by each member.
    * family_gains_with_other_noise: the first with shot and impulse noise among the corruptions, as the rule had it
      before the result was seen.
    """

    def wide(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.pivot(index="seed", columns="arm", values="value")

    robust, before = wide(robustness(runs)), wide(robustness(runs, but=["gaussian_noise"]))
    of = {name: wide(group) for name, group in runs.groupby("measure")}
    members, log_trace = [STABILITY, *PENALTIES], np.log(of[TRACE])
    return {
        "family_gains_on_distorted": [paired(robust[a] - robust[CONTROL], a) for a in members],
        "trace_penalty_lowers_the_trace": over_networks(log_trace["trace"] - log_trace[CONTROL], within=_OPEN),
        "trades_resists_the_attack": paired(of[ATTACK]["trades"] - of[ATTACK][STABILITY]),
        "relatives_less_stability": [paired(robust[a] - robust[STABILITY], a) for a in PENALTIES],
        "clean_change": [paired(of[ORIGINAL][a] - of[ORIGINAL][CONTROL], a) for a in members],
        "family_gains_with_other_noise": [paired(before[a] - before[CONTROL], a) for a in members],
    }


def draw(found: pd.DataFrame) -> Figure:
    """Gain over the control in points of each member (rows) on each measure; bold where the interval excludes 0."""
    part = found[found["kind"] != OUTPUT]
    figure, axes = style.subplots(height=1.6 + 0.36 * (part["arm"].nunique() - 1), width=1.75)
    comparison.gain_matrix(axes, part, across="measure", names=NAMES.__getitem__, size=6)
    axes.tick_params(labelsize=8)
    seeds, images = int(found["seeds"].iloc[0]), part.groupby("measure")["n"].first()
    counts = f"{images[ORIGINAL]:,} images ({ATTACK}: {images[ATTACK]:,})"
    axes.set_title(f"gain over control, paired, {seeds} seeds, {counts}; bold: 95% interval excludes 0", fontsize=8)
    return figure


def draw_outputs(found: pd.DataFrame) -> Figure:
    """KL under the noise and trace of G of each member over those of the control: geometric means over seeds."""
    part = found[(found["kind"] == OUTPUT) & (found["arm"] != CONTROL)]
    figure, panels = style.subplots(1, 2, height=2.9, sharey=True)
    for axes, measure, words in zip(panels, (KL, TRACE), ("KL under the noise", r"tr $G$"), strict=True):
        group = part[part["measure"] == measure]
        mean, low, high = (np.exp(group[name].clip(-_OPEN, _OPEN)) for name in ("gain", "gain_low", "gain_high"))
        bars = np.stack([mean - low, high - mean])
        if int(group["seeds"].iloc[0]) == 1:
            bars[:] = 0
        axes.errorbar(mean, range(len(group)), xerr=bars, fmt="o", color="#0072B2", markersize=4, capsize=2)
        axes.axvline(1, color=style.COLOURS[CONTROL], linewidth=1)
        axes.set(xscale="log", xlabel=f"{words}, over the control's")
    panels[0].set_yticks(range(part["arm"].nunique()), [NAMES[arm] for arm in part["arm"].unique()], fontsize=8)
    panels[0].invert_yaxis()
    seeds, images = int(part["seeds"].iloc[0]), int(part["n"].iloc[0])
    figure.suptitle(f"{seeds} seeds, {images:,} images, 95% t interval over seeds of the logarithm", fontsize=8)
    return figure
