"""Optimisers as optax chains over parameter groups, and averages of the weights."""

import dataclasses
import re
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from fastcifar_jax.schedules import Schedule, WarmupDecay
from fastcifar_jax.types import Params


class Optimizer(Protocol):
    """What `Recipe.optim` must be: a frozen dataclass that builds an optax transformation for a run's length."""

    def __call__(self, num_epochs: float, steps_per_epoch: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss."""
        ...


class Average(Protocol):
    """What `Recipe.average` must be: an average of `{"params": ..., "batch_stats": ...}` over the steps of a run."""

    def init(self, variables: Params) -> Params:
        """The average before the first step."""
        ...

    def update(self, average: Params, variables: Params, batch_index: Int[Array, ""]) -> Params:
        """The average after the step that trained on batch `batch_index` (0-based) of its epoch."""
        ...


def scale_by_schedule_of_epochs(schedule: Schedule, steps_per_epoch: int) -> optax.GradientTransformation:
    """Multiplies by `-schedule(time)`, where the first update sees time `1 / steps_per_epoch`.

    `optax.scale_by_learning_rate` counts from 0; the original increments its step before it looks the rate up
    (`[BoT c10]`), so a schedule that ends at 0 makes the very last step with rate 0.
    """
    # An int32 count divided by a Python number would be float32 even in 64-bit mode.
    return optax.scale_by_learning_rate(
        lambda count: schedule((count + 1).astype(jnp.result_type(float)) / steps_per_epoch)
    )


def nesterov(
    schedule: Schedule, steps_per_epoch: int, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Nesterov SGD with coupled weight decay and the learning rate inside the velocity.

    With `d = -lr * (g + weight_decay * w)`: `v <- momentum * v + d`, `w <- w + d + momentum * v`. This is not
    `optax.sgd`, which scales by the rate after the trace and so differs whenever the rate changes.

    Args:
      schedule: learning rate for a mean loss, as a function of time in epochs.
      steps_per_epoch: steps in one epoch.
      momentum: share of the velocity that is kept.
      weight_decay: L2 coefficient for a mean loss.

    References:
      cifar10-fast `torch_backend.py`; specification, section 3.2.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_schedule_of_epochs(schedule, steps_per_epoch),
        optax.trace(decay=momentum, nesterov=True),
    )


def label_by_path(params: Params, groups: dict[str, str]) -> Params:
    """Names the group of every parameter: the first whose pattern is found in its path ("layer1/conv/kernel").

    Raises:
      ValueError: a parameter that no pattern matches.
    """

    def label(path, _):
        name = "/".join(str(entry.key) for entry in path)
        for group, pattern in groups.items():
            if re.search(pattern, name):
                return group
        raise ValueError(f"parameter {name} is in none of the groups {groups}; add a pattern that matches it")

    return jax.tree_util.tree_map_with_path(label, params)


@dataclasses.dataclass(frozen=True)
class Nesterov:
    """The optimiser of the bag of tricks: weights in one group, batch norm biases in another (section 3.3).

    Attributes:
      peak_lr: largest learning rate, for a mean loss.
      momentum: of Nesterov's velocity.
      weight_decay: coupled L2, for a mean loss.
      bias_scale: the biases' learning rate is multiplied and their decay divided by this (64 from the frozen
        scales on), so that their `lr * weight_decay` stays that of the weights.
      schedule: multiples of the peak over the run.
    """

    peak_lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bias_scale: float = 1.0
    schedule: WarmupDecay = WarmupDecay()

    def __post_init__(self):
        if not (self.peak_lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0 and self.bias_scale > 0):
            raise ValueError(
                f"optim has peak_lr {self.peak_lr}, momentum {self.momentum}, weight_decay {self.weight_decay} and "
                f"bias_scale {self.bias_scale}; expected peak_lr and bias_scale above 0, 0 <= momentum < 1, "
                "weight_decay >= 0"
            )

    def __call__(self, num_epochs: float, steps_per_epoch: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss.

        Raises:
          ValueError: a schedule that does not fit into `num_epochs`.
        """
        shape = self.schedule(num_epochs)

        def group(scale):
            return nesterov(
                lambda time: self.peak_lr * scale * shape(time),
                steps_per_epoch,
                momentum=self.momentum,
                weight_decay=self.weight_decay / scale,
            )

        if self.bias_scale == 1:
            return group(1.0)
        transforms = {"bias": group(self.bias_scale), "weight": group(1.0)}
        return optax.multi_transform(transforms, lambda params: label_by_path(params, {"bias": r"bias$", "weight": ""}))


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average of the weights and of the batch norm statistics, without debiasing (section 3.7).

    It starts from the initial weights, so it is poor for the first epochs by design.

    Attributes:
      decay: share kept per step; an update every `every` steps keeps `decay ** every`.
      every: steps between updates. The count starts anew in each epoch: batch 0, `every`, 2 `every`, ...
    """

    decay: float = 0.99
    every: int = 5

    def __post_init__(self):
        if not (0 <= self.decay < 1 and self.every >= 1):
            raise ValueError(f"Ema has decay {self.decay}, every {self.every}; expected 0 <= decay < 1, every >= 1")

    def init(self, variables: Params) -> Params:
        """A copy, so that donating the state never hands one buffer over twice."""
        return jax.tree.map(jnp.copy, variables)

    def update(self, average: Params, variables: Params, batch_index: Int[Array, ""]) -> Params:
        """The average after the step that trained on batch `batch_index` (0-based) of its epoch."""
        share = 1 - self.decay**self.every
        return jax.lax.cond(
            batch_index % self.every == 0,
            lambda: optax.incremental_update(variables, average, share),
            lambda: average,
        )
