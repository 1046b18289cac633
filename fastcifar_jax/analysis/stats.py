"""Statistics of a few noisy runs: intervals, comparisons of two recipes, and how many runs are needed.

A value is the result of one run, a plain float in the caller's unit. Of two arms, `a` is the baseline and `b` is
compared with it; every difference is b minus a. `confidence` is that of an interval, and 1 minus the level of a test.
All raise ValueError for a confidence outside 0..1, a value that is not finite, and too few runs: `summarize` needs one,
`welch`, `tost` and `power_of` two per arm, `paired` three pairs.
"""

import bisect
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from scipy import special

Floats = Sequence[float]
MOST_RUNS = 2**40  # per arm; `runs_needed` does not search further


class Summary(NamedTuple):
    """Number of runs, their mean and sample standard deviation, and the interval of the mean."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of b minus mean of a, its interval, two-sided p-value, degrees of freedom, and Hedges' g."""

    estimate: float
    low: float
    high: float
    p_value: float
    df: float
    hedges_g: float


class Paired(NamedTuple):
    """Number of pairs, correlation (NaN if an arm is constant), mean of b minus a, its interval, two-sided p-value."""

    n: int
    correlation: float
    estimate: float
    low: float
    high: float
    p_value: float


class Equivalence(NamedTuple):
    """The margin, the larger p-value of the two one-sided tests, and whether both reject."""

    margin: float
    p_value: float
    equivalent: bool


def summarize(values: Floats, confidence: float = 0.95) -> Summary:
    """The mean of one arm's runs with its t interval (Student 1908).

    For a single run `sd`, `low` and `high` are NaN, since one run does not show the spread.

    Example:
      >>> found = summarize([94.1, 94.2, 93.9, 94.0])
      >>> found.n, round(found.mean, 2), round(found.low, 2), round(found.high, 2)
      (4, 94.05, 93.84, 94.26)
    """
    sample, _ = as_sample(values, 1, "values"), alpha_of(confidence)
    mean, sd = float(mean_of(sample)), _sd(sample)
    low = high = mean + sd  # NaN for a single run, the mean for equal runs
    if sd > 0:
        low, high = map(float, _quietly(scipy.stats.ttest_1samp, sample, 0).confidence_interval(confidence))
    return Summary(sample.size, mean, sd, low, high)


def welch(a: Floats, b: Floats, confidence: float = 0.95) -> Difference:
    """The difference b minus a without the assumption of equal variances (Welch 1947, Satterthwaite 1946).

    Hedges' g is the difference over the pooled standard deviation, times the exact small-sample factor (Hedges
    1981). Where both arms are constant the interval has width 0, p is 0 or 1, `df` is NaN and g is 0 or infinite.

    Example:
      >>> found = welch([94.1, 94.2, 93.9, 94.0], [94.3, 94.5, 94.2, 94.4])
      >>> round(found.estimate, 2), round(found.low, 2), round(found.high, 2), round(found.p_value, 3)
      (0.3, 0.08, 0.52, 0.017)
    """
    first, second, _ = as_sample(a, 2, "arm a"), as_sample(b, 2, "arm b"), alpha_of(confidence)
    estimate, m = float(mean_of(second) - mean_of(first)), first.size + second.size - 2
    sd = math.sqrt(((first.size - 1) * _sd(first) ** 2 + (second.size - 1) * _sd(second) ** 2) / m)
    if sd == 0:
        g = math.copysign(math.inf, estimate) if estimate else 0.0
        return Difference(estimate, estimate, estimate, float(estimate == 0), math.nan, g)
    test = _quietly(scipy.stats.ttest_ind, second, first, equal_var=False)
    low, high = test.confidence_interval(confidence)
    factor = math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)
    return Difference(estimate, float(low), float(high), float(test.pvalue), float(test.df), factor * estimate / sd)


def paired(a: Floats, b: Floats, confidence: float = 0.95) -> Paired:
    """The difference b minus a of runs of the same seeds in the same order (Student 1908).

    Raises:
      ValueError: arms of different lengths.
    """
    first, second = as_sample(a, 3, "arm a"), as_sample(b, 3, "arm b")
    if first.size != second.size:
        raise ValueError(f"arm a has {first.size} runs and arm b {second.size}; pairs need one of each for every seed")
    n, estimate, sd, low, high = summarize(second - first, confidence)
    p_value = float(_quietly(scipy.stats.ttest_rel, second, first).pvalue) if sd > 0 else float(estimate == 0)
    constant = _sd(first) == 0 or _sd(second) == 0
    return Paired(n, math.nan if constant else float(np.corrcoef(first, second)[0, 1]), estimate, low, high, p_value)


def tost(a: Floats, b: Floats, margin: float, confidence: float = 0.95) -> Equivalence:
    """Whether b is within `margin` of a: two one-sided Welch tests, each at level 1 - confidence (Schuirmann 1987).

    That is, whether Welch's interval of confidence 1 - 2 * (1 - confidence), 90 % by default, lies between -margin and
    margin. The margin is the smallest difference that matters, chosen before the runs are seen. "Not equivalent" is
    not evidence of a difference.

    Raises:
      ValueError: a margin that is not above 0.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; give the smallest difference that matters, above 0")
    first, second, alpha = as_sample(a, 2, "arm a"), as_sample(b, 2, "arm b"), alpha_of(confidence)
    if _sd(first) == _sd(second) == 0:
        p_value = float(abs(second[0] - first[0]) >= margin)
    else:
        sides = ((second + margin, "greater"), (second - margin, "less"))
        tests = (_quietly(scipy.stats.ttest_ind, x, first, equal_var=False, alternative=side) for x, side in sides)
        p_value = max(float(test.pvalue) for test in tests)
    return Equivalence(margin, p_value, p_value < alpha)


def power_of(sd_a: float, sd_b: float, n_a: int, n_b: int, difference: float, confidence: float = 0.95) -> float:
    """The probability that the two-sided Welch test finds a true difference, by the noncentral t distribution.

    The degrees of freedom are those of the true standard deviations. The test has to estimate them, which costs power
    for very few runs: for two equal arms, 68 % instead of 78 % at three runs each, 78 % instead of 80 % at five.

    Raises:
      ValueError: a standard deviation below 0.
    """
    if not (0 <= sd_a < math.inf and 0 <= sd_b < math.inf and math.isfinite(difference)):
        raise ValueError(f"standard deviations {sd_a}, {sd_b} and difference {difference} must be finite, the sds >= 0")
    if min(n_a, n_b) < 2:
        raise ValueError(f"{n_a} and {n_b} runs; a test needs at least two in each arm")
    alpha, square = alpha_of(confidence), sd_a**2 / n_a + sd_b**2 / n_b
    if square == 0:
        return float(difference != 0)
    share = sd_a**2 / n_a / square
    df = 1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1))  # Welch-Satterthwaite
    critical, shift = -special.stdtrit(df, alpha / 2), difference / math.sqrt(square)
    # T = (Z + shift) / S, with Z normal and df * S^2 chi-squared: the probability given S, averaged over quantiles of S
    # that are denser towards both ends. SciPy's noncentral t is NaN or wrong in places (its issues 8344 and 25106).
    v = (np.arange(1000) + 0.5) / 1000
    s = np.sqrt(special.gammaincinv(df / 2, v * v * (3 - 2 * v)) / (df / 2))
    found = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
    return float(np.average(found, weights=v * (1 - v)))


def runs_needed(sd_a: float, sd_b: float, difference: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Runs per arm with which the two-sided Welch test of equally large arms finds `difference` with this power.

    `difference` is the smallest that would matter, not the one that was observed. The result is at least 2, and
    `MOST_RUNS` where that many or more are needed.

    Raises:
      ValueError: a difference of 0, a standard deviation below 0, or a power not between 0 and 1.

    Example:
      >>> runs_needed(0.14, 0.14, difference=0.1)
      32
    """
    if difference == 0:
        raise ValueError("difference is 0, which no number of runs finds; give the smallest that would matter")
    if not 0 < power < 1:
        raise ValueError(f"power is {power}; give a probability between 0 and 1, such as 0.8")
    enough = lambda n: power_of(sd_a, sd_b, n, n, difference, confidence) >= power
    high = 2
    while high < MOST_RUNS and not enough(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=max(2, high // 2), key=enough)


def holm(p_values: Floats) -> tuple[float, ...]:
    """P-values adjusted for being several (Holm 1979), in the order given.

    Rejecting where the adjusted value is at most alpha keeps the probability of any false rejection within alpha,
    however the tests depend on each other.

    Raises:
      ValueError: a p-value outside 0..1.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      (0.03, 0.06, 0.06)
    """
    if bad := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-value {bad[0]} is not between 0 and 1; leave out the tests that could not be made")
    ranks = np.argsort(p_values, kind="stable")
    adjusted = np.asarray(p_values, float)
    adjusted[ranks] = np.maximum.accumulate(np.minimum(1, adjusted[ranks] * np.arange(ranks.size, 0, -1)))
    return tuple(adjusted.tolist())


def confidence_at_look(look: int, confidence: float = 0.95) -> float:
    """The confidence of the interval at look 1, 2, 3 ... with which the intervals of all looks hold together.

    Where blocks of runs are added until the interval is good enough, a plain 95 % interval covers less often than
    95 %: stopping as soon as it excludes 0 will happen sooner or later without any difference. Spending
    alpha / (look * (look + 1)), which sums to alpha, keeps the probability that any of the intervals is wrong within
    alpha, whatever the stopping rule (union bound, as in Darling and Robbins 1967; Bonferroni spending). The cost is
    width: the first look is at 97.5 %, and the tenth interval is 1.8 times as wide as a plain one, which takes 3.2
    times the runs to make up for. Fewer looks cost less: use growing blocks.

    Raises:
      ValueError: a look below 1 or between two.
    """
    if look < 1 or look % 1:
        raise ValueError(f"look is {look}; count the looks 1, 2, 3 ...")
    return 1 - alpha_of(confidence) / (look * (look + 1))


def as_sample(values: Floats, least: int, name: str) -> np.ndarray:
    """The values as a vector of at least `least` finite numbers; `name` is for the error."""
    sample = np.asarray(values, float)
    if sample.ndim != 1 or sample.size < least:
        raise ValueError(f"{name}: {sample.size} values, expected a flat list of at least {least}; run more seeds")
    if not np.all(np.isfinite(sample)):
        raise ValueError(f"{name}: {sample.tolist()} are not all finite; report diverged runs separately")
    return sample


def alpha_of(confidence: float) -> float:
    """1 - confidence, for a confidence between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a probability between 0 and 1, such as 0.95")
    return 1 - confidence


def mean_of(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis; of equal values it is exactly that value, which a plain sum does not promise."""
    first = values[..., :1]
    return first[..., 0] + (values - first).mean(-1)


def _sd(sample):
    """Sample standard deviation: exactly 0 for equal values, NaN for a single one."""
    return float((sample - sample[0]).std(ddof=1)) if sample.size > 1 else math.nan


def _quietly(test, *samples, **options):
    """A t test of SciPy's without its warning about nearly equal values, whose rounding is far below one image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return test(*samples, **options)
