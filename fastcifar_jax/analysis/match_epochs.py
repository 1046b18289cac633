"""Epochs that a better recipe can drop until it is no better than another: a gain in accuracy expressed in time.

The method of the original, in which every trick was traded for fewer epochs at equal accuracy (Bag of Tricks).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, CompareOptions, compare


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


def equal_epochs(answer: dict[str, Any]) -> stats.Crossing | None:
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
    return stats.crossing(epochs, [values[e] for e in epochs], base["values"], answer["confidence"])
