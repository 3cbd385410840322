"""Outliers that are made, and wrong labels that are real: overlaid digits, flipped labels, CIFAR-10N."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import DataError, Split

HUMAN_LABELS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


def overlay(split: Split, eligible: np.ndarray | Tensor, *, per_class: int, shift: int = 4, seed: int = 0) -> Split:
    """Overlaid images as in Setup 0 of Shu & Zhu (2019), read off the released code.

    For each class k, `per_class` images of k that are eligible (there: classified correctly by both networks) are each
    paired with a random image of another class; the two are shifted independently by whole numbers of pixels, uniform
    in [-shift, shift] on both axes, with 0 moving in; the pixelwise maximum is an outlier with label k. A tenth of them
    is left out, held out in the released code. The images have a background of 0.

    Returns:
        The outliers; `index` holds the position of the image that gave the label.

    Raises:
        ValueError: a class has too few eligible images, or per_class is not at least 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    generator = np.random.default_rng(seed)
    labels, allowed = split.labels.numpy(), np.asarray(eligible, dtype=bool)
    chosen = []
    for k in np.unique(labels):
        candidates = np.flatnonzero((labels == k) & allowed)
        if len(candidates) < per_class:
            raise ValueError(f"class {k} has {len(candidates)} eligible images, {per_class} are needed")
        both = candidates, np.flatnonzero(labels != k)
        chosen.append([generator.choice(rows, per_class, replace=False) for rows in both])
    first, second = np.concatenate(chosen, axis=1)
    shifts = generator.integers(-shift, shift + 1, size=(len(first), 4))
    kept = np.flatnonzero(np.arange(len(first)) % per_class < per_class - per_class // 10)
    images = [
        torch.maximum(shifted(split.images[i], *moves[:2]), shifted(split.images[j], *moves[2:]))
        for i, j, moves in zip(first[kept], second[kept], shifts[kept].tolist(), strict=True)
    ]
    return Split(torch.stack(images), split.labels[first[kept]], split.index[first[kept]])


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """`image` (C, H, W) moved by whole pixels; 0 moves in, what leaves is lost."""
    height, width = image.shape[-2:]
    wide = F.pad(image, (abs(right), abs(right), abs(down), abs(down)))
    return wide[..., abs(down) - down :, abs(right) - right :][..., :height, :width]


def flip_labels(labels: Tensor, *, share: float, classes: int, seed: int = 0) -> Tensor:
    """Labels (N,) int64 of which a random share is replaced by another of K classes, uniformly: synthetic label noise.

    Raises:
        ValueError: the share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.clone()
    moved = torch.from_numpy(generator.integers(1, classes, size=len(chosen)))
    given[chosen] = (labels[chosen] + moved) % classes
    return given


def human_labels(kind: str, data_dir: str | Path | None) -> tuple[Tensor, Tensor]:
    """CIFAR-10N (Wei et al. 2022): labels that people gave to the 50,000 training images, and the verified ones.

    Each (50000,) int64 in the order of torchvision's training images, from `data_dir/cifar10n.npz`. Of `HUMAN_LABELS`
    "aggre_label" is the majority of three, "worse_label" a wrong one of them.

    Raises:
        DataError: the file is missing or holds no such labels.
    """
    if kind not in HUMAN_LABELS:
        raise DataError(f"unknown labels {kind!r}: CIFAR-10N has {', '.join(HUMAN_LABELS)}")
    path = None if data_dir is None else Path(data_dir).expanduser() / "cifar10n.npz"
    if path is None or not path.is_file():
        raise DataError(
            f"CIFAR-10N: {path or 'cifar10n.npz'} is missing; name its folder with --data DIR or INFLUENCE_DATA=DIR "
            "(arrays clean_label, aggre_label, random_label1..3, worse_label of http://noisylabels.com, as one .npz)"
        )
    with np.load(path, allow_pickle=False) as arrays:
        absent = [name for name in (kind, "clean_label") if name not in arrays]
        if absent:
            raise DataError(f"CIFAR-10N: {path} has no {absent[0]}")
        given, verified = (torch.from_numpy(arrays[name].astype(np.int64)) for name in (kind, "clean_label"))
    if given.shape != (50_000,) or verified.shape != (50_000,):
        raise DataError(f"CIFAR-10N: {path} has {tuple(given.shape)} labels, expected 50,000")
    return given, verified
