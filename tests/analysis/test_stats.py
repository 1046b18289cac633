import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fastcifar_jax.analysis.stats import (
    MOST_RUNS,
    confidence_at_look,
    crossing,
    holm,
    paired,
    pairing_helps,
    power_of,
    runs_needed,
    summarize,
    tost,
    welch,
)

A = (0.9391, 0.9404, 0.9398, 0.9412, 0.9385)
B = (0.9415, 0.9409, 0.9422, 0.9401, 0.9430, 0.9418, 0.9437)
EXPERIMENTS = 2000


def draws(seed, n, sd_a=1.0, sd_b=1.0, difference=0.0, experiments=EXPERIMENTS):
    """Pairs of arms of `n` runs: normal, as accuracies over seeds nearly are."""
    rng = np.random.default_rng(seed)
    a = sd_a * rng.standard_normal((experiments, n))
    return zip(a, difference + sd_b * rng.standard_normal((experiments, n)), strict=True)


def share_of(outcomes):
    outcomes = list(outcomes)
    return sum(outcomes) / len(outcomes)


# One arm


def test_summary_by_hand():
    summary = summarize([3.0, 1.0, 2.0], threshold=2.0)
    assert summary[:3] == (3, 2.0, 1.0)
    assert summary.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom
    assert summary.low + summary.high == pytest.approx(4)
    assert summary.share == pytest.approx(2 / 3)  # a run at the threshold counts


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_summary_is_scipys_t_interval(confidence):
    summary = summarize(B, confidence=confidence)
    expected = scipy_stats.t.interval(confidence, len(B) - 1, np.mean(B), scipy_stats.sem(B))
    assert (summary.low, summary.high) == pytest.approx(expected, rel=1e-12)
    assert summary.sd == pytest.approx(np.std(B, ddof=1), rel=1e-12)
    assert summary.share is None


def test_one_run_has_no_spread():
    summary = summarize([0.94], threshold=0.94)
    assert (summary.n, summary.mean, summary.share) == (1, 0.94, 1.0)
    assert all(math.isnan(x) for x in (summary.sd, summary.low, summary.high))


def test_equal_runs_have_exactly_no_spread():
    assert np.var([0.1] * 3, ddof=1) > 0  # what a plain sum makes of them
    assert summarize([0.1] * 3)[1:5] == (0.1, 0.0, 0.1, 0.1)


# Two arms


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("arms", [(A, B), (B, A), (A, A[:2])], ids=["a b", "b a", "two runs"])
def test_welch_is_scipys(arms, confidence):
    a, b = arms
    result, expected = welch(a, b, confidence), scipy_stats.ttest_ind(b, a, equal_var=False)
    assert result.estimate == pytest.approx(np.mean(b) - np.mean(a), rel=1e-9)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(confidence)), rel=1e-9)
    assert (result.p_value, result.df) == pytest.approx((expected.pvalue, expected.df), rel=1e-9)


def test_the_difference_is_b_minus_a():
    assert welch(A, B).estimate > 0 and welch(A, B).hedges_g > 0
    assert paired(A, B[:5]).estimate > 0
    assert welch(B, A).estimate < 0 and welch(B, A).hedges_g < 0


@pytest.mark.parametrize(
    ("a", "b", "g"),
    [
        ((0, 2), (3, 5), 3 / math.sqrt(2) / math.sqrt(math.pi)),  # Gamma(1) / Gamma(1/2)
        ((0, 1, 2), (2, 3, 4), 2 * math.sqrt(2 / math.pi)),  # Gamma(2) / (sqrt(2) Gamma(3/2))
        ((0, 2), (1, 3, 5, 1), 1.5 / math.sqrt((2 + 11) / 4) * math.sqrt(2 / math.pi)),  # unequal n and variance
    ],
)
def test_hedges_g_by_hand(a, b, g):
    assert welch(a, b).hedges_g == pytest.approx(g, rel=1e-12)


def test_hedges_g_has_no_bias():
    """Hedges' factor is the one that makes g unbiased; Cohen's d of three runs an arm is 25 % too large."""
    g = [welch(a, b).hedges_g for a, b in draws(1, 3, difference=2.0, experiments=8000)]
    assert np.mean(g) == pytest.approx(2, abs=4 * np.std(g) / math.sqrt(len(g)))
    assert 4 * np.std(g) / math.sqrt(len(g)) < 0.1


@pytest.mark.parametrize(("b", "p_value", "g"), [(0.94, 1.0, 0.0), (0.95, 0.0, math.inf), (0.93, 0.0, -math.inf)])
def test_constant_arms(b, p_value, g):
    result = welch([0.94] * 3, [b] * 4)
    assert result.low == result.estimate == result.high == b - 0.94
    assert (result.p_value, result.hedges_g) == (p_value, g)
    assert math.isnan(result.df)


def test_one_constant_arm_has_the_other_arms_degrees_of_freedom():
    result = welch([0.94] * 9, B)
    assert result.df == pytest.approx(len(B) - 1)
    assert (result.low, result.high) == pytest.approx(tuple(x - 0.94 for x in summarize(B)[3:5]), rel=1e-9)


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("sds", [(1, 1), (1, 3)], ids=["equal sds", "unequal sds"])
def test_intervals_cover_as_often_as_they_say(n, sds):
    arms = list(draws((2, n), n, *sds, difference=0.5))
    differences = (welch(a, b) for a, b in arms)
    assert 0.93 <= share_of(d.low <= 0.5 <= d.high for d in differences) <= 0.97
    summaries = (summarize(b) for _, b in arms)
    assert 0.93 <= share_of(s.low <= 0.5 <= s.high for s in summaries) <= 0.97


# Pairs


@pytest.mark.parametrize("n", [3, 5])
def test_paired_is_scipys(n):
    a, b = A[:n], B[:n]
    result, expected = paired(a, b, 0.9), scipy_stats.ttest_rel(b, a)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-9)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.correlation == pytest.approx(scipy_stats.pearsonr(a, b).statistic, rel=1e-9)
    assert (result.n, result.estimate) == (n, pytest.approx(np.mean(b) - np.mean(a), rel=1e-9))


def test_pairs_without_spread():
    same = paired(A, A)
    assert (same.estimate, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert same.correlation == pytest.approx(1)
    for constant in (paired(A, [0.94] * 5), paired([0.94] * 5, A)):
        assert math.isnan(constant.correlation)
        assert constant.low < constant.high


@pytest.mark.parametrize(("shared", "least", "most"), [(3.0, 0.9, 1.0), (0.0, 0.0, 0.5)])
def test_pairing_helps_where_the_seed_is_shared(shared, least, most):
    """Of four runs an arm: noise of the seed makes it help nearly always; without, lost degrees of freedom cost."""
    rng = np.random.default_rng(3)
    helped, covered = [], []
    for a, b in draws(4, 4):
        seeds = shared * rng.standard_normal(4)
        pairs = paired(a + seeds, b + seeds)
        helped.append(pairing_helps(welch(a + seeds, b + seeds), pairs))
        covered.append(pairs.low <= 0 <= pairs.high)
    assert least <= share_of(helped) <= most
    assert 0.93 <= share_of(covered) <= 0.97


# Equivalence


@pytest.mark.parametrize("margin", [0.001, 0.003, 0.01])
@pytest.mark.parametrize("arms", [(A, B), (B, A)], ids=["b better", "a better"])
def test_tost_is_two_one_sided_tests(arms, margin):
    a, b = np.array(arms[0]), np.array(arms[1])
    above = scipy_stats.ttest_ind(b + margin, a, equal_var=False, alternative="greater")
    below = scipy_stats.ttest_ind(b - margin, a, equal_var=False, alternative="less")
    result = tost(a, b, margin)
    assert result.p_value == pytest.approx(max(above.pvalue, below.pvalue), rel=1e-6)
    ninety = welch(a, b, 0.9)
    assert result.equivalent == (-margin < ninety.low and ninety.high < margin)
    assert result.margin == margin


def test_tost_of_constant_arms():
    assert tost([0.94] * 2, [0.95] * 2, 0.02) == (0.02, 0.0, True)
    assert tost([0.94] * 2, [0.95] * 2, 0.005) == (0.005, 1.0, False)


def test_tost_errs_as_often_as_it_says():
    """At a difference of exactly the margin, 5 % are called equivalent."""
    assert 0.035 <= share_of(tost(a, b, 3.0).equivalent for a, b in draws(5, 8, 1, 2, difference=3.0)) <= 0.065


# How many runs


@pytest.mark.parametrize(
    ("d", "power", "runs"),
    [(0.2, 0.8, 394), (0.5, 0.8, 64), (0.8, 0.8, 26), (0.5, 0.95, 105)],  # Cohen 1988, table 2.4.1, and G*Power 3.1
)
def test_runs_needed_is_the_textbooks(d, power, runs):
    assert runs_needed(1, 1, d, power) == runs


@pytest.mark.parametrize(
    ("sd", "difference", "normal", "runs"),
    [(0.13, 0.1, 27, 28), (0.15, 0.1, 36, 37), (0.13, 0.05, 107, 108)],
)
def test_runs_needed_for_accuracies_in_percent(sd, difference, normal, runs):
    """One more than the normal approximation, which does not know that the sds are estimated."""
    z = scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)
    assert math.ceil(2 * (z * sd / difference) ** 2) == normal
    assert runs_needed(sd, sd, difference) == runs
    assert runs_needed(sd / 100, sd / 100, -difference / 100) == runs  # as fractions; the sign is no matter


def test_runs_needed_is_the_least():
    runs = runs_needed(0.1, 0.3, 0.2, power=0.9, confidence=0.99)
    assert power_of(0.1, 0.3, runs - 1, runs - 1, 0.2, 0.99) < 0.9 <= power_of(0.1, 0.3, runs, runs, 0.2, 0.99)


def test_runs_needed_has_an_end():
    assert runs_needed(1, 1, 1e-12) == MOST_RUNS == 2**40
    assert runs_needed(0, 0, 1e-12) == 2


@pytest.mark.parametrize("n", [2, 5, 30, 1000])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.8, 5.0])
def test_power_is_the_noncentral_t(n, shift):
    df, critical = 2 * n - 2, scipy_stats.t.ppf(0.975, 2 * n - 2)
    expected = scipy_stats.nct.sf(critical, df, shift) + scipy_stats.nct.cdf(-critical, df, shift)
    assert power_of(1, 1, n, n, shift * math.sqrt(2 / n)) == pytest.approx(expected, abs=1e-6)


def test_power_where_scipys_noncentral_t_gives_up():
    assert power_of(0.13, 0.13, 20, 20, 50) == 1.0
    assert power_of(0, 0, 2, 2, 0.1) == 1.0
    assert power_of(0, 0, 2, 2, 0) == 0.0


@pytest.mark.parametrize(("n", "sds", "difference"), [(28, (0.13, 0.13), 0.1), (20, (0.1, 0.3), 0.2)])
def test_power_by_simulation(n, sds, difference):
    found = share_of(welch(a, b).p_value <= 0.05 for a, b in draws((6, n), n, *sds, difference))
    assert found == pytest.approx(power_of(*sds, n, n, difference), abs=0.03)
    assert 0.75 < found < 0.85


# Several comparisons


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))  # 3, 2 and 4 times; 0.04 kept up
    assert holm([0.7, 0.6]) == (1.0, 1.0)
    assert holm([0.02]) == (0.02,)
    assert holm([]) == ()


# Looks


def at_the_stop(a, b, confidence, done):
    """The interval at which one who looks after every two runs, from four on, stops."""
    for look, n in enumerate(range(4, len(a) + 1, 2), start=1):
        result = welch(a[:n], b[:n], confidence(look))
        if done(result):
            break
    return result


def plain(look):
    return 0.95


def test_the_spent_errors_sum_to_alpha():
    spent = [1 - confidence_at_look(look) for look in range(1, 2000)]
    assert spent[:3] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert 0.05 * 0.999 < sum(spent) < 0.05
    assert confidence_at_look(1, 0.9) == pytest.approx(0.95)


def test_what_ten_looks_cost():
    """The figures in the docstring."""
    wider = scipy_stats.norm.isf((1 - confidence_at_look(10)) / 2) / scipy_stats.norm.isf(0.025)
    assert (round(wider, 1), round(wider**2, 1)) == (1.8, 3.2)


def test_stopping_when_zero_is_excluded():
    """Without any difference, up to 29 looks: a plain interval finds one far too often, ours does not."""
    excludes = lambda result: result.low > 0 or result.high < 0
    arms = list(draws(7, 60, experiments=1000))
    assert share_of(excludes(at_the_stop(a, b, plain, excludes)) for a, b in arms) > 0.10
    assert share_of(excludes(at_the_stop(a, b, confidence_at_look, excludes)) for a, b in arms) <= 0.05


@pytest.mark.parametrize("sds", [(1, 1), (0.5, 1.5)], ids=["equal sds", "unequal sds"])
def test_stopping_at_a_half_width(sds):
    narrow = lambda result: (result.high - result.low) / 2 <= 1.2
    arms = list(draws(8, 60, *sds, difference=0.5, experiments=1000))

    def coverage(confidence):
        results = [at_the_stop(a, b, confidence, narrow) for a, b in arms]
        assert all(narrow(result) for result in results)  # 60 runs are enough
        return share_of(result.low <= 0.5 <= result.high for result in results)

    assert coverage(plain) < 0.95 <= coverage(confidence_at_look)


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarize([]), "values: 0 values, expected a flat list of at least 1"),
        (lambda: summarize([[0.9, 0.9]]), "flat list"),
        (lambda: summarize([0.9, math.nan]), "nan.* not all finite; report runs that diverged"),
        (lambda: summarize([0.9], confidence=95), "confidence is 95; give a probability"),
        (lambda: welch([0.9], B), "arm a: 1 values, expected .* at least 2"),
        (lambda: welch(A, [0.9]), "arm b: 1 values, expected .* at least 2"),
        (lambda: welch(A, B, 0), "confidence is 0"),
        (lambda: paired(A[:2], B[:2]), "arm a: 2 values, expected .* at least 3"),
        (lambda: paired(A, B), "arm a has 5 runs and arm b 7; pairs need one of each"),
        (lambda: tost(A, B, 0), "margin is 0; give the difference"),
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
        (lambda: crossing([2, 1], [A, A], B), r"xs \[2, 1\] for 2 samples; .* let xs increase"),
        (lambda: crossing([1, 2], [A], B), r"xs \[1, 2\] for 1 samples; give a sample for each"),
        (lambda: crossing([1], [A], B), "xs: 1 values, expected .* at least 2"),
        (lambda: crossing([1, 2], [A, []], B), r"samples\[1\]: 0 values"),
        (lambda: crossing([1, 2], [A, A], []), "target: 0 values"),
        (lambda: crossing([1, 2], [A, A], B, resamples=9), "resamples is 9; give at least 100"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
