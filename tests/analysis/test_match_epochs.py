"""Where one recipe is as good as another, and the interval of that: by hand, by formula, by simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from fastcifar_jax.analysis.compare import Arm, CompareOptions, compare
from fastcifar_jax.analysis.match_epochs import crossing, equal_epochs, match_epochs
from tests.helpers_records import RECORD, with_changes


@pytest.mark.parametrize(
    ("xs", "samples", "target", "value"),
    [
        ([8, 10, 14], [[0.93], [0.94], [0.96]], [0.945], 11),
        ([8, 10, 14], [[0.92, 0.94], [0.94], [0.96]], [0.93, 0.94], 9),
        ([8, 10, 14], [[0.93], [0.94], [0.96]], [0.94], 10),
        ([1, 2, 3, 4], [[0.0], [2.0], [0.0], [2.0]], [1.0], 3.5),  # the last rise
        ([1, 2, 3], [[0.0], [2.0], [0.0]], [1.0], math.inf),
        ([8, 10], [[0.93], [0.94]], [0.95], math.inf),  # outside what was tried
        ([8, 10], [[0.93], [0.94]], [0.92], -math.inf),
        ([8, 10], [[0.93], [0.94]], [0.93], -math.inf),  # at the smallest
        ([8, 10], [[0.1] * 3, [0.1] * 7], [0.1] * 11, -math.inf),  # equal in spite of rounding
    ],
)
def test_crossing_by_hand(xs, samples, target, value):
    found = crossing(xs, samples, target)
    assert found.value == pytest.approx(value)
    if all(len(set(arm)) == 1 for arm in (*samples, target)):
        assert found.low == found.high == found.value


@pytest.mark.parametrize(("confidence", "half"), [(0.95, 0.1 * math.sqrt(2)), (0.6, 0.1 * math.sqrt(2)), (0.4, 0)])
def test_crossing_interval_by_hand(confidence, half):
    """Of two runs, a quarter of the resamples is the lower one twice: inside a tail of 20 %, not of 30 %.

    The square root makes up for the mean of a resample having half the variance that the mean of two runs has.
    """
    result = crossing([8, 10], [[8], [10]], [8.9, 9.1], confidence)
    assert result == pytest.approx((9, 9 - half, 9 + half))


@pytest.mark.parametrize(("end", "both"), [(1, 0), (2, 2)], ids=["low", "high"])
def test_crossing_interval_takes_order_statistics_outwards(end, both):
    """Of 100 resamples of two runs, `few` are one run twice: the tail reaches the last of them, and no further."""
    few = np.sum(np.random.default_rng(0).integers(2, size=(100, 2)).sum(1) == both)  # the target is resampled first
    for rank, outside in ((few - 0.01, True), (few + 0.01, False)):
        found = crossing([8, 10], [[8], [10]], [8.9, 9.1], confidence=1 - 2 * rank / 99, resamples=100)[end]
        assert abs(found - 9) == pytest.approx(0.1 * math.sqrt(2) * outside, abs=1e-9)


def test_crossing_interval_is_that_of_the_delta_method():
    """At 1/4 of a step, the gain has variance (1 + 9/16 + 1/16) sd^2 / n, and its slope is 1."""
    rng = np.random.default_rng(9)
    n, sd = 400, 0.5
    samples = [x + sd * rng.standard_normal(n) for x in (8, 9, 10, 11)]
    result = crossing([8, 9, 10, 11], samples, 9.25 + sd * rng.standard_normal(n), confidence=0.9)
    half = scipy.stats.norm.ppf(0.95) * sd * math.sqrt((1 + 10 / 16) / n)
    assert (result.value - result.low, result.high - result.value) == pytest.approx((half, half), rel=0.15)
    assert result.value == pytest.approx(9.25, abs=2 * half)


def test_crossing_interval_may_end_outside():
    result = crossing([8, 10, 12], [[0.90, 0.94], [0.93, 0.94], [0.93, 0.95]], [0.93, 0.94])
    assert (result.low, result.value, result.high) == (-math.inf, 10, math.inf)


def test_crossing_repeats_with_its_seed():
    rng = np.random.default_rng(10)
    repeat = lambda seed: crossing([8, 9, 10], samples, target, seed=seed)
    samples, target = [x + 0.2 * rng.standard_normal(10) for x in (8, 9, 10)], 9.3 + 0.2 * rng.standard_normal(10)
    assert repeat(1) == repeat(1) != repeat(2)
    assert crossing([8, 9, 10], samples, target) == crossing([8, 9, 10], samples, target, 0.95, resamples=2000, seed=0)


@pytest.mark.parametrize(
    ("experiments", "n", "least", "most"),
    [
        (150, 5, 0.86, 0.96),
        pytest.param(500, 5, 0.87, 0.95, marks=pytest.mark.slow),
        pytest.param(500, 20, 0.92, 0.97, marks=pytest.mark.slow),
    ],
)
def test_crossing_interval_covers(experiments, n, least, most):
    """Nearly as often as it says at 20 runs per arm, less at five, as its docstring admits."""
    rng = np.random.default_rng((11, n))
    found = []
    for _ in range(experiments):
        samples = [x + 0.5 * rng.standard_normal(n) for x in (8, 9, 10, 11)]
        found.append(crossing([8, 9, 10, 11], samples, 9.3 + 0.5 * rng.standard_normal(n), resamples=200))
    assert least <= np.mean([result.low <= 9.3 <= result.high for result in found]) <= most


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossing([2, 1], [[1, 2], [1, 2]], [1]), r"xs \[2, 1\] for 2 samples; .* increasing xs"),
        (lambda: crossing([1, 2], [[1]], [1]), r"xs \[1, 2\] for 1 samples; give one sample per x"),
        (lambda: crossing([1], [[1]], [1]), "xs: 1 values, expected .* at least 2"),
        (lambda: crossing([1, 2], [[1], []], [1]), r"samples\[1\]: 0 values"),
        (lambda: crossing([1, 2], [[1, 2], [1, 2]], []), "target: 0 values"),
        (lambda: crossing([1, 2], [[1, 2], [1, 2]], [1], resamples=9), "resamples is 9; the tails need at least 100"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def make_arm(values, num_epochs):
    recipe, results = (
        {**RECORD.recipe, "num_epochs": num_epochs},
        ({**RECORD.result, "tta_accuracy": x} for x in values),
    )
    records = (with_changes(RECORD, recipe=recipe, seed=seed, result=result) for seed, result in enumerate(results))
    return Arm(f"{num_epochs} epochs", tuple(records))


def test_match_epochs_requests_arms_until_one_is_no_better():
    requested, base = [], make_arm((0.94, 0.941), 9)

    def arms():
        for num_epochs, value in ((8, 0.95), (7, 0.945), (6, 0.935), (5, 0.93)):
            requested.append(num_epochs)
            yield make_arm((value, value + 0.001), num_epochs)

    first, *_, last = match_epochs(base, arms(), CompareOptions())
    assert requested == [8, 7, 6] == [arm["num_epochs"] for arm in last["arms"][1:]]
    assert last == compare([base, *list(arms())[:3]], CompareOptions())
    percent = [[93.5, 93.6], [94.5, 94.6], [95.0, 95.1]], [94.0, 94.1]
    assert equal_epochs(last) == pytest.approx(crossing([6, 7, 8], *percent))
    assert equal_epochs(last).value == pytest.approx(6.5) and equal_epochs(first) is None
