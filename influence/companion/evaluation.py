"""Scores of a classifier and the intervals they are reported with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence (Guo et al. 2017, eq. 3).

    Args:
        confidence: (N,) probability of the predicted class.
        correct: (N,) whether the prediction is right.
        bins: number of bins over (0, 1].

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != right.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"expected two vectors of one length, at least 1, got shapes {p.shape} and {right.shape}")
    which = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=right - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def mean_interval(values: Sequence[float] | ArrayLike, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds with its Student t interval: (mean, low, high); the interval of a single value is infinite.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a vector of at least one value, got shape {x.shape}")
    mean = float(x.mean())
    if len(x) == 1:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half


def rank_agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, ties given their mean rank."""
    return float(stats.spearmanr(np.asarray(first), np.asarray(second)).statistic)


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, repeats: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with its percentile bootstrap interval: (mean, low, high).

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a vector of at least one value, got shape {x.shape}")
    generator = np.random.default_rng(seed)
    means = [x[generator.integers(0, len(x), len(x))].mean() for _ in range(repeats)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)


def share_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float, float]:
    """A share with Wilson's interval: (share, low, high).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    found = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return successes / trials, float(found.low), float(found.high)


def detection(
    score: ArrayLike,
    positive: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    level: float = 0.95,
    repeats: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """AUROC and average precision of a score, with percentile bootstrap intervals over the examples.

    The resampling keeps the numbers of positives and negatives, and is the same for every score of one call's seed.

    Args:
        score: (N,) larger for what is to be found; infinities allowed.
        positive: (N,) bool.
        weight: (N,) weights of the examples in the average precision, to stand for another share of positives.
        level: of the intervals.
        repeats: bootstrap samples.
        seed: of the resampling.

    Returns:
        auroc, auroc_low, auroc_high, ap, ap_low, ap_high.

    Raises:
        ValueError: there are no positives or no negatives.
    """
    hit = np.asarray(positive, dtype=bool)
    # Ranks: the two measures depend on nothing else, and infinities become numbers.
    ranks = stats.rankdata(np.asarray(score, dtype=np.float64), method="dense").astype(np.float64)
    w = np.ones(len(hit)) if weight is None else np.asarray(weight, dtype=np.float64)
    groups = np.flatnonzero(hit), np.flatnonzero(~hit)
    if not (len(groups[0]) and len(groups[1])):
        raise ValueError(f"expected positives and negatives, got {len(groups[0])} and {len(groups[1])}")
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        rows = np.concatenate([generator.choice(group, len(group)) for group in groups])
        found.append((roc_auc_score(hit[rows], ranks[rows]), _average_precision(hit, ranks, w, rows)))
    lows, highs = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        "auroc": float(roc_auc_score(hit, ranks)),
        "auroc_low": float(lows[0]),
        "auroc_high": float(highs[0]),
        "ap": _average_precision(hit, ranks, w, np.arange(len(hit))),
        "ap_low": float(lows[1]),
        "ap_high": float(highs[1]),
    }


def _average_precision(hit: np.ndarray, ranks: np.ndarray, weight: np.ndarray, rows: np.ndarray) -> float:
    return float(average_precision_score(hit[rows], ranks[rows], sample_weight=weight[rows]))


def two_sample(first: ArrayLike, second: ArrayLike, *, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """Two-sample tests of two sets of scores, and the size of the effect.

    Args:
        first: (N,) scores.
        second: (M,) scores.
        level: of the interval.
        seed: of the bootstrap over the examples of both sets (200 samples).

    Returns:
        ks (Kolmogorov-Smirnov distance), ks_p, mw_p (Mann-Whitney, two-sided), effect (probability that a score of
        `second` exceeds one of `first`, ties half), effect_low, effect_high.

    Raises:
        ValueError: one of the sets is empty.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    ks = stats.ks_2samp(a, b)
    hit = np.repeat([False, True], [len(a), len(b)])
    both = detection(np.concatenate([a, b]), hit, level=level, seed=seed)
    return {
        "ks": float(ks.statistic),
        "ks_p": float(ks.pvalue),
        "mw_p": float(stats.mannwhitneyu(b, a, alternative="two-sided").pvalue),
        "effect": both["auroc"],
        "effect_low": both["auroc_low"],
        "effect_high": both["auroc_high"],
    }


def agreement(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, repeats: int = 200, seed: int = 0
) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b of two scores, with percentile bootstrap intervals over the examples.

    Returns:
        spearman, spearman_low, spearman_high, kendall, kendall_low, kendall_high.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    generator = np.random.default_rng(seed)
    samples = [np.arange(len(a)), *(generator.integers(0, len(a), len(a)) for _ in range(repeats))]
    found = np.array(
        [(stats.spearmanr(a[rows], b[rows]).statistic, stats.kendalltau(a[rows], b[rows]).statistic) for rows in samples]
    )
    lows, highs = np.nanquantile(found[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    result = {}
    for column, name in enumerate(("spearman", "kendall")):
        result[name] = float(found[0, column])
        result[f"{name}_low"], result[f"{name}_high"] = float(lows[column]), float(highs[column])
    return result
