"""Which alpha and sigma, and is the last layer enough: chosen on validation images, judged on test images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from ... import style
from ...images import distortions
from ...images.data import Dataset
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...zoo import last_layer, training
from ...zoo.finetuning import Arm
from ..common import classifier, dataset, scored
from . import comparison
from .comparison import CONTROL, ORIGINAL, paired

_COPIES = 8  # noisy ones of each training image
PAPER = "last 0.01 0.04"


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Precision@1 over the grid with the last layer free, and of the arms of fig_jpeg_quality with all layers free.

    Parameters of the run: dataset, model, seeds (of the networks), images (of each part, drawn at random; 0 for all),
    versions (distortions that the choice is made by), grid and sigmas (alphas and sigmas for the last layer), repeats
    (continuations of each network by its last layer), features (training images for these, drawn at random), head_steps
    (of Adam), and those of `comparison.standard` for all layers.

    Returns:
        "runs", one row per seed, arm ("last ALPHA SIGMA" or "all ALPHA SIGMA"; "last control" and "all control"), part
        ("valid" or "test") and distortion: precision_at_1, for the last layer the mean over repeats.
    """
    chosen = run.parameters
    name, model = chosen["dataset"], chosen["model"]
    names = ("versions", "grid", "sigmas", "repeats", "features", "head_steps", "images")
    setting = {key: chosen[key] for key in names}
    frames = []
    for seed in chosen["seeds"]:
        trained = classifier(run, name, model, seed=seed)
        images = dataset(run, name)
        found = scored(run, f"last-layer/{name}-{model}", _last, trained, images, seed=seed, setting=setting)
        frames.append(found.assign(seed=seed))
    versions = [ORIGINAL, *chosen["versions"]]
    for part in ("valid", "test"):
        frames.append(comparison.measure(run, name, of_all_layers(chosen), versions, part=part).assign(part=part))
    return {"runs": pd.concat(frames, ignore_index=True)[["seed", "arm", "part", "distortion", "precision_at_1"]]}


def of_all_layers(parameters: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of fig_jpeg_quality but augmentation, by the names that they have here."""
    whole = [arm for arm in comparison.standard(parameters).values() if arm.objective != "augmentation"]
    return {f"all {_cell(arm.alpha, arm.sigma)}": arm for arm in whole}


def _cell(alpha: float, sigma: float) -> str:
    return f"{alpha:g} {sigma:g}" if alpha else CONTROL


def _last(
    model: nn.Module, images: Dataset, *, seed: int, device: torch.device, setting: dict[str, Any]
) -> pd.DataFrame:
    """One row per cell, part and distortion: arm, part, distortion, precision_at_1."""
    count = setting["images"] or None
    parts = {"valid": images.valid.sample(count), "test": images.test.sample(count)}
    versions = [ORIGINAL, *setting["versions"]]
    seen = {
        (part, version): last_layer.features(model, distortions.apply(version, split.images), device=device)
        for part, split in parts.items()
        for version in versions
    }
    train, start = images.train.sample(setting["features"], seed=seed), last_layer.layer(model)
    rows = []
    for place, sigma in enumerate(setting["sigmas"]):
        noise = training.mixed_seed(seed, 60_000)  # up to its scale the same for every sigma
        copies = last_layer.with_noisy_copies(
            model, train.images, sigma=sigma, copies=_COPIES, seed=noise, device=device
        )
        # The control does not see the noise: it is one and the same for every sigma.
        for alpha in [*([] if place else [0.0]), *setting["grid"]]:
            tuned = [
                last_layer.tune(start, copies, train.labels, alpha=alpha, steps=setting["head_steps"], seed=(seed, r))
                for r in range(setting["repeats"])
            ]
            for (part, version), features in seen.items():
                with torch.no_grad():
                    right = [(layer(features).argmax(1) == parts[part].labels).double().mean() for layer in tuned]
                rows.append((f"last {_cell(alpha, sigma)}", part, version, float(torch.stack(right).mean())))
    return pd.DataFrame(rows, columns=["arm", "part", "distortion", "precision_at_1"])


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """Gain of every cell over the control of the same layers and seed, and its alpha and sigma.

    Returns:
        One row per seed, arm and part: layers, alpha, sigma, clean (gain on originals), distorted (mean gain over the
        distortions).
    """
    kind = np.where(runs["distortion"] == ORIGINAL, "clean", "distorted")
    wide = runs.assign(kind=kind).pivot_table(index=["seed", "part", "arm"], columns="kind", values="precision_at_1")
    table = wide.reset_index().rename_axis(columns=None)
    table[["layers", "cell"]] = table["arm"].str.split(" ", n=1, expand=True)
    where = ["seed", "part", "layers"]
    control = table[table["cell"] == CONTROL].set_index(where)[["clean", "distorted"]]
    table = table[table["cell"] != CONTROL].join(control, on=where, rsuffix="_control")
    for column in ("clean", "distorted"):
        table[column] -= table.pop(f"{column}_control")
    table[["alpha", "sigma"]] = table.pop("cell").str.split(" ", expand=True).astype(float)
    return table.reset_index(drop=True)


def best(gained: pd.DataFrame, *, margin: float = 0.01) -> dict[str, str]:
    """The cell chosen on validation images for each choice of layers, by the name of its arm.

    The largest distorted gain among the cells that cost at most `margin` of clean accuracy, means over seeds; among all
    cells where there is none.
    """
    chosen = {}
    for layers, group in gained[gained["part"] == "valid"].groupby("layers"):
        means = group.groupby("arm")[["clean", "distorted"]].mean()
        kept = means[means["clean"] >= -margin]
        chosen[str(layers)] = str((kept if len(kept) else means)["distorted"].idxmax())
    return chosen


def claims(gained: pd.DataFrame) -> dict[str, Estimate]:
    """Gains on test images of the cells chosen on validation images, means over seeds.

    * LAYERS_clean_gain, LAYERS_distorted_gain: of the chosen cell of each choice of layers; of_paper_* for the paper's
      alpha = .01 and sigma = .04 with the last layer free.
    * all_layers_gain_more_than_last: distorted gain of the chosen cell with all layers free less that with the last.
    """
    test = gained[gained["part"] == "test"]
    chosen = best(gained)

    def of(arm: str, column: str) -> pd.Series:
        return test[test["arm"] == arm].set_index("seed")[column]

    found = {
        f"{name}_{column}_gain": paired(of(arm, column), arm)
        for name, arm in {**chosen, "of_paper": PAPER}.items()
        for column in ("clean", "distorted")
    }
    more = of(chosen["all"], "distorted") - of(chosen["last"], "distorted")
    return found | {"all_layers_gain_more_than_last": paired(more)}


def draw(runs: pd.DataFrame) -> Figure:
    """The grid of the last layer on validation images, and the chosen cells of both on test images.

    A square marks the chosen cell, a circle the paper's.
    """
    gained = gains(runs)
    chosen = best(gained)
    figure = Figure(figsize=(style.WIDTH, 6.0))
    halves = figure.add_gridspec(2, 1)
    above, below = (figure.add_subfigure(halves[place]) for place in range(2))
    last = gained[(gained["layers"] == "last") & (gained["part"] == "valid")]
    largest = 100 * max(float(last.groupby("arm")[c].mean().abs().max()) for c in ("clean", "distorted"))
    panels = above.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("clean", "distorted"), strict=True):
        cells = 100 * last.pivot_table(index="alpha", columns="sigma", values=part)
        image = comparison.gain_cells(axes, cells.to_numpy(), largest=largest, digits=2)
        axes.invert_yaxis()
        for arm, marker in ((chosen["last"], "s"), (PAPER, "o")):
            alpha, sigma = (float(number) for number in arm.split()[1:])
            if alpha in cells.index and sigma in cells.columns:
                where = cells.columns.get_loc(sigma), cells.index.get_loc(alpha)
                axes.plot(*where, marker, markersize=24, markerfacecolor="none", markeredgecolor="black")
        axes.set_xticks(range(len(cells.columns)), [f"{v:g}" for v in cells.columns])
        axes.set_yticks(range(len(cells.index)), [f"{v:g}" for v in cells.index])
        axes.set_xlabel(r"$\sigma$ (pixels in [0, 1])")
        axes.set_title(f"last layer alone: {'originals' if part == 'clean' else 'mean over distortions'}", fontsize=9)
    panels[0].set_ylabel(r"$\alpha$")
    above.colorbar(image, ax=list(panels), label="gain, validation (pp)")
    _draw_chosen(below, runs, {**chosen, "paper": PAPER})
    return figure


def _draw_chosen(figure: Any, runs: pd.DataFrame, chosen: Mapping[str, str]) -> None:
    axes = figure.subplots()
    test = runs[runs["part"] == "test"]
    versions = list(test["distortion"].unique())
    looks = {
        "paper": ("last layer, paper's", "#999999"),
        "last": ("last layer, chosen", style.STABILITY[0]),
        "all": ("all layers, chosen", style.STABILITY[1]),
    }
    for place, (name, (text, colour)) in enumerate(looks.items()):
        arm = chosen[name]
        gain = comparison.gains(test, arm, control=f"{arm.split()[0]} {CONTROL}")
        found = pd.DataFrame([paired(row) for row in gain.to_numpy()])
        bars = 100 * style.error_bars(found, "value", "")
        x = np.arange(len(versions)) + 0.2 * (place - 1)
        alpha, sigma = arm.split()[1:]
        label = rf"{text}: $\alpha$ = {alpha}, $\sigma$ = {sigma}"
        axes.errorbar(x, 100 * found["value"], bars, fmt="o", color=colour, capsize=2, markersize=4, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(versions)), versions)
    axes.set_ylabel("gain, test (pp)")
    axes.set_title(f"paired gain over the control, {test['seed'].nunique()} networks, 95% interval", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
