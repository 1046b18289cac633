"""One honest answer from a few noisy runs: intervals, comparisons of two recipes, and how many runs to make.

A value is one run's, a plain float in the caller's unit (the package's accuracies are fractions). Of two arms, `a` is
the recipe that is compared with and `b` the other; every difference is b minus a. `confidence` is that of an interval,
and 1 minus the level of a test. ValueError is raised for a confidence outside 0..1 and a value that is not finite.
"""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

Floats = Sequence[float]
MOST_RUNS = 2**40  # an arm; `runs_needed` looks no further


class Summary(NamedTuple):
    """Number of runs, mean, sample standard deviation, interval of the mean, share of runs at the threshold."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    share: float | None


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


class Crossing(NamedTuple):
    """The x where b is as good as a, and its interval; -inf: at or below the smallest tried, inf: above the largest."""

    value: float
    low: float
    high: float


def summarize(values: Floats, threshold: float | None = None, confidence: float = 0.95) -> Summary:
    """The mean of one arm's runs with its t interval (Student 1908).

    Args:
      values: one a run. Of a single run `sd`, `low` and `high` are NaN: it says nothing about the spread.
      threshold: `share` is the fraction of runs at or above it; None without a threshold.
      confidence: of the interval.

    Raises:
      ValueError: no values.

    Example:
      >>> found = summarize([94.1, 94.2, 93.9, 94.0], threshold=94)
      >>> found.n, round(found.mean, 2), round(found.low, 2), round(found.high, 2), found.share
      (4, 94.05, 93.84, 94.26, 0.75)
    """
    n, mean, variance = _moments(values, 1, "values")
    half = _half_width(math.sqrt(variance / n), n - 1, _alpha(confidence))
    share = None if threshold is None else float(np.mean(np.asarray(values) >= threshold))
    return Summary(n, mean, math.sqrt(variance), mean - half, mean + half, share)


def welch(a: Floats, b: Floats, confidence: float = 0.95) -> Difference:
    """The difference b minus a without assuming equal variances (Welch 1947, Satterthwaite 1946).

    Hedges' g is the difference over the pooled standard deviation, times the exact small-sample factor (Hedges
    1981). Where both arms are constant the interval has width 0, p is 0 or 1, `df` is NaN and g is 0 or infinite.

    Raises:
      ValueError: fewer than two runs in an arm.

    Example:
      >>> found = welch([94.1, 94.2, 93.9, 94.0], [94.3, 94.5, 94.2, 94.4])
      >>> round(found.estimate, 2), round(found.low, 2), round(found.high, 2), round(found.p_value, 3)
      (0.3, 0.08, 0.52, 0.017)
    """
    (n_a, mean_a, variance_a), (n_b, mean_b, variance_b) = _moments(a, 2, "arm a"), _moments(b, 2, "arm b")
    estimate, (error, df) = mean_b - mean_a, _welch_error(variance_a, variance_b, n_a, n_b)
    half = _half_width(error, df, _alpha(confidence))
    p_value = min(1.0, 2 * _tail(abs(estimate), error, df))
    m = n_a + n_b - 2
    sd = math.sqrt(((n_a - 1) * variance_a + (n_b - 1) * variance_b) / m)
    factor = math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)
    g = factor * estimate / sd if sd > 0 else math.copysign(math.inf, estimate) if estimate else 0.0
    return Difference(estimate, estimate - half, estimate + half, p_value, df, g)


def paired(a: Floats, b: Floats, confidence: float = 0.95) -> Paired:
    """The difference b minus a of runs that share a seed, from the differences of the pairs (Student 1908).

    Args:
      a: one run a seed; at least three, since the correlation of two pairs is always 1 or -1.
      b: the runs of the same seeds in the same order.
      confidence: of the interval.

    Raises:
      ValueError: fewer than three pairs, or arms of different lengths.
    """
    first, second = _sample(a, 3, "arm a"), _sample(b, 3, "arm b")
    if first.size != second.size:
        raise ValueError(f"arm a has {first.size} runs and arm b {second.size}; pairs need one of each for every seed")
    n, estimate, sd, low, high, _ = summarize(second - first, confidence=confidence)
    p_value = min(1.0, 2 * _tail(abs(estimate), sd / math.sqrt(n), n - 1))
    constant = np.ptp(first) == 0 or np.ptp(second) == 0
    return Paired(n, math.nan if constant else float(np.corrcoef(first, second)[0, 1]), estimate, low, high, p_value)


def pairing_helps(unpaired: Difference, pairs: Paired) -> bool:
    """Whether the paired interval is narrower than Welch's of the same runs, at the same confidence.

    It tells how to plan the next comparison. Whoever reports the narrower of the two has chosen an interval after
    seeing the data, and it covers less often than it says.
    """
    return pairs.high - pairs.low < unpaired.high - unpaired.low


def tost(a: Floats, b: Floats, margin: float, confidence: float = 0.95) -> Equivalence:
    """Whether b is within `margin` of a: two one-sided Welch tests, each at level 1 - confidence (Schuirmann 1987).

    The same as asking whether Welch's interval of confidence 1 - 2 * (1 - confidence), 90 % by default, lies between
    -margin and margin. The margin, in the values' unit, is the difference from which on it matters, and is chosen
    before the runs are seen. "Not equivalent" is no evidence of a difference.

    Raises:
      ValueError: a margin that is not above 0, or fewer than two runs in an arm.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; give the difference from which on it matters, above 0")
    (n_a, mean_a, variance_a), (n_b, mean_b, variance_b) = _moments(a, 2, "arm a"), _moments(b, 2, "arm b")
    error, df = _welch_error(variance_a, variance_b, n_a, n_b)
    p_value = max(_tail(margin + sign * (mean_b - mean_a), error, df) for sign in (-1, 1))
    return Equivalence(margin, p_value, p_value < _alpha(confidence))


def power_of(sd_a: float, sd_b: float, n_a: int, n_b: int, difference: float, confidence: float = 0.95) -> float:
    """The probability that the two-sided Welch test finds a true difference, by the noncentral t distribution.

    Its degrees of freedom are those of the true variances. The test has to estimate them, which costs power where
    runs are very few: of two equal arms, 68 % and not 78 % at three runs each, 78 % and not 80 % at five.

    Args:
      sd_a, sd_b: standard deviations of the arms' runs, in the unit of `difference`.
      n_a, n_b: numbers of runs; at least two.
      difference: that is there.
      confidence: 1 minus the level of the test.

    Raises:
      ValueError: a standard deviation below 0, fewer than two runs in an arm, or a difference that is not finite.
    """
    if not (0 <= sd_a < math.inf and 0 <= sd_b < math.inf and math.isfinite(difference)):
        raise ValueError(f"standard deviations {sd_a}, {sd_b} and difference {difference} must be finite, the sds >= 0")
    if min(n_a, n_b) < 2:
        raise ValueError(f"{n_a} and {n_b} runs; a test needs at least two in each arm")
    (error, df), alpha = _welch_error(sd_a**2, sd_b**2, n_a, n_b), _alpha(confidence)
    if error == 0:
        return float(difference != 0)
    critical, shift = -special.stdtrit(df, alpha / 2), difference / error
    # T = (Z + shift) / S, with Z normal and df * S^2 chi-squared: the chance given S, averaged over quantiles of S that
    # lie denser towards both ends. SciPy's noncentral t is NaN or wrong in places (its issues 8344 and 25106).
    v = (np.arange(1000) + 0.5) / 1000
    s = np.sqrt(special.gammaincinv(df / 2, v * v * (3 - 2 * v)) / (df / 2))
    found = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
    return float(np.average(found, weights=v * (1 - v)))


def runs_needed(sd_a: float, sd_b: float, difference: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Runs an arm, as many in both, with which the two-sided Welch test finds `difference` with this power.

    Args:
      sd_a, sd_b: standard deviations of the arms' runs, in the unit of `difference`.
      difference: the smallest that would matter, not the one that was observed.
      power: the probability of finding it.
      confidence: 1 minus the level of the test.

    Returns:
      At least 2; `MOST_RUNS` where that many or more are needed.

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

    To reject where the adjusted value is at most alpha keeps the chance of any false rejection within alpha, however
    the tests depend on each other.

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


# Instead of the union bound: two stages, exact, but with one look (Stein 1945); time-uniform confidence sequences,
# which need bounded values, a known variance or many runs (Howard et al. 2021); alpha spending that uses the looks'
# correlation, narrower, but with the greatest number of runs fixed in advance (Lan and DeMets 1983).
def confidence_at_look(look: int, confidence: float = 0.95) -> float:
    """The confidence to ask of the interval at this look, so that the intervals of all looks hold together.

    Where blocks of runs are added until the interval is good enough, a plain 95 % interval covers less often than
    95 %: if one stops when it excludes 0, that happens sooner or later without any difference. Spending
    alpha / (look * (look + 1)), which sums to alpha, keeps the chance that any of the intervals is wrong within alpha,
    whatever the stopping rule (union bound, as in Darling and Robbins 1967; Bonferroni spending).

    It costs width: the first look is at 97.5 %, and the tenth interval is 1.8 times as wide as a plain one, which takes
    3.2 times the runs to make up. Fewer looks cost less: let the blocks grow.

    Args:
      look: 1 for the first; every interval that was looked at counts.
      confidence: of all intervals together.

    Raises:
      ValueError: a look below 1 or between two.
    """
    if look < 1 or look % 1:
        raise ValueError(f"look is {look}; count the looks 1, 2, 3 ...")
    return 1 - _alpha(confidence) / (look * (look + 1))


def crossing(
    xs: Floats,
    samples: Sequence[Floats],
    target: Floats,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Crossing:
    """The least x from which on b is as good as a, for one who spends a gain on a shorter run.

    b's means are joined by straight lines. Where they last rise to a's mean is the crossing: -inf where b is at least
    as good at every x tried, inf where it is worse at the largest. The interval is the percentile bootstrap's over
    runs (Efron 1979), a and each arm of b resampled apart, with deviations widened by sqrt(n / (n - 1)) for the
    resamples' smaller variance (Hesterberg 2015); it may end at -inf or inf too. Of few runs it is still too narrow:
    at five an arm, 95 % intervals cover about 91 %. An arm of one run is resampled as itself, as if it had no noise.

    Args:
      xs: increasing, at least two; say epoch counts.
      samples: the values of b's runs at each x.
      target: the values of a's runs.
      confidence: of the interval.
      resamples: of the bootstrap; at least 100.
      seed: of the bootstrap.

    Raises:
      ValueError: `xs` that do not increase or do not match `samples`, an arm without runs, or too few resamples.
    """
    alpha, counts = _alpha(confidence), _sample(xs, 2, "xs")
    if len(counts) != len(samples) or np.any(np.diff(counts) <= 0):
        raise ValueError(f"xs {list(xs)} for {len(samples)} samples; give a sample for each x, and let xs increase")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; give at least 100, for there to be tails")
    arms = [_sample(target, 1, "target"), *(_sample(arm, 1, f"samples[{i}]") for i, arm in enumerate(samples))]
    means, rng, drawn = np.array([_mean(arm) for arm in arms]), np.random.default_rng(seed), []
    for arm, mean in zip(arms, means, strict=True):
        deviations = _mean(arm[rng.integers(arm.size, size=(resamples, arm.size))]) - mean
        drawn.append(mean + deviations * math.sqrt(arm.size / max(1, arm.size - 1)))
    found = sorted(_cross(counts, resampled) for resampled in np.transpose(drawn))
    # Order statistics, taken outwards: to interpolate between two of them would meet inf - inf.
    low, high = math.floor(alpha / 2 * (resamples - 1)), math.ceil((1 - alpha / 2) * (resamples - 1))
    return Crossing(_cross(counts, means), found[low], found[high])


def _cross(xs, means):
    gains = means[1:] - means[0]  # over the target's
    worse = np.flatnonzero(gains < 0)
    if worse.size == 0:
        return -math.inf
    if (i := worse[-1]) == xs.size - 1:
        return math.inf
    return float(xs[i] + (xs[i + 1] - xs[i]) * gains[i] / (gains[i] - gains[i + 1]))


def _sample(values, least, name):
    """`values` as a vector of at least `least` finite numbers."""
    sample = np.asarray(values, float)
    if sample.ndim != 1 or sample.size < least:
        raise ValueError(f"{name}: {sample.size} values, expected a flat list of at least {least}; run more")
    if not np.all(np.isfinite(sample)):
        raise ValueError(f"{name}: {sample.tolist()} are not all finite; report runs that diverged apart from the rest")
    return sample


def _alpha(confidence):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a probability between 0 and 1, such as 0.95")
    return 1 - confidence


def _mean(values):
    """Mean over the last axis; of equal values it is exactly that value, which a plain sum does not promise."""
    first = values[..., :1]
    return first[..., 0] + (values - first).mean(-1)


def _moments(values, least, name):
    """Number, mean and unbiased variance, which is exactly 0 for equal values and NaN for one."""
    sample = _sample(values, least, name)
    variance = float((sample - sample[0]).var(ddof=1)) if sample.size > 1 else math.nan
    return sample.size, float(_mean(sample)), variance


def _welch_error(variance_a, variance_b, n_a, n_b):
    """Standard error of the difference, and its Welch-Satterthwaite degrees of freedom."""
    square = variance_a / n_a + variance_b / n_b
    if square == 0:
        return 0.0, math.nan
    share = variance_a / n_a / square
    return math.sqrt(square), 1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1))


def _half_width(error, df, alpha):
    return 0.0 if error == 0 else float(-special.stdtrit(df, alpha / 2)) * error


def _tail(estimate, error, df):
    """The chance of an estimate at least this high where the truth is 0."""
    return float(estimate <= 0) if error == 0 else float(special.stdtr(df, -estimate / error))
