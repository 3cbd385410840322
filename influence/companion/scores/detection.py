"""How well a score finds, separates and orders, each with its interval over the examples."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95  # of all intervals
Interval = tuple[float, float, float]  # value, low, high


def vector(values: ArrayLike) -> np.ndarray:
    """`values` as a float64 vector; a ValueError where there are none."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a vector of at least one value, got shape {x.shape}")
    return x


def bootstrap_interval(values: ArrayLike) -> Interval:
    """Mean with its percentile bootstrap interval: (mean, low, high); a ValueError without values."""
    x = vector(values)
    if len(x) == 1:
        return float(x[0]), float(x[0]), float(x[0])
    options = {"n_resamples": 1000, "confidence_level": LEVEL, "method": "percentile"}
    low, high = stats.bootstrap((x,), np.mean, rng=np.random.default_rng(0), **options).confidence_interval
    return float(x.mean()), float(low), float(high)


def _percentiles(values: np.ndarray) -> Interval:
    """The first value with the percentiles of the others, its bootstrap samples; NaN of none."""
    value, samples = float(values[0]), values[1:]
    drawn = samples[~np.isnan(samples)]  # a sample of one value alone has no order
    if not len(drawn):
        return value, np.nan, np.nan
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def columns(name: str, interval: Interval, ends: str | None = None) -> dict[str, float]:
    """An estimate with its interval as the columns NAME, NAME_low and NAME_high; `ends` stands for NAME_ in these."""
    ends = f"{name}_" if ends is None else ends
    return dict(zip((name, f"{ends}low", f"{ends}high"), interval, strict=True))


def share_interval(successes: int, trials: int) -> Interval:
    """A share with Wilson's interval: (share, low, high); a ValueError without trials, or of more successes."""
    found = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return successes / trials, float(found.low), float(found.high)


def detection(
    score: ArrayLike,
    positive: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    repeats: int = 200,
) -> dict[str, float]:
    """AUROC and average precision of a score, with percentile bootstrap intervals over the examples.

    The score, (N,), is larger for what is to be found, and may be infinite; weights, (N,), of the examples in average
    precision stand for another share of positives. The resampling keeps the numbers of positives and negatives, and is
    the same for every score.

    Returns:
        auroc, auroc_low, auroc_high, ap, ap_low, ap_high.

    Raises:
        ValueError: there are no positives or no negatives.
    """
    hit = np.asarray(positive, dtype=bool)
    auroc, ap = _curves(score, hit, _resampled(hit.tobytes(), repeats), weight)
    return columns("auroc", _percentiles(auroc)) | columns("ap", _percentiles(ap))


def auroc_difference(first: ArrayLike, second: ArrayLike, positive: ArrayLike, *, repeats: int = 200) -> Interval:
    """AUROC of one score, (N,), less that of another, with a percentile bootstrap interval paired by example.

    The rest is as in `detection`.
    """
    hit = np.asarray(positive, dtype=bool)
    counts = _resampled(hit.tobytes(), repeats)
    return _percentiles(_curves(first, hit, counts)[0] - _curves(second, hit, counts)[0])


@lru_cache(maxsize=2)  # every score of the same examples is resampled alike
def _resampled(positive: bytes, repeats: int) -> np.ndarray:
    """How often each example is drawn, (repeats + 1, N); the first row is the data themselves."""
    hit = np.frombuffer(positive, dtype=bool)
    groups = np.flatnonzero(hit), np.flatnonzero(~hit)
    if not (len(groups[0]) and len(groups[1])):
        raise ValueError(f"expected positives and negatives, got {len(groups[0])} and {len(groups[1])}")
    generator = np.random.default_rng(0)
    counts = np.ones((repeats + 1, len(hit)))
    for group in groups:
        counts[1:, group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=repeats)
    return counts


def _curves(
    score: ArrayLike, hit: np.ndarray, counts: np.ndarray, weight: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision for each row of counts."""
    values = np.asarray(score, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    falling = values[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))  # the last example of each tie
    hit, counts = hit[order], counts[:, order]
    auroc = _auroc(counts * hit, counts * ~hit, last)
    if weight is not None:
        counts = counts * np.asarray(weight, dtype=np.float64)[order]
    return auroc, _average_precision(counts * hit, counts * ~hit, last)


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


def two_sample(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Two-sample tests of scores (N,) and (M,), and the size of the effect with its bootstrap interval.

    Returns:
        ks (Kolmogorov-Smirnov distance), ks_p, mw_p (Mann-Whitney, two-sided), effect (probability that a score of
        `second` exceeds one of `first`, ties half), effect_low, effect_high; a ValueError where one set is empty.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    ks = stats.ks_2samp(a, b)
    hit = np.repeat([False, True], [len(a), len(b)])
    both = detection(np.concatenate([a, b]), hit)
    return {
        "ks": float(ks.statistic),
        "ks_p": float(ks.pvalue),
        "mw_p": float(stats.mannwhitneyu(b, a, alternative="two-sided").pvalue),
        **{f"effect{suffix}": both[f"auroc{suffix}"] for suffix in ("", "_low", "_high")},
    }


def spearman(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Spearman's rank correlation along the last axis, ties given their mean rank; NaN where one side is constant.

    To the last digit what `scipy.stats.spearmanr` gives for one pair of samples at a time.
    """
    n = np.shape(first)[-1]
    a, b = (stats.rankdata(values, axis=-1) - (n + 1) / 2 for values in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        both, b_alone, a_alone = ((x * y).sum(axis=-1) * np.true_divide(1, n - 1) for x, y in ((a, b), (b, b), (a, a)))
        return np.clip(both / np.sqrt(b_alone) / np.sqrt(a_alone), -1, 1)


def _drawn_pairs(first: ArrayLike, second: ArrayLike, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Two scores, (N,), of all examples and of bootstrap samples of them, (repeats + 1, N) each."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    rows = np.random.default_rng(0).integers(0, len(a), (repeats, len(a)))
    rows = np.concatenate([np.arange(len(a))[None], rows])
    return a[rows], b[rows]


def spearman_interval(first: ArrayLike, second: ArrayLike, *, repeats: int = 200) -> Interval:
    """Spearman's rho of two scores, (N,), with its percentile bootstrap interval over the examples."""
    return _percentiles(spearman(*_drawn_pairs(first, second, repeats)))


def agreement(first: ArrayLike, second: ArrayLike, *, repeats: int = 200) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b, "kendall", of two scores, with bootstrap intervals, in `columns`."""
    pairs = _drawn_pairs(first, second, repeats)
    kendall = np.array([stats.kendalltau(*pair).statistic for pair in zip(*pairs, strict=True)])
    return columns("spearman", _percentiles(spearman(*pairs))) | columns("kendall", _percentiles(kendall))
