"""Learning rates as functions of time, counted in epochs, or in steps for schedules with `IN_STEPS`."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]  # time in epochs -> multiple of the peak learning rate


def piecewise_linear(knots: tuple[float, ...], values: tuple[float, ...]) -> Schedule:
    """Linear interpolation through `(knot, value)` pairs, constant outside them.

    Args:
      knots: strictly increasing times, in epochs; traced ones are not checked.
      values: one per knot.

    Raises:
      ValueError: knots that do not increase, or a different number of values.

    Example:
      >>> schedule = piecewise_linear((0, 5, 24), (0, 0.4, 0))
      >>> [round(schedule(float(time)).item(), 4) for time in (0, 2.5, 5, 24, 30)]
      [0.0, 0.2, 0.4, 0.0, 0.0]
    """
    if len(knots) != len(values) or len(knots) < 2:
        raise ValueError(f"{len(knots)} knots and {len(values)} values; give the same number of each, at least two")
    traced = any(isinstance(knot, jax.core.Tracer) for knot in knots)
    if not traced and any(a >= b for a, b in zip(knots, knots[1:], strict=False)):
        shown = ", ".join(f"{knot:g}" for knot in knots)
        raise ValueError(f"schedule knots {shown} (in epochs) must increase; train for more epochs or move the knots")

    def schedule(time):
        # Not jnp.interp, whose search is a loop, for which an accelerator waits for the host.
        time = jnp.asarray(time)
        xs, ys = jnp.asarray(knots, time.dtype), jnp.asarray(values, time.dtype)
        y = jnp.full_like(time, ys[-1])
        for i in reversed(range(len(knots) - 1)):
            rise = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
            y = jnp.where(time < xs[i + 1], ys[i] + rise * (time - xs[i]), y)
        return jnp.where(time < xs[0], ys[0], y)

    return schedule


@dataclasses.dataclass(frozen=True)
class WarmupDecay:
    """A linear rise from 0 to 1, a fall to `end`, and constant last epochs (Bag of Tricks, sections "EMA" and "TTA").

    The knots are `(0, 0), (warmup * E, 1), (E - flat_epochs, end)` for a run of E epochs.

    Attributes:
      warmup: fraction of the run before the peak: 1/5 in the post, 5/24 in its first steps.
      end: value at the last knot, as a fraction of the peak.
      flat_epochs: length of the constant part, in epochs.

    Example:
      >>> WarmupDecay(end=0.1, flat_epochs=2.0).knots(10)
      (0.0, 2.0, 8.0)
    """

    warmup: float = 1 / 5
    end: float = 0.0
    flat_epochs: float = 0.0

    def __post_init__(self):
        if not 0 < self.warmup < 1:
            raise ValueError(f"schedule.warmup is {self.warmup}; give a fraction of the run, between 0 and 1")
        if self.flat_epochs < 0 or self.end < 0:
            raise ValueError(f"schedule.flat_epochs {self.flat_epochs} and end {self.end} must not be negative")

    def knots(self, num_epochs: float) -> tuple[float, float, float]:
        """The times of the three knots, in epochs."""
        return (0.0, self.warmup * num_epochs, num_epochs - self.flat_epochs)

    def __call__(self, num_epochs: float) -> Schedule:
        """The schedule of a run of `num_epochs` epochs.

        Raises:
          ValueError: a run so short that the last knot would precede the peak.
        """
        return piecewise_linear(self.knots(num_epochs), (0.0, 1.0, self.end))


def count_steps(num_epochs: float, steps_per_epoch: int) -> int:
    """Number of steps in `num_epochs` epochs, which need not be a whole number; rounded up.

    Example:
      >>> count_steps(9.9, 48)
      476
    """
    return math.ceil(round(num_epochs * steps_per_epoch, 6))  # 48 * 9.9 is 475.20000000000005


@dataclasses.dataclass(frozen=True)
class Triangle:
    """A linear rise from `start` to 1 and a fall to `end` over the steps of a run (airbench.md, section 5).

    Steps are counted from 0; the value `end` belongs to the step after the last.

    Attributes:
      start: value at the first step, as a fraction of the peak.
      peak: fraction of the run's steps before the peak, rounded down to a step; 0 for no rise.
      end: value at the end of the run.
    """

    start: float = 0.2
    peak: float = dataclasses.field(default=0.23, metadata={"static": True})  # its step is a Python number
    end: float = 0.07

    IN_STEPS: ClassVar = True  # its time; that of a schedule without this is in epochs

    def __post_init__(self):
        if not (0 <= self.peak < 1 and self.start >= 0 and self.end >= 0):
            raise ValueError(
                f"Triangle has start {self.start}, peak {self.peak}, end {self.end}; expected 0 <= peak < 1, and "
                "start and end >= 0"
            )

    def __call__(self, num_steps: int) -> Schedule:
        """The schedule of a run as a function of the number of steps taken."""
        peak = int(self.peak * num_steps)
        if peak == 0:
            return piecewise_linear((0.0, float(num_steps)), (1.0, self.end))
        return piecewise_linear((0.0, float(peak), float(num_steps)), (self.start, 1.0, self.end))
