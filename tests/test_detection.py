from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from influence.companion.artifacts.sensitivity import fig_label_noise
from influence.companion.scores import detection


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    hit = generator.uniform(size=300) < 0.3
    score = np.round(generator.normal(size=300) + 0.8 * hit, 1)  # with ties
    return score, hit, generator.uniform(0.5, 3, size=300)


def test_points_are_those_of_scikit_learn(sample: tuple[np.ndarray, ...]) -> None:
    score, hit, weight = sample
    found = detection.detection(score, hit, weight=weight)
    assert found["auroc"] == pytest.approx(roc_auc_score(hit, score), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(hit, score, sample_weight=weight), abs=1e-12)
    plain = detection.detection(score, hit)
    assert plain["ap"] == pytest.approx(average_precision_score(hit, score), abs=1e-12)


def test_interval_is_as_wide_as_theory_says(sample: tuple[np.ndarray, ...]) -> None:
    score, hit, _ = sample
    found = detection.detection(score, hit, repeats=1000)
    a, m, n = found["auroc"], hit.sum(), (~hit).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982
    error = np.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n))
    assert found["auroc_low"] < a < found["auroc_high"]
    assert (found["auroc_high"] - found["auroc_low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_only_the_order_counts_and_infinities_are_allowed(sample: tuple[np.ndarray, ...]) -> None:
    score, hit, _ = sample
    large = np.where(score == score.max(), np.inf, np.exp(score))
    assert detection.detection(large, hit) == detection.detection(score, hit)
    with pytest.raises(ValueError, match="got 0 and 300"):
        detection.detection(score, np.zeros(300, dtype=bool))


def test_two_samples() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=400), generator.normal(0.5, size=500)
    found = detection.two_sample(a, b)
    assert found["effect"] == pytest.approx(stats.norm.cdf(0.5 / np.sqrt(2)), abs=0.05)
    assert 0.5 < found["effect_low"] < found["effect"] < found["effect_high"] and found["mw_p"] < 1e-6
    same = detection.two_sample(a, a)
    assert same["effect"] == 0.5 and same["ks"] == 0 and same["effect_low"] < 0.5 < same["effect_high"]


def test_rank_correlation_is_scipys() -> None:
    assert detection.spearman([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert detection.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 20, (2, 30, 50))
    expected = [stats.spearmanr(*pair).statistic for pair in zip(first, second, strict=True)]
    assert detection.spearman(first, second).tolist() == expected
    assert np.isnan(detection.spearman(first[0], np.zeros(50)))


def test_agreement_and_shares() -> None:
    x = np.arange(50.0)
    assert detection.agreement(x, np.exp(x))["kendall"] == pytest.approx(1)
    found = detection.agreement(x, np.where(x < 25, 0, x))
    assert found["kendall"] < found["spearman"] < 1 and found["kendall_low"] < found["kendall"] < found["kendall_high"]
    share, low, high = detection.share_interval(0, 100)
    assert share == low == 0 and high == pytest.approx(0.037, abs=1e-3)
    mean, low, high = detection.bootstrap_interval(np.random.default_rng(0).normal(2, 1, 400))
    assert low < mean < high and (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)


def test_difference_of_aurocs_is_paired() -> None:
    generator = np.random.default_rng(0)
    wrong = generator.random(400) < 0.3
    score = wrong + generator.normal(size=400)
    assert detection.auroc_difference(score, score, wrong) == (0, 0, 0)
    noisy = score + 0.3 * generator.normal(size=400)
    value, low, high = detection.auroc_difference(score, noisy, wrong)
    one, other = (detection.detection(s, wrong) for s in (score, noisy))
    assert value == pytest.approx(one["auroc"] - other["auroc"])
    assert low < value < high and high - low < one["auroc_high"] - one["auroc_low"]


def test_confident_learning_takes_the_mean_of_the_class() -> None:
    # The mean probability of label 0 is .8, that of label 1 is .3: .7 is little for a 0, .4 much for a 1.
    probs, labels = np.array([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.8, 0.2]]), np.array([0, 0, 1, 1])
    score = fig_label_noise.less_than_its_class(probs, labels)
    assert score == pytest.approx([1 - 0.9 / 1.5, 1 - 0.7 / 1.5, 1 - 0.9 / 1.5, 1 - 0.7 / 1.5])
