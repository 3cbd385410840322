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
from ..common import bound, dataset
from ..stability import comparison
from ..stability.comparison import CONTROL, ORIGINAL, over_images, own_noise, standard, summary

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
        "images", one row per seed, arm, kind, measure and image: value. Of a distortion, a corruption and an attack it
        is 1 where the prediction is right and else 0, of a corruption in the mean over severities; "PGD" is of l_inf
        2 / 255, 10 steps from a random start. Of the kind "output" there are "KL", the mean of KL(p(x) || p(x + eps))
        in nats over draws of noise of sigma, not clipped, and "trace", tr G per squared unit of pixels in [0, 1].
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
        found.append(one.assign(seed=seed, arm=name)[["seed", "arm", "kind", "measure", "image", "value"]])
    return {"images": pd.concat(found, ignore_index=True)}


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
    """Kind, measure, image, value of each of `measures`, or of those in `only`, for pixels 0..255, and near_cut.

    `shown` gives the images of a kind and measure, one tensor for each severity; `chosen` are parameters of the run.
    Rounding may turn a prediction round where near_cut is true: where it is nearly a tie, and, after an attack, whose
    steps are signs, where it is sure by little.
    """
    found = []
    for kind, name in measures(chosen):
        if only is not None and name not in only:
            continue
        near: Any = False
        if kind == OUTPUT:
            few = split.take(np.arange(min(chosen["traced"], len(split))))
            network, x = copy.deepcopy(model).double(), training.pixels(few.images, device).double()
            if name == KL:
                value = _kl(network, x, chosen["sigma"], chosen["draws"])
            else:
                value = 255.0**2 * influence.trace(network, x, wrt="input")[:, 0].cpu().numpy()
        else:
            if kind == "attack":
                margins = _under_attack(model, split.take(np.arange(min(chosen["attacked"], len(split)))), device)[None]
            else:
                logits = [training.predict(model, images, device=device) for images in shown(kind, name)]
                margins = np.stack([attacks.margin(one, split.labels) for one in logits])
            value = (margins > 0).mean(axis=0)
            near = attacks.near_tie(margins, attacked=kind == "attack").any(axis=0)
        image = split.index.numpy()[: len(value)]
        found.append(pd.DataFrame({"kind": kind, "measure": name, "image": image, "value": value, "near_cut": near}))
    return pd.concat(found, ignore_index=True)


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


def _under_attack(model: nn.Module, split: Split, device: torch.device) -> np.ndarray:
    generator = torch.Generator(device).manual_seed(training.mixed_seed(70_000))  # one start for every network
    return attacks.margins(model, split, partial(attacks.pgd, epsilon=PGD_RADIUS, generator=generator), device)


@torch.no_grad()
def _kl(network: nn.Module, x: torch.Tensor, sigma: float, draws: int) -> np.ndarray:
    generator = torch.Generator(x.device).manual_seed(training.mixed_seed(70_001))
    clean, losses = F.log_softmax(network(x), dim=1), []
    for _ in range(draws):
        noise = 255 * sigma * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        losses.append(kl(clean, F.log_softmax(network(x + noise), dim=1)).cpu().numpy())
    mean: np.ndarray = np.mean(losses, axis=0)
    return mean


def together(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Means over the images: seed, arm, kind, measure, n (images), value."""
    of = tables["images"].groupby(["seed", "arm", "kind", "measure"], sort=False)["value"]
    return of.agg(n="size", value="mean").reset_index()


def distorted(images: pd.DataFrame, *, but: Collection[str] | None = None) -> list[str]:
    """Names of all distortions and corruptions but noise; `but`, names of measures, stands for every kind of noise."""
    known = images[["kind", "measure"]].drop_duplicates()
    measure = known[known["kind"].isin(["distortion", "corruption"])]["measure"]
    noise = measure.str.endswith("_noise") if but is None else measure.isin(but)
    return list(measure[~(noise | measure.str.startswith("noise-") | (measure == ORIGINAL))])


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every measure and its change from the control, paired: `comparison.summary`.

    Of KL and trace the natural logarithm, so that a change is that of a ratio.
    """
    logged = runs["kind"] == OUTPUT
    value = runs["value"].where(~logged, np.log(runs["value"].where(logged, 1.0)))
    return summary(runs.assign(value=value), value="value", within=("kind", "measure", "n"))


def claims(tables: Mapping[str, pd.DataFrame]) -> dict[str, Estimate | list[Estimate]]:
    """What the rules ask, paired by network and image; the interval is the wider one of `common.over_seeds`.

    * family_gains_on_distorted: gain in precision over the control of the stability loss and of each relative, a mean
      over all that is `distorted`.
    * trace_penalty_lowers_the_trace: log of the mean trace after the trace penalty over that after the control.
    * trades_resists_the_attack: precision under PGD of TRADES less that of the stability loss.
    * relatives_less_stability: the first of each relative less that of the stability loss.
    * clean_change: change of precision on clean images by each member.
    * family_gains_with_other_noise: the first with shot and impulse noise among the corruptions, as the rule had it
      before the result was seen.
    """
    images, members = tables["images"], [STABILITY, *PENALTIES]
    robust, clean = _by_image(images, distorted(images)), _by_image(images, [ORIGINAL])
    before = _by_image(images, distorted(images, but=["gaussian_noise"]))
    attacked, trace = _by_image(images, [ATTACK]), _by_image(images, [TRACE])[["trace", CONTROL]]
    # Of the log of a ratio of means to first order: what each image adds to it.
    mean = trace.groupby("seed").transform("mean")
    log_trace = np.log(mean) + trace / mean
    return {
        "family_gains_on_distorted": [over_images(robust[a] - robust[CONTROL], a) for a in members],
        "trace_penalty_lowers_the_trace": over_images(log_trace["trace"] - log_trace[CONTROL]),
        "trades_resists_the_attack": over_images(attacked["trades"] - attacked[STABILITY]),
        "relatives_less_stability": [over_images(robust[a] - robust[STABILITY], a) for a in PENALTIES],
        "clean_change": [over_images(clean[a] - clean[CONTROL], a) for a in members],
        "family_gains_with_other_noise": [over_images(before[a] - before[CONTROL], a) for a in members],
    }


def _by_image(images: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Mean over some measures: one row for each seed and image, one column for each arm."""
    return images[images["measure"].isin(names)].pivot_table(index=["seed", "image"], columns="arm", values="value")


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
