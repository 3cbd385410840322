"""How well a score finds, separates and orders, each with its interval over the examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


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

    The resampling keeps the numbers of positives and negatives, and is the same for every score of one seed.

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
    hit, values = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64)
    groups = np.flatnonzero(hit), np.flatnonzero(~hit)
    if not (len(groups[0]) and len(groups[1])):
        raise ValueError(f"expected positives and negatives, got {len(groups[0])} and {len(groups[1])}")
    generator = np.random.default_rng(seed)
    counts = np.ones((repeats + 1, len(hit)))  # how often each example is drawn; the first row is the data themselves
    for group in groups:
        drawn = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=repeats)
        counts[1:, group] = drawn
    order = np.argsort(-values, kind="stable")
    falling = values[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))  # the last example of each tie
    hit, counts = hit[order], counts[:, order]
    auroc = _auroc(counts * hit, counts * ~hit, last)
    if weight is not None:
        counts = counts * np.asarray(weight, dtype=np.float64)[order]
    ap = _average_precision(counts * hit, counts * ~hit, last)
    result: dict[str, float] = {}
    for name, found in (("auroc", auroc), ("ap", ap)):
        low, high = np.quantile(found[1:], [(1 - level) / 2, (1 + level) / 2]) if repeats else (np.nan, np.nan)
        result |= {name: float(found[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _auroc(true: np.ndarray, false: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Area under the ROC by trapezes, for rows of weights in falling order of the score."""
    t, f = (np.pad(x.cumsum(axis=1)[:, last], ((0, 0), (1, 0))) for x in (true, false))
    area = (np.diff(f, axis=1) * (t[:, 1:] + t[:, :-1]) / 2).sum(axis=1)
    return np.asarray(area / (t[:, -1] * f[:, -1]))


def _average_precision(true: np.ndarray, false: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Sum of precision times the step of recall, for rows of weights in falling order of the score."""
    t, f = (x.cumsum(axis=1)[:, last] for x in (true, false))
    precision = t / np.maximum(t + f, 1e-300)
    return np.asarray((precision * np.diff(t, axis=1, prepend=0)).sum(axis=1) / t[:, -1])


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
    pairs = [(a[rows], b[rows]) for rows in samples]
    found = np.array([(stats.spearmanr(*pair).statistic, stats.kendalltau(*pair).statistic) for pair in pairs])
    lows, highs = np.nanquantile(found[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    result = {}
    for column, name in enumerate(("spearman", "kendall")):
        result[name] = float(found[0, column])
        result[f"{name}_low"], result[f"{name}_high"] = float(lows[column]), float(highs[column])
    return result
