"""Epochs that a better recipe can drop until it is no better than another: a gain in accuracy expressed in time.

The method of the original, in which every trick was traded for fewer epochs at equal accuracy (Bag of Tricks).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, CompareOptions, compare


class Crossing(NamedTuple):
    """Where b is as good as a, and its interval; -inf: at or below the smallest x tried, inf: above the largest."""

    value: float
    low: float
    high: float


def match_epochs(base: Arm, arms: Iterable[Arm], options: CompareOptions) -> Iterator[dict[str, Any]]:
    """Compares arms of fewer and fewer epochs with the base until one is no better.

    Args:
      base: the recipe to match.
      arms: the other recipe, with decreasing numbers of epochs. Each is requested only when the one before it was
        better than the base, so an iterator need not run more than that.
      options: the metric, an accuracy, and the confidence of the intervals.

    Yields:
      `compare` of the base and all arms so far; the last one is the answer.

    Raises:
      ValueError: fewer than two finished runs of an arm.
    """
    tried = [base]
    for arm in arms:
        tried.append(arm)
        yield (answer := compare(tried, options))
        if answer["differences"][-1]["estimate"] <= 0:
            return


def equal_epochs(answer: dict[str, Any]) -> Crossing | None:
    """The number of epochs at which the other recipe is as good as the base.

    Args:
      answer: the last that `match_epochs` yielded.

    Returns:
      None where a single number of epochs was tried.
    """
    base, *others = answer["arms"]
    values = {arm["num_epochs"]: arm["values"] for arm in others}
    epochs = sorted(values)
    if len(epochs) < 2:
        return None
    return crossing(epochs, [values[e] for e in epochs], base["values"], answer["confidence"])


def crossing(
    xs: Sequence[float],
    samples: Sequence[Sequence[float]],
    target: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Crossing:
    """The smallest x from which on b is as good as a, to express a gain as a shorter run.

    b's means are joined by straight lines. The crossing is where they last rise to a's mean: -inf where b is at least
    as good at every x tried, inf where it is worse at the largest. The interval is the percentile bootstrap's over
    runs (Efron 1979), with a and each arm of b resampled independently and deviations widened by sqrt(n / (n - 1)) for
    the smaller variance of the resamples (Hesterberg 2015); it too may end at -inf or inf. For few runs it is still
    too narrow: at five per arm, 95 % intervals cover about 91 %. A single run counts as one without noise.

    Args:
      xs: increasing, at least two; for example epoch counts.
      samples: the values of b's runs at each x.
      target: the values of a's runs.
      confidence: of the interval.
      resamples: of the bootstrap, from `seed`; at least 100.

    Raises:
      ValueError: `xs` that do not increase or do not match `samples`, or too few resamples.
    """
    alpha, counts = stats.alpha_of(confidence), stats.as_sample(xs, 2, "xs")
    if len(counts) != len(samples) or np.any(np.diff(counts) <= 0):
        raise ValueError(f"xs {list(xs)} for {len(samples)} samples; give one sample per x, and increasing xs")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; the tails need at least 100")
    arms = [
        stats.as_sample(target, 1, "target"),
        *(stats.as_sample(arm, 1, f"samples[{i}]") for i, arm in enumerate(samples)),
    ]
    means, rng, drawn = np.array([stats.mean_of(arm) for arm in arms]), np.random.default_rng(seed), []
    for arm, mean in zip(arms, means, strict=True):
        deviations = stats.mean_of(arm[rng.integers(arm.size, size=(resamples, arm.size))]) - mean
        drawn.append(mean + deviations * math.sqrt(arm.size / max(1, arm.size - 1)))
    found = sorted(_cross(counts, resampled) for resampled in np.transpose(drawn))
    # Order statistics, rounded outwards; scipy.stats.bootstrap interpolates between them, which fails at inf - inf.
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
