"""Which score finds wrong labels: those that people gave (CIFAR-10N), by networks that were trained on such labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...images import outliers
from ...images.data import Split
from ...ledger import paths
from ...ledger.reference import Estimate
from ...ledger.results import COMMITTED, Run
from ...scores import imagewise
from ...scores.detection import auroc_difference
from ...zoo import dynamics, recipes, training
from ..common import classifier, dataset, scored
from .common import detection_table

SYNTHETIC = "flipped"
CONFIDENT = "confident"  # self-confidence less the class's mean: confident learning (Northcutt et al. 2021)
AUM, EARLY_EL2N = "aum", "early_el2n"  # of trainings on the very labels; of AUM its negative
_FOLDS = 4
_EPOCHS = 10  # of the training that gives AUM: half of the recipe's
_NETWORKS = 3  # over which early EL2N is a mean


def compute(run: Run) -> dict[str, pd.DataFrame]:
    """Every score of training images under the labels that they were given.

    Labels of CIFAR-10N are judged out of sample: by the network of `recipes.yaml` that was trained on the same kind of
    labels of the other three quarters of the images; AUM and early EL2N, by their definitions, by trainings on the very
    labels (`dynamics.recorded`). Flipped labels, for the data sets that come with a dependency, are judged by networks
    that were trained on the right ones.

    Returns:
        "scores", one row per model, kind and image: wrong (bool: the given label is not the verified one), the columns
        of `imagewise.all_scores` and, for CIFAR-10N, confident, aum and early_el2n, of which more is more suspicious.
    """
    p, images = run.parameters, run.parameters["images"] or None
    options: dict[str, Any] = {"seed": p["seeds"][0], "images": images, "share": p["share"], "without": p["without"]}
    frames = [of_kind(run, kind, p["dataset"], p["models"], **options) for kind in p["kinds"]]
    return {"scores": pd.concat(frames, ignore_index=True)}


def of_kind(
    run: Run,
    kind: str,
    dataset_name: str,
    models: Sequence[str],
    *,
    seed: int,
    images: int | None,
    share: float,
    without: Sequence[str],
) -> pd.DataFrame:
    """The scores of one kind of labels, as `compute` says."""
    if kind != SYNTHETIC:
        return _out_of_sample(run, kind, seed=seed, images=images, without=without)
    whole = dataset(run, dataset_name)
    held_out = whole.valid.sample(images, seed=seed)  # which the networks have not seen
    given = outliers.flip_labels(held_out.labels, share=share, classes=len(whole.classes), seed=seed)
    split, wrong = Split(held_out.images, given, held_out.index), (given != held_out.labels).numpy()
    frames = []
    for model in models:
        trained = classifier(run, dataset_name, model, seed=seed)
        frame = scored(run, f"labels/{dataset_name}-{model}", imagewise.all_scores, trained, split, without=without)
        frames.append(frame.assign(kind=kind, model=model, wrong=wrong))
    return pd.concat(frames, ignore_index=True).drop(columns="near_cut")


def _out_of_sample(run: Run, kind: str, *, seed: int, images: int | None, without: Sequence[str]) -> pd.DataFrame:
    _, verified = outliers.human_labels(kind, paths.data_dir())
    frames = []
    for fold in range(_FOLDS):
        recipe = recipes.named(f"{noisy(kind)}-{fold}-0")
        found = recipe.dataset()
        run.add_input(f"cifar10 {kind} {fold}", found.digest)
        trained, held_out = training.fit(recipe, found, device=run.device), found.valid.sample(images, seed=seed)
        frames.append(scored(run, f"labels/{kind}-{fold}", _scores, trained, held_out, without=without))
    frame = pd.concat(frames, ignore_index=True)
    wrong = frame["label"].to_numpy() != verified.numpy()[frame["image"]]
    probs = frame.filter(like="probability_")
    frame = frame.drop(columns=[*probs, "near_cut"])
    confident = less_than_its_class(probs.to_numpy(), frame["label"].to_numpy())
    frame = frame.assign(kind=kind, model="noisy-resnet20", wrong=wrong, **{CONFIDENT: confident})
    return frame.join(_in_training(run, kind), on="image")


def noisy(kind: str) -> str:
    """How the names of the recipes begin that learn a kind of labels of CIFAR-10N."""
    return f"noisy-{kind.removesuffix('_label')}"


def _in_training(run: Run, kind: str) -> pd.DataFrame:
    """AUM of one training, negative, and the mean of early EL2N over several, for every image of CIFAR-10."""
    first = recipes.named(f"{noisy(kind)}-0-0")
    found = recipes.data_set(first.data, first.labels, None, paths.data_dir())
    made = []
    for seed in range(_NETWORKS):
        recipe = replace(first, name=f"{noisy(kind)}-all-{seed}", fold=None, seed=seed)
        epochs = dynamics.EARLY if seed else _EPOCHS
        publish = run.profile == COMMITTED
        made.append(dynamics.recorded(recipe, found, epochs=epochs, device=run.device, publish=publish))
    early = torch.stack([one.el2n for one in made]).double().mean(dim=0)
    values = {AUM: -made[0].aum().double().cpu().numpy(), EARLY_EL2N: early.cpu().numpy()}
    return pd.DataFrame(values, index=torch.cat([found.train.index, found.valid.index]).numpy())


def _scores(model: nn.Module, split: Split, without: Sequence[str], device: torch.device) -> pd.DataFrame:
    """All scores, and the probabilities of all classes."""
    frame = imagewise.all_scores(model, split, device=device, without=without)
    probs = training.predict(model, split.images, device=device).double().softmax(1).numpy()
    return frame.assign(**{f"probability_{k}": probs[:, k] for k in range(probs.shape[1])})


def less_than_its_class(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 less the self-confidence adjusted as by confident learning (Northcutt et al. 2021), (N,).

    From the probabilities (N, K) of each class its threshold is taken, the mean probability of the examples that have
    its label; all are then moved above 0 and divided by their sum.
    """
    thresholds = np.array([probs[labels == k, k].mean() if (labels == k).any() else 0 for k in range(probs.shape[1])])
    adjusted = probs - thresholds + thresholds.max()
    adjusted /= adjusted.sum(axis=1, keepdims=True)
    return np.asarray(1 - adjusted[np.arange(len(labels)), labels])


def table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """AUROC and average precision of each score, with 95% bootstrap intervals over images."""
    return detection_table(tables["scores"], also=[CONFIDENT, AUM, EARLY_EL2N])


def claims(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Estimate]]:
    """Differences of AUROC, paired by image, for every network and kind of label.

    * fi_beats_jacobian_norm: exact FI less the Jacobian norm.
    * released_fi_loses_to_the_loss: released FI (e = 1e-3) less the loss.
    * confident_learning_against_the_loss: confident learning less the loss, where it was computed.
    * el2n_against_the_loss: EL2N less the loss.
    * aum_against_the_loss, early_el2n_against_the_loss: either less the loss, where it was computed.
    """
    pairs = {
        "fi_beats_jacobian_norm": ("exact", "jacobian_norm"),
        "released_fi_loses_to_the_loss": ("released_1e-3", "loss"),
        "confident_learning_against_the_loss": (CONFIDENT, "loss"),
        "el2n_against_the_loss": ("el2n", "loss"),
        "aum_against_the_loss": (AUM, "loss"),
        "early_el2n_against_the_loss": (EARLY_EL2N, "loss"),
    }
    found: dict[str, list[Estimate]] = {}
    for (model, kind), group in tables["scores"].groupby(["model", "kind"], sort=False):
        for item, (first, second) in pairs.items():
            if first in group and group[first].notna().all():
                interval = auroc_difference(group[first], group[second], group["wrong"])
                found.setdefault(item, []).append(Estimate(*interval, len(group), f"{model} {kind}"))
    return found
