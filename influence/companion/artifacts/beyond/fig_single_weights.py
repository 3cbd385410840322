"""Single weights and single pixels, where FI is below its ceiling: does what it ranks first hurt most?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ... import style
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores.detection import columns
from ...scores.evaluation import mean_interval
from ...scores.weightwise import TREATMENTS, ablations, occlusions
from ..common import groups, networks, scored
from ..stability.comparison import paired

# The share of the weights, and of an image's pixels, by which the claims are judged.
_JUDGED = 0.01


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Accuracy and loss after the first weights of each ranking, or the first pixels, are taken away.

    Returns:
        "weights" of `weightwise.ablations` and "pixels" of `weightwise.occlusions`, both with the columns dataset,
        model, seed and images (tested).
    """
    chosen = run.parameters
    found: dict[str, list[pd.DataFrame]] = {"weights": [], "pixels": []}
    for network in networks(run):
        train, test, trained = network.dataset.train, network.dataset.test, network.trained
        ranked = train.sample(chosen["scored"], seed=network.seed)
        tested = test.sample(chosen["tested"] or None, seed=network.seed)
        covered = test.sample(chosen["covered"], seed=network.seed)
        grey = float(train.images.double().mean())
        options: Any = {"seed": network.seed, "shares": chosen["shares"]}
        weights = scored(run, f"single/weights-{network.name}", ablations, trained, ranked, tested, **options)
        pixels = scored(run, f"single/pixels-{network.name}", occlusions, trained, covered, value=grey, **options)
        for name, frame, images in (("weights", weights, tested), ("pixels", pixels, covered)):
            found[name].append(frame.assign(images=len(images), **network.columns))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Accuracy lost and loss gained, mean over networks with 95% t intervals.

    Returns:
        One row per what ("weights" or "pixels"), treatment, ranking and share: networks, images, count (how many were
        taken away), lost (of the accuracy) and risen (of the loss, nats), each with _low and _high.
    """
    rows = []
    for what, changes in _changes(tables).items():
        for about, group in groups(changes, "treatment", "ranking", "share"):
            row = {"what": what, **about, "networks": len(group)}
            row |= {"images": int(group["images"].iloc[0]), "count": int(group[what].iloc[0])}
            for column in ("lost", "risen"):
                row |= columns(column, mean_interval(group[column]))
            rows.append(row)
    return pd.DataFrame(rows)


def _changes(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of the tables with what was lost and risen against the same network as it is."""
    found = {}
    for what, frame in tables.items():
        network = ["dataset", "model", "seed"]
        before = frame[frame["ranking"] == "none"].set_index(network)
        changed = frame[frame["ranking"] != "none"].reset_index(drop=True)
        own = before.loc[pd.MultiIndex.from_frame(changed[network])]
        changed["lost"] = own["accuracy"].to_numpy() - changed["accuracy"]
        changed["risen"] = changed["loss"] - own["loss"].to_numpy()
        found[what] = changed if "treatment" in changed else changed.assign(treatment="covered")
    return found


def claims(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Estimate] | Estimate]:
    """By rules fixed before the run, on the first 1% (of the weights set to 0; of the pixels covered).

    The accuracy lost by FI's ranking less that by another, paired by network, the mean over networks:
    fi_weights_hurt_most and fi_pixels_hurt_most against each other ranking but that at random, which
    fi_weights_hurt_more_than_random and fi_pixels_hurt_more_than_random are about.
    """
    found: dict[str, list[Estimate] | Estimate] = {}
    for what, changes in _changes(tables).items():
        lost = _lost(changes, _JUDGED, TREATMENTS[0] if what == "weights" else "covered")
        beyond = {
            ranking: paired(lost["exact"] - lost[ranking], f"against {style.RANKINGS[ranking][0]}")
            for ranking in style.RANKINGS
            if ranking != "exact" and ranking in lost
        }
        found[f"fi_{what}_hurt_most"] = [e for ranking, e in beyond.items() if ranking != "random"]
        found[f"fi_{what}_hurt_more_than_random"] = beyond["random"]
    return found


def _lost(changes: pd.DataFrame, share: float, treatment: str) -> pd.DataFrame:
    """Accuracy lost by each network (rows) and ranking (columns)."""
    part = changes[(changes["share"] == share) & (changes["treatment"] == treatment)]
    return part.pivot(index=["dataset", "model", "seed"], columns="ranking", values="lost")


def beside(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Estimate]]:
    """What is not judged, of weights: other shares, and rounding.

    * fi_beyond_random_weights: the accuracy lost by FI's ranking less that at random, set to 0, at each share.
    * weights_set_to_0_at_SHARE, the largest, weights_in_4_bits_at_SHARE, the judged: lost by each ranking.
    * other_weights_beyond_fi_at_SHARE, the largest: lost by each other ranking less that by FI, set to 0.
    """
    changes = _changes(tables)["weights"]
    shares = sorted(changes["share"].unique())
    zero, rounded = _lost(changes, shares[-1], TREATMENTS[0]), _lost(changes, _JUDGED, TREATMENTS[1])
    rankings = {name: words for name, (words, *_) in style.RANKINGS.items() if name in zero}
    small = [(share, _lost(changes, share, TREATMENTS[0])) for share in shares]
    return {
        "fi_beyond_random_weights": [paired(lost["exact"] - lost["random"], f"{share:g}") for share, lost in small],
        f"weights_set_to_0_at_{shares[-1]:g}": [paired(zero[name], words) for name, words in rankings.items()],
        f"weights_in_4_bits_at_{_JUDGED:g}": [paired(rounded[name], words) for name, words in rankings.items()],
        f"other_weights_beyond_fi_at_{shares[-1]:g}": [
            paired(zero[name] - zero["exact"], words) for name, words in rankings.items() if name != "exact"
        ],
    }


def draw(summary: pd.DataFrame) -> Figure:
    """Accuracy lost against the share taken away, one line for each ranking: weights set to 0, in 4 bits; pixels."""
    figure, panels = style.subplots(1, 3, height=3.4, width=1.25)
    kinds = [("weights", "set to 0"), ("weights", "4 bits"), ("pixels", "covered")]
    for axes, (what, treatment) in zip(panels, kinds, strict=True):
        part = summary[(summary["what"] == what) & (summary["treatment"] == treatment)]
        style.by_share(axes, part, "lost", apart=1.05, middle=3)
        axes.axhline(0, color="black", linewidth=0.4)
        images, count = part["images"].iloc[0], part["networks"].iloc[0]
        axes.set_title(f"{what} {treatment}\n{count} networks (95% t interval),\n{images:,} test images", fontsize=8)
        axes.set_xlabel(f"share of the {what} (%)")
    panels[0].set_ylabel("accuracy lost (points)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, title="first by", title_fontsize=7)
    return figure
