from __future__ import annotations

import numpy as np
import pytest

from influence.companion.scores import evaluation


def test_calibration_error_by_hand() -> None:
    # bin (0.8, 0.867]: two images, confidence 0.85, one right; bin (0.933, 1]: two at 0.95, both right
    error = evaluation.expected_calibration_error([0.85, 0.85, 0.95, 0.95], [True, False, True, True])
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.05, rel=1e-12)
    assert evaluation.expected_calibration_error([1.0, 1.0], [True, True]) == 0


def test_calibrated_predictions_have_almost_none() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.1, 1, 200_000)
    assert evaluation.expected_calibration_error(confidence, generator.uniform(size=200_000) < confidence) < 0.01
    assert evaluation.expected_calibration_error(confidence, generator.uniform(size=200_000) < 0.9 * confidence) > 0.04


def test_mean_interval_by_hand_and_its_coverage() -> None:
    mean, low, high = evaluation.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(2 - low) == pytest.approx(4.302652729911275 / 3**0.5)
    draws = np.random.default_rng(0).normal(5, 2, (2000, 4))
    covered = np.mean([low <= 5 <= high for _, low, high in map(evaluation.mean_interval, draws)])
    assert abs(covered - 0.95) < 0.02
    assert evaluation.mean_interval([0.5]) == (0.5, -np.inf, np.inf)


@pytest.mark.parametrize("arguments", [([], []), ([0.5], [True, False]), ([[0.5]], [[True]])])
def test_calibration_error_refuses_what_does_not_match(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="two vectors of one length"):
        evaluation.expected_calibration_error(*arguments)
