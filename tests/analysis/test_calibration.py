"""Accuracy, loss and calibration error of logits."""

import math

import numpy as np
import pytest

from fastcifar_jax.analysis.calibration import calibration_error, measure


def test_measures_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]) + 5
    found = measure(logits, np.array([0, 2, 2]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3)
    assert found["calibration error"] == pytest.approx((0.3 + 0.6 + 0.6) / 3)  # each in a bin of its own


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_against_a_loop(bins):
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(size=200), np.arange(bins + 1) / bins])  # the edges too
    correct = rng.uniform(size=len(confidence)) < 0.6
    expected = 0.0
    for m in range(1, bins + 1):
        # At 0 exactly, which no softmax gives, the first bin is closed.
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins) | ((m == 1) & (confidence == 0))
        if inside.any():
            expected += inside.sum() / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected)


def test_perfect_calibration_is_zero():
    assert calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == 0
