"""Optimisers as optax chains over parameter groups."""

import dataclasses
import re
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from fastcifar_jax.schedules import Schedule, Triangle, WarmupDecay, count_steps
from fastcifar_jax.types import Params, flatten_by_path

WHITEN_BIAS = r"whiten/bias$"  # path of the one parameter that airbench freezes during a run


class Optimizer(Protocol):
    """The type of `Recipe.optim`: a frozen dataclass that builds an optax transformation for the length of a run.

    One that stops training some parameters may have a method `skip_gradients(epoch)`, see `skipped_gradients`.
    """

    def __call__(self, num_epochs: float, steps_per_epoch: int, batch_size: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss."""
        ...


def skipped_gradients(optim: Optimizer, epoch: int) -> str | None:
    """A pattern for the paths of the parameters that an optimiser does not change in an epoch (1-based), or None.

    Their gradients are not computed: the optimiser gets zeros for them, and must not change the parameters.
    """
    skip_gradients = getattr(optim, "skip_gradients", None)
    return None if skip_gradients is None else skip_gradients(epoch)


def stop_gradients(params: Params, pattern: str) -> Params:
    """The parameters; no gradient flows to those whose path matches the pattern."""
    groups = label_by_path(params, {"frozen": pattern, "trained": ""})
    return jax.tree.map(lambda p, group: jax.lax.stop_gradient(p) if group == "frozen" else p, params, groups)


def scale_by_schedule_of_epochs(schedule: Schedule, steps_per_epoch: int) -> optax.GradientTransformation:
    """Multiplies by `-schedule(time)`, where the first update sees time `1 / steps_per_epoch`.

    `optax.scale_by_learning_rate` counts from 0. The original increments its step before it evaluates the schedule
    (`[BoT c10]`), so with a schedule that ends at 0 the last step has the rate 0.
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
      momentum: fraction of the velocity that is kept.
      weight_decay: L2 coefficient for a mean loss.

    References:
      cifar10-fast `torch_backend.py`; specification, section 3.2.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_schedule_of_epochs(schedule, steps_per_epoch),
        optax.trace(decay=momentum, nesterov=True),
    )


def scale_biases(factor: float, pattern: str = r"bias$") -> optax.GradientTransformation:
    """Multiplies the gradients of the parameters whose path matches `pattern` by `factor`."""

    def update(updates, params):
        del params
        groups = label_by_path(updates, {"bias": pattern, "other": ""})
        return jax.tree.map(lambda g, group: g * factor if group == "bias" else g, updates, groups)

    return optax.stateless(update)


def label_by_path(params: Params, groups: dict[str, str]) -> Params:
    """Names the group of every parameter: the first whose pattern is found in its path ("layer1/conv/kernel").

    Raises:
      ValueError: a parameter that no pattern matches.
    """

    def label(name):
        for group, pattern in groups.items():
            if re.search(pattern, name):
                return group
        raise ValueError(f"parameter {name} is in none of the groups {groups}; add a pattern that matches it")

    return jax.tree.unflatten(jax.tree.structure(params), map(label, flatten_by_path(params)))


@dataclasses.dataclass(frozen=True)
class Nesterov:
    """The optimiser of the bag of tricks, with one group for weights and one for batch norm biases (section 3.3).

    The biases' rate is multiplied and their decay divided by `bias_scale`. Rate times decay is then the same in both
    groups, and they differ only in a factor of the gradient.

    Attributes:
      peak_lr: largest learning rate, for a mean loss.
      momentum: of Nesterov's velocity.
      weight_decay: coupled L2, for a mean loss.
      bias_scale: factor of the biases' learning rate and divisor of their decay (64 since the step with frozen
        scales).
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

    def __call__(self, num_epochs: float, steps_per_epoch: int, batch_size: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss.

        Raises:
          ValueError: a schedule that does not fit into `num_epochs`.
        """
        del batch_size  # the rate is for a mean loss
        shape = self.schedule(num_epochs)
        return optax.chain(
            scale_biases(self.bias_scale),
            nesterov(
                lambda time: self.peak_lr * shape(time),
                steps_per_epoch,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            ),
        )


class FreezeState(NamedTuple):
    """State of `freeze_after`."""

    step: Int[Array, ""]  # steps taken so far


def freeze_after(pattern: str, num_steps: int) -> optax.GradientTransformation:
    """Zero updates for the parameters whose path matches `pattern`, starting with step `num_steps` (0-based)."""

    def update(updates, state, params=None):
        del params
        groups = label_by_path(updates, {"frozen": pattern, "other": ""})
        frozen = state.step >= num_steps
        stop = lambda u, group: jnp.where(frozen, jnp.zeros_like(u), u) if group == "frozen" else u
        return jax.tree.map(stop, updates, groups), FreezeState(optax.safe_increment(state.step))

    return optax.GradientTransformation(lambda params: FreezeState(jnp.int32(0)), update)


@dataclasses.dataclass(frozen=True)
class AirbenchSGD:
    """Nesterov SGD with a decoupled parametrisation (airbench.md, section 5).

    Rate and decay are stated for 1,024 examples and for what momentum m makes of a constant gradient, which is
    `1 + 1 / (1 - m)` times it: `lr / (1024 * (1 + 1 / (1 - m)))` is the rate for a summed loss. The schedule multiplies
    the rate only, and the decay is inside the gradient, so it follows both rate and momentum.

    Attributes:
      lr: per 1,024 examples.
      momentum: of Nesterov's velocity.
      weight_decay: per 1,024 examples, independent of the rate.
      bias_scale: multiplies the rate of the norms' biases, not their decay.
      schedule: multiples of `lr` over the run.
      whiten_bias_epochs: epochs after which the whitening layer's bias is frozen; None to train it throughout.
    """

    lr: float = 11.5
    momentum: float = 0.85
    weight_decay: float = 0.0153
    bias_scale: float = 64.0
    schedule: Triangle = Triangle()
    whiten_bias_epochs: int | None = 3

    def __post_init__(self):
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0 and self.bias_scale > 0):
            raise ValueError(
                f"optim has lr {self.lr}, momentum {self.momentum}, weight_decay {self.weight_decay} and bias_scale "
                f"{self.bias_scale}; expected lr and bias_scale above 0, 0 <= momentum < 1, weight_decay >= 0"
            )

    def __call__(self, num_epochs: float, steps_per_epoch: int, batch_size: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss."""
        rate = self.lr / (1024 * (1 + 1 / (1 - self.momentum)))
        schedule = self.schedule(count_steps(num_epochs, steps_per_epoch))
        parts = [
            optax.scale(batch_size),  # to the gradients of the summed loss
            scale_biases(self.bias_scale, r"norm/bias$"),
            optax.add_decayed_weights(self.weight_decay * batch_size / self.lr),
            optax.trace(decay=self.momentum, nesterov=True),
            scale_by_steps(lambda step: rate * schedule(step)),
        ]
        if self.whiten_bias_epochs is not None:
            parts.append(freeze_after(WHITEN_BIAS, self.whiten_bias_epochs * steps_per_epoch))
        return optax.chain(*parts)

    def skip_gradients(self, epoch: int) -> str | None:
        """See `skipped_gradients`."""
        return WHITEN_BIAS if self.whiten_bias_epochs is not None and epoch > self.whiten_bias_epochs else None


def scale_by_steps(schedule: Schedule) -> optax.GradientTransformation:
    """Multiplies by `-schedule(step)`, where the first update is step 0."""
    return optax.scale_by_learning_rate(lambda count: schedule(count.astype(jnp.result_type(float))))
