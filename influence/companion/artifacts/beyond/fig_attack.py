"""mFI-PSO (Shu, Shi, Jia, Zhu, Chen 2020): does FI choose the pixel values whose joint change fools the network?"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import influence

from ... import style
from ...images.data import Split
from ...images.pictures import packed, unpacked
from ...ledger.reference import Estimate
from ...ledger.results import Run
from ...scores import swarm
from ...scores.detection import bootstrap_interval, columns, share_interval
from ...scores.imagewise import chunks, score_gradient, table
from ...scores.pixelwise import top_entries
from ...zoo import training
from ..common import Subject, estimates, groups, networks, scored

PUBLISHED = "published"  # every value that passes the threshold
CHOICES = {
    "fi": "FI",
    "saliency": "gradient",
    "trace": "trace of G",
    "random": "at random",
    PUBLISHED: "all with FI of .01 or more",
}
_THRESHOLD = 0.01  # of FI
_COLOURS = {"fi": "exact", "saliency": "saliency", "trace": "trace", "random": "random", PUBLISHED: "released"}


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Every choice of values moved by the same swarm, on test images that each network classifies rightly.

    Returns:
        "attacks", one row per network, image and choice: dataset, model, seed, image, passing (share of the image's
        values with FI of .01 or more), values (how many were moved), changed (bool: the prediction is another one)
        and reached (bool: it is the target).
        "pictures" and "maps", of the first image of each network whose prediction the published choice changes (the
        first of all where it changes none): as `shown` gives them.
    """
    chosen = run.parameters
    found: dict[str, list[pd.DataFrame]] = {"attacks": [], "pictures": [], "maps": []}
    options = {name: chosen[name] for name in ("share", "reach", "particles", "steps")}
    for network in networks(run):
        pool = network.dataset.test.sample(2 * chosen["images"], seed=network.seed)
        right = training.predict(network.trained.model, pool.images, device=run.device).argmax(1) == pool.labels
        split = pool.take(right.nonzero()[: chosen["images"], 0].tolist())
        name = f"mfi-pso/{network.name}"
        attacks = scored(run, name, attacked, network.trained, split, seed=network.seed, **options)
        parts = {"attacks": attacks.drop(columns="bytes"), **shown(network, split, attacks, device=run.device)}
        for part, frame in parts.items():
            found[part].append(frame.assign(**network.columns))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def shown(subject: Subject, split: Split, attacks: pd.DataFrame, *, device: torch.device) -> dict[str, pd.DataFrame]:
    """One image before and after its attack, and the FI of its values.

    Returns:
        "pictures", two rows, "before" and "after" (every value rounded to a grey level): when, image (0-based, standard
        order), target and predicted (names of classes), p_target, p_predicted, and the image as `pictures.packed` has
        it. "maps", one row per value of the image: channel, row, column, fi.
    """
    published = attacks[attacks["choice"] == PUBLISHED]
    one = published.iloc[int(published["changed"].to_numpy().argmax())]
    picture = split.take([int((split.index == one["image"]).nonzero()[0, 0])]).images
    moved = torch.frombuffer(bytearray(one["bytes"]), dtype=torch.uint8).view(picture.permute(0, 2, 3, 1).shape)
    both = torch.cat([picture, moved.permute(0, 3, 1, 2)])
    model, classes = subject.trained.model, subject.dataset.classes
    _, target, scores = ranked(model, training.pixels(picture, device), generator=torch.Generator(device))
    p = training.predict(model, both, device=device).double().softmax(1)
    top, predicted = p.max(1)
    about = {
        "when": ["before", "after"],
        "image": int(one["image"]),
        "target": classes[int(target)],
        "predicted": [classes[int(k)] for k in predicted],
        "p_target": p[:, int(target)],
        "p_predicted": top,
    }
    axes = dict(zip(("channel", "row", "column"), map(range, picture.shape[1:]), strict=True))
    places = pd.MultiIndex.from_product([*axes.values()], names=[*axes]).to_frame(index=False)
    pictures = pd.concat([pd.DataFrame(about), packed(both)], axis=1)
    return {"pictures": pictures, "maps": places.assign(fi=scores["fi"].flatten().cpu().numpy())}


def attacked(
    model: nn.Module,
    split: Split,
    *,
    share: float,
    reach: float,
    seed: int,
    device: torch.device,
    **search: int,
) -> pd.DataFrame:
    """What `swarm.minimise` finds for each choice and image; `compute` says what the columns are.

    Besides, of the published choice: bytes, the moved image as `pictures.packed` has it; None for the others.
    """
    frames = []
    for rows, x, _ in chunks(split, 8, device, "swarms"):
        flat = x.flatten(1)
        chance = torch.Generator(device).manual_seed(training.mixed_seed(seed, 60_000, int(rows[0])))
        predicted, target, scores = ranked(model, x, generator=chance)
        masks = {name: top_entries(score, max(1, round(share * flat.shape[1]))) for name, score in scores.items()}
        masks[PUBLISHED] = scores["fi"] >= _THRESHOLD

        def margin(moves: Tensor, x: Tensor = x, target: Tensor = target) -> Tensor:
            """Largest log P of another class less that of the target, (S, N): below 0 the target is predicted."""
            with torch.no_grad():
                log_p = F.log_softmax(model((x + moves.view(-1, *x.shape)).flatten(0, 1)).double(), dim=1)
            at = target.repeat(len(moves))[:, None]
            others = log_p.scatter(1, at, -torch.inf).amax(1)
            return (others - log_p.gather(1, at)[:, 0]).view(len(moves), -1)

        for name, mask in masks.items():
            low, high = (-255 * reach * mask).maximum(-flat), (255 * reach * mask).minimum(255 - flat)
            # The same draws for every choice.
            draws = torch.Generator(device).manual_seed(training.mixed_seed(seed, 70_000, int(rows[0])))
            moves, _ = swarm.minimise(margin, low, high, generator=draws, **search)
            moved = x + moves.view_as(x)
            with torch.no_grad():
                after = model(moved).argmax(1)
            found = {"image": split.index[rows], "passing": masks[PUBLISHED].double().mean(1)}
            found |= {"values": mask.sum(1), "changed": after != predicted, "reached": after == target}
            images = packed(moved.round().to(torch.uint8).cpu())["bytes"] if name == PUBLISHED else None
            frames.append(table(found).assign(choice=name, bytes=images))
    return pd.concat(frames, ignore_index=True)


def ranked(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Predicted class and target, the second most likely one, (N,), and the score (N, D) by which each choice ranks.

    With s_k = d log P_k / d omega of a single pixel value, f = -log P of the target t: FI is s_t^2 / sum_k P_k s_k^2,
    the gradient |s_t|, the trace sum_k P_k s_k^2.
    """
    metric = influence.metric_tensor(model, x, wrt=influence.Patches(size=1))
    predicted, target = metric.log_probs.topk(2, dim=1).indices.T
    fi = influence.first_order_influence(metric, target).fi
    gradient, _ = score_gradient(model, x, target)
    chance = torch.rand(fi.shape, generator=generator, device=fi.device, dtype=fi.dtype)
    found = {"fi": fi, "saliency": gradient.flatten(1).abs().double(), "trace": metric.trace(), "random": chance}
    return predicted, target, found


def summary(attacks: pd.DataFrame) -> pd.DataFrame:
    """Shares of changed predictions by choice, with Wilson's intervals, and FI's share less theirs, paired by image.

    Returns:
        One row per dataset, model, seed and choice: images, values (mean), reached (share), passing (mean), changed,
        low, high, fi_less (share of FI's choice less this one's); passing and fi_less with 95% bootstrap intervals.
    """
    rows = []
    for network, group in groups(attacks, "dataset", "model", "seed"):
        wide = group.pivot(index="image", columns="choice", values="changed").astype(float)
        for choice in CHOICES:
            part = group[group["choice"] == choice]
            row = {**network, "choice": choice, "images": len(part)}
            row |= {name: float(part[name].mean()) for name in ("values", "reached")}
            row |= columns("passing", bootstrap_interval(part["passing"]))
            row |= columns("changed", share_interval(int(part["changed"].sum()), len(part)), "")
            rows.append(row | columns("fi_less", bootstrap_interval(wide["fi"] - wide[choice])))
    return pd.DataFrame(rows)


def claims(found: pd.DataFrame) -> dict[str, list[Estimate]]:
    """Share of predictions changed by FI's choice less that by the gradient's, by chance's and by the trace's.

    * fi_beats_gradient, fi_beats_random and fi_against_trace: for each network, paired by image.
    * threshold_passes: the mean share of an image's values that the published threshold lets through;
      published_choice_changes: the share of predictions changed by moving all of these.
    """
    wanted = {
        "fi_beats_gradient": ("saliency", "fi_less"),
        "fi_beats_random": ("random", "fi_less"),
        "fi_against_trace": ("trace", "fi_less"),
        "threshold_passes": (PUBLISHED, "passing"),
        "published_choice_changes": (PUBLISHED, "changed"),
    }
    claimed = {}
    for item, (choice, value) in wanted.items():
        ends = "" if value == "changed" else None
        claimed[item] = estimates(found[found["choice"] == choice], value, ends, of="{dataset} {model}")
    return claimed


def draw(found: pd.DataFrame) -> Figure:
    """Share of predictions changed by each choice, Wilson's 95% intervals, and FI's share less each other's."""
    groups = list(found.groupby(["dataset", "model", "seed"], sort=False))
    figure, grid = style.subplots(len(groups), 2, height=0.7 + 1.8 * len(groups), squeeze=False)
    for row, ((name, model, _), group) in zip(grid, groups, strict=True):
        part = group.set_index("choice").loc[list(CHOICES)]
        for place, choice in enumerate(CHOICES):
            line = part.loc[[choice]]
            look = {"fmt": "o", "color": style.SCORES[_COLOURS[choice]][0], "capsize": 2}
            for axes, value, ends in ((row[0], "changed", ""), (row[1], "fi_less", None)):
                if value == "changed" or choice not in ("fi", PUBLISHED):
                    axes.errorbar(100 * line[value], [place], xerr=100 * style.error_bars(line, value, ends), **look)
        names = [f"{CHOICES[str(choice)]} ({moved:.0f})" for choice, moved in part["values"].items()]
        row[0].set_yticks(range(len(CHOICES)), names)
        row[1].set_yticks(range(len(CHOICES)), [])
        row[1].axvline(0, color="0.5", linewidth=1)
        for axes in row:
            axes.set_ylim(len(CHOICES) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
        images = int(part["images"].iloc[0])
        row[0].set_title(f"{style.name(name)}, {style.name(model)}, n = {images} images", loc="left", fontsize=9)
    grid[-1, 0].set_xlabel("predictions changed (%)")
    grid[-1, 1].set_xlabel("FI's choice less this one (points)")
    return figure


def draw_maps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """An image of each network, the FI of its values (mean over channels), and the image after the published attack."""
    keys = ["dataset", "model", "seed"]
    groups = list(tables["pictures"].groupby(keys, sort=False))
    figure, grid = style.subplots(len(groups), 3, height=0.4 + 2.4 * len(groups), squeeze=False)
    for row, (key, pictures) in zip(grid, groups, strict=True):
        values = tables["maps"][tables["maps"][keys].eq(key).all(axis=1)]
        fi = values.pivot_table(index="row", columns="column", values="fi", aggfunc="mean").to_numpy()
        least = min(_THRESHOLD, float(fi[fi > 0].min()))
        drawn = row[1].imshow(fi, cmap="viridis", norm=LogNorm(least, float(fi.max())))
        figure.colorbar(drawn, ax=row[1], label="FI")
        row[1].set(xticks=[], yticks=[])
        passing = f"{100 * float((values['fi'] >= _THRESHOLD).mean()):.1f}%"
        row[1].set_title(f"FI of the target; {passing} of\nthe values have {_THRESHOLD:g} or more", fontsize=8)
        for axes, (_, picture) in zip(row[::2], pictures.iterrows(), strict=True):
            style.picture(axes, unpacked(picture))
            said = f"predicted {picture['predicted']}, P = {picture['p_predicted']:.2f}"
            axes.set_title(f"{said}\ntarget {picture['target']}, P = {picture['p_target']:.2g}", fontsize=8)
        network = f"{style.name(key[0])}, {style.name(key[1])}"
        row[0].set_ylabel(f"{network}\ntest image {pictures['image'].iloc[0]}", fontsize=8)
    return figure
