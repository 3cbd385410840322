"""Scores of a classifier and the intervals they are reported with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .detection import LEVEL, Interval, vector


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence (Guo et al. 2017, eq. 3).

    Of (N,) probabilities of the predicted class, and whether (N,) it is the right one; a ValueError where these differ
    in length, or are empty.
    """
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != right.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"expected two vectors of one length, at least 1, got shapes {p.shape} and {right.shape}")
    which = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=right - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def mean_interval(values: ArrayLike, *, within: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean over seeds with its Student t interval, cut to what is possible; that of a single value is all of `within`.

    A ValueError without values.
    """
    x = vector(values)
    mean, half = float(x.mean()), np.inf
    if len(x) > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, max(mean - half, within[0]), min(mean + half, within[1])
