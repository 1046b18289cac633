"""The statistics against SciPy, formulas and textbooks."""

import math

import numpy as np
import pytest
import scipy.stats

from fastcifar_jax.analysis.stats import (
    MOST_RUNS,
    confidence_at_look,
    holm,
    paired,
    power_of,
    runs_needed,
    summarize,
    tost,
    welch,
)

A = (0.9391, 0.9404, 0.9398, 0.9412, 0.9385)
B = (0.9415, 0.9409, 0.9422, 0.9401, 0.9430, 0.9418, 0.9437)


def error_of(a, b):
    """Standard error of the difference and its degrees of freedom, as Welch and Satterthwaite write them."""
    u, v = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    return math.sqrt(u + v), (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_summary_by_formula(confidence):
    summary = summarize(B, confidence)
    expected = scipy.stats.t.interval(confidence, len(B) - 1, np.mean(B), scipy.stats.sem(B))
    assert (summary.low, summary.high) == pytest.approx(expected, rel=1e-12)
    assert summary[:3] == (7, pytest.approx(np.mean(B)), pytest.approx(np.std(B, ddof=1), rel=1e-12))
    assert summarize([3.0, 1.0, 2.0]).high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # Student's table


def test_runs_without_spread():
    assert summarize([0.94])[:2] == (1, 0.94)
    assert all(math.isnan(x) for x in summarize([0.94])[2:])
    assert np.var([0.1] * 3, ddof=1) > 0  # because of rounding
    assert summarize([0.1] * 3) == (3, 0.1, 0.0, 0.1, 0.1)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("arms", [(A, B), (B, A), (A, A[:2])], ids=["a b", "b a", "two runs"])
def test_welch_and_tost_by_formula(arms, confidence):
    result, estimate, (error, df) = welch(*arms, confidence), np.mean(arms[1]) - np.mean(arms[0]), error_of(*arms)
    assert (result.estimate, result.df) == pytest.approx((estimate, df), rel=1e-9)
    half = scipy.stats.t.isf((1 - confidence) / 2, df) * error
    assert (result.low, result.high) == pytest.approx((estimate - half, estimate + half), rel=1e-9)
    assert result.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(estimate) / error, df), rel=1e-9)
    for margin in (0.001, 0.003, 0.01):
        found, ninety = tost(*arms, margin), welch(*arms, 0.9)
        assert found.p_value == pytest.approx(scipy.stats.t.sf((margin - abs(estimate)) / error, df), rel=1e-6)
        assert found[::2] == (margin, -margin < ninety.low and ninety.high < margin)


@pytest.mark.parametrize(
    ("a", "b", "g"),
    [
        ((0, 2), (3, 5), 3 / math.sqrt(2) / math.sqrt(math.pi)),  # Gamma(1) / Gamma(1/2)
        ((2, 3, 4), (0, 1, 2), -2 * math.sqrt(2 / math.pi)),  # Gamma(2) / (sqrt(2) Gamma(3/2))
        ((0, 2), (1, 3, 5, 1), 1.5 / math.sqrt((2 + 11) / 4) * math.sqrt(2 / math.pi)),  # unequal n and variance
    ],
)
def test_hedges_g_by_hand(a, b, g):
    assert welch(a, b).hedges_g == pytest.approx(g, rel=1e-12)


@pytest.mark.parametrize(("b", "p_value", "g"), [(0.94, 1.0, 0.0), (0.95, 0.0, math.inf), (0.93, 0.0, -math.inf)])
def test_constant_arms(b, p_value, g):
    result = welch([0.94] * 3, [b] * 4)
    assert result.low == result.estimate == result.high == b - 0.94
    assert (result.p_value, result.hedges_g) == (p_value, g)
    assert math.isnan(result.df)
    assert tost([0.94] * 3, [b] * 4, 0.02) == (0.02, 0.0, True)
    assert tost([0.94] * 3, [b] * 4, 0.005) == ((0.005, 0.0, True) if b == 0.94 else (0.005, 1.0, False))


def test_one_constant_arm_has_the_other_arms_degrees_of_freedom():
    result = welch([0.1] * 3, B)
    assert result.df == pytest.approx(len(B) - 1)
    assert (result.low, result.high) == pytest.approx(tuple(x - 0.1 for x in summarize(B)[3:]), rel=1e-9)


@pytest.mark.parametrize("n", [3, 5])
def test_paired_by_formula(n):
    a, b = A[:n], B[:n]
    result, differences = paired(a, b, 0.9), np.subtract(b, a)
    expected = scipy.stats.t.interval(0.9, n - 1, differences.mean(), scipy.stats.sem(differences))
    assert (result.low, result.high) == pytest.approx(expected, rel=1e-9)
    assert (result.n, result.estimate) == (n, pytest.approx(np.mean(b) - np.mean(a), rel=1e-9))
    assert result.p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)
    assert result.correlation == pytest.approx(scipy.stats.pearsonr(a, b).statistic, rel=1e-9)


def test_pairs_without_spread():
    assert paired(A, A) == (5, pytest.approx(1), 0, 0, 0, 1)
    shifted = paired([0.5, 1.0, 2.0], [1.0, 1.5, 2.5])
    assert (shifted.low, shifted.high, shifted.p_value) == (0.5, 0.5, 0)
    for constant in (paired(A, [0.94] * 5), paired([0.94] * 5, A)):
        assert math.isnan(constant.correlation)
        assert constant.low < constant.high


@pytest.mark.parametrize(
    ("sd", "difference", "power", "runs"),
    [
        (1, 0.2, 0.8, 394), (1, 0.5, 0.8, 64), (1, 0.8, 0.8, 26), (1, 0.5, 0.95, 105),  # Cohen 1988 and G*Power 3.1
        # Accuracies in percent and as fractions; one more than the normal approximation, where sds are not estimated.
        (0.13, 0.1, 0.8, 28), (0.15, 0.1, 0.8, 37), (0.13, 0.05, 0.8, 108), (0.0013, -0.001, 0.8, 28),
        (1, 1e-12, 0.8, MOST_RUNS), (0, 1e-12, 0.8, 2),
    ],
)  # fmt: skip
def test_runs_needed(sd, difference, power, runs):
    assert runs_needed(sd, sd, difference, power) == runs


def test_runs_needed_is_the_least():
    runs = runs_needed(0.1, 0.3, 0.2, power=0.9, confidence=0.99)
    assert power_of(0.1, 0.3, runs - 1, runs - 1, 0.2, 0.99) < 0.9 <= power_of(0.1, 0.3, runs, runs, 0.2, 0.99)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.8, 5.0])
@pytest.mark.parametrize(("n", "sd_b"), [(2, 1), (5, 1), (30, 1), (1000, 1), (5, 3), (30, 3)])
def test_power_is_the_noncentral_t(n, sd_b, shift):
    df = (n - 1) * (1 + sd_b**2) ** 2 / (1 + sd_b**4)
    critical = scipy.stats.t.ppf(0.975, df)
    expected = scipy.stats.nct.sf(critical, df, shift) + scipy.stats.nct.cdf(-critical, df, shift)
    assert power_of(1, sd_b, n, n, shift * math.sqrt((1 + sd_b**2) / n)) == pytest.approx(expected, abs=1e-6)
    # Where SciPy's noncentral t gives up.
    assert power_of(0.13, 0.13, 20, 20, 50) == power_of(0, 0, 2, 2, 0.1) == 1.0 and power_of(0, 0, 2, 2, 0) == 0.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))  # times 3, 2 and 4; 0.04 raised
    assert [holm(p_values) for p_values in ([0.7, 0.6], [0.02], [])] == [(1.0, 1.0), (0.02,), ()]


def test_confidence_at_look():
    spent = [1 - confidence_at_look(look) for look in range(1, 2000)]
    assert spent[:3] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert 0.05 * 0.999 < sum(spent) < 0.05
    assert confidence_at_look(1, 0.9) == pytest.approx(0.95)
    wider = scipy.stats.norm.isf(spent[9] / 2) / scipy.stats.norm.isf(0.025)
    assert (round(wider, 1), round(wider**2, 1)) == (1.8, 3.2)  # as the docstring says


@pytest.mark.parametrize("sd_b", [1, 3])
@pytest.mark.parametrize(
    ("difference", "done", "plain_covers"),
    [
        (0.0, lambda low, high: (low > 0) | (high < 0), 0.90),  # a difference where there is none
        (0.5, lambda low, high: high - low <= 2.4, 0.95),
    ],
    ids=["zero is excluded", "narrow"],
)
def test_intervals_after_optional_stopping(sd_b, difference, done, plain_covers):
    """Looks after every two runs, from four on: a plain interval covers too rarely, ours does not."""
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((1000, 60)), difference + sd_b * rng.standard_normal((1000, 60))

    def coverage(confidence):
        low, high, ongoing = np.zeros(1000), np.zeros(1000), np.ones(1000, bool)
        for look, n in enumerate(range(4, 61, 2), start=1):
            test = scipy.stats.ttest_ind(b[ongoing, :n], a[ongoing, :n], axis=1, equal_var=False)
            low[ongoing], high[ongoing] = test.confidence_interval(confidence(look))
            ongoing &= ~done(low, high)
            if not ongoing.any():
                break
        return np.mean((low <= difference) & (difference <= high))

    assert coverage(lambda look: 0.95) < plain_covers
    assert coverage(confidence_at_look) >= 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarize([]), "values: 0 values, expected a flat list of at least 1"),
        (lambda: summarize([[0.9, 0.9]]), "flat list"),
        (lambda: summarize([0.9, math.nan]), "nan.* not all finite; report diverged runs separately"),
        (lambda: summarize([0.9], confidence=95), "confidence is 95; give a probability"),
        (lambda: welch([0.9], B), "arm a: 1 values, expected .* at least 2"),
        (lambda: welch(A, [0.9]), "arm b: 1 values, expected .* at least 2"),
        (lambda: welch(A, B, 0), "confidence is 0"),
        (lambda: paired(A[:2], B[:2]), "arm a: 2 values, expected .* at least 3"),
        (lambda: paired(A, B), "arm a has 5 runs and arm b 7; pairs need one of each"),
        (lambda: tost(A, B, 0), "margin is 0; give the smallest difference that matters"),
        (lambda: tost(A, B, math.nan), "margin is nan"),
        (lambda: tost(A, B, 0.1, 1), "confidence is 1"),
        (lambda: power_of(-1, 1, 5, 5, 1), "standard deviations -1, 1 and difference 1 must be"),
        (lambda: power_of(1, math.nan, 5, 5, 1), "standard deviations 1, nan"),
        (lambda: power_of(1, 1, 5, 5, math.inf), "difference inf"),
        (lambda: power_of(1, 1, 5, 1, 1), "5 and 1 runs; .* at least two"),
        (lambda: power_of(1, 1, 5, 5, 1, 1.5), "confidence is 1.5"),
        (lambda: runs_needed(1, 1, 0), "difference is 0, which no number of runs finds"),
        (lambda: runs_needed(1, 1, 1, power=80), "power is 80; give a probability"),
        (lambda: runs_needed(1, 1, 1, power=1), "power is 1; give a probability"),
        (lambda: runs_needed(1, 1, 1, power=0), "power is 0; give a probability"),
        (lambda: holm([0.5, 1.5]), "p-value 1.5 is not between"),
        (lambda: holm([math.nan]), "p-value nan"),
        (lambda: confidence_at_look(0), "look is 0; count the looks"),
        (lambda: confidence_at_look(1.5), "look is 1.5"),
        (lambda: confidence_at_look(1, 95), "confidence is 95"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
