"""Averages of the weights."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastcifar_jax.types import Params


class Progress(NamedTuple):
    """Position of a step in a run."""

    step: Int[Array, ""]  # steps taken, including this one
    batch_index: Int[Array, ""]  # of the step's batch in the epoch, 0-based
    num_steps: int  # of the whole run


class Average(Protocol):
    """The type of `Recipe.average`: an average of `{"params": ..., "batch_stats": ...}` over the steps of a run."""

    def init(self, variables: Params) -> Params:
        """The average before the first step."""
        ...

    def update(self, average: Params, variables: Params, progress: Progress) -> tuple[Params, Params]:
        """The average after a step, and the variables that training continues with."""
        ...


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average of the weights and of the batch norm statistics, without debiasing (section 3.7).

    It starts from the initial weights, so evaluations in the first epochs are poor.

    Attributes:
      decay: fraction kept per step; an update every `every` steps keeps `decay ** every`.
      every: steps between updates, which follow batch 0, `every`, 2 `every`, ... of each epoch.
    """

    decay: float = 0.99
    every: int = 5

    def __post_init__(self):
        if not (0 <= self.decay < 1 and self.every >= 1):
            raise ValueError(f"Ema has decay {self.decay}, every {self.every}; expected 0 <= decay < 1, every >= 1")

    def init(self, variables: Params) -> Params:
        """A copy, since a buffer of the donated state must not occur in it twice."""
        return jax.tree.map(jnp.copy, variables)

    def update(self, average: Params, variables: Params, progress: Progress) -> tuple[Params, Params]:
        """The average after a step, and the variables as they are."""
        # Not lax.cond: an accelerator would wait for the host to read the predicate.
        keep = jnp.where(progress.batch_index % self.every == 0, self.decay**self.every, 1.0)
        return jax.tree.map(lambda slow, fast: _mix(slow, fast, keep), average, variables), variables


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Slow weights and batch norm statistics, to which training is reset (airbench.md, section 5).

    After every `every`-th step s of T: `slow <- d * slow + (1 - d) * fast` with `d = decay ** every * (s / T) ** 3`,
    then `fast <- slow`; momentum is unchanged. The slow copy is evaluated, so the steps after its last update have no
    effect.

    Attributes:
      decay: fraction of the slow copy that a step would keep at the end of the run.
      every: steps between updates of the slow copy.
    """

    decay: float = 0.95
    every: int = 5

    def __post_init__(self):
        if not (0 <= self.decay < 1 and self.every >= 1):
            raise ValueError(
                f"Lookahead has decay {self.decay}, every {self.every}; expected 0 <= decay < 1, every >= 1"
            )

    def init(self, variables: Params) -> Params:
        """A copy, since a buffer of the donated state must not occur in it twice."""
        return jax.tree.map(jnp.copy, variables)

    def update(self, average: Params, variables: Params, progress: Progress) -> tuple[Params, Params]:
        """The slow copy after a step, and the fast one, which equals it after every `every`-th step."""
        done = progress.step.astype(jnp.result_type(float)) / progress.num_steps
        due = progress.step % self.every == 0
        keep = jnp.where(due, self.decay**self.every * done**3, 1.0)
        slow = jax.tree.map(lambda slow, fast: _mix(slow, fast, keep), average, variables)
        return slow, jax.tree.map(lambda slow, fast: jnp.where(due, slow, fast), slow, variables)


def _mix(slow, fast, keep):
    """`keep * slow + (1 - keep) * fast`; exactly `slow` if `keep` is 1, where `fast` is finite."""
    return keep.astype(slow.dtype) * slow + (1 - keep).astype(slow.dtype) * fast
