"""Setup 4 of Shu & Zhu (2019): which pixels and patches of an image are vulnerable, and does changing them matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import influence

from ... import style
from ...images.pictures import packed, unpacked
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import bootstrap_interval, columns, share_interval
from ...scores.pixelwise import intervene, patch_maps
from ...zoo import training
from ..common import Subject, groups, networks, over_seeds, scored

PATCH = 3  # side of the patch that is changed

# Test images of which the paper shows maps, or the released code logged FI, of each of its networks.
_OF_PAPER = {
    ("mnist", "resnet50"): (1878,),
    ("mnist", "densenet121"): (3073,),
    ("cifar10", "resnet50"): (7908,),
    ("cifar10", "densenet121"): (1105, 2172),
}
RANKINGS = ("exact", "released", "saliency", "trace", "random")  # of pixels, by `pixelwise.rankings`


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Setup 4: the images that the paper would show, their maps, and what changing pixels does, for each network.

    Parameters of the run: datasets (of `data.NAMES`), models (of `models.NAMES`), seeds (of networks, images and the
    random ranking), images (test images among which those shown are sought; 0 for all), changed (test images whose
    entries are changed), counts (how many at once), epsilon (e of the released code).

    Returns:
        "pictures", "maps" and "flatness", of the functions of these names; "changes", of `intervention`. All with the
        columns dataset, model, seed.
    """
    chosen = run.parameters
    found: dict[str, list[pd.DataFrame]] = {"pictures": [], "maps": [], "flatness": [], "changes": []}
    for network in networks(run):
        shown = chosen_images(run, network, images=chosen["images"] or None)
        frame = maps(run, network, shown, epsilon=chosen["epsilon"])
        parts = {
            "pictures": pictures(run, network, shown, frame),
            "maps": frame,
            "flatness": flatness(frame, len(network.dataset.classes)),
            "changes": intervention(
                run, network, images=chosen["changed"], counts=chosen["counts"], epsilon=chosen["epsilon"]
            ),
        }
        for name, part in parts.items():
            found[name].append(part.assign(**network.columns))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def chosen_images(run: Run, subject: Subject, *, images: int | None) -> pd.DataFrame:
    """The images the paper would show of a network, and those that it did show of this kind of network.

    "correct" and "wrong": correct with P_pred > .5 and the largest FI, and wrong with the largest FI, of the whole
    image for f = -log P(y_pred), among `images` test images drawn at random (None for all).

    Returns:
        One row per kind ("correct", "wrong", without a row where there is no such image, and "imageI" for the paper's
        test image I): row (position in the test set), image (0-based, standard order), label, predicted, p_predicted,
        fi.
    """
    test, network = subject.dataset.test, subject.trained.model
    split = test.sample(images, seed=subject.seed)
    top, predicted = training.predict(network, split.images, device=run.device).double().log_softmax(1).max(1)
    # FI of the whole image is (1 - P) / P at full rank; of those that are shown it is computed in full below.
    ceiling, right = (-top).expm1(), predicted == split.labels
    shown = {}
    for kind, eligible in (("correct", right & (top.exp() > 0.5)), ("wrong", ~right)):
        if bool(eligible.any()):
            shown[kind] = int(split.index[torch.where(eligible, ceiling, -1).argmax()])
    shown |= {f"image{image}": image for image in _OF_PAPER.get((subject.dataset.name, subject.model), ())}
    rows = [int((test.index == image).nonzero()[0, 0]) for image in shown.values()]
    metric = influence.metric_tensor(network, training.pixels(test.images[rows], run.device), wrt="input")
    found = influence.first_order_influence(metric)
    columns = {
        "kind": list(shown),
        "row": rows,
        "image": list(shown.values()),
        "label": test.labels[rows],
        "predicted": found.labels.cpu(),
        "p_predicted": metric.log_probs.amax(1).exp().cpu(),
        "fi": found.fi[:, 0].cpu(),
    }
    return pd.DataFrame(columns)


def maps(run: Run, network: Subject, chosen: pd.DataFrame, *, epsilon: float) -> pd.DataFrame:
    """FI of every k x k patch of the chosen images, per colour channel, k = 1, 3, 5, 7, f = -log P(y_pred).

    Returns:
        One row per kind, size, channel and pixel: row, column, exact, released, alignment, rank.
    """
    split = network.dataset.test.take(chosen["row"].tolist())
    frame = scored(run, f"setup4/maps-{network.name}", patch_maps, network.trained, split, epsilon=epsilon)
    return of_kinds(frame, chosen).drop(columns="near_cut")


def of_kinds(frame: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """What `patch_maps` returns, with the kind of each chosen image in the place of its place."""
    return frame.assign(kind=frame["place"].map(dict(enumerate(chosen["kind"])))).drop(columns="place")


def flatness(frame: pd.DataFrame, classes: int) -> pd.DataFrame:
    """How flat each map is: over its patches of rank K - 1, the largest relative difference of exact FI.

    Returns:
        One row per kind and size: patches, full_rank_share, spread (NaN where no patch has rank K - 1), and the range
        of the alignment over all patches.
    """
    rows = []
    for about, group in groups(frame, "kind", "size"):
        full = group.loc[group["rank"] == classes - 1, "exact"]
        rows.append(
            {
                **about,
                "patches": len(group),
                "full_rank_share": len(full) / len(group),
                "spread": float(full.max() / full.min() - 1) if len(full) else np.nan,
                "alignment_low": group["alignment"].min(),
                "alignment_high": group["alignment"].max(),
                "largest_released": group["released"].max(),
            }
        )
    return pd.DataFrame(rows)


def pictures(run: Run, subject: Subject, chosen: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """The chosen images, and what changing the pixel of largest FI (mean and change over all channels) does to each.

    The pixel goes to 0 or to 255, whichever lowers P of the predicted class more.

    Returns:
        The rows of `chosen` with class names, pixel_row, pixel_column, pixel_fi, pixel_value (what it is changed to),
        p_changed, predicted_changed, and the image as `pictures.packed` has it.
    """
    rows, everything = [], subject.dataset
    for record in chosen.to_dict("records"):
        item = {str(name): value for name, value in record.items()}
        single = frame[(frame["kind"] == item["kind"]) & (frame["size"] == 1)]
        mean = single.groupby(["row", "column"])["exact"].mean()
        r, c = mean.idxmax()
        versions = everything.test.images[[item["row"]] * 2]
        versions[0, :, r, c], versions[1, :, r, c] = 0, 255
        p = training.predict(subject.trained.model, versions, device=run.device).double().softmax(1)
        worse = int(p[:, item["predicted"]].argmin())
        rows.append(
            {
                **item,
                **{f"{name}_name": everything.classes[item[name]] for name in ("label", "predicted")},
                "pixel_row": int(r),
                "pixel_column": int(c),
                "pixel_fi": float(mean.max()),
                "pixel_value": 255 * worse,
                "p_changed": float(p[worse, item["predicted"]]),
                "predicted_changed": int(p[worse].argmax()),
            }
        )
    return pd.concat([pd.DataFrame(rows), packed(everything.test.images[chosen["row"].tolist()])], axis=1)


def intervention(run: Run, network: Subject, *, images: int, counts: Sequence[int], epsilon: float) -> pd.DataFrame:
    """Change the entries that each ranking puts first, and see how far P of the predicted class moves.

    Every chosen entry (a pixel in one channel) goes to the farther end of 0..255 ("farther"), in the same way for every
    ranking, or by 8 or 32 grey levels against the sign of its gradient of log P ("step 8", "step 32"), clipped to
    0..255. Rankings of patches use the mean over the patch, except for exact FI of the patch itself (flat at rank
    K - 1, so that its first place says nothing).

    Args:
        run: the artifact.
        network: whose predictions move.
        images: test images, drawn at random.
        counts: how many single entries are changed at once.
        epsilon: e of the released code.

    Returns:
        One row per image (with data set, model and seed), ranking, target ("entries" or "patch", the one of 3x3 in one
        channel), count and change ("farther", "step 8", "step 32"): image, p_before, p_after, drop (p_before -
        p_after), flipped.
    """
    split = network.dataset.test.sample(images, seed=network.seed)
    options: dict[str, Any] = {"counts": counts, "patch": PATCH, "epsilon": epsilon, "seed": network.seed}
    found = scored(run, f"setup4/intervention-{network.name}", intervene, network.trained, split, **options)
    return found.drop(columns="near_cut").assign(**network.columns)


def intervention_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean fall of P and share of flips for each ranking, with 95% intervals, and the fall beyond that of "random".

    Bootstrap over images for the means (paired by image for `beyond_random` and `beyond_saliency`), Wilson for flips.
    """
    rows = []
    for about, group in groups(frame, "dataset", "model", "seed", "target", "count", "change"):
        drops = group.pivot(index="image", columns="ranking", values="drop")
        for ranking in RANKINGS:
            part = group[group["ranking"] == ranking]
            row = {**about, "ranking": ranking, "images": len(part)}
            row |= columns("drop", bootstrap_interval(part["drop"]))
            row |= columns("flips", share_interval(int(part["flipped"].sum()), len(part)))
            for other in ("random", "saliency"):
                row |= columns(f"beyond_{other}", bootstrap_interval(drops[ranking] - drops[other]))
            rows.append(row)
    return pd.DataFrame(rows)


def claims(table: pd.DataFrame, flat: pd.DataFrame) -> dict[str, bool | list[Estimate]]:
    """Setup 4 by rules fixed before the run, on single entries moved to their farther end unless said otherwise.

    * fi_finds_vulnerable_pixels (the paper's claim): the fall of P under released FI beyond that under random entries,
      the mean over seeds, for every network and number of entries.
    * fi_finds_where_to_step: the same for a step of 32 grey levels against the sign of the gradient.
    * saliency_finds_vulnerable_pixels: the fall of P under gradient saliency beyond that under random entries.
    * fi_less_saliency: the fall of P under exact FI beyond that under gradient saliency.
    * saliency_finds_more_than_fi: each interval of fi_less_saliency lies below 0.
    * patches_of_full_rank_are_flat: exact FI of the patches of rank K - 1 of one image differs by at most 1e-6.
    """
    large = flat[(flat["size"] >= 3) & flat["spread"].notna()]
    against = _beyond(table, "exact", "saliency")
    return {
        "fi_finds_vulnerable_pixels": _beyond(table, "released", "random"),
        "fi_finds_where_to_step": _beyond(table, "released", "random", change="step 32"),
        "saliency_finds_vulnerable_pixels": _beyond(table, "saliency", "random"),
        "fi_less_saliency": against,
        "saliency_finds_more_than_fi": all(e.high < 0 for e in against),
        "patches_of_full_rank_are_flat": bool(len(large) > 0 and (large["spread"] <= 1e-6).all()),
    }


def _beyond(table: pd.DataFrame, ranking: str, other: str, *, change: str = "farther") -> list[Estimate]:
    """The fall of P under one ranking beyond that under another, for each network and number of entries."""
    entries = table[(table["target"] == "entries") & (table["change"] == change) & (table["ranking"] == ranking)]
    return [
        over_seeds(group, f"beyond_{other}", of=f"{of['dataset']} {of['model']}, {_target('entries', of['count'])}")
        for of, group in groups(entries, "dataset", "model", "count")
    ]


def draw_shown(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Exact FI and alignment of the images of one network, the first of the last data set: KIND_COLUMN -> figure."""
    shown = tables["pictures"]
    network = ["dataset", "model", "seed"]
    first = shown[shown["dataset"] == shown["dataset"].iloc[-1]].iloc[0]
    figures = {}
    for _, image in shown[shown[network].eq(first[network]).all(axis=1)].iterrows():
        of_image = tables["maps"][[*network, "kind"]].eq(image[[*network, "kind"]]).all(axis=1)
        for column in ("exact", "alignment"):
            figures[f"{image['kind']}_{column}"] = draw_areas(tables["maps"][of_image], image, column=column)
    return figures


_MAP = "nipy_spectral"  # the paper's
_FLAT = 1e-6  # relative


def draw_areas(maps: pd.DataFrame, image: pd.Series, *, column: str = "exact") -> Figure:
    """One image: itself, with its most vulnerable pixel changed, then a row of maps for each channel and an overlay.

    Args:
        maps: one kind of `maps`.
        image: the row of `pictures` for the same image.
        column: what is mapped, "exact", "released" or "alignment".
    """
    sizes, channels = sorted(maps["size"].unique()), int(maps["channel"].max()) + 1
    figure, grid = style.subplots(channels + 1, len(sizes), height=1.75 * (channels + 1), width=1.25, squeeze=False)
    top = float(maps[column].max())  # one range from 0 for all maps, as in the paper
    for row in range(channels):
        for axes, size in zip(grid[row], sizes, strict=True):
            values = _map(maps, size, row, column)
            drawn = axes.imshow(values, cmap=_MAP, vmin=0, vmax=top)
            _say_flat(axes, values, column)
            axes.set_title(f"{size}x{size}", fontsize=8)
        grid[row, 0].set_ylabel("grey" if channels == 1 else ("red", "green", "blue")[row])
    figure.colorbar(drawn, ax=grid[:channels, -1], label="alignment" if column == "alignment" else f"{column} FI")
    last, pixels = grid[-1], unpacked(image)
    changed = pixels.copy()
    changed[image["pixel_row"], image["pixel_column"]] = image["pixel_value"]
    said = f"true {image['label_name']}, predicted {image['predicted_name']}\nP = {image['p_predicted']:.3f}"
    style.picture(last[0], pixels, said)
    said = f"pixel ({image['pixel_row']}, {image['pixel_column']}) changed\nP = {image['p_changed']:.3f}"
    style.picture(last[1], changed, said)
    for axes, size in zip(last[2:], sizes[:2], strict=False):
        style.picture(axes, pixels, f"overlay {size}x{size}, mean of channels")
        mean = np.mean([_map(maps, size, channel, column) for channel in range(channels)], axis=0)
        axes.imshow(mean, cmap=_MAP, vmin=0, vmax=top, alpha=0.5)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def _map(maps: pd.DataFrame, size: int, channel: int, column: str) -> np.ndarray:
    chosen = maps[(maps["size"] == size) & (maps["channel"] == channel)]
    return chosen.pivot(index="row", columns="column", values=column).to_numpy()


def _say_flat(axes: Axes, values: np.ndarray, column: str) -> None:
    """Write on a map of one colour what it shows: the palette's top grey reads as missing data."""
    median = float(np.median(values))
    if np.mean(np.abs(values - median) <= _FLAT * abs(median)) > 0.5:
        text = f"flat: {'ceiling ' if column == 'exact' else ''}{median:.3g}"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=7)


def draw_intervention(table: pd.DataFrame) -> Figure:
    """Fall of P when each ranking's first entries are changed in each way, with 95% intervals; first seed."""
    shown = style.first_seed(table)
    changes = list(table["change"].unique())
    figure, grid = style.subplots(
        len(shown), len(changes), height=0.5 + 2.0 * len(shown), width=1.25, squeeze=False, sharey="row"
    )
    for row, (name, model, group) in zip(grid, shown, strict=True):
        targets = group[["target", "count"]].drop_duplicates().to_numpy().tolist()
        rankings = list(group["ranking"].unique())
        for axes, change in zip(row, changes, strict=True):
            for place, ranking in enumerate(rankings):
                part = group[(group["ranking"] == ranking) & (group["change"] == change)]
                x = np.arange(len(targets)) + 0.13 * (place - (len(rankings) - 1) / 2)
                look = {"fmt": "o", "markersize": 3, "elinewidth": 1, "color": style.SCORES[ranking][0]}
                axes.errorbar(x, part["drop"], yerr=style.error_bars(part, "drop"), label=style.name(ranking), **look)
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            axes.set_xticks(range(len(targets)), [_target(*target) for target in targets], fontsize=7, rotation=20)
        row[0].set_ylabel(f"{name}\n{model}\nfall of P")
    for axes, change in zip(grid[0], changes, strict=True):
        axes.set_title("to the farther end" if change == "farther" else f"{change} grey levels", fontsize=8)
    figure.suptitle(
        f"{table['images'].iloc[0]} test images of each data set, 95% bootstrap intervals over them", fontsize=9
    )
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    return figure


def _target(target: str, count: int) -> str:
    if target == "patch":
        return f"{round(count**0.5)}x{round(count**0.5)} patch"
    return f"{count} value{'s' if count > 1 else ''}"
