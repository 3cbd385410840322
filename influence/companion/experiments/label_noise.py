"""Which score finds wrong labels: real ones (CIFAR-10N), or labels flipped at random where no download is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from .. import cache, outliers, paths, scores
from ..data import DataError, Split
from ..detection import detection
from ..results import Run
from ..zoo import pretrained
from .common import classifier, dataset
from .keyed import bound

SYNTHETIC = "flipped"


def noisy_scores(
    run: Run,
    dataset_name: str,
    models: Sequence[str],
    kinds: Sequence[str],
    *,
    seed: int,
    images: int | None,
    share: float,
    without: Sequence[str] = (),
) -> pd.DataFrame:
    """Every score of training images under the labels given to them, by each network.

    All networks were trained on verified labels: this asks how well a score finds wrong labels where the network was
    not fitted to them. Images are drawn from the validation part, which our own networks have not seen; the
    pretrained ones have.

    Args:
        run: the artifact.
        dataset_name: "cifar10", or one whose labels are flipped.
        models: names of `models.NAMES` and, for CIFAR-10, of `pretrained.NAMES`.
        kinds: "flipped", or labels of CIFAR-10N.
        seed: of the networks, the choice of images and the flips.
        images: how many, drawn at random; None for all.
        share: of the labels that "flipped" replaces.
        without: scores to leave out.

    Returns:
        One row per model, kind and image: wrong (bool: the given label is not the verified one) and the columns of
        `scores.all_scores`.

    Raises:
        DataError: labels of CIFAR-10N for another data set, or not in the order of the training images.
    """
    split = dataset(run, dataset_name).valid.sample(images, seed=seed)
    frames = []
    for model in models:
        network, key = _network(run, dataset_name, model, seed)
        given = {kind: _given(run, dataset_name, split, kind, share=share, seed=seed) for kind in kinds}
        entry: dict[str, object] = {
            "model": key,
            "data": dataset(run, dataset_name).digest,
            "images": images,
            "seed": seed,
        }
        entry |= {"kinds": list(kinds), "share": share, "without": list(without), "device": run.device.type}
        compute = bound(scores.all_scores, network, split, given=given, device=run.device, without=without)
        frame = cache.table(f"labels/{dataset_name}-{model}", entry, compute)
        verified = dict(zip(split.index.tolist(), split.labels.tolist(), strict=True))
        wrong = frame["label"] != frame["image"].map(verified)
        frames.append(frame.rename(columns={"given": "kind"}).assign(model=model, wrong=wrong))
    return pd.concat(frames, ignore_index=True)


def _network(run: Run, dataset_name: str, model: str, seed: int) -> tuple[nn.Module, str]:
    if model in pretrained.NAMES:
        network, digest = pretrained.load(model, paths.data_dir(), device=run.device)
        run.add_input(model, digest)
        return network, digest
    trained = classifier(run, dataset_name, model, seed=seed)
    return trained.model, trained.key


def _given(run: Run, dataset_name: str, split: Split, kind: str, *, share: float, seed: int) -> Tensor:
    if kind == SYNTHETIC:
        classes = len(dataset(run, dataset_name).classes)
        return outliers.flip_labels(split.labels, share=share, classes=classes, seed=seed)
    if dataset_name != "cifar10":
        raise DataError(f"labels {kind!r} belong to cifar10, not to {dataset_name!r}")
    given, verified = outliers.human_labels(kind, paths.data_dir())
    if not torch.equal(verified[split.index], split.labels):
        raise DataError("CIFAR-10N: its verified labels are not those of the training images, another order?")
    run.add_input(f"cifar10n {kind}", cache.fingerprint(given.tolist()))
    return given[split.index]


def detection_table(frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """AUROC and average precision of each score for finding wrong labels, with 95% bootstrap intervals over images."""
    rows = []
    for (model, kind), group in frame.groupby(["model", "kind"], sort=False):
        hits = {"accuracy": float((group["predicted"] == group["label"])[~group["wrong"]].mean())}
        counts = {"images": len(group), "wrong": int(group["wrong"].sum())}
        for score in (name for name in scores.NAMES if name in group):
            found = detection(group[score], group["wrong"], seed=seed)
            rows.append({"model": model, "kind": kind, "score": score, **counts, **hits, **found})
    return pd.DataFrame(rows)


def claims(table: pd.DataFrame) -> dict[str, bool | float]:
    """By rules fixed before the run, each for every network and kind of label.

    * fi_beats_jacobian_norm: the lower end of the interval of exact FI's AUROC lies above the upper end of that of the
      Jacobian norm.
    * nothing_beats_the_loss: no score's lower end lies above the loss's upper end.
    """
    found = table.set_index(["model", "kind", "score"])
    low, high = found["auroc_low"].unstack(), found["auroc_high"].unstack()
    return {
        "fi_beats_jacobian_norm": bool((low["exact"] > high["jacobian_norm"]).all()),
        "nothing_beats_the_loss": bool((low.max(axis=1) <= high["loss"]).all()),
    }
