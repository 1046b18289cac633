"""Per-example losses: `loss(logits, labels) -> [batch]`, no reduction hidden inside."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fastcifar_jax.types import Labels, Logits


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy against the label mixed with the uniform distribution.

    `(1 - s) * (-log p_y) - s * mean_k(log p_k)` with `s = label_smoothing` (Bag of Tricks, "label smoothing": 0.2).
    With `s > 0` the smallest possible loss is the entropy of the target, 0.8669 for s = 0.2 and ten classes.

    Attributes:
      label_smoothing: weight of the uniform distribution, 0 <= s < 1.
    """

    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; give a number from 0 to below 1")

    def __call__(self, logits: Logits, labels: Labels) -> Float[Array, " batch"]:
        """The loss of each example, in the logits' dtype."""
        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, self.label_smoothing))


def num_correct(logits: Logits, labels: Labels) -> Array:
    """How many rows have their largest logit at the label (int32 scalar; the first of equal logits counts)."""
    return jnp.sum(jnp.argmax(logits, -1).astype(labels.dtype) == labels, dtype=jnp.int32)
